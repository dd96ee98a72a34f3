"""Stop requests: all ranks agree on one, save, and a later start continues from there."""

import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_resume import ROOT, assert_same_curve, curve

from peakd_ds.ranks import parents, preempt, signals


def signal_one_rank(number: int) -> tuple[str | None, str | None]:
    """Runs on every rank: the stop agreed on before and after rank 1 receives a signal."""
    from peakd_ds.ranks import dist

    before = preempt.stop_agreed()
    if dist.rank() == 1:
        signals.received.add(number)
    after = preempt.stop_agreed()
    signals.received.clear()
    return before and before.name, after and after.name


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_all_ranks_agree_on_the_signal_of_one(two_ranks: Any, number: int) -> None:
    assert two_ranks.run(signal_one_rank, number) == [(None, signal.Signals(number).name)] * 2


def test_usr1_takes_precedence_over_the_term_that_follows(single_rank: None) -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signals.received.add(number)
    assert preempt.stop_agreed() == signal.SIGUSR1
    signals.received.clear()


@pytest.mark.starts(3)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_signalled_run_saves_and_continues(
    tiny_data: Path,
    tiny_teacher: Callable[[str], Path],
    tmp_path: Path,
    env: dict[str, str],
    number: int,
    code: int,
) -> None:
    """The signal comes before the imports are done, and then in the middle of an epoch."""
    words = "--task rte --num_hidden_layers 2 --no_ptp --epochs 6 --global_batch_size 8 --log_steps 1 --save_steps 0"
    paths = ["--teacher", str(tiny_teacher("rte")), "--data_dir", str(tiny_data), "--dtype", "fp32"]

    def start(run_dir: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "peakd_ds", *words.split(), *paths, "--run_dir", str(run_dir)]
        return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)

    undisturbed = start(tmp_path / "undisturbed")
    assert "results.json" in undisturbed.communicate(timeout=240)[1]
    run_dir = tmp_path / "run"
    process = start(run_dir)
    time.sleep(0.5)  # Python has started, torch is not imported yet
    process.send_signal(number)
    output = process.communicate(timeout=240)[1]
    assert process.returncode == code, output
    assert f"stopped by {signal.Signals(number).name}; the same command goes on from here" in output
    assert (run_dir / "checkpoints" / "distill" / "latest").read_text() == "step-00000001"
    process = start(run_dir)
    while len(curve(run_dir) if (run_dir / "metrics.jsonl").exists() else []) < 15:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert code == process.wait(timeout=240)
    assert start(run_dir).wait(timeout=240) == 0
    assert_same_curve(tmp_path / "undisturbed", run_dir, 1e-6)


def test_a_launcher_that_is_gone_counts_as_term(single_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parents, "gone", lambda: 4321)
    assert preempt.stop_agreed() == signal.SIGTERM
    with pytest.raises(
        preempt.Stopped, match=r"^stopped, since the launcher \(process 4321\) is gone; the same command"
    ):
        preempt.leave_if(signal.SIGTERM)
    monkeypatch.setattr(parents, "gone", lambda: None)
    assert preempt.stop_agreed() is None
    assert str(preempt.Stopped(signal.SIGTERM)).startswith("stopped by SIGTERM;")


def test_a_run_without_a_launcher_outlives_its_shell_and_terminal(
    tiny_data: Path, tiny_teacher: Callable[[str], Path], tmp_path: Path, env: dict[str, str]
) -> None:
    """The shell is killed and its terminal is closed while the run prints there; the run is finished all the same."""
    words = "--task rte --num_hidden_layers 2 --no_ptp --epochs 3 --global_batch_size 8 --log_steps 1 --dtype fp32"
    run_dir = tmp_path / "run"
    paths = ["--teacher", str(tiny_teacher("rte")), "--data_dir", str(tiny_data), "--run_dir", str(run_dir)]
    command = shlex.join([sys.executable, "-m", "peakd_ds", *words.split(), *paths])
    shell, terminal = pty.fork()
    if shell == 0:
        os.chdir(ROOT)
        os.execve("/bin/bash", ["bash", "--norc", "--noprofile", "-i"], env)
    os.write(terminal, f"{command} & disown\n".encode())
    deadline = time.monotonic() + 240
    while not (run_dir / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 65536)
    os.kill(shell, signal.SIGKILL)
    os.waitpid(shell, 0)
    os.close(terminal)
    assert not (run_dir / "results.json").exists(), "the run was over before its terminal"
    while not (run_dir / "results.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
