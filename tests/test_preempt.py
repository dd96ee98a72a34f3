"""Stop requests: agreed by all ranks, saved, and gone on from."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_resume import ROOT, assert_same_curve, curve

from peakd_ds.ranks import preempt, signals


def ask_one_rank(number: int) -> tuple[str | None, str | None]:
    """Runs on every rank: what is agreed before and after rank 1 is asked to stop."""
    from peakd_ds.ranks import dist

    before = preempt.stop_agreed()
    if dist.rank() == 1:
        signals._note(number, None)
    after = preempt.stop_agreed()
    signals._received.clear()
    return before and before.name, after and after.name


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_what_one_rank_is_asked_all_agree_on(two_ranks: Any, number: int) -> None:
    assert two_ranks.run(ask_one_rank, number) == [(None, signal.Signals(number).name)] * 2


def test_usr1_counts_more_than_the_term_that_follows(single_rank: None) -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signals._note(number, None)
    assert preempt.stop_agreed() == signal.SIGUSR1
    signals._received.clear()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_signalled_run_saves_and_goes_on(
    tiny_data: Path,
    tiny_teacher: Callable[[str], Path],
    tmp_path: Path,
    env: dict[str, str],
    number: int,
    code: int,
) -> None:
    """The process is signalled in the middle of an epoch, and once before its imports are done."""
    words = "--task rte --num_hidden_layers 2 --no_ptp --epochs 6 --global_batch_size 8 --log_steps 1 --save_steps 0"
    paths = ["--teacher", str(tiny_teacher("rte")), "--data_dir", str(tiny_data), "--dtype", "fp32"]

    def start(run_dir: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "peakd_ds", *words.split(), *paths, "--run_dir", str(run_dir)]
        return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)

    whole = start(tmp_path / "whole")
    assert "results.json" in whole.communicate(timeout=240)[1]
    run_dir = tmp_path / "run"
    process = start(run_dir)
    time.sleep(0.5)  # Python is there, torch is not
    process.send_signal(number)
    told = process.communicate(timeout=240)[1]
    assert process.returncode == code, told
    assert f"stopped by {signal.Signals(number).name}; the same command goes on from here" in told
    assert (run_dir / "checkpoints" / "distill" / "latest").read_text() == "step-00000001"
    process = start(run_dir)
    while len(curve(run_dir) if (run_dir / "metrics.jsonl").exists() else []) < 15:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert code == process.wait(timeout=240)
    assert start(run_dir).wait(timeout=240) == 0
    assert_same_curve(tmp_path / "whole", run_dir, 1e-6)
