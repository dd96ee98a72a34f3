"""SPS in every family that can learn, in float64: orders, exchange, packed rows, saving and unrolling.

The reference is transformers' own model of the effective depth, into which weights are copied one by one here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import config_of, head_of, tokenizer_of
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, BertForSequenceClassification

from peakd_ds import sps
from peakd_ds.families import BERT, FAMILIES, STUDENTS, is_packed
from peakd_ds.model.build import build_classifier
from peakd_ds.packed.packing import Take, pack, padded, pool
from peakd_ds.packed.rows import padded_inputs, take_packed_rows
from peakd_ds.results import int8
from peakd_ds.results.export import export_model, export_onnx, unroll
from peakd_ds.sps.order import execution_order
from peakd_ds.sps.shared import ExchangedQKV, share_layers

OTHERS = tuple(name for name in STUDENTS if name != BERT)
ORDERS = [(1, "sps"), (2, "sps"), (3, "sps"), (6, "sps"), (2, "sequence"), (2, "cycle_rev"), (3, "cycle"), (2, "none")]
LENGTHS = (23, 11, 7, 3)
TOLERANCE = 1e-12


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def shared_config(model_type: str, num_layers: int, sharing: str, **settings: Any) -> Any:
    plain = config_of(model_type, tokenizer_of(model_type), head_of("no", "yes", "maybe"), **settings)
    kept = {name: value for name, value in plain.to_dict().items() if name not in ("model_type", "layer_types")}
    kind = sps.SPSBertConfig if model_type == BERT else sps.classes_of(model_type).config
    kept[kind.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = num_layers
    return kind(**kept | {"sharing": sharing, "shuffle_qk": None})


def make_student(model_type: str, num_layers: int = 2, sharing: str = "sps", **settings: Any) -> Any:
    """A student whose weights and biases are all far from 0, so that every one of them matters."""
    torch.manual_seed(7)
    student = build_classifier(shared_config(model_type, num_layers, sharing, **settings))
    for name, parameter in student.named_parameters():
        is_scale = parameter.dim() == 1 and name.endswith("weight")
        nn.init.normal_(parameter, mean=float(is_scale), std=0.3)
    return student.eval()


def packed_rows(student: Any, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Any]:
    generator = np.random.default_rng(3)
    ids = [generator.integers(5, student.config.vocab_size, size=length) for length in lengths]
    return pack(ids, [(np.arange(len(row)) > len(row) // 2).astype(np.int64) for row in ids])


def reference(student: Any, exchanges: bool = True) -> tuple[Any, list[tuple[str, str]]]:
    """The plain model of the effective depth with the student's weights, and pairs of (its name, the student's)."""
    family = FAMILIES[student.config.model_type.removeprefix("sps_")]
    order = execution_order(student.config.num_hidden_layers, student.config.sharing, student.config.shuffle_qk)
    plain = type(unroll(student))(unroll(student).config).eval()
    source, prefix = (
        dict(student.named_parameters(remove_duplicate=False)),
        f"{student.base_model_prefix}.{family.layers}.",
    )
    first_run = {stored: number for number, (stored, _) in reversed(list(enumerate(order)))}
    pairs = []
    for name, parameter in plain.named_parameters():
        origin, fused = name, False
        if name.startswith(prefix):
            number, _, inner = name.removeprefix(prefix).partition(".")
            stored, swapped = order[int(number)]
            if exchanges and swapped:
                for query, key in family.exchange:
                    names = {query: key, key: query}
                    module, _, kind = inner.rpartition(".")
                    inner = f"{names.get(module, module)}.{kind}"
                fused = bool(family.fused_qkv) and inner.startswith(family.fused_qkv)
            origin = f"{prefix}{first_run[stored]}.{inner}"
            if origin not in source:  # modernbert's first layer has no LayerNorm before attention; later runs do
                origin = name
        value = source[origin].detach()
        if fused:
            query, key, rest = value.chunk(3)
            value = torch.cat((key, query, rest))
        parameter.data.copy_(value)
        pairs.append((name, f"{origin} exchanged" if fused else origin))
    return plain, pairs


def shared_gradients(plain: Any, pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """The gradient of each parameter of the student: the sum over the layers that it runs in."""
    gradients: dict[str, Any] = {}
    of_plain = dict(plain.named_parameters())
    for name, origin in pairs:
        gradient = of_plain[name].grad
        if gradient is None:
            continue
        if origin.endswith(" exchanged"):
            key, query, rest = gradient.chunk(3)
            gradient, origin = torch.cat((query, key, rest)), origin.removesuffix(" exchanged")
        gradients[origin] = gradients.get(origin, 0) + gradient
    return gradients


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return (logits * torch.linspace(-1, 2, logits.numel()).view_as(logits)).sum() + logits.square().sum()


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize(("num_layers", "sharing"), ORDERS)
@pytest.mark.parametrize("model_type", OTHERS)
def test_student_equals_the_model_with_copied_weights(model_type: str, num_layers: int, sharing: str) -> None:
    student = make_student(model_type, num_layers, sharing)
    plain, pairs = reference(student)
    inputs = padded_inputs(student.config, packed_rows(student))
    ours, theirs = student(**inputs, output_hidden_states=True), plain(**inputs, output_hidden_states=True)
    assert largest(ours.logits, theirs.logits) < TOLERANCE
    assert len(ours.hidden_states) == len(theirs.hidden_states) == student.config.num_effective_layers + 1
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert largest(mine, other) < TOLERANCE
    loss_of(ours.logits).backward()
    loss_of(theirs.logits).backward()
    expected = shared_gradients(plain, pairs)
    found = gradients_of(student)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert largest(gradient, expected[name]) < TOLERANCE * max(1, expected[name].abs().max().item()), name
    if sharing == "sps":  # the exchange changes what is computed
        assert largest(reference(student, exchanges=False)[0](**inputs).logits, theirs.logits) > 1e-7
    unrolled = unroll(student)
    assert type(unrolled) is type(plain) and largest(unrolled(**inputs).logits, theirs.logits) < TOLERANCE


@pytest.mark.parametrize(("num_layers", "sharing"), ORDERS)
@pytest.mark.parametrize("model_type", OTHERS)
def test_packed_rows_equal_padded_rows(model_type: str, num_layers: int, sharing: str) -> None:
    student = make_student(model_type, num_layers, sharing)
    rows = packed_rows(student)
    inputs, depth = padded_inputs(student.config, rows), student.config.num_effective_layers
    theirs = student(**inputs, output_hidden_states=True)
    layers = tuple(range(1, depth + 1))
    expected = {layer: theirs.hidden_states[layer] for layer in layers}
    loss_of(torch.cat([theirs.logits.flatten(), *(expected[layer][:, 0].flatten() for layer in layers)])).backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in student.named_parameters() if parameter.grad is not None
    }
    student.zero_grad()
    for pooling in ("cls", "last", "mean"):
        take = Take(layers, pooling=pooling)
        output = student(**rows, take=take)
        assert largest(output.logits, theirs.logits) < TOLERANCE
        for layer in layers:
            whole = expected[layer][inputs["attention_mask"].bool()]
            assert largest(take.states[layer], pool(whole, rows["packing"], pooling)) < TOLERANCE
        if pooling == "cls":
            loss_of(
                torch.cat([output.logits.flatten(), *(take.states[layer].flatten() for layer in layers)])
            ).backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            assert largest(parameter.grad, gradients[name]) < 1e-11 * max(1, gradients[name].abs().max().item()), name
    take = Take(layers, all_tokens=True)
    assert largest(student(**rows, take=take).logits, theirs.logits) < TOLERANCE
    for layer in layers:
        assert largest(take.states[layer][0], expected[layer][inputs["attention_mask"].bool()]) < TOLERANCE


@pytest.mark.parametrize("model_type", OTHERS)
def test_rows_do_not_see_each_other(model_type: str) -> None:
    student = make_student(model_type)
    together = student(**packed_rows(student)).logits
    plain_rows = padded(packed_rows(student))["input_ids"]
    other = plain_rows.clone()
    other[1:] = 7
    ids = [other[number, :length].numpy() for number, length in enumerate(LENGTHS)]
    changed = student(**pack(ids, [(np.arange(len(row)) > len(row) // 2).astype(np.int64) for row in ids])).logits
    assert largest(together[0], changed[0]) < TOLERANCE and largest(together[1:], changed[1:]) > 1e-3


@pytest.mark.parametrize("model_type", [name for name in STUDENTS if is_packed(shared_config(name, 1, "sps"))])
def test_last_layer_computes_first_tokens_alone(model_type: str) -> None:
    student = make_student(model_type, 1)
    widths: list[int] = []
    layers = list(student.base_model.get_submodule(FAMILIES[model_type].layers).children())
    wide = [module for module in layers[-1].modules() if isinstance(module, nn.Linear)]
    widest = max(wide, key=lambda module: module.in_features)  # the last of the feed-forward layer
    widest.register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
    student(**packed_rows(student))
    assert widths[-1] == len(LENGTHS), "the feed-forward layer of the last run should see one token a row"


def test_sharing_modules_equals_the_class_of_bert() -> None:
    """The way of all other families, on BERT, against BERT's own class."""
    for num_layers, sharing in ORDERS:
        student = make_student(BERT, num_layers, sharing)
        order = execution_order(num_layers, sharing)
        plain = BertForSequenceClassification(unroll(student).config).eval()
        plain.load_state_dict(unroll(student).state_dict())
        share_layers(plain.base_model, FAMILIES[BERT], order)
        assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in student.parameters())
        plain.set_attn_implementation("peakd_packed")
        take_packed_rows(plain)
        rows, layers = packed_rows(student), tuple(range(1, len(order) + 1))
        ours, theirs = Take(layers), Take(layers)
        logits, expected = plain(**rows, take=ours).logits, student(**rows, take=theirs).logits
        assert largest(logits, expected) < TOLERANCE
        assert all(largest(ours.states[layer], theirs.states[layer]) < TOLERANCE for layer in layers)
        loss_of(logits).backward()
        loss_of(expected).backward()
        mine = [p.grad for p in plain.parameters() if p.grad is not None]
        others = [p.grad for p in student.parameters() if p.grad is not None]
        assert len(mine) == len(others) and all(largest(a, b) < 1e-11 for a, b in zip(mine, others, strict=True))


@pytest.mark.parametrize("model_type", OTHERS)
def test_saved_student_loads_as_it_was(model_type: str, tmp_path: Path) -> None:
    for num_layers, sharing in ((2, "sps"), (2, "sequence"), (6, "sps")):
        student = make_student(model_type, num_layers, sharing)
        folder = tmp_path / f"{num_layers}-{sharing}"
        student.save_pretrained(folder)
        numbers = sum(parameter.numel() for parameter in student.parameters())
        size = (folder / "model.safetensors").stat().st_size
        assert numbers * 8 <= size < numbers * 8 + 20_000, "shared layers are stored once"
        assert json.loads((folder / "config.json").read_text())["model_type"] == f"sps_{model_type}"
        loaded, report = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float64, output_loading_info=True
        )
        assert not any(report.values()), report
        inputs = padded_inputs(student.config, packed_rows(student))
        assert largest(loaded.eval()(**inputs).logits, student(**inputs).logits) < TOLERANCE
        assert sum(parameter.numel() for parameter in loaded.parameters()) == numbers
        base = AutoModel.from_pretrained(folder, dtype=torch.float64).eval()
        states = student(**inputs, output_hidden_states=True).hidden_states[-1]
        assert largest(base(**inputs).last_hidden_state, states) < TOLERANCE


def test_without_tied_embeddings_layers_are_shared_all_the_same(tmp_path: Path) -> None:
    student = make_student("roberta", tie_word_embeddings=False)
    student.save_pretrained(tmp_path / "student")
    loaded, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "student", dtype=torch.float64, output_loading_info=True
    )
    inputs = padded_inputs(student.config, packed_rows(student))
    assert not any(report.values()) and largest(loaded.eval()(**inputs).logits, student(**inputs).logits) < TOLERANCE


def test_deberta_with_positions_of_its_own_exchanges_them_too() -> None:
    student = make_student("deberta-v2", share_att_key=False)
    first, again = (student.deberta.encoder.layer[number].attention.self for number in (0, 2))
    assert again.pos_query_proj is first.pos_key_proj and again.pos_key_proj is first.pos_query_proj
    plain, _ = reference(student)
    inputs = padded_inputs(student.config, packed_rows(student))
    assert largest(student(**inputs).logits, plain(**inputs).logits) < TOLERANCE


def test_modernbert_keeps_the_norm_and_the_window_of_its_layers() -> None:
    student = make_student("modernbert", 2)
    layers = student.model.layers
    assert isinstance(layers[0].attn_norm, nn.Identity) and isinstance(layers[2].attn_norm, nn.LayerNorm)
    assert layers[3].attn_norm is layers[1].attn_norm and isinstance(layers[3].attn.Wqkv, ExchangedQKV)
    assert [layer.attention_type for layer in layers] == ["full_attention", "sliding_attention"] * 2


@pytest.mark.parametrize("model_type", OTHERS)
def test_onnx(model_type: str, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    student = make_student(model_type, 1).float()
    tokenizer, files = tokenizer_of(model_type), [tmp_path / "model.onnx", tmp_path / "model_int8.onnx"]
    assert export_onnx(unroll(student), tokenizer, files[0]) < 1e-4
    int8.quantise(*files)
    assert files[1].stat().st_size < files[0].stat().st_size
    tokens = tokenizer(["the film was good", "a dull plot"], padding=True, return_tensors="pt")
    logits, quantised = (int8.runner(file)(tokens) for file in files)
    torch.testing.assert_close(quantised, logits, rtol=0, atol=0.4)  # weights are random and narrow


READ_WITH_TRANSFORMERS = """
import json, sys
from transformers import AutoModelForSequenceClassification, pipeline
found, texts = {}, ["the film was good", "a dull plot"]
for folder in sys.argv[1:]:
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    scores = pipeline("text-classification", model=folder, top_k=None)(texts, truncation=True)
    found[folder] = [{entry["label"]: entry["score"] for entry in row} for row in scores]
assert "peakd_ds" not in sys.modules
print(json.dumps(found))
"""


def test_unrolled_students_load_with_transformers_alone(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    expected: dict[str, Any] = {}
    for model_type in STUDENTS:
        student, tokenizer = make_student(model_type).float(), tokenizer_of(model_type)
        folder = tmp_path / model_type
        export_model(unroll(student), tokenizer, folder, "")
        ids = [np.array(tokenizer(text)["input_ids"]) for text in ("the film was good", "a dull plot")]
        with torch.no_grad():
            probabilities = student(**pack(ids, [np.zeros_like(row) for row in ids])).logits.softmax(-1)
        expected[str(folder)] = [dict(zip(("no", "yes", "maybe"), row.tolist(), strict=True)) for row in probabilities]
    done = subprocess.run(
        [sys.executable, "-c", READ_WITH_TRANSFORMERS, *expected],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for folder, rows in expected.items():
        for mine, other in zip(rows, found[folder], strict=True):
            assert other == pytest.approx(mine, abs=1e-5), folder


def test_exchange_transposes_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the same states, the second run has the first one's scores transposed, unless positions add terms."""
    found: list[torch.Tensor] = []
    softmax = nn.functional.softmax
    monkeypatch.setattr(
        nn.functional, "softmax", lambda scores, *args, **more: found.append(scores) or softmax(scores, *args, **more)
    )
    for model_type in OTHERS:
        family, student = FAMILIES[model_type], make_student(model_type, 2)
        student.set_attn_implementation("eager")
        states = torch.randn(1, 9, student.config.hidden_size)
        for number in (1, 3):  # runs of the second layer: ModernBERT's first has a norm of its own in the second run
            layer = student.base_model.get_submodule(family.layers)[number]
            layer.register_forward_pre_hook(lambda _, args, states=states: (states, *args[1:]))
        found.clear()
        student(input_ids=torch.arange(5, 14)[None], attention_mask=torch.ones(1, 9, dtype=torch.int64))
        first, _, again = found[1:4]
        if family.has_relative_scores:
            assert largest(first.mT, again) > 1e-3, f"{model_type} is said to add terms that are not transposed"
        else:
            assert largest(first.mT, again) < TOLERANCE * first.abs().max(), model_type
