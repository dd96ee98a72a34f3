"""Every student ZeRO stage beside every teacher config, in fp32 and bf16: the same losses, step after step."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from peakd_ds import run, stages, train
from peakd_ds.command_line import parse
from peakd_ds.data.batches import global_batches
from peakd_ds.data.division import epoch_slots
from peakd_ds.engine import engines
from peakd_ds.engine.ds_config import batch_plan
from peakd_ds.errors import UserError
from peakd_ds.ranks import dist
from peakd_ds.results.log import RunLog
from peakd_ds.run import open_run

NUM_STEPS = 4


def losses(argv: list[str]) -> list[float]:
    """Runs on every rank: the global loss of the distill stage's first steps."""
    config = parse(argv)
    run = open_run(config)
    stage = stages.build_stage("distill", run, RunLog(run.folder))
    engine = engines.training_engine(
        stages.build_module(stage, run), config, run.student_ds_config, num_steps=10, name="distill"
    )
    slots = epoch_slots(len(run.train_rows), config.global_batch_size, config.seed, epoch=0)[:NUM_STEPS]
    shares = np.zeros(NUM_STEPS)
    batches = global_batches(run.train, run.train_rows, slots, run.num_accum_steps)
    for step, batch in enumerate(stage.with_teacher_outputs(batches)):
        for micro in batch.micro_batches:
            loss, _ = stage.loss(engine, micro, batch, False)
            engine.backward(loss.total * engines.undo_averaging(engine))
            engine.step()
            shares[step] += loss.total.item()
    engine.destroy()
    import torch

    return dist.all_reduce(torch.from_numpy(shares)).tolist()


@pytest.fixture
def argv(tiny_data: Path, tiny_teacher, tmp_path: Path) -> list[str]:
    words = "--task rte --num_hidden_layers 2 --dropout 0 --no_ptp --stages distill --lr 1e-3 --layer_map 1:1,2:2,3:4"
    batch = "--global_batch_size 16 --micro_batch_size 4"
    paths = ["--teacher", str(tiny_teacher("rte")), "--data_dir", str(tiny_data), "--run_dir", str(tmp_path / "run")]
    return [*words.split(), *batch.split(), *paths]


@pytest.mark.parametrize("teacher", ["teacher_zero0", "teacher_zero3", "teacher_zero3_offload"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_student_stages_beside(two_ranks, argv: list[str], tmp_path: Path, teacher: str, dtype: str) -> None:
    def run(stage: int, teacher: str, dtype: str) -> list[float]:
        words = ["--student_ds_config", f"zero{stage}_{dtype}", "--teacher_ds_config", teacher]
        folder = str(tmp_path / f"{stage}{teacher}{dtype}")
        return two_ranks.run(losses, [*argv, *words, "--run_dir", folder])[0]

    plain = run(0, "teacher_zero0", "fp32")
    assert plain[-1] < plain[0], "the comparison below should see training"
    for stage in range(4):
        tolerance = 1e-4 if dtype == "fp32" else 5e-2
        assert run(stage, teacher, dtype) == pytest.approx(plain, rel=tolerance), f"student at stage {stage}"


def losses_by_adding(argv: list[str]) -> list[float]:
    """The same with DeepSpeed's own way of summing bf16 gradients."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "copy_first_gradients", lambda optimizer: None)
        return losses(argv)


def test_copying_the_first_gradients_changes_nothing(two_ranks, argv: list[str], tmp_path: Path) -> None:
    """Over two micro-batches a step, of which the second is added."""
    words = [*argv, "--student_ds_config", "zero1_bf16"]
    copied, added = (
        two_ranks.run(function, [*words, "--run_dir", str(tmp_path / function.__name__)])
        for function in (losses, losses_by_adding)
    )
    assert copied == added and copied[0][-1] < copied[0][0]


def fail_on_one(argv: list[str]) -> str:
    """Runs on every rank: what a run says whose model cannot be read on the second."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.rank() == 1:
            patch.setattr(stages, "build_student", lambda *_: Path("/no/such/model").read_bytes())
        with pytest.raises(UserError) as caught:
            train.main(parse(argv))
    return str(caught.value)


def test_a_model_that_one_rank_cannot_read_stops_all(two_ranks, argv: list[str]) -> None:
    messages = two_ranks.run(fail_on_one, argv)
    assert messages[0] == messages[1] and messages[0].startswith("rank 1: ") and "/no/such/model" in messages[0]


def dtype_on_mixed_hosts(argv: list[str]) -> str:
    """Runs on every rank: what --dtype auto becomes where the first rank's processor alone is fast in bf16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "has_fast_bf16", lambda: dist.rank() == 0)
        return open_run(parse(argv)).config.dtype


def test_all_ranks_choose_the_same_dtype(two_ranks, argv: list[str]) -> None:
    assert two_ranks.run(dtype_on_mixed_hosts, argv) == ["fp32", "fp32"]


def rows_of_one_s_own(argv: list[str], folders: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        open_run(parse([*argv, "--data_dir", folders[dist.rank()]]))
    return str(caught.value)


def test_ranks_must_have_the_same_rows(two_ranks, argv: list[str], tiny_data: Path, tmp_path: Path) -> None:
    """Each node may have its own copy of the data, and one of them may be old."""
    shutil.copytree(tiny_data, tmp_path / "old")
    rows = pyarrow.parquet.read_table(next((tmp_path / "old" / "rte").glob("train-*.parquet")))
    pyarrow.parquet.write_table(rows[:80], next((tmp_path / "old" / "rte").glob("train-*.parquet")))
    told = two_ranks.run(rows_of_one_s_own, argv, [str(tiny_data), str(tmp_path / "old")])
    assert told[0] == told[1] and "has other rows of train in" in told[0]
    assert "give all nodes the same data" in told[0] and not (tmp_path / "run").exists()


def dtype_with_data_of_one_s_own(argv: list[str], folders: list[str]) -> str:
    return open_run(parse([*argv, "--data_dir", folders[dist.rank()]])).config.dtype


def test_a_test_split_that_one_host_has_does_not_matter(
    two_ranks, argv: list[str], tiny_data: Path, tmp_path: Path
) -> None:
    """No stage reads it."""
    shutil.copytree(tiny_data, tmp_path / "more")
    shutil.copy(
        next((tmp_path / "more" / "rte").glob("validation-*.parquet")),
        tmp_path / "more" / "rte" / "test-00000-of-00001.parquet",
    )
    for folders in ([str(tiny_data), str(tmp_path / "more")], [str(tmp_path / "more"), str(tiny_data)]):
        assert two_ranks.run(dtype_with_data_of_one_s_own, [*argv, "--dtype", "fp32"], folders) == ["fp32", "fp32"]
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize(("world_size", "expected"), [(1, (6, 8)), (2, (6, 4)), (4, (6, 2)), (16, (3, 1))])
def test_accumulation_follows_from_the_batch(world_size: int, expected: tuple[int, int]) -> None:
    micro, accum = batch_plan(48, 6, world_size)
    assert (micro, accum) == expected
    assert micro * accum * world_size == 48
