"""Packed rows against the same rows padded, through transformers' own classes, and the CPU's dropout and attention."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peakd_ds.model.build import forward_with_states
from peakd_ds.packed import attention, cpu
from peakd_ds.packed.attention import Dropout, attend
from peakd_ds.packed.cpu import PART_COST, _draw, cheapest_parts, parts_of
from peakd_ds.packed.packing import WIDTH_MULTIPLE, pack, padded
from peakd_ds.results.export import unroll
from peakd_ds.sps import SPSBertConfig, SPSBertForSequenceClassification

LENGTHS = (5, 9, 1, 33, 2)


def make_rows(lengths: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    return [rng.integers(5, 50, n) for n in lengths], [rng.integers(0, 2, n) for n in lengths]


def make_model(sharing: str = "sps", num_layers: int = 2, **settings: Any) -> SPSBertForSequenceClassification:
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, num_attention_heads=2, intermediate_size=64, initializer_range=0.1)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = SPSBertConfig(num_hidden_layers=num_layers, sharing=sharing, **(sizes | no_dropout | settings))
    return SPSBertForSequenceClassification(config).train()


def test_packed_inputs_are_the_rows_one_after_another() -> None:
    ids, types = make_rows(LENGTHS)
    inputs = pack(ids, types)
    packing = inputs["packing"]
    assert inputs["input_ids"].tolist() == [np.concatenate(ids).tolist()]
    assert inputs["token_type_ids"].tolist() == [np.concatenate(types).tolist()]
    assert inputs["position_ids"].tolist() == [[position for n in LENGTHS for position in range(n)]]
    assert packing.starts.tolist() == [0, 5, 14, 15, 48]
    assert (packing.num_rows, packing.width, int(packing.lengths.max())) == (5, 2 * WIDTH_MULTIPLE, 33)


def test_padded_inputs_are_what_a_tokenizer_pads() -> None:
    ids, types = make_rows(LENGTHS)
    inputs = padded(pack(ids, types))
    assert all(tensor.shape == (5, 33) for tensor in inputs.values())
    for row, length in enumerate(LENGTHS):
        assert inputs["input_ids"][row].tolist() == ids[row].tolist() + [0] * (33 - length)
        assert inputs["token_type_ids"][row].tolist() == types[row].tolist() + [0] * (33 - length)
        assert inputs["attention_mask"][row].tolist() == [1] * length + [0] * (33 - length)


@pytest.mark.parametrize("lengths", [LENGTHS, (7,), (32, 32), (1, 1, 1)])
def test_padding_and_unpadding_undo_each_other(lengths: tuple[int, ...]) -> None:
    packing = pack(*make_rows(lengths))["packing"]
    tokens = torch.randn(sum(lengths), 3, 2)
    wide = packing.pad(tokens)
    assert torch.equal(packing.unpad(wide), tokens)
    assert torch.equal(wide.abs().sum((2, 3)) > 0, packing.mask[:, 0, 0])


def gradients_of(model: torch.nn.Module, seen: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    sum(((index + 1) * tensor.sin()).sum() for index, tensor in enumerate(seen)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def check_against_padded(model: SPSBertForSequenceClassification, lengths: Sequence[int], hidden_loss: str) -> None:
    """Logits, states of every layer and all gradients, in double precision: fp32 would show the order of sums."""
    model = model.double()
    inputs = pack(*make_rows(lengths))
    packing, layers = inputs["packing"], range(1, model.config.num_effective_layers + 1)
    logits, hidden = forward_with_states(model, inputs, layers, hidden_loss)
    ours = [logits, *(states.flatten(0, -2) for states in hidden)]
    our_gradients = gradients_of(model, ours)

    output = model(**padded(inputs), output_hidden_states=True)
    in_row = packing.mask[:, 0, 0, : int(packing.lengths.max())]
    theirs = [states[:, 0] if hidden_loss == "cls" else states[in_row] for states in output.hidden_states[1:]]
    their_gradients = gradients_of(model, [output.logits, *theirs])
    assert_same(ours, [output.logits, *theirs], 1e-12)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("hidden_loss", ["cls", "tokens"])
@pytest.mark.parametrize(("num_layers", "sharing"), [(1, "none"), (1, "sps"), (2, "sps"), (3, "cycle_rev")])
def test_packed_equals_padded(num_layers: int, sharing: str, hidden_loss: str) -> None:
    check_against_padded(make_model(sharing, num_layers), LENGTHS, hidden_loss)


@pytest.mark.parametrize("lengths", [(7,), (32, 32), (1, 1, 1)])
def test_packed_equals_padded_at_the_edges(lengths: tuple[int, ...]) -> None:
    check_against_padded(make_model(), lengths, "cls")


@pytest.mark.parametrize("hidden_loss", ["cls", "tokens"])
def test_packed_equals_padded_with_recomputed_activations(hidden_loss: str) -> None:
    model = make_model()
    model.gradient_checkpointing_enable()
    check_against_padded(model, LENGTHS, hidden_loss)


def test_packed_equals_a_plain_bert_in_fp32() -> None:
    """Within 1e-6, and without sharing any of our code with it."""
    model = make_model("sps", 3)
    plain = unroll(model)
    inputs = pack(*make_rows(LENGTHS))
    assert_same([model(**inputs).logits], [plain(**padded(inputs)).logits], 1e-6)


def test_the_path_of_other_devices_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by PyTorch, as on a GPU, run here."""
    monkeypatch.setattr(attention, "uses_cpu_path", lambda tensor: False)
    check_against_padded(make_model(), LENGTHS, "cls")
    check_against_padded(make_model("cycle_rev"), LENGTHS, "tokens")


def test_the_last_layer_computes_first_tokens_alone() -> None:
    model, widths = make_model("none"), []
    for layer in model.bert.encoder.layer:
        layer.intermediate.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    inputs = pack(*make_rows(LENGTHS))
    model(**inputs)
    forward_with_states(model, inputs, [2], "cls")
    forward_with_states(model, inputs, [1], "tokens")
    forward_with_states(model, inputs, [2], "tokens")
    total = sum(LENGTHS)
    assert widths == [total, len(LENGTHS)] * 3 + [total, total]


def test_without_logits_the_pass_ends_after_the_last_layer_that_is_read() -> None:
    model, runs = make_model("sps", 2), []
    for number, layer in enumerate(model.bert.encoder.layer):
        layer.register_forward_hook(lambda module, inputs, output, number=number: runs.append(number))
    inputs = pack(*make_rows(LENGTHS))
    _, whole = forward_with_states(model, inputs, [1, 3], "cls")
    _, short = forward_with_states(model, inputs, [1, 3], "cls", with_logits=False)
    assert runs == [0, 1, 0, 1] + [0, 1, 0]
    assert_same(short, whole, 1e-6)


def test_states_alone_have_a_gradient() -> None:
    """Where nothing reads what lies above the layer that is looked at."""
    model = make_model("sps", 1)
    inputs = pack(*make_rows(LENGTHS))
    weight, answers = model.bert.encoder.layer[0].attention.self.query.weight, []
    for is_packed in (True, False):
        model.zero_grad()
        if is_packed:
            states = forward_with_states(model, inputs, [1], "cls")[1][0]
        else:
            states = model(**padded(inputs), output_hidden_states=True).hidden_states[1][:, 0]
        states.sin().sum().backward()
        answers.append(weight.grad.clone())
    assert answers[1].norm() > 0
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-6)


# -- The CPU's dropout and attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_the_share_it_says_and_keeps_the_mean(dtype: torch.dtype, p: float) -> None:
    torch.manual_seed(0)
    ones = torch.ones(1000, 1003, dtype=dtype)
    output = Dropout(p)(ones)
    share = (output == 0).double().mean().item()
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / ones.numel()) ** 0.5)
    dropped, kept = output.unique().tolist()
    assert dropped == 0 and kept == pytest.approx(1 / (1 - p), rel=5e-3)
    assert output.double().mean().item() == pytest.approx(1.0, rel=5e-3)
    columns = (output == 0).double().mean(0)  # each of the four places in a random word drops alike
    for place in range(4):
        assert columns[place::4].mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / (ones.numel() / 4)) ** 0.5)


def test_dropout_of_neighbours_is_independent() -> None:
    torch.manual_seed(1)
    dropped = (Dropout(0.5)(torch.ones(1_000_000)) == 0).double()
    for lag in (1, 2, 3, 4, 8):
        correlation = torch.corrcoef(torch.stack([dropped[:-lag], dropped[lag:]]))[0, 1].item()
        assert abs(correlation) < 5e-3


def test_dropout_has_the_gradient_of_what_it_kept() -> None:
    states = torch.randn(37, 11, dtype=torch.float64, requires_grad=True)
    output = Dropout(0.3)(states)
    (gradient,) = torch.autograd.grad(output.sum(), states)
    torch.testing.assert_close(output, states * gradient)
    assert 0 < (gradient == 0).double().mean() < 1


def test_dropout_follows_the_seed_and_does_nothing_in_eval() -> None:
    dropout, states = Dropout(0.5), torch.randn(50, 7)
    answers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        answers.append(dropout(states))
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])
    assert dropout.eval()(states) is states
    assert torch.equal(Dropout(1.0)(states), torch.zeros_like(states))


@pytest.mark.parametrize(("lengths", "num_parts"), [(LENGTHS, 0), ((70, 65, 40, 33, 9, 5, 1), 3), ((9, 5, 1), 1)])
@pytest.mark.parametrize("is_first_only", [False, True])
def test_attention_with_dropout_has_the_gradient_of_its_formula(
    is_first_only: bool, lengths: tuple[int, ...], num_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Softmax(Q K^T / sqrt(D)), dropped with the mask that was drawn, times V; all in double precision."""
    monkeypatch.setattr(cpu, "PART_COST", 1)
    monkeypatch.setattr(cpu, "PART_ROWS", 1)
    packing, heads = pack(*make_rows(lengths))["packing"], 2
    assert len(parts_of(packing)) == max(num_parts, 1)
    num_tokens = sum(lengths)
    torch.manual_seed(0)
    query, key, value = (torch.randn(num_tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    masks: list[Tensor] = []

    def draw(like: Tensor, p: float) -> tuple[Tensor, float]:
        keep, scale = attention_draw(like, p)
        masks.append(keep * scale)
        return keep, scale

    attention_draw = _draw
    monkeypatch.setattr(cpu, "_draw", draw)
    asking = query[packing.starts] if is_first_only else query
    ours = attend(asking, key, value, packing, heads, 0.5, 0.3)
    our_gradients = torch.autograd.grad(ours.sin().sum(), (query, key, value))

    expected, parts = [], parts_of(packing)
    by_part = [mask.unflatten(0, (-1, heads)) for mask in masks]
    assert [mask.shape[::3] for mask in by_part] == [(part.num_rows, part.width) for part in parts]
    mask_of_row = [mask for masks_of_part in by_part for mask in masks_of_part]
    for row, (start, length) in enumerate(zip(packing.starts.tolist(), lengths, strict=True)):
        q, k, v = (x[start : start + length].view(length, heads, 4).transpose(0, 1) for x in (query, key, value))
        q = q[:, :1] if is_first_only else q
        weights = F.softmax(q @ k.mT * 0.5, -1) * mask_of_row[row][:, : q.shape[1], :length]
        expected.append((weights @ v).transpose(0, 1).flatten(1))
    theirs = torch.cat(expected)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, formula in zip(our_gradients, torch.autograd.grad(theirs.sin().sum(), (query, key, value)), strict=True):
        torch.testing.assert_close(mine, formula, rtol=1e-10, atol=1e-12)
    assert 0.2 < torch.cat([mask.flatten() == 0 for mask in masks]).double().mean() < 0.4


def test_parts_cost_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all ways to cut the rows, in twos."""
    monkeypatch.setattr(cpu, "PART_ROWS", 2)
    random = np.random.default_rng(0)
    for _ in range(50):
        lengths = np.sort(random.integers(1, 129, random.integers(1, 20)))[::-1]
        places = range(2, len(lengths), 2)
        cuts = [
            [0, *(place for number, place in enumerate(places) if choice >> number & 1), len(lengths)]
            for choice in range(2 ** len(places))
        ]

        def cost(edges: Sequence[int], lengths: np.ndarray = lengths) -> int:
            widths = [-(-lengths[start] // WIDTH_MULTIPLE) * WIDTH_MULTIPLE for start in edges[:-1]]
            return sum(
                PART_COST + (stop - start) * width**2
                for start, stop, width in zip(edges, edges[1:], widths, strict=False)
            )

        parts = cheapest_parts(lengths)
        assert [stop for _, stop in parts[:-1]] == [start for start, _ in parts[1:]]
        assert cost([0, *(stop for _, stop in parts)]) == min(map(cost, cuts)) and parts[-1][1] == len(lengths)


def test_bf16_attention_is_as_near_as_bf16_allows() -> None:
    packing = pack(*make_rows(LENGTHS))["packing"]
    torch.manual_seed(0)
    states = [torch.randn(sum(LENGTHS), 64) for _ in range(3)]
    exact = attend(*states, packing, 4, 0.25, 0.0)
    rounded = attend(*(x.bfloat16() for x in states), packing, 4, 0.25, 0.0)
    assert (rounded.float() - exact).norm() / exact.norm() < 0.01
