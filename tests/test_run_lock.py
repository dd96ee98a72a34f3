"""One run folder has one owner; dead owners are recognised, live ones respected."""

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peakd_ds.cluster import run_lock
from peakd_ds.errors import UserError


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    yield
    run_lock._held = None


def owned_by(run_dir: Path, **facts: Any) -> None:
    """Another start's lock."""
    owner = run_lock.describe_me() | {"token": "other"} | facts
    (run_dir / run_lock.NAME).write_text(json.dumps(owner))


def test_taken_and_given_back(tmp_path: Path) -> None:
    with run_lock.owned(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
        run_lock.check()
    assert list(tmp_path.iterdir()) == []


def test_live_process_keeps_it(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    owned_by(tmp_path, pid=child.pid, process_start=run_lock.process_start(child.pid))
    with pytest.raises(UserError, match=f"is in use: process {child.pid} on .* wait for its end or take another"):
        run_lock.take(tmp_path)
    child.kill()
    child.wait()
    assert json.loads((tmp_path / "lock.json").read_text())["token"] == "other"


def test_dead_process_does_not(tmp_path: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    owned_by(tmp_path, pid=child.pid)
    run_lock.take(tmp_path)
    run_lock.check()


def test_another_start_that_was_quicker_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two starts find the same dead owner; one asks Slurm about it while the other takes the folder."""
    child, quicker = subprocess.Popen(["true"]), subprocess.Popen(["sleep", "60"])
    child.wait()
    owned_by(tmp_path, pid=child.pid)
    seen, why_alive = [], run_lock.why_alive

    def slow(owner: dict[str, Any], me: dict[str, Any]) -> str | None:
        reason = why_alive(owner, me)
        if not seen:
            owned_by(tmp_path, pid=quicker.pid, process_start=run_lock.process_start(quicker.pid))
        seen.append(owner["pid"])
        return reason

    monkeypatch.setattr(run_lock, "why_alive", slow)
    with pytest.raises(UserError, match=f"is in use: process {quicker.pid} on "):
        run_lock.take(tmp_path)
    quicker.kill()
    quicker.wait()
    assert seen == [child.pid, quicker.pid]
    assert [file.name for file in tmp_path.iterdir()] == ["lock.json"]


def test_a_lock_that_is_put_aside_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    run_lock.take(tmp_path)
    file, aside = tmp_path / "lock.json", tmp_path / "aside"
    file.rename(aside)
    back = threading.Timer(0.3, aside.rename, (file,))
    back.start()
    run_lock.check()
    back.join()


def test_another_process_with_the_number_of_a_dead_one(tmp_path: Path) -> None:
    owned_by(tmp_path, process_start="1")
    run_lock.take(tmp_path)


def test_half_written_lock(tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text('{"tok')
    run_lock.take(tmp_path)


def test_host_of_which_nothing_is_known(tmp_path: Path) -> None:
    owned_by(tmp_path, host="elsewhere")
    with pytest.raises(UserError, match=r"on elsewhere.*nothing can be learnt.*delete .*lock.json"):
        run_lock.take(tmp_path)


def test_earlier_start_of_the_job_gives_way_and_stops_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run_lock.take(tmp_path)
    owned_by(tmp_path, job="7", restart=1, host="node3")
    with pytest.raises(UserError, match=r"now belongs to job 7, start 1, process .* on node3"):
        run_lock.check()
    with pytest.raises(UserError, match="is a later start of this job, whose start 0 is over"):
        run_lock.take(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    run_lock.take(tmp_path)


@pytest.mark.parametrize(("answer", "is_alive"), [("echo 7.0", True), ("true", False), ("echo >&2 x; exit 1", True)])
def test_slurm_is_asked_whether_the_step_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, is_alive: bool
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\n[ "$*" = "--noheader --steps=7.0" ] || exit 3\n{answer}\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    owned_by(tmp_path, job="7", step="0", host="node3")
    if is_alive:
        with pytest.raises(UserError, match="in use: job 7, start 0"):
            run_lock.take(tmp_path)
    else:
        run_lock.take(tmp_path)


def test_deleted_lock_stops_its_owner(tmp_path: Path) -> None:
    run_lock.take(tmp_path)
    (tmp_path / "lock.json").unlink()
    with pytest.raises(UserError, match="now belongs to nobody"):
        run_lock.check()
