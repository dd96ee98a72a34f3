"""What slurm/distill.sh runs before, beside and after srun. The script itself decides nothing.

    python -m peakd_ds.cluster.job open TRAIN.PY-OPTIONS   checks the options, makes the start's folder, prints its path
    python -m peakd_ds.cluster.job watch START PID         ends an srun that waits for a host that is gone
    python -m peakd_ds.cluster.job close START             says how the start ended, and requeues the job or does not

Each start of a job has a folder RUN/logs/JOB-RESTART: start.json, code.diff, settings.yaml, HOST.log (each line with
its rank), srun.log, and the ranks' notes of how they ended. The notes and Slurm's state of the job decide what becomes
of it. srun's exit code does not: with --kill-on-bad-exit it may be that of a rank which was killed because another one
failed.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

from peakd_ds import __version__
from peakd_ds.cluster import run_folder
from peakd_ds.command_line import parse, to_yaml
from peakd_ds.config.outputs import STAGES
from peakd_ds.errors import UserError, exit_with, first_line
from peakd_ds.files import parse_json, write_atomically
from peakd_ds.ranks.notes import Note, read_notes
from peakd_ds.ranks.slurm_env import job_name

TERM_WAIT_S = 60  # after SIGTERM, Slurm shows within this time what it is doing with the job
LOST_WAIT_S = 10  # ranks that have lost another one have ended by then
SHARED_FAULTS = ("run folder", "the open-file limit")  # beginnings of preflight's faults that all nodes share
MAX_BAD_NODES = 4  # that a one-node job tries, one after another


# -- Before srun -------------------------------------------------------------------------------------------------------


class StartFacts(TypedDict):
    """Contents of start.json."""

    job: str
    restart: int
    nodes: str
    words: list[str]
    """train.py's options."""
    code: str
    teacher_cache: str
    at: float
    """Seconds since 1970."""
    position: list[str]
    """Where the run stood before this start."""


def open_start(argv: Sequence[str]) -> Path:
    """Check the options of train.py and make the folder of this start.

    Raises:
        UserError: an option is wrong, or the run folder is not given, not a run's, not writable or has a
            backslash in its path.
    """
    config = parse(argv)
    env = os.environ
    job, restart, run_dir = str(job_name()), _number("SLURM_RESTART_COUNT", "0"), Path(config.run_dir).absolute()
    if "\\" in str(run_dir):
        raise UserError(
            f"--run_dir {config.run_dir} has a backslash in its path, which srun --output takes out of file names; "
            "choose a folder without one"
        )
    teacher_cache = Path(config.teacher_cache or run_dir / "teacher_cache").absolute()
    folder = run_dir / "logs" / f"{job}-{restart}"
    run_folder.check_owner(run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("rank-*.json"):
            old.unlink()
        facts = StartFacts(
            job=job,
            restart=restart,
            nodes=env.get("SLURM_JOB_NODELIST", ""),
            words=list(argv),
            code=_code_revision(folder),
            teacher_cache=str(teacher_cache),
            at=time.time(),
            position=position(run_dir, teacher_cache),
        )
        write_atomically(folder / "start.json", json.dumps(facts, indent=2) + "\n")
        write_atomically(folder / "settings.yaml", to_yaml(config))
    except OSError as error:
        raise UserError(
            f"--run_dir {config.run_dir} cannot be written on {socket.gethostname()} ({error}); give a folder on a "
            "file system that all nodes share and may write to"
        ) from error
    return folder


OWN_FOLDERS = ("peakd_ds", "kernels", "ds_configs")


def _code_revision(folder: Path) -> str:
    """The commit that runs here, or the version where git does not track this code; its changes go into code.diff.

    An installed package may lie inside a repository that is somebody else's: its commit and its changes say nothing
    about this code, and may hold secrets. git runs none of the programs that a repository's configuration may name.
    """

    def git(*words: str) -> str:
        command = ["git", "-c", "core.fsmonitor=false", "-C", str(Path(__file__).parents[2]), *words]
        env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, env=env).stdout

    try:
        git("ls-files", "--error-unmatch", "--", str(Path(__file__).resolve()))
        revision = git("rev-parse", "HEAD").strip()
        difference = git("diff", "--no-ext-diff", "--no-textconv", "HEAD", "--", *OWN_FOLDERS)
    except (OSError, subprocess.CalledProcessError):
        return f"version {__version__}"
    if difference:
        (folder / "code.diff").write_text(difference)
    return revision + (" with code.diff" if difference else "")


def position(run_dir: Path, teacher_cache: Path) -> list[str]:
    """How far the run has come on disk, stage by stage; a start that leaves it unchanged has made no progress."""
    stages = []
    for stage in STAGES:
        folder = run_dir / "checkpoints" / stage
        if (folder / "FINISHED.json").exists():
            stages.append(f"{stage} finished")
        elif (folder / "latest").exists():
            stages.append(f"{stage} {(folder / 'latest').read_text()}")
    num_parts = len(list(teacher_cache.glob("*/*part-*.sha256")))
    return [*stages, *([f"{num_parts} parts of the teacher cache"] if num_parts else [])]


# -- While srun runs ---------------------------------------------------------------------------------------------------


def watch(start: Path, pid: int) -> None:
    """Once a rank has noted a loss or a failure, give srun some time to end, then kill it.

    srun would wait for the tasks of a host that is gone until Slurm declares the node down (SlurmdTimeout, 300 s by
    default).
    """
    while not any(note["how"] in ("lost", "failed") for note in read_notes(start)):
        time.sleep(1)
    time.sleep(LOST_WAIT_S)
    print("srun still waits for ranks that are gone; ending it", flush=True)
    os.kill(pid, signal.SIGKILL)


# -- After srun: what becomes of the job -------------------------------------------------------------------------------


@dataclass
class Verdict:
    """What becomes of the job."""

    action: str
    """done, requeue or fail."""
    reason: str
    exclude: list[str] = field(default_factory=list)
    """Nodes that Slurm must not give the job again."""


def decide(
    notes: Sequence[Note],
    bad_nodes: dict[str, str],
    job: dict[str, str],
    cause: str,
    num_idle_starts: int,
    bad_before: Collection[str] = (),
    restart: int = 0,
) -> Verdict:
    """What becomes of the job, from the ranks' notes, preflight's bad nodes and Slurm's state of the job.

    Args:
        bad_nodes: Nodes that preflight found bad in this start, and why.
        job: Fields of `scontrol show job`, and TotalNodes of its partition; empty if Slurm does not answer.
        cause: Who failed and why, in one line.
        num_idle_starts: Starts of this job in a row, this one included, that have saved nothing new.
        bad_before: Nodes that earlier starts of this job found bad.
        restart: Number of this start.
    """
    outcomes = {note["how"] for note in notes}
    state = job.get("JobState", "RUNNING")
    if outcomes == {"finished"}:
        return Verdict("done", "the run is finished")
    if int(job.get("Restarts", restart)) > restart:  # this host was cut off, and scontrol answers only now
        return Verdict("fail", f"start {job['Restarts']} of this job has begun; this start leaves it alone")
    if state != "RUNNING" and job.get("Reason") != "TimeLimit":
        # scancel by a user, or a requeue by Slurm: scontrol does not say which, and a requeue would undo the scancel.
        return Verdict("fail", f"Slurm is ending the job ({state}); what was saved is kept")
    if "refused" in outcomes:
        return Verdict("fail", cause)
    if bad_nodes:
        return _decide_on_bad_nodes(bad_nodes, job, bad_before)
    reason = cause
    if "stopped" in outcomes:
        stop = next(note for note in notes if note["how"] == "stopped")
        reason = "stopped and saved: " + ("preempted" if _is_preempted(job) else stop["signal"])
    if num_idle_starts > 1:
        return Verdict("fail", f"{num_idle_starts} starts in a row have saved nothing new; not requeued: {reason}")
    return _requeue(reason, job)


def _decide_on_bad_nodes(bad_nodes: dict[str, str], job: dict[str, str], bad_before: Collection[str]) -> Verdict:
    """Requeue without the bad nodes, unless another node would be no better or there is none."""
    names = ", ".join(f"{node} ({reason})" for node, reason in bad_nodes.items())
    num_nodes, all_bad = int(job.get("NumNodes", "0").split("-")[0]), bad_nodes.keys() | set(bad_before)
    faults = [fault for reasons in bad_nodes.values() for fault in reasons.split("; ")]
    is_chosen_by_user = job.get("ReqNodeList", "(null)") != "(null)"
    would_recur = num_nodes != 1 or is_chosen_by_user or any(fault.startswith(SHARED_FAULTS) for fault in faults)
    if len(bad_nodes) >= num_nodes and would_recur:
        return Verdict("fail", f"every node is bad: {names}")
    if not bad_nodes.keys() - bad_before:
        return Verdict("fail", f"Slurm has given the job bad nodes again that it excludes: {names}")
    if num_nodes == 1 and len(all_bad) >= min(MAX_BAD_NODES, int(job.get("TotalNodes", MAX_BAD_NODES))):
        return Verdict("fail", f"all {len(all_bad)} nodes that the job has tried are bad, now {names}")
    return _requeue(f"bad nodes, excluded from now on: {names}", job, list(bad_nodes))


def _requeue(reason: str, job: dict[str, str], exclude: Sequence[str] = ()) -> Verdict:
    if job.get("Requeue") == "0":
        return Verdict("fail", f"{reason}; the job has --no-requeue: submit the same command again to go on")
    return Verdict("requeue", reason, list(exclude))


def cause_of(notes: Sequence[Note], srun_log: str, hosts: Sequence[str] = ()) -> str:
    """Who failed first and why: rank, host and cause in one line; "" if neither notes nor srun say.

    A rank that was killed leaves no note, but srun names it; the ranks that lost it do leave notes. A host that is gone
    is at first not named by srun either: it is one that has a log but no note.

    Args:
        hosts: Hosts that have a log.
    """
    by_time = sorted(notes, key=lambda note: note["at"])
    for how in ("refused", "failed"):
        for note in by_time:
            if note["how"] == how:
                return f"rank {note['rank']} on {note['host']}: {note['cause']}"
    ranks_with_notes = {note["rank"] for note in notes}
    for line in srun_log.splitlines():
        dead_node = re.search(r"Node failure on (\S+)", line)
        if dead_node:
            return f"node {dead_node[1]} failed"
        found = re.search(r"srun: error: (\S+): tasks? ([\d,-]+): (.+)", line)
        if found and int(re.split("[,-]", found[2])[0]) not in ranks_with_notes:
            return f"rank {found[2]} on {found[1]}: {found[3]}"
    first_loss = next((note for note in by_time if note["how"] == "lost"), None)
    if first_loss is None:
        return ""
    loser = f"rank {first_loss['rank']} on {first_loss['host']}"
    silent_ranks = [rank for rank in range(first_loss["world_size"]) if rank not in ranks_with_notes]
    if not silent_ranks:
        return f"{loser}: {first_loss['cause']}"
    silent_hosts = ", ".join(host for host in hosts if host not in {note["host"] for note in notes})
    return (
        f"rank {', '.join(map(str, silent_ranks))} on {silent_hosts or 'a host with other ranks'} is gone without a "
        f"note, and {loser} lost it: {first_loss['cause']}"
    )


# -- After srun: acting on it ------------------------------------------------------------------------------------------


def close_start(start: Path) -> int:
    """Print how the start ended, requeue the job if it is to go on, and return the batch script's exit code."""
    facts = _read_start(start)
    notes, run_dir = read_notes(start), start.parents[1]
    has_term = any(note.get("signal") == "SIGTERM" for note in notes)
    job = _wait_for_slurm(facts["job"]) if has_term else _scontrol_job(facts["job"])
    hosts = [file.stem for file in sorted(start.glob("*.log")) if file.name != "srun.log"]
    cause = cause_of(notes, _read(start / "srun.log"), hosts) or _last_error(start) or "the ranks did not say why"
    reached = position(run_dir, Path(facts["teacher_cache"]))
    with contextlib.suppress(OSError):
        end = {"is_idle": reached == facts["position"], "cause": cause}
        write_atomically(start / "end.json", json.dumps(end) + "\n")
    bad_nodes = _read_facts(start / "bad_nodes.json")
    earlier = [file for file in start.parent.glob(f"{facts['job']}-*/bad_nodes.json") if file.parent != start]
    bad_before = {node for file in earlier for node in _read_facts(file)}
    verdict = decide(
        notes, bad_nodes, job, cause, _num_idle_starts(start.parent, facts["job"]), bad_before, facts["restart"]
    )
    print(f"run {run_dir}, job {facts['job']}, start {facts['restart']}: {verdict.reason}", flush=True)
    if verdict.action == "done":
        return 0
    if verdict.action == "requeue":
        print(f"requeued, to go on from {', '.join(reached) or 'the beginning'}", flush=True)
        return _requeue_now(facts["job"], verdict.exclude)
    return 2 if any(note["how"] == "refused" for note in notes) else 1


def _last_error(start: Path) -> str:
    """The last error in the ranks' logs or srun's, for ranks that could not leave a note, as on a full disk."""
    for file in sorted(start.glob("*.log"), key=lambda file: file.name == "srun.log"):
        errors = [line for line in _read(file).splitlines() if "rror: " in line]
        if errors:
            rank, _, text = errors[-1].partition(": ")
            return errors[-1] if file.name == "srun.log" else f"rank {rank} on {file.stem}: {text}"
    return ""


def _num_idle_starts(logs: Path, job: str) -> int:
    """Number of the job's last starts in a row that saved nothing new; starts cut off with their host are skipped."""
    number = 0
    folders = [folder for folder in logs.glob(f"{job}-*") if folder.name.rpartition("-")[2].isdecimal()]
    for folder in sorted(folders, key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True):
        end = _read_facts(folder / "end.json")
        if end and not end.get("is_idle"):
            break
        number += bool(end) and not (folder / "bad_nodes.json").exists()
    return number


def _requeue_now(job: str, exclude: Sequence[str]) -> int:
    """Requeue the job without the given nodes, and return the batch script's exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm sends it on requeueing, and there is more to do
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode != 0:
        print(f"scontrol requeue failed: {done.stderr.strip()}; submit the same command again to go on", flush=True)
        return 1
    if exclude:  # Slurm allows this change while the job is pending, as it is now
        before = [name for name in [_scontrol_job(job).get("ExcNodeList", "(null)")] if name != "(null)"]
        nodes = ",".join([*before, *exclude])
        subprocess.run(["scontrol", "update", f"JobId={job}", f"ExcNodeList={nodes}"])
    return 1


def _wait_for_slurm(job: str) -> dict[str, str]:
    """The job's fields after a SIGTERM, once they show what Slurm is doing with the job.

    That may be a preemption, the job's end, in which Slurm also ends this script, or nothing: a stray signal, such as
    a delayed one that was meant for the job's last start.
    """
    deadline = time.monotonic() + TERM_WAIT_S
    while True:
        fields = _scontrol_job(job)
        if _is_preempted(fields) or fields.get("JobState") != "RUNNING" or time.monotonic() > deadline:
            return fields
        time.sleep(2)


def _is_preempted(job: dict[str, str]) -> bool:
    return job.get("PreemptTime", "None") not in ("None", "Unknown")


def _scontrol_job(job: str) -> dict[str, str]:
    """Fields of the job, with TotalNodes of its partition; empty if Slurm does not answer."""
    fields = _scontrol("job", job)
    partition = _scontrol("partition", fields["Partition"]) if "Partition" in fields else {}
    return fields | {name: partition[name] for name in ("TotalNodes",) if name in partition}


def _scontrol(kind: str, name: str) -> dict[str, str]:
    done = subprocess.run(["scontrol", "show", kind, name], capture_output=True, text=True)
    return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)


def _read_facts(file: Path) -> dict[str, Any]:
    """Contents of a JSON file of a start; empty if it is missing or damaged."""
    try:
        facts = parse_json(_read(file))
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _read(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def _number(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise UserError(f"{name} {text!r} is not a number; leave it as Slurm has set it")
    return int(text)


def _read_start(folder: Path) -> StartFacts:
    """Contents of a start's start.json. Raises UserError if it is missing or damaged."""
    file = folder / "start.json"
    try:
        facts = parse_json(file.read_text())
        if all(isinstance(facts[name], kind) for name, kind in _FACTS.items()):
            return cast(StartFacts, facts)
        reason = "its entries are not those of a start"
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = first_line(error)
    raise UserError(f"{file} does not say which start it is of ({reason}); give the folder that `open` has printed")


_FACTS = {"job": str, "restart": int, "teacher_cache": str, "position": list}
"""What `close` needs of start.json."""


USAGE = "use `open TRAIN.PY-OPTIONS`, `watch START PID` or `close START`"


def run_command(words: Sequence[str]) -> int:
    """Run `open`, `watch` or `close`, and return the exit code. Raises UserError for words that do not fit."""
    match list(words):
        case ["open", *options]:
            print(open_start(options))
        case ["watch", start, pid]:
            if not (pid.isascii() and pid.isdecimal() and int(pid) > 1):
                raise UserError(f"PID {pid!r} is not a process's number; {USAGE}")
            _read_start(Path(start))
            watch(Path(start), int(pid))
        case ["close", start]:
            return close_start(Path(start))
        case []:
            raise UserError(f"no command; {USAGE}")
        case _:
            raise UserError(f"unknown command {' '.join(words)!r}; {USAGE}")
    return 0


def cli() -> None:
    """Run the command of the command line."""
    try:
        raise SystemExit(run_command(sys.argv[1:]))
    except (UserError, OSError) as error:
        exit_with(error, "distill.sh")


if __name__ == "__main__":
    cli()
