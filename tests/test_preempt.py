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
from types import SimpleNamespace
from typing import Any, cast

import pytest
from test_resume import ROOT, assert_same_curve, curve

from peakd_ds import command_line, plan
from peakd_ds.model.sizes import Parameters
from peakd_ds.ranks import dist, parents, preempt, signals
from peakd_ds.ranks.outcome import noted
from peakd_ds.teacher.online import OnlineTeacher


def signal_one_rank(number: int) -> tuple[str | None, str | None]:
    """Runs on every rank: the stop agreed on before and after rank 1 receives a signal."""
    from peakd_ds.ranks import dist

    before = preempt.stop_agreed()
    if dist.rank() == 1:
        signals.received.add(number)
    after = preempt.stop_agreed()
    signals.received.clear()
    return before and before.name, after and after.name


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_all_ranks_agree_on_the_signal_of_one(two_ranks: Any, number: int) -> None:
    assert two_ranks.run(signal_one_rank, number) == [(None, signal.Signals(number).name)] * 2


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_it_takes_precedence_over_the_term_that_follows(single_rank: None, number: int) -> None:
    signals.received.update((number, signal.SIGTERM))
    assert preempt.stop_agreed() == number
    signals.received.clear()


BLOCKED = """
import ctypes
from peakd_ds.ranks import signals
signals.listen()
print("listens", flush=True)
mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
libc.pthread_mutex_lock(mutex)
libc.pthread_mutex_lock(mutex)
"""
"""The main thread waits for itself, where no handler of Python runs."""


def test_only_a_late_second_ctrl_c_ends_at_once(env: dict[str, str]) -> None:
    """One Ctrl-C may come as several signals; a process that waits for a lost rank hears the second one too."""
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "listens\n"
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.1)
    time.sleep(signals.AGAIN_S)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert output == "ended at once by a second Ctrl-C; the same command goes on from the last checkpoint\n"


@pytest.mark.parametrize("error", [RuntimeError("g++ was killed"), KeyboardInterrupt()])
def test_an_error_after_ctrl_c_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    """Ctrl-C ends a compiler that the program has started."""
    monkeypatch.setattr(signals, "received", {signal.SIGINT})
    with pytest.raises(SystemExit) as caught, noted():
        raise error
    assert caught.value.code == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert "stopped by SIGINT (Ctrl-C) before it could save" in line and "the same command goes on" in line


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_alone_tells_of_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(dist, "leave", lambda: None)  # other tests share the process group
    with pytest.raises(SystemExit) as caught, noted():
        raise preempt.Stopped(signal.SIGINT)
    assert caught.value.code == 130
    assert ("stopped by SIGINT (Ctrl-C); the same command goes on from here" in capsys.readouterr().err) == (rank == 0)


def test_other_programs_end_in_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["peakd-eval"])
    monkeypatch.setattr("peakd_ds.train.run_rank", interrupted)
    with pytest.raises(SystemExit) as caught:
        command_line.start("peakd_ds.train:run_rank", "peakd-eval", parse_words=list)
    assert (caught.value.code, capsys.readouterr().err) == (130, "peakd-eval: stopped by Ctrl-C\n")


@pytest.mark.starts(3)
@pytest.mark.parametrize(("early", "late"), [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGUSR1)])
def test_signalled_run_saves_and_continues(
    tiny_data: Path,
    tiny_teacher: Callable[[str], Path],
    tmp_path: Path,
    env: dict[str, str],
    early: signal.Signals,
    late: signal.Signals,
) -> None:
    """A signal comes before the imports are done, and then in the middle of an epoch."""
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
    process.send_signal(early)
    output = process.communicate(timeout=240)[1]
    assert process.returncode == 128 + early, output
    assert output.count(f"stopped by {early.name}") == output.count("; the same command goes on from here") == 1
    assert "Traceback" not in output
    assert (run_dir / "checkpoints" / "distill" / "latest").read_text() == "step-00000001"
    process = start(run_dir)
    while len(curve(run_dir) if (run_dir / "metrics.jsonl").exists() else []) < 15:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(late)
    assert process.wait(timeout=240) == 128 + late
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


def test_the_plan_warns_where_deepspeed_would_kill_before_all_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = Parameters(100_000_000, 300_000_000, 0), Parameters(30_000_000, 40_000_000, 0)
    source = SimpleNamespace(is_classifier=False)
    trained = object.__new__(OnlineTeacher)
    trained.source = cast(Any, source)
    run = SimpleNamespace(config=SimpleNamespace(stages=("teacher", "distill")), teacher=trained)
    run.used_tokens = run.teacher_used_tokens = range(10)
    run.tokenizer = run.teacher_tokenizer = range(20)
    monkeypatch.delenv("CROSS_RANK", raising=False)
    assert plan._stopping(cast(Any, run), teacher, student) == []
    monkeypatch.setenv("CROSS_RANK", "0")
    (line,) = plan._stopping(cast(Any, run), teacher, student)
    assert "a checkpoint has 5.6 GB, which takes some 56 s to write at 100 MB/s (assumed)" in line
    assert "after Ctrl-C deepspeed waits 30 s and kills; start with torchrun --shutdown_timeout 112 instead" in line
    source.is_classifier = True
    assert plan._stopping(cast(Any, run), teacher, student) == [], "the student alone is trained"
