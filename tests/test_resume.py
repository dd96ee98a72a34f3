"""A stopped run continues to the losses of a run that was never stopped, on any number of ranks and at any ZeRO stage.

Dropout is on where the number of ranks stays the same, since its masks come from (seed, stage, step, rank). Models that
a finished stage has saved are checked before they are read.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_files import DAMAGES, damageable, delete

from peakd_ds import train
from peakd_ds.command_line import parse
from peakd_ds.engine import checkpoint
from peakd_ds.errors import UserError
from peakd_ds.files import damage_of

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
                continue  # DeepSpeed does not report it at stage 0
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


# -- Models that a finished stage has saved ----------------------------------------------------------------------------

SAVED = {"teacher": ("teacher", "ptp"), "ptp": ("checkpoints/ptp/student", "distill")}
"""For each stage: the folder of its model, and the stage that reads it."""


def refusal_of(argv: list[str]) -> str:
    """Runs on every rank: the error message of the program."""
    try:
        run_all(argv)
    except UserError as error:
        return str(error)
    return "no error"


def stages_until(stage: str) -> list[str]:
    return ["--stages", "teacher,ptp,distill".split(stage)[0] + stage]


@pytest.fixture(scope="module")
def saved(argv: list[str], pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose teacher and ptp stages are finished."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    pools(2).run(run_all, [*argv, "--run_dir", str(folder), *stages_until("ptp")])
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("stage", SAVED)
def test_a_damaged_model_is_refused_on_all_ranks(
    argv: list[str], pools, saved: Path, tmp_path: Path, stage: str, damage: Callable[[Path], None]
) -> None:
    """Each file in turn, before a later stage reads it."""
    name, reader = SAVED[stage]
    expected = damageable(saved / name)
    assert {"model.safetensors", "config.json", "SHA256SUMS", "DONE"} < {file.name for file in expected}
    for file in expected:
        run_dir = Path(shutil.copytree(saved, tmp_path / file.name))
        if reader == "ptp":
            shutil.rmtree(run_dir / "checkpoints" / "ptp")
        damage(run_dir / name / file.name)
        before = sorted(run_dir.rglob("*"))
        messages = pools(2).run(refusal_of, [*argv, "--run_dir", str(run_dir), *stages_until(reader)])
        for message in messages:
            assert f"{run_dir / name} is damaged (" in message and file.name in message.split(";")[0]
            assert ("is missing" in message) == (damage is delete)
            finished = run_dir / "checkpoints" / stage / "FINISHED.json"
            assert f"; delete it and {finished}, and the same command (with the {stage} stage) writes it" in message
            assert "\n" not in message
        assert [path for path in sorted(run_dir.rglob("*")) if ".safetensors" in path.name] == [
            path for path in before if ".safetensors" in path.name
        ], "nothing was trained"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_teacher_is_named_although_its_outputs_are_cached(
    argv: list[str], pools, saved: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    run_dir = Path(shutil.copytree(saved, tmp_path / "run"))
    shutil.rmtree(run_dir / "checkpoints" / "ptp")
    words = [*argv, "--run_dir", str(run_dir), "--teacher_mode", "cached"]
    pools(2).run(run_all, [*words, *stages_until("ptp")])
    assert (run_dir / "teacher_cache" / "train" / "manifest.json").exists()
    damage(run_dir / "teacher" / "model.safetensors")
    for message in pools(2).run(refusal_of, words):
        assert f"{run_dir / 'teacher'} is damaged (model.safetensors is " in message


@pytest.mark.parametrize("stage", SAVED)
@pytest.mark.parametrize("damage", [*DAMAGES, shutil.rmtree])
def test_the_remedy_writes_the_model_again(
    argv: list[str], pools, saved: Path, whole_run: Path, tmp_path: Path, stage: str, damage: Callable[[Path], None]
) -> None:
    """After it, the run ends as one that was never damaged."""
    name, _ = SAVED[stage]
    run_dir = Path(shutil.copytree(saved, tmp_path / "run"))
    damage(run_dir / name / "model.safetensors" if damage is not shutil.rmtree else run_dir / name)
    words = [*argv, "--run_dir", str(run_dir)]
    message = pools(2).run(refusal_of, words)[0]
    assert f"{run_dir / name} is damaged (" in message
    shutil.rmtree(run_dir / name, ignore_errors=True)
    (run_dir / "checkpoints" / stage / "FINISHED.json").unlink()
    pools(2).run(run_all, words)
    assert damage_of(run_dir / name) is None
    for file in ("model.safetensors", "config.json"):
        assert (run_dir / name / file).read_bytes() == (saved / name / file).read_bytes()
    assert_same_curve(whole_run, run_dir, 1e-6)


@pytest.mark.parametrize(("name", "stage"), [("teacher", "teacher"), ("student", "distill")])
def test_a_model_that_is_gone_after_the_end(
    argv: list[str], pools, whole_run: Path, tmp_path: Path, name: str, stage: str
) -> None:
    """The results would otherwise say that there never was one."""
    run_dir = Path(shutil.copytree(whole_run, tmp_path / "run"))
    shutil.rmtree(run_dir / name)
    words, finished = [*argv, "--run_dir", str(run_dir)], run_dir / "checkpoints" / stage / "FINISHED.json"
    for message in pools(2).run(refusal_of, words):
        assert f"{run_dir / name} is damaged (it is missing); delete it and {finished}, and the same" in message
    finished.unlink()
    pools(2).run(run_all, words)
    weights = f"{name}/model.safetensors"
    assert (run_dir / weights).read_bytes() == (whole_run / weights).read_bytes()
    assert json.loads((run_dir / "results.json").read_text())[name]["params"] > 0
