"""A run that is stopped, however, goes on to the losses of one that never was: same ranks, other ranks, other stages.

Dropout is on where the number of ranks stays the same, since its masks come from (seed, stage, step, rank).
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peakd_ds import train
from peakd_ds.command_line import parse
from peakd_ds.engine import checkpoint

ROOT = Path(__file__).parent.parent


class Stopped(Exception):
    """Stands for a kill right after a checkpoint."""


def run_all(argv: list[str]) -> None:
    train.main(parse(argv))


def run_until_saved(argv: list[str], stage: str, step: int) -> str:
    """Runs on every rank: the program, cut off when the checkpoint of that step is on disk."""
    save = checkpoint.save

    def save_then_stop(folder: Path, engine: object, state: checkpoint.TrainState) -> None:
        save(folder, engine, state)
        if folder.name == stage and state.step >= step:
            raise Stopped

    checkpoint.save = save_then_stop  # type: ignore[assignment]
    try:
        run_all(argv)
    except Stopped:
        return "stopped"
    finally:
        checkpoint.save = save
    return "ended"


def curve(run_dir: Path) -> list[dict]:
    """The logged steps and evaluations, without what depends on the clock or on how the batch is dealt to ranks."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    clock = ("samples_per_s", "tokens_per_s", "padding_share")
    return [{key: value for key, value in record.items() if key not in clock} for record in records]


def assert_same_curve(first: Path, second: Path, tolerance: float) -> None:
    ours, theirs = curve(first), curve(second)
    assert [(r["stage"], r["step"]) for r in ours] == [(r["stage"], r["step"]) for r in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"stage", "split"}:
            if name == "grad_norm" and None in (one[name], other[name]):
                continue  # DeepSpeed does not tell it at stage 0
            assert one[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), (name, one, other)


@pytest.fixture(scope="module")
def argv(tiny_data: Path, tiny_encoder: Path) -> list[str]:
    words = "--task rte --num_hidden_layers 2 --epochs 2 --global_batch_size 16 --log_steps 1 --save_steps 4 --lr 1e-3"
    return [*words.split(), "--dtype", "fp32", "--teacher", str(tiny_encoder), "--data_dir", str(tiny_data)]


@pytest.fixture(scope="module")
def whole_run(argv: list[str], pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `argv` on two ranks, never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pools(2).run(run_all, [*argv, "--run_dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def whole_run_without_dropout(argv: list[str], pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole_without_dropout") / "run"
    pools(2).run(run_all, [*argv, "--dropout", "0", "--micro_batch_size", "4", "--run_dir", str(folder)])
    return folder


@pytest.mark.parametrize("world_size", [1, 4])
def test_same_curve_on_one_two_and_four_ranks(
    argv: list[str], pools, tmp_path: Path, whole_run_without_dropout: Path, world_size: int
) -> None:
    """One rank accumulating 4 times, two twice, four once: the same samples in each step, so the same losses."""
    words = ["--dropout", "0", "--micro_batch_size", "4", "--run_dir", str(tmp_path / "run")]
    pools(world_size).run(run_all, [*argv, *words])
    assert_same_curve(whole_run_without_dropout, tmp_path / "run", 1e-4)


@pytest.mark.parametrize(("stage", "step"), [("teacher", 4), ("ptp", 8), ("distill", 4)])
def test_stopped_at_a_checkpoint(
    argv: list[str], pools, tmp_path: Path, whole_run: Path, stage: str, step: int
) -> None:
    words = [*argv, "--run_dir", str(tmp_path / "run")]
    assert set(pools(2).run(run_until_saved, words, stage, step)) == {"stopped"}
    pools(2).run(run_all, words)
    assert_same_curve(whole_run, tmp_path / "run", 1e-6)


@pytest.mark.parametrize(("world_size", "ds_config"), [(1, "zero3_fp32"), (4, "zero1_fp32"), (2, "zero0_fp32")])
def test_resumed_at_another_size_and_stage(
    argv: list[str], pools, tmp_path: Path, whole_run_without_dropout: Path, world_size: int, ds_config: str
) -> None:
    words = [*argv, "--dropout", "0", "--run_dir", str(tmp_path / "run")]
    assert set(pools(2).run(run_until_saved, words, "distill", 4)) == {"stopped"}
    pools(world_size).run(run_all, [*words, "--student_ds_config", ds_config, "--micro_batch_size", "4"])
    assert_same_curve(whole_run_without_dropout, tmp_path / "run", 1e-4)


@pytest.mark.starts(4)
def test_killed_at_any_moment(argv: list[str], tmp_path: Path, env: dict[str, str]) -> None:
    """kill -9 at a random moment, then to the end: the curve of a run never stopped."""
    command = [sys.executable, "peakd_ds/train.py", *argv]

    def start(run_dir: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, "--run_dir", str(run_dir)], cwd=ROOT, env=env, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait(timeout=240) == 0
    num_steps = len(curve(tmp_path / "whole"))
    seed = random.randrange(10**6)
    num_steps_alive = num_steps * random.Random(seed).randrange(10, 90) // 100
    process, metrics, deadline = start(tmp_path / "run"), tmp_path / "run" / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= num_steps_alive):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait(timeout=10) == -signal.SIGKILL
    assert start(tmp_path / "run").wait(timeout=240) == 0, f"random seed {seed}"
    assert_same_curve(tmp_path / "whole", tmp_path / "run", 1e-6)
