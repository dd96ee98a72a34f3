"""A folder has one owner at a time: live owners are respected or waited for, dead ones are recognised."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from peakd_ds.cluster import run_lock
from peakd_ds.errors import UserError
from peakd_ds.ranks import preempt


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    yield
    run_lock._held = None


def owned_by(run_dir: Path, **facts: Any) -> None:
    """Another start's lock."""
    owner = asdict(run_lock.this_start()) | {"token": "other"} | facts
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

    def slow(owner: run_lock.Owner, mine: run_lock.Owner) -> str | None:
        reason = why_alive(owner, mine)
        if not seen:
            owned_by(tmp_path, pid=quicker.pid, process_start=run_lock.process_start(quicker.pid))
        seen.append(owner.pid)
        return reason

    monkeypatch.setattr(run_lock, "why_alive", slow)
    with pytest.raises(UserError, match=f"is in use: process {quicker.pid} on "):
        run_lock.take(tmp_path)
    quicker.kill()
    quicker.wait()
    assert seen == [child.pid, quicker.pid]
    assert [file.name for file in tmp_path.iterdir()] == ["lock.json"]


def test_check_waits_for_a_lock_that_is_moved_aside(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("content", [b"", b'{"tok', b"[]", b"{}", b"7", b"\xff\xfe{}"])
def test_damaged_lock(tmp_path: Path, content: bytes) -> None:
    """Both uses refuse it in one line with the file and the remedy, and leave it unchanged."""
    file = tmp_path / "lock.json"
    file.write_bytes(content)
    for use in (run_lock.owned(tmp_path), run_lock.waiting_for(file, print)):
        with pytest.raises(UserError, match=f"^{file} is damaged: it names no start; delete it if [^\n]*$"), use:
            pass
    assert file.read_bytes() == content and list(tmp_path.iterdir()) == [file]


def test_lock_that_is_damaged_later_stops_its_owner(tmp_path: Path) -> None:
    with run_lock.owned(tmp_path):
        (tmp_path / "lock.json").write_text("[]")
        with pytest.raises(UserError, match=r"lock\.json is damaged"):
            run_lock.check()
    assert (tmp_path / "lock.json").read_text() == "[]"


def test_lock_of_the_previous_version(tmp_path: Path) -> None:
    """Its fields have not changed."""
    fields = "token host pid process_start cluster job step restart since".split()
    assert list(asdict(run_lock.this_start())) == fields
    owned_by(tmp_path, pid=0, process_start="1")
    run_lock.take(tmp_path)


def test_host_of_which_nothing_is_known(tmp_path: Path) -> None:
    owned_by(tmp_path, host="elsewhere")
    with pytest.raises(UserError, match=r"on elsewhere.* cannot find out whether it still runs; .*delete .*lock.json"):
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


# -- A folder that one start builds ------------------------------------------------------------------------------------


def build_lock(tmp_path: Path, age_s: float = 0, **facts: Any) -> tuple[Path, list[str]]:
    """Another start's lock of a folder that it builds, and a list for the messages about it."""
    owned_by(tmp_path, **facts)
    file = tmp_path / "lock.json"
    os.utime(file, (time.time() - age_s,) * 2)
    return file, []


def test_dead_builder_is_not_waited_for(tmp_path: Path) -> None:
    file, said = build_lock(tmp_path, process_start="1")
    with run_lock.waiting_for(file, said.append):
        assert json.loads(file.read_text())["pid"] == os.getpid()
        run_lock.check()  # passes: it guards only run folders
    assert said == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_live_builder_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setattr(run_lock, "POLL_S", 0.1)
    file, said = build_lock(tmp_path, **({} if host == "here" else {"host": host}))
    threading.Timer(0.35, file.unlink).start()
    with run_lock.waiting_for(file, said.append):
        assert len(said) == 1, "once"
        assert f"{tmp_path} is being built by process {os.getpid()} on" in said[0] and f"delete {file}" in said[0]


def test_waiting_ends_with_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single_rank: None) -> None:
    file, said = build_lock(tmp_path)
    monkeypatch.setattr(preempt, "stop_agreed", lambda: signal.SIGTERM)
    with pytest.raises(preempt.Stopped), run_lock.waiting_for(file, said.append):
        pass
    assert json.loads(file.read_text())["token"] == "other"


@pytest.mark.parametrize(("answer", "is_alive"), [("echo 7.0", True), ("true", False)])
def test_slurm_is_asked_only_about_a_silent_builder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, is_alive: bool
) -> None:
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\n{answer}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(run_lock, "POLL_S", 0.0)
    folder = tmp_path / "cache"
    folder.mkdir()
    file, said = build_lock(folder, age_s=run_lock.SILENT_S - 60, job="7", step="0", host="node3")
    monkeypatch.setattr(preempt, "stop_agreed", lambda: signal.SIGTERM)
    with pytest.raises(preempt.Stopped), run_lock.waiting_for(file, said.append):
        pass
    assert not (tmp_path / "asked").exists()
    os.utime(file, (0, time.time() - run_lock.SILENT_S - 60))
    if is_alive:
        with pytest.raises(UserError, match=f"^{file} is held by job 7, start 0, .*nothing was built for 31 minutes"):
            run_lock.waiting_for(file, said.append).__enter__()
    else:
        with run_lock.waiting_for(file, said.append):
            pass
    assert (tmp_path / "asked").exists() and file.exists() == is_alive


def test_touched_lock_is_not_silent(tmp_path: Path) -> None:
    file, _ = build_lock(tmp_path, age_s=3600)
    run_lock.touch(file)
    assert time.time() - file.stat().st_mtime < 60
    file.unlink()
    run_lock.touch(file)
    assert not file.exists(), "a user has deleted it"
