"""What slurm/distill.sh asks before and after srun, so that the script needs no judgement of its own.

    python -m peakd_ds.cluster.job open TRAIN.PY-OPTIONS   checks them, makes the start's folder, prints its path
    python -m peakd_ds.cluster.job watch START PID         ends srun where it waits for a host that is gone
    python -m peakd_ds.cluster.job close START             says how the start ended; requeues the job, or not

Each start of a job has a folder RUN/logs/JOB-RESTART: start.json, code.diff, HOST.log (each line with its rank),
srun.log, and the notes in which ranks say how they ended. srun's exit code is no guide: with --kill-on-bad-exit it is
that of a rank which was killed for another's sake. So the notes decide, and Slurm's own word on the job.
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
from typing import Any

from peakd_ds.command_line import parse, to_yaml
from peakd_ds.config.outputs import STAGES
from peakd_ds.errors import UserError, exit_with
from peakd_ds.files import write_atomically
from peakd_ds.ranks.notes import read_notes
from peakd_ds.ranks.slurm_env import job_name

TERM_WAIT_S = 60  # after SIGTERM Slurm soon says what it means to do with the job
LOST_WAIT_S = 10  # ranks that outlive a lost one are over by then
COMMON_FAULTS = ("run folder", "the open-file limit")  # in preflight's words: those of every node
MOST_BAD_NODES = 4  # that a job of one node tries, one after another


# -- Before srun -------------------------------------------------------------------------------------------------------


def open_start(argv: Sequence[str]) -> Path:
    """Check the options of train.py and make the folder of this start.

    Raises:
        UserError: an option is wrong, the run folder is not given or not writable.
    """
    config = parse(argv)
    env = os.environ
    folder = Path(config.run_dir).absolute() / "logs" / f"{job_name()}-{env.get('SLURM_RESTART_COUNT', '0')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("rank-*.json"):
            old.unlink()
        facts: dict[str, Any] = {
            "job": job_name(),
            "restart": int(env.get("SLURM_RESTART_COUNT", "0")),
            "nodes": env.get("SLURM_JOB_NODELIST", ""),
            "words": list(argv),
            "code": _code_revision(folder),
            "teacher_cache": str(Path(config.teacher_cache or Path(config.run_dir) / "teacher_cache").absolute()),
            "at": time.time(),
        }
        facts["position"] = position(folder.parents[1], Path(facts["teacher_cache"]))
        write_atomically(folder / "start.json", json.dumps(facts, indent=2) + "\n")
        write_atomically(folder / "settings.yaml", to_yaml(config))
    except OSError as error:
        raise UserError(
            f"--run_dir {config.run_dir} cannot be written on {socket.gethostname()} ({error}); give a folder on a "
            "file system that all nodes share and may write to"
        ) from error
    return folder


def _code_revision(folder: Path) -> str:
    """The commit that runs here; what differs from it goes into code.diff."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        revision, difference = git("rev-parse", "HEAD").strip(), git("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        from peakd_ds import __version__

        return f"version {__version__}"
    if difference:
        (folder / "code.diff").write_text(difference)
    return revision + (" with code.diff" if difference else "")


def position(run_dir: Path, teacher_cache: Path) -> list[str]:
    """How far the run has come on disk; two equal positions mean no progress between them."""
    place = []
    for stage in STAGES:
        folder = run_dir / "checkpoints" / stage
        if (folder / "FINISHED.json").exists():
            place.append(f"{stage} finished")
        elif (folder / "latest").exists():
            place.append(f"{stage} {(folder / 'latest').read_text()}")
    num_parts = len(list(teacher_cache.glob("*/part-*.sha256")))
    return [*place, *([f"{num_parts} parts of the teacher cache"] if num_parts else [])]


# -- While srun runs ---------------------------------------------------------------------------------------------------


def watch(start: Path, pid: int) -> None:
    """Once a rank has noted a loss or failure, give srun a while to end, then kill it.

    srun waits for the tasks of a host that is gone until Slurm declares the node down (SlurmdTimeout, 300 s by
    default).
    """
    while not any(told["how"] in ("lost", "failed") for told in read_notes(start)):
        time.sleep(1)
    time.sleep(LOST_WAIT_S)
    print("srun is still waiting for ranks that are gone: it is ended", flush=True)
    os.kill(pid, signal.SIGKILL)


# -- After srun --------------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """What becomes of the job."""

    action: str
    """done, requeue or fail."""
    reason: str
    exclude: list[str] = field(default_factory=list)
    """Nodes that the job shall not get again."""


def decide(
    notes: Sequence[dict[str, Any]],
    bad_nodes: dict[str, str],
    job: dict[str, str],
    cause: str,
    num_idle_starts: int,
    bad_before: Collection[str] = (),
    restart: int = 0,
) -> Verdict:
    """From the ranks' notes, preflight's bad nodes and Slurm's word to what becomes of the job.

    Args:
        job: Fields of `scontrol show job`, and its partition's TotalNodes; empty if Slurm does not answer.
        cause: Who failed and why, in one line.
        num_idle_starts: Starts of this job in a row, this one included, that have saved nothing new.
        bad_before: Nodes that an earlier start of this job has found bad.
        restart: Number of this start.
    """
    how = {told["how"] for told in notes}
    state = job.get("JobState", "RUNNING")
    if how == {"finished"}:
        return Verdict("done", "the run is finished")
    if int(job.get("Restarts", restart)) > restart:  # scontrol answered late: this host was cut off
        return Verdict("fail", f"start {job['Restarts']} of this job has begun and is left alone")
    if state != "RUNNING" and job.get("Reason") != "TimeLimit":
        # A user's scancel, or Slurm's own requeueing: scontrol tells neither, and a requeue now would defy the first.
        return Verdict("fail", f"Slurm is ending the job ({state}); what was saved is kept")
    if "refused" in how:
        return Verdict("fail", cause)
    if bad_nodes:
        names = ", ".join(f"{node} ({reason})" for node, reason in bad_nodes.items())
        num_nodes, all_bad = int(job.get("NumNodes", "0").split("-")[0]), bad_nodes.keys() | set(bad_before)
        faults = [fault for reasons in bad_nodes.values() for fault in reasons.split("; ")]
        is_chosen = job.get("ReqNodeList", "(null)") != "(null)"  # by the user: there is no other
        is_common = num_nodes != 1 or is_chosen or any(fault.startswith(COMMON_FAULTS) for fault in faults)
        if len(bad_nodes) >= num_nodes and is_common:
            return Verdict("fail", f"every node is bad: {names}")
        if not bad_nodes.keys() - bad_before:
            return Verdict("fail", f"Slurm has given bad nodes again that were to be left out: {names}")
        if num_nodes == 1 and len(all_bad) >= min(MOST_BAD_NODES, int(job.get("TotalNodes", MOST_BAD_NODES))):
            return Verdict("fail", f"the job's node is bad, for the {len(all_bad)}. time: {names}")
        return _requeue(f"bad nodes, which the job shall not get again: {names}", job, list(bad_nodes))
    if "stopped" in how:
        told = next(told for told in notes if told["how"] == "stopped")
        why = "stopped and saved: " + ("preempted" if _is_preempted(job) else told["signal"])
    else:
        why = cause
    if num_idle_starts > 1:
        return Verdict("fail", f"{num_idle_starts} starts in a row have saved nothing new, so no further one: {why}")
    return _requeue(why, job)


def _requeue(why: str, job: dict[str, str], exclude: Sequence[str] = ()) -> Verdict:
    if job.get("Requeue") == "0":
        return Verdict("fail", f"{why}; the job has --no-requeue: submit the same command again to go on")
    return Verdict("requeue", why, list(exclude))


def close_start(start: Path) -> int:
    """Tell how the start ended, act on it, and return the batch script's exit code."""
    facts, notes = json.loads((start / "start.json").read_text()), read_notes(start)
    has_term = any(told.get("signal") == "SIGTERM" for told in notes)
    job = _wait_for_slurm(facts["job"]) if has_term else _scontrol_job(facts["job"])
    hosts = [file.stem for file in sorted(start.glob("*.log")) if file.name != "srun.log"]
    cause = cause_of(notes, _read(start / "srun.log"), hosts) or _last_error(start) or "the ranks ended without a word"
    reached = position(start.parents[1], Path(facts["teacher_cache"]))
    is_idle = reached == facts["position"]
    with contextlib.suppress(OSError):
        write_atomically(start / "end.json", json.dumps({"is_idle": is_idle, "cause": cause}) + "\n")
    bad_nodes = json.loads(_read(start / "bad_nodes.json") or "{}")
    earlier = [file for file in start.parent.glob(f"{facts['job']}-*/bad_nodes.json") if file.parent != start]
    bad_before = {node for file in earlier for node in json.loads(file.read_text())}
    verdict = decide(
        notes, bad_nodes, job, cause, _num_idle_starts(start.parent, facts["job"]), bad_before, facts["restart"]
    )
    print(f"run {start.parents[1]}, job {facts['job']}, start {facts['restart']}: {verdict.reason}", flush=True)
    if verdict.action == "requeue":
        print(f"requeued, to go on from {', '.join(reached) or 'the beginning'}", flush=True)
    if verdict.action == "done":
        return 0
    if verdict.action == "requeue":
        return _requeue_now(facts["job"], verdict.exclude)
    return 2 if any(told["how"] == "refused" for told in notes) else 1


def cause_of(notes: Sequence[dict[str, Any]], srun_log: str, hosts: Sequence[str] = ()) -> str:
    """Who failed first and why: rank, host and cause in one line; empty if neither notes nor srun tell.

    A rank that was killed leaves no note, but srun tells of it; the ranks that lost it do leave one. Of a host that is
    gone not even srun tells at first: it is one of `hosts`, those with a log, that no note comes from.
    """
    for kinds in (("refused",), ("failed",)):
        for told in sorted((told for told in notes if told["how"] in kinds), key=lambda told: told["at"]):
            return f"rank {told['rank']} on {told['host']}: {told['cause']}"
    ranks_with_notes = {told["rank"] for told in notes}
    for line in srun_log.splitlines():
        dead_node = re.search(r"Node failure on (\S+)", line)
        if dead_node:
            return f"node {dead_node[1]} failed"
        found = re.search(r"srun: error: (\S+): tasks? ([\d,-]+): (.+)", line)
        if found and int(re.split("[,-]", found[2])[0]) not in ranks_with_notes:
            return f"rank {found[2]} on {found[1]}: {found[3]}"
    for told in sorted((told for told in notes if told["how"] == "lost"), key=lambda told: told["at"]):
        silent = ", ".join(str(rank) for rank in range(told.get("world_size", 0)) if rank not in ranks_with_notes)
        places = ", ".join(host for host in hosts if host not in {told["host"] for told in notes})
        if silent:
            return (
                f"rank {silent} on {places or 'a host that others are on too'} is gone without a word, and "
                f"rank {told['rank']} on {told['host']} lost it: {told['cause']}"
            )
        return f"rank {told['rank']} on {told['host']}: {told['cause']}"
    return ""


def _last_error(start: Path) -> str:
    """For ranks that could not even leave a note, on a full disk say: what their logs and srun's tell last."""
    for file in sorted(start.glob("*.log"), key=lambda file: file.name == "srun.log"):
        errors = [line for line in _read(file).splitlines() if "rror: " in line]
        if errors:
            rank, _, text = errors[-1].partition(": ")
            return errors[-1] if file.name == "srun.log" else f"rank {rank} on {file.stem}: {text}"
    return ""


def _num_idle_starts(logs: Path, job: str) -> int:
    """Starts of the job, from the newest back, that saved nothing new. One cut off with its host does not count."""
    number = 0
    for folder in sorted(logs.glob(f"{job}-*"), key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True):
        end = _read(folder / "end.json")
        if end and not json.loads(end)["is_idle"]:
            break
        number += bool(end) and not (folder / "bad_nodes.json").exists()
    return number


def _requeue_now(job: str, exclude: Sequence[str]) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm's, on requeueing: there is more to do
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode != 0:
        print(f"scontrol requeue failed: {done.stderr.strip()}; submit the same command again to go on", flush=True)
        return 1
    if exclude:  # can be changed while the job is pending, as it is from now on
        before = [name for name in [_scontrol_job(job).get("ExcNodeList", "(null)")] if name != "(null)"]
        nodes = ",".join([*before, *exclude])
        subprocess.run(["scontrol", "update", f"JobId={job}", f"ExcNodeList={nodes}"])
    return 1


def _wait_for_slurm(job: str) -> dict[str, str]:
    """After a SIGTERM: until Slurm ends this script, or says that it preempts the job, or does nothing for a while (a
    stray signal, such as a delayed one that was meant for the job's last start). The job's fields then."""
    deadline = time.monotonic() + TERM_WAIT_S
    while True:
        fields = _scontrol_job(job)
        if _is_preempted(fields) or fields.get("JobState") != "RUNNING" or time.monotonic() > deadline:
            return fields
        time.sleep(2)


def _is_preempted(job: dict[str, str]) -> bool:
    return job.get("PreemptTime", "None") not in ("None", "Unknown")


def _scontrol_job(job: str) -> dict[str, str]:
    fields = _scontrol("job", job)
    partition = _scontrol("partition", fields["Partition"]) if "Partition" in fields else {}
    return fields | {name: partition[name] for name in ("TotalNodes",) if name in partition}


def _scontrol(kind: str, name: str) -> dict[str, str]:
    done = subprocess.run(["scontrol", "show", kind, name], capture_output=True, text=True)
    return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)


def _read(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def cli() -> None:
    """`open`, `watch` or `close`, for slurm/distill.sh."""
    words = sys.argv[2:]
    match sys.argv[1]:
        case "open":
            try:
                print(open_start(words))
            except UserError as error:
                exit_with(error, "distill.sh")
        case "watch":
            watch(Path(words[0]), int(words[1]))
        case "close":
            raise SystemExit(close_start(Path(words[0])))
        case other:
            raise SystemExit(f"unknown: {other}")


if __name__ == "__main__":
    cli()
