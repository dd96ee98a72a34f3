"""Teachers of every family: what packed rows give is what transformers' own model says of each row alone.

First in float64 without ranks, then as DeepSpeed engines on two ranks, online and cached, replicated, sharded and
offloaded. The reference is always `AutoModelForSequenceClassification` on one row at a time, without padding.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import DECODERS, head_of, save_family
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peakd_ds.command_line import parse
from peakd_ds.data import reading
from peakd_ds.data.tasks import get_task
from peakd_ds.families import FAMILIES, has_token_types, is_packed
from peakd_ds.model import contract
from peakd_ds.model.build import Teacher, load_teacher
from peakd_ds.packed.packing import pack
from peakd_ds.ranks import dist
from peakd_ds.run import Run, open_run
from peakd_ds.teacher.online import OnlineTeacher

TASK = get_task("rte")
HEAD = head_of(*TASK.label_names)
NUM_LAYERS = 4
LAYERS = (1, 2, 3)
LENGTHS = (23, 3, 11, 7, 1)
NUM_ROWS = 24
CROSSED = ("bert", "roberta", "qwen2")
"""Families that are tried in every combination."""
WORDS = "--task rte --num_hidden_layers 2 --max_seq_length 32 --layer_map 1:1,2:2,3:3 --global_batch_size 16"
ZERO_3: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}  # else the tiny weights stay whole
DS_CONFIGS = {
    "zero0": {},
    "zero3": ZERO_3,
    "offload": {**ZERO_3, "offload_param": {"device": "cpu", "pin_memory": False}},
}

Outputs = tuple[Tensor, dict[int, Tensor]]
"""Logits [N, C] and, by layer, vectors of rows [N, H]."""


@pytest.fixture(scope="module")
def teacher_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`teacher_of(model_type)` gives the folder of a random classifier for rte."""
    folder = tmp_path_factory.mktemp("teachers")

    def made(model_type: str) -> Path:
        target = folder / model_type
        return target if target.exists() else save_family(target, model_type, HEAD, num_layers=NUM_LAYERS)

    return made


def plain_model(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' own classifier; its weights alone are rounded, as DeepSpeed does: positions stay fp32."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    if dtype == torch.float64:
        return model.double()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def expected_of(model: Any, rows: Iterable[tuple[Sequence[int], Sequence[int]]], pooling: str) -> Outputs:
    """What the model says of rows (ids, token types), of each alone."""
    logits, states = [], {layer: [] for layer in range(1, NUM_LAYERS + 1)}
    for ids, types in rows:
        inputs = {"input_ids": torch.tensor([list(ids)])}
        if has_token_types(model.config):
            inputs["token_type_ids"] = torch.tensor([list(types)])
        output = model(**inputs, output_hidden_states=True)
        assert len(output.hidden_states) == NUM_LAYERS + 1
        logits.append(output.logits[0])
        for layer, kept in states.items():
            kept.append(pooled(output.hidden_states[layer][0], pooling))
    return torch.stack(logits), {layer: torch.stack(kept) for layer, kept in states.items()}


def pooled(states_SH: Tensor, pooling: str) -> Tensor:
    """The vector [H] of a row without padding; all of its tokens [S, H] for `tokens`."""
    return {"cls": states_SH[0], "last": states_SH[-1], "mean": states_SH.mean(0)}[pooling]


def largest(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return (one - other).abs().max().item()


# -- Float64 -----------------------------------------------------------------------------------------------------------

POOLINGS = ("cls", "last", "mean")
CASES = [(name, pooling, {}) for name in FAMILIES for pooling in POOLINGS if pooling != "cls" or name not in DECODERS]
CASES += [("modernbert", pooling, {"classifier_pooling": "mean"}) for pooling in ("cls", "mean")]
CASES += [("deberta-v2", "mean", {"share_att_key": False})]


@pytest.mark.parametrize(("model_type", "pooling", "settings"), CASES)
def test_packed_rows_are_rows_alone(
    model_type: str, pooling: str, settings: dict[str, Any], tmp_path: Path, single_rank: None
) -> None:
    folder = save_family(tmp_path / "teacher", model_type, HEAD, num_layers=NUM_LAYERS, **settings)
    source = contract.find_encoder(str(folder), "teacher")
    contract.load_tokenizer(source)
    config = parse([*WORDS.split(), "--teacher", str(folder), "--run_dir", str(tmp_path / "run")])
    model = load_teacher(config, TASK, source, tmp_path / "none").double().eval()
    generator = np.random.default_rng(3)
    ids = [generator.integers(5, model.config.vocab_size, size=length) for length in LENGTHS]
    types = [(np.arange(len(row)) > len(row) // 2).astype(np.int64) for row in ids]
    logits, states = expected_of(plain_model(folder, torch.float64), zip(ids, types, strict=True), pooling)
    teacher, inputs, layers = Teacher(model, pooling), pack(ids, types), tuple(states)
    with torch.no_grad():
        found_logits, found = teacher(layers, **inputs)
        assert largest(found_logits, logits) < 1e-12
        for layer, theirs in zip(layers, found, strict=True):
            assert largest(theirs, states[layer]) < 1e-12, layer
        without_logits = teacher(LAYERS, with_logits=False, **inputs)[1]
        assert all(largest(states[layer], theirs) < 1e-12 for layer, theirs in zip(LAYERS, without_logits, strict=True))
        whole = teacher(layers, "tokens", **inputs)[1]
    assert all(states_1TH.shape == (1, sum(LENGTHS), 32) for states_1TH in whole)
    for layer, states_1TH in zip(layers, whole, strict=True):
        rows = states_1TH[0].split(LENGTHS)
        assert largest(torch.stack([pooled(row, pooling) for row in rows]), states[layer]) < 1e-12
    assert largest(logits[1:], logits[:-1]) > 1e-3, "rows differ"


def test_which_families_run_packed(teacher_of: Callable[[str], Path]) -> None:
    """In a packed family no token of padding is computed, in others rows are padded inside."""
    for model_type in FAMILIES:
        folder = teacher_of(model_type)
        source = contract.find_encoder(str(folder), "teacher")
        contract.load_tokenizer(source)
        model = load_teacher(parse([*WORDS.split(), "--teacher", str(folder), "--run_dir", "x"]), TASK, source, folder)
        widths: list[Any] = []
        table = model.get_input_embeddings()
        table.register_forward_hook(lambda _, args, __, widths=widths: widths.append(tuple(args[0].shape)))
        Teacher(model)(**pack([np.full(n, 9) for n in LENGTHS], [np.zeros(n, np.int64) for n in LENGTHS]))
        assert widths[0] == ((1, sum(LENGTHS)) if is_packed(source.config) else (len(LENGTHS), max(LENGTHS)))


# -- Engines on two ranks ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def argv_of(
    teacher_of: Callable[[str], Path], tiny_data: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[str]]:
    """`argv_of(model_type, name of DS_CONFIGS, mode, dtype)` gives a command line; each has a run folder of its own."""
    folder = tmp_path_factory.mktemp("runs")
    for name, section in DS_CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": section} if section else {}))

    def argv(model_type: str, name: str, mode: str, dtype: str) -> list[str]:
        models = ["--teacher", str(teacher_of(model_type)), "--student_init", str(tiny_encoder)]
        engine = ["--teacher_ds_config", str(folder / f"{name}.json"), "--teacher_mode", mode, "--dtype", dtype]
        run_dir = ["--run_dir", str(folder / f"{model_type}-{name}-{mode}-{dtype}")]
        return [*WORDS.split(), *models, *engine, *run_dir, "--data_dir", str(tiny_data)]

    return argv


def outputs_of(argvs: list[list[str]]) -> list[tuple[np.ndarray, list[np.ndarray], float]]:
    """Runs on every rank: for each run, logits and states of this rank's rows, and the share of weights held here."""
    return [_outputs_of(open_run(parse(argv))) for argv in argvs]


def _outputs_of(run: Run) -> tuple[np.ndarray, list[np.ndarray], float]:
    teacher = run.teacher
    assert isinstance(teacher, OnlineTeacher)
    rows, share = rows_of(dist.rank()), 0.0
    if run.config.teacher_mode == "cached":
        cached = run.teacher_cache.outputs(lambda _: None)
        assert cached is not None
        logits, states = cached["train"].of(torch.from_numpy(rows))
    else:
        weights = list(teacher.engine().module.parameters())
        sizes = [getattr(weight, "ds_numel", weight.numel()) for weight in weights]
        share = sum(weight.numel() for weight in weights) / sum(sizes)
        micro = run.train.micro_batch_for_teacher(run.train.micro_batch(rows))
        with torch.no_grad():
            logits, states = teacher.forward(micro, LAYERS, True)
        teacher.stop()
    return logits.float().numpy(), [tensor.float().numpy() for tensor in states], share


def rows_of(rank: int) -> np.ndarray:
    """Other rows on each rank, and another number of them."""
    return np.arange(0, 14) if rank == 0 else np.arange(14, NUM_ROWS)


def expected_by_text(folder: Path, tiny_data: Path, dtype: torch.dtype) -> Outputs:
    """What transformers' own tokenizer and model say of the first rows of train."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = reading.load_splits(TASK, str(tiny_data))["train"][list(range(NUM_ROWS))]
    texts = zip(rows["sentence1"], rows["sentence2"], strict=True)
    options = {"truncation": True, "max_length": 32, "return_token_type_ids": True}
    encoded = [tokenizer(*pair, **options) for pair in texts]
    pooling = "last" if folder.name in DECODERS else "cls"
    pairs = [(row["input_ids"], row["token_type_ids"]) for row in encoded]
    return expected_of(plain_model(folder, dtype), pairs, pooling)


def check(two_ranks: Any, tiny_data: Path, argv_of: Any, teacher_of: Any, cases: list[tuple[str, ...]]) -> None:
    """Run the cases (model type, name of DS_CONFIGS, mode, dtype) in one launch and compare each with its reference."""
    found = two_ranks.run(outputs_of, [argv_of(*case) for case in cases])
    expected: dict[tuple[str, str], Outputs] = {}
    for number, case in enumerate(cases):
        model_type, name, mode, dtype = case
        if (model_type, dtype) not in expected:
            kind = torch.float32 if dtype == "fp32" else torch.bfloat16
            expected[model_type, dtype] = expected_by_text(teacher_of(model_type), tiny_data, kind)
        logits, states = expected[model_type, dtype]
        tolerance = 2e-5 if dtype == "fp32" else 2**-4
        for rank in (0, 1):
            rows = torch.from_numpy(rows_of(rank))
            their_logits, their_states, share = found[rank][number]
            assert_close(their_logits, logits[rows], tolerance, case)
            for layer, theirs in zip(LAYERS, their_states, strict=True):
                assert_close(theirs, states[layer][rows], tolerance, (*case, layer))
            if mode == "online":
                assert share == (1 if name == "zero0" else 0), "weights are whole on every rank, or all in parts"


def assert_close(found: np.ndarray, expected: Tensor, tolerance: float, case: Any) -> None:
    error = (torch.from_numpy(found) - expected.float()).abs().max().item()
    assert error <= tolerance * max(1, expected.abs().max().item()), (case, error)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_online(model_type: str, two_ranks, tiny_data: Path, argv_of: Any, teacher_of: Any) -> None:
    cases = [(model_type, stage, "online", "fp32") for stage in ("zero0", "zero3")]
    check(two_ranks, tiny_data, argv_of, teacher_of, cases)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_cached_and_offloaded(model_type: str, two_ranks, tiny_data: Path, argv_of: Any, teacher_of: Any) -> None:
    cases = [(model_type, *way, "fp32") for way in (("zero0", "cached"), ("offload", "online"))]
    check(two_ranks, tiny_data, argv_of, teacher_of, cases)


@pytest.mark.parametrize("model_type", CROSSED)
def test_every_combination(model_type: str, two_ranks, tiny_data: Path, argv_of: Any, teacher_of: Any) -> None:
    """Those that the tests above leave out."""
    done = [("zero0", "online"), ("zero3", "online"), ("offload", "online"), ("zero0", "cached")]
    ways = [(stage, mode, dtype) for stage in DS_CONFIGS for mode in ("online", "cached") for dtype in ("fp32", "bf16")]
    cases = [(model_type, *way) for way in ways if way[2] == "bf16" or way[:2] not in done]
    check(two_ranks, tiny_data, argv_of, teacher_of, cases)
