"""The ranks' notes, srun's log and Slurm's state decide what becomes of a job: done, requeue or fail."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ENVIRONMENT

from peakd_ds import __version__
from peakd_ds.cluster import job
from peakd_ds.cluster.job import cause_of, decide
from peakd_ds.errors import UserError
from peakd_ds.ranks import dist, preempt
from peakd_ds.ranks.liveness import LostRank
from peakd_ds.ranks.notes import START_DIR, Note, note, read_notes
from peakd_ds.ranks.outcome import noted
from peakd_ds.ranks.slurm_env import num_nodes_of_this_start

RUNNING = {"JobState": "RUNNING", "Requeue": "1", "NumNodes": "2", "PreemptTime": "None"}
ENDING = RUNNING | {"JobState": "COMPLETING", "Reason": "None"}  # as after scancel
KILLED = "srun: error: node2: task 1: Killed\nsrun: launch/slurm: _step_signal: Terminating StepId=7.0\n"


def ended(how: str, rank: int = 0, cause: str = "", at: float = 0.0, **more: Any) -> Note:
    """A rank's note."""
    host = f"node{rank + 1}"
    return {"how": how, "rank": rank, "world_size": 0, "host": host, "cause": cause, "at": at, **more}


@pytest.mark.parametrize(
    ("notes", "job", "action"),
    [
        ([ended("finished", 0), ended("finished", 1)], RUNNING, "done"),
        ([ended("finished", 0), ended("lost", 1)], RUNNING, "requeue"),
        ([ended("stopped", signal="SIGUSR1")], RUNNING, "requeue"),
        ([ended("stopped", signal="SIGUSR1")], ENDING, "fail"),
        ([ended("stopped", signal="SIGUSR1")], RUNNING | {"Requeue": "0"}, "fail"),
        ([ended("stopped", signal="SIGTERM")], RUNNING, "requeue"),  # still RUNNING after the wait: a stray signal
        ([ended("stopped", signal="SIGTERM")], ENDING, "fail"),
        ([ended("stopped", signal="SIGTERM")], ENDING | {"Reason": "TimeLimit"}, "requeue"),
        ([ended("stopped", signal="SIGTERM")], RUNNING | {"PreemptTime": "2026-11-24T12:00:00"}, "requeue"),
        ([ended("refused", cause="--lr -1 is wrong")], RUNNING, "fail"),
        ([ended("lost")], RUNNING, "requeue"),
        ([], RUNNING, "requeue"),
        ([], ENDING, "fail"),
        ([], {}, "requeue"),
    ],
)
def test_verdict(notes: list[Note], job: dict[str, str], action: str) -> None:
    assert decide(notes, {}, job, "cause", num_idle_starts=1).action == action


def test_second_start_in_a_row_without_progress_is_the_last() -> None:
    for notes in ([], [ended("failed")], [ended("stopped", signal="SIGUSR1")]):
        assert decide(notes, {}, RUNNING, "rank 1 on node2: Killed", 1).action == "requeue"
        verdict = decide(notes, {}, RUNNING, "rank 1 on node2: Killed", 2)
        assert verdict.action == "fail" and "saved nothing new" in verdict.reason


def test_a_start_that_was_cut_off_leaves_a_later_one_alone() -> None:
    """Slurm answers on its host only when the job has been requeued and runs elsewhere."""
    lost = [ended("lost", cause="silent", world_size=2)]
    assert decide(lost, {}, RUNNING | {"Restarts": "1"}, "silent", 1, restart=1).action == "requeue"
    verdict = decide(lost, {}, RUNNING | {"Restarts": "1"}, "silent", 1, restart=0)
    assert verdict.action == "fail" and "start 1 of this job has begun" in verdict.reason


def test_bad_nodes_are_left_out_unless_all_are_bad() -> None:
    verdict = decide([], {"node2": "no GPU"}, RUNNING, "", 2)
    assert (verdict.action, verdict.exclude) == ("requeue", ["node2"]) and "node2 (no GPU)" in verdict.reason
    assert decide([], {"node1": "full", "node2": "full"}, RUNNING, "", 1).action == "fail"
    assert decide([], {"node2": "no GPU"}, RUNNING, "", 2, {"node1"}).action == "requeue"
    assert decide([], {"node2": "no GPU"}, RUNNING, "", 2, {"node1", "node2"}).action == "fail", "it would never end"


def test_a_job_of_one_node_moves_to_another() -> None:
    one = RUNNING | {"NumNodes": "1", "TotalNodes": "9"}
    assert decide([], {"node1": "scratch is full"}, one, "", 1).exclude == ["node1"]
    assert decide([], {"node3": "scratch is full"}, one, "", 3, {"node1", "node2"}).action == "requeue"
    assert decide([], {"node4": "scratch is full"}, one, "", 4, {"node1", "node2", "node3"}).action == "fail"
    for fault in ("0 of 4 GPUs are visible; run folder /r has 3 MiB free", "the open-file limit is 256"):
        verdict = decide([], {"node1": fault}, one, "", 1)
        assert verdict.action == "fail" and "every node is bad" in verdict.reason, "all nodes share the fault"
    assert decide([], {"node1": "full"}, one | {"ReqNodeList": "node1"}, "", 1).action == "fail"
    assert decide([], {"node1": "full"}, one | {"ReqNodeList": "(null)"}, "", 1).action == "requeue"
    assert decide([], {"node2": "full"}, one | {"TotalNodes": "2"}, "", 1, {"node1"}).action == "fail"
    assert decide([], {"node1": "full"}, one | {"TotalNodes": "1"}, "", 1).action == "fail", "there is no other node"


def test_cause_is_the_killed_rank_and_not_those_that_lost_it() -> None:
    lost = ended("lost", 0, "RuntimeError: Connection closed by peer")
    assert cause_of([lost], KILLED) == "rank 1 on node2: Killed"
    assert cause_of([lost, ended("failed", 1, "ValueError: x")], KILLED) == "rank 1 on node2: ValueError: x"
    assert cause_of([lost], "srun: error: node1: task 0: Exited with exit code 1\n").startswith("rank 0 on node1: Runt")
    assert cause_of([], "srun: error: Node failure on node2\n" + KILLED) == "node node2 failed"
    several = "srun: error: node2: tasks 2-3: Killed\nsrun: error: node1: task 0: Terminated\n"
    assert cause_of([], several) == "rank 2-3 on node2: Killed"


def test_cause_is_the_host_without_notes() -> None:
    lost = ended("lost", 0, "RuntimeError: Connection reset by peer", world_size=2)
    assert cause_of([lost], "", ["node1", "node2"]).startswith("rank 1 on node2 is gone without a note, and rank 0 on")
    assert cause_of([lost, ended("lost", 1, at=1.0)], "", ["node1", "node2"]).startswith(
        "rank 0 on node1: RuntimeError"
    )


def test_idle_starts_are_counted_from_the_newest_back(tmp_path: Path) -> None:
    def end(restart: int, **facts: Any) -> None:
        (tmp_path / f"7-{restart}").mkdir()
        if facts:
            (tmp_path / f"7-{restart}" / "end.json").write_text(json.dumps(facts))

    end(0, is_idle=True)
    end(1, is_idle=False)
    end(9, is_idle=True)
    end(10)  # cut off with its host
    end(11, is_idle=True)
    assert job._num_idle_starts(tmp_path, "7") == 2
    (tmp_path / "7-9" / "bad_nodes.json").write_text("{}")
    assert job._num_idle_starts(tmp_path, "7") == 1


def test_position_shows_progress(tmp_path: Path) -> None:
    assert job.position(tmp_path, tmp_path / "cache") == []
    for stage, name, text in (("teacher", "FINISHED.json", "{}"), ("ptp", "latest", "step-00000004")):
        (tmp_path / "checkpoints" / stage).mkdir(parents=True)
        (tmp_path / "checkpoints" / stage / name).write_text(text)
    assert job.position(tmp_path, tmp_path / "cache") == ["teacher finished", "ptp step-00000004"]
    (tmp_path / "cache" / "train").mkdir(parents=True)
    (tmp_path / "cache" / "train" / "part-00.sha256").touch()
    assert job.position(tmp_path, tmp_path / "cache")[-1] == "1 parts of the teacher cache"
    (tmp_path / "cache" / "train" / "layer-03-part-00.sha256").touch()
    assert job.position(tmp_path, tmp_path / "cache")[-1] == "2 parts of the teacher cache", "a layer is progress too"


@pytest.fixture
def start_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(dist, "leave", lambda: None)  # other tests share the process group
    monkeypatch.setenv(START_DIR, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    return tmp_path


@pytest.mark.parametrize(
    ("error", "how", "code"),
    [
        (preempt.Stopped(preempt.signal.SIGUSR1), "stopped", 138),
        (preempt.Stopped(preempt.signal.SIGTERM), "stopped", 143),
        (UserError("--lr"), "refused", None),
        (RuntimeError("[gloo] Connection closed by peer [10.77.0.12]:5531"), "lost", 1),
        (LostRank("rank 1 of 2 did not come"), "lost", 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"), "failed", 1),
        (MemoryError("too much"), "failed", 1),
        (OSError(12, "Cannot allocate memory"), "failed", 1),
        (RuntimeError("Resource temporarily unavailable"), "failed", 1),
        (ZeroDivisionError("division"), "failed", None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "failed", None),
    ],
)
def test_rank_notes_how_it_ended(
    start_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    how: str,
    code: int | None,
) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    with pytest.raises(SystemExit if code else type(error)) as caught, noted():
        raise error
    assert code is None or caught.value.code == code
    (first,) = read_notes(start_dir)
    assert (first["how"], first["rank"]) == (how, 3) and str(error) in first["cause"]
    assert first.get("signal") == (error.signal.name if isinstance(error, preempt.Stopped) else None)
    note("lost", "later")
    assert read_notes(start_dir) == [first], "the first note is kept"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (code is not None) and all(line.startswith("rank 3 on ") for line in lines)


def test_a_lone_rank_has_lost_nobody(start_dir: Path) -> None:
    """Another program refuses its connection: a traceback helps to find it."""
    with pytest.raises(RuntimeError), noted():
        raise RuntimeError("Connection refused")
    assert read_notes(start_dir)[0]["how"] == "failed"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"how": "lost"}'])
def test_a_damaged_note_is_left_out(start_dir: Path, content: bytes) -> None:
    note("failed", "it divides by zero")
    (start_dir / "rank-00001.json").write_bytes(content)
    assert [found["rank"] for found in read_notes(start_dir)] == [3]


def test_no_note_outside_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(START_DIR, raising=False)
    monkeypatch.chdir(tmp_path)
    note("finished")
    assert not any(tmp_path.iterdir())


def test_open_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    words = ["--task", "rte", "--teacher", "somewhere"]
    with pytest.raises(UserError, match="--run_dir is missing"):
        job.open_start(words)
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    folder = job.open_start(words)
    assert folder == tmp_path / "run" / "logs" / "7-0"
    facts = json.loads((folder / "start.json").read_text())
    assert facts["nodes"] == "node[1-2]" and facts["words"] == words and facts["position"] == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        job.open_start([*words, "--run_dir", str(tmp_path / "file" / "run")])


def test_files_of_a_start_follow_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o077)
    try:
        folder = job.open_start(["--task", "rte", "--teacher", "somewhere", "--run_dir", str(tmp_path / "run")])
        monkeypatch.setenv(START_DIR, str(folder))
        note("finished")
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(files) >= 3 and all(file.stat().st_mode & 0o077 == 0 for file in files), files


def test_a_folder_whose_name_srun_would_change(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has a backslash in its path.*choose a folder without one"):
        job.open_start(["--task", "rte", "--teacher", "somewhere", "--run_dir", str(tmp_path / "a\\b")])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        *([], ["x"], ["[]"], ["\0"], ["open", "[]"], ["open", "\0"], ["open", "--run_dir", "a\0b"]),
        *(["watch"], ["watch", "START"], ["watch", "START", "x"], ["watch", "START", "\0"], ["watch", "START", "1"]),
        *(["watch", "START", "99999"], ["watch", "a\0b", "99999"], ["close"], ["close", "START", "x"]),
        *(["close", "START"], ["close", "nowhere"], ["close", "a\0b"], ["close", "[]"], ["close", ""]),
    ],
)
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b"\xff\0", b'{"job": 7}'])
def test_wrong_words(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    content: bytes | None,
) -> None:
    """One line and exit code 2, whatever is wrong with the words or the start's folder."""
    if content is not None:
        (tmp_path / "start.json").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["job", *(str(tmp_path) if word == "START" else word for word in words)])
    with pytest.raises(SystemExit) as ended:
        job.cli()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("distill.sh: error: ") and "\0" not in line


def test_restart_count_that_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "x")
    with pytest.raises(UserError, match="SLURM_RESTART_COUNT 'x' is not a number"):
        job.open_start(["--task", "rte", "--teacher", "somewhere", "--run_dir", str(tmp_path / "run")])


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    """The package inside a repository of somebody else, which has a secret and a diff program, and tracks not ours."""
    root = tmp_path / "theirs"
    for name in ("peakd_ds", "kernels", "ds_configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(job.__file__).parents[2] / name, root / "venv" / name, ignore=ignored)
    marker = tmp_path / "marker"
    (tmp_path / "differ").write_text(f"#!/bin/sh\ntouch {marker}\n")
    (tmp_path / "differ").chmod(0o755)
    (root / "secret.env").write_text("nothing\n")
    (root / ".gitattributes").write_text("* diff=ours\n")
    git(root, "init", "-q")
    git(root, "config", "diff.ours.command", str(tmp_path / "differ"))
    git(root, "config", "diff.ours.textconv", str(tmp_path / "differ"))
    git(root, "config", "diff.external", str(tmp_path / "differ"))
    git(root, "config", "core.fsmonitor", str(tmp_path / "differ"))
    git(root, "add", "secret.env", ".gitattributes")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b.example", "commit", "-qm", "theirs")
    (root / "secret.env").write_text("API_KEY=abc\n")
    marker.unlink(missing_ok=True)
    return root


def git(root: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(root), *words], check=True)


def opened_with(package_root: Path, run_dir: Path) -> dict[str, str]:
    """Contents of the files that `job open` of this copy of the package makes."""
    words = ["--task", "rte", "--teacher", "somewhere", "--run_dir", str(run_dir)]
    env = {**ENVIRONMENT, "PYTHONPATH": str(package_root)}
    done = subprocess.run(
        [sys.executable, "-m", "peakd_ds.cluster.job", "open", *words],
        env=env,
        cwd=run_dir.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return {file.name: file.read_text() for file in Path(done.stdout.strip()).iterdir()}


def test_code_of_a_strangers_repository_is_not_recorded(copied_package: Path, tmp_path: Path) -> None:
    files = opened_with(copied_package / "venv", tmp_path / "run")
    assert "code.diff" not in files and json.loads(files["start.json"])["code"] == f"version {__version__}"
    assert "API_KEY" not in str(files) and not (tmp_path / "marker").exists()


def test_only_our_code_is_recorded(copied_package: Path, tmp_path: Path) -> None:
    """The same repository after it has taken the package in: its other files stay out of code.diff."""
    git(copied_package, "add", "venv")
    git(copied_package, "-c", "user.name=a", "-c", "user.email=a@b.example", "commit", "-qm", "ours", "--", "venv")
    module = copied_package / "venv" / "peakd_ds" / "ptp.py"
    module.write_text(module.read_text() + "# changed\n")
    (tmp_path / "marker").unlink(missing_ok=True)
    files = opened_with(copied_package / "venv", tmp_path / "run")
    assert json.loads(files["start.json"])["code"].endswith(" with code.diff")
    assert "+# changed" in files["code.diff"] and "API_KEY" not in str(files)
    assert not (tmp_path / "marker").exists()


def test_nodes_of_a_step_and_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    assert num_nodes_of_this_start() == 1
    monkeypatch.setenv("SLURM_NNODES", "4")
    assert num_nodes_of_this_start() == 4
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
    assert num_nodes_of_this_start() == 1
