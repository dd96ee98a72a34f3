"""peakd-plan for every family: it plans them, and its numbers are those of the engines and of autograd."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import new_pools
from test_planner import ACCUM, check_memory, kept_for_backward, settings
from tiny_families import config_of, save_family, tokenizer_of
from torch import nn

from peakd_ds.data.tasks import get_task
from peakd_ds.engine.ds_config import DTYPES
from peakd_ds.families import FAMILIES, STUDENTS, is_packed
from peakd_ds.model.build import task_head
from peakd_ds.programs import activations, planner, scripts
from peakd_ds.programs.activations import Batch

PADDED = [name for name, family in FAMILIES.items() if not family.is_packed]
NOT_BERT = [name for name in STUDENTS if name != "bert"]
LENGTHS = (64, 40, 50, 60)


# -- The command -------------------------------------------------------------------------------------------------------


def plan_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    planner.main(scripts.plan_options(["--task", "rte", "--max_seq_length", "64", "--json", *words]))
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_planned(model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, bert = save_family(tmp_path / "model", model_type), save_family(tmp_path / "bert", "bert")
    can_learn = FAMILIES[model_type].can_learn
    words = ["--teacher", str(folder), *([] if can_learn else ["--student_init", str(bert)])]
    plan = plan_of(capsys, *words)
    assert plan["padded"] == (["teacher", "student"] if can_learn else ["teacher"]) * (model_type in PADDED)
    assert len(plan["choices"]) == 2 * 4 * 3 and plan["recommended"]["index"] is not None
    assert sum(plan["teacher_parameters_of"].values()) == plan["teacher_parameters"]
    as_student = plan_of(capsys, "--teacher", str(bert), *(["--student_init", str(folder)] if can_learn else []))
    assert as_student["padded"] == ["student"] * (can_learn and model_type in PADDED)


def test_padding_takes_memory_and_the_plan_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--tokens_per_row lowers the activations of packed rows only."""
    mpnet, bert = (save_family(tmp_path / name, name) for name in ("mpnet", "bert"))

    def memory(*words: str) -> tuple[int, int]:
        best = plan_of(capsys, "--teacher", str(mpnet), *words)["choices"][0]
        return best["student_memory"]["activations"], best["teacher_memory"]["activations"]

    packed = ["--student_init", str(bert)]
    assert memory("--tokens_per_row", "20") == pytest.approx(memory(), rel=1e-3)  # indices of tokens
    assert memory(*packed, "--tokens_per_row", "20")[0] < memory(*packed)[0] < memory()[0]
    planner.main(scripts.plan_options(["--teacher", str(mpnet), "--task", "rte", "--max_seq_length", "64"]))
    assert "\npadding: rows of the teacher and the student are padded to the longest\n" in capsys.readouterr().out
    planner.main(scripts.plan_options(["--teacher", str(bert), "--task", "rte", "--max_seq_length", "64"]))
    assert "padding: " not in capsys.readouterr().out


# -- Activations -------------------------------------------------------------------------------------------------------


def family_config(model_type: str, **more: Any) -> Any:
    special = {"local_attention": 128} if model_type == "modernbert" else {}  # a window has another path on CPUs
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 8000}
    return config_of(model_type, tokenizer_of(model_type), **(sizes | special | more))


def filled(module: nn.Module, dtype: str) -> nn.Module:
    """A module from the meta device with random weights, and buffers that its forward pass can use."""
    module = module.to_empty(device="cpu").to(DTYPES[dtype])
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    for name, buffer in module.named_buffers():
        if buffer.dtype == torch.int64:
            buffer.copy_(torch.arange(buffer.numel()).view(buffer.shape) * ("position" in name))
        else:
            nn.init.constant_(buffer, 0.5)
    return module


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("hidden_loss", "dropout"), [("cls", 0.1), ("tokens", 0.1)])
@pytest.mark.parametrize("model_type", NOT_BERT)
def test_activations_are_bounded(
    single_rank: None, model_type: str, dtype: str, hidden_loss: str, dropout: float
) -> None:
    encoder = family_config(model_type)
    _, matched = planner.build_on_meta(settings(hidden_loss=hidden_loss, dropout=dropout), encoder, encoder)
    module = filled(matched, dtype).train()
    measured = kept_for_backward(module, LENGTHS)
    batch = Batch(len(LENGTHS), sum(LENGTHS), max(LENGTHS), DTYPES[dtype].itemsize, on_gpu=False)
    bound = activations.student_activations(module, 256, batch)
    print(f"{model_type} {dtype} {hidden_loss}: at most {bound:,}, kept {measured:,}, {bound / measured:.3f}")
    assert measured <= bound <= 1.13 * measured


@pytest.mark.parametrize("change", [{"share_att_key": False}, {"pos_att_type": ["c2p"]}, {"conv_kernel_size": 3}])
def test_settings_of_deberta_are_bounded(single_rank: None, change: dict[str, Any]) -> None:
    encoder = family_config("deberta-v2", position_buckets=64, **change)
    _, matched = planner.build_on_meta(settings(), encoder, encoder)
    assert not is_packed(encoder)
    module = filled(matched, "fp32").train()
    measured = kept_for_backward(module, LENGTHS)
    bound = activations.student_activations(module, 256, Batch(4, sum(LENGTHS), max(LENGTHS), 4, on_gpu=False))
    print(f"{change}: at most {bound:,}, kept {measured:,}, {bound / measured:.3f}")
    assert measured <= bound <= 1.2 * measured


# -- Memory of engines -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_pools() -> Iterator[Callable[[int], Any]]:
    """Ranks that hold no tensors of other tests."""
    with new_pools() as pool_of:
        yield pool_of


CASES = [("fp32", 0, "teacher_zero0"), ("bf16", 1, "teacher_zero3_offload"), ("fp32", 1, "teacher_zero0")]
CASES += [("bf16", 2, "teacher_zero3"), ("fp32", 3, "teacher_zero3")]


@pytest.mark.parametrize("model_type", ["roberta", "modernbert", "deberta-v2", "mpnet"])
def test_memory(own_pools, tiny_data: Path, tmp_path: Path, model_type: str) -> None:
    """Weights, gradients, masters and moments of two ranks are the plan's to the last byte.

    At 320, matrices are larger than what ZeRO 3 leaves unsharded, as in real models.
    """
    teacher = save_family(tmp_path / "teacher", model_type, task_head(get_task("rte")), hidden_size=320)
    words = "--task rte --num_hidden_layers 2 --no_ptp --stages distill --layer_map 1:1,2:2 --micro_batch_size 4"
    words += f" --global_batch_size {8 * ACCUM}"
    for dtype, stage, teacher_name in CASES:
        if FAMILIES[model_type].has_relative_scores:
            teacher_name = "teacher_zero0"  # at stage 3 up to 1.4 % more is gathered than the bound (docs/planning.md)
        argv = [*words.split(), "--teacher", str(teacher), "--data_dir", str(tiny_data)]
        argv += ["--teacher_ds_config", teacher_name]
        check_memory(own_pools(2), argv, stage, dtype, tmp_path / f"{dtype}-{stage}")
