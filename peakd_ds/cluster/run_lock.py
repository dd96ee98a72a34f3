"""Lock files: one start at a time writes into a folder, and lock.json there names it.

Two uses:
- `owned`: a run folder. A second start is refused, and a start that has lost the folder stops before its next write
  (`check`).
- `waiting_for`: a folder that one start builds for all, such as a teacher cache. A second start waits for the first.

A start takes a lock if there is none or if its owner is over: a process of this host that is gone, a Slurm step that
Slurm no longer has, or an earlier start of the same job. Rank 0 holds the lock for all ranks.
"""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from peakd_ds.errors import UserError
from peakd_ds.files import create_file, hidden_sibling, parse_json
from peakd_ds.ranks import dist, preempt
from peakd_ds.ranks.slurm_env import job_name

NAME = "lock.json"
POLL_S = 2.0
SILENT_S = 1800.0  # an owner on another host that has not touched its lock for this long is no longer waited for
MAX_TRIES = 10

_held: tuple[Path, str] | None = None


@dataclass(frozen=True)
class Owner:
    """The start that a lock file names. The fields are those of the file."""

    token: str
    """Random; tells this lock from every other."""
    host: str
    pid: int
    process_start: str | None
    cluster: str | None
    job: str | None
    step: str | None
    restart: int
    since: str

    def __str__(self) -> str:
        job = f"job {self.job}, start {self.restart}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}, since {self.since}"


def this_start() -> Owner:
    """This process as the owner of a lock, with a new token."""
    env = os.environ
    return Owner(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        pid=os.getpid(),
        process_start=process_start(os.getpid()),
        cluster=env.get("SLURM_CLUSTER_NAME"),
        job=job_name(),
        step=env.get("SLURM_STEP_ID"),
        restart=int(env.get("SLURM_RESTART_COUNT", "0")),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


# -- The lock of a run folder ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def owned(run_dir: Path) -> Iterator[None]:
    """Own the run folder in the block (collective). At its end the lock is deleted if it still is this start's.

    Raises:
        UserError: on all ranks, as `take` does.
    """
    global _held
    dist.on_main(lambda: take(run_dir))
    try:
        yield
    finally:
        if _held is not None:
            file, token = _held
            _held = None
            _give_back(file, token)


def take(run_dir: Path) -> None:
    """Become the owner of a run folder.

    Raises:
        UserError: a live owner or a later start of this job has it, or its lock is damaged; nothing is changed then.
    """
    global _held
    file, mine = run_dir / NAME, this_start()
    reason = _take(file, mine, lambda owner, silent_s: why_alive(owner, mine))
    if reason is not None:
        raise UserError(
            f"--run_dir {run_dir} is in use: {reason}; wait for its end or take another --run_dir "
            f"(if you know that it is over, delete {file})"
        )
    _held = (file, mine.token)
    check()


def check() -> None:
    """Check before a write that this process still owns its run folder, if it ever owned one.

    Raises:
        UserError: another start has taken the folder.
    """
    if _held is None:
        return
    file, token = _held
    for _ in range(MAX_TRIES):
        owner = _owner_of(file)
        if owner is not None:
            break
        time.sleep(0.1)  # another start may have moved it aside for a moment, see _remove_dead
    if owner is None or owner.token != token:
        raise UserError(f"{file.parent} now belongs to {owner or 'nobody'}; this start writes nothing more and stops")


# -- The lock of a folder that one start builds ------------------------------------------------------------------------


@contextlib.contextmanager
def waiting_for(file: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock file in the block (collective); while another live start holds it, say so once and wait.

    An owner on this host is waited for while its process lives, one on another host while it touches the lock.

    Raises:
        UserError: the owner on another host has been silent for SILENT_S and is not known to be over, or the lock is
            damaged.
        Stopped: the ranks have agreed to stop.
    """
    mine, has_said = this_start(), False

    def name_of_builder() -> str | None:
        return _take(file, mine, lambda owner, silent_s: _whom_to_wait_for(file, mine, owner, silent_s))

    while (name := dist.on_main(name_of_builder)) is not None:
        if not has_said:
            say(f"{file.parent} is being built by {name}; waiting for it (if it is over, delete {file})")
            has_said = True
        preempt.leave_if(preempt.stop_agreed())
        time.sleep(POLL_S)
    try:
        yield
    finally:  # not collective: the block may have raised on one rank alone
        if dist.is_main():
            _give_back(file, mine.token)


def touch(file: Path) -> None:
    """Show starts on other hosts that the owner still works; a user may have deleted the lock."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(file)


def _whom_to_wait_for(file: Path, mine: Owner, owner: Owner, silent_s: float) -> str | None:
    """The name of a live owner; None if it is over.

    Slurm is asked only about a silent owner on another host or one in this job, not at every poll.
    """
    is_elsewhere = owner.host != mine.host
    is_silent = is_elsewhere and silent_s > SILENT_S
    is_in_this_job = owner.job is not None and owner.job == mine.job
    if why_alive(owner, mine, asks_slurm=is_silent or (is_elsewhere and is_in_this_job)) is None:
        return None
    if is_silent:
        raise UserError(
            f"{file} is held by {owner}, but nothing was built for {silent_s / 60:.0f} minutes; delete the file if "
            "that start is over, then start again"
        )
    return str(owner)


# -- Taking and giving back --------------------------------------------------------------------------------------------


def _take(file: Path, mine: Owner, find_reason: Callable[[Owner, float], str | None]) -> str | None:
    """Take a lock; None if it is ours now, else the reason why its owner keeps it.

    Args:
        find_reason: Called with the owner and the seconds since it touched the lock; None means that it is over, and
            its lock is removed.

    Raises:
        UserError: the lock is damaged.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(MAX_TRIES):
        if create_file(file, json.dumps(asdict(mine), indent=2) + "\n"):
            return None
        try:
            content, silent_s = file.read_bytes(), time.time() - file.stat().st_mtime
        except FileNotFoundError:  # given back just now
            continue
        reason = find_reason(_parse(file, content), silent_s)
        if reason is not None:
            return reason
        _remove_dead(file, content)
    return "other starts, which took it in turn"


def _give_back(file: Path, token: str) -> None:
    """Delete a lock with this token; a user may have deleted it, and another start taken it since."""
    with contextlib.suppress(OSError, UserError):
        owner = _owner_of(file)
        if owner is not None and owner.token == token:
            file.unlink()


def _remove_dead(file: Path, content: bytes) -> None:
    """Delete a lock with this content, whose owner is over; one that another start has put in its place stays."""
    aside = hidden_sibling(file, "dead")
    with contextlib.suppress(FileNotFoundError):
        if file.read_bytes() != content:
            return
        file.rename(aside)
        if aside.read_bytes() != content:
            with contextlib.suppress(FileExistsError):
                os.link(aside, file)
        aside.unlink()


def _owner_of(file: Path) -> Owner | None:
    """The owner that a lock file names; None if there is no file. Raises UserError if it is damaged."""
    try:
        return _parse(file, file.read_bytes())
    except FileNotFoundError:
        return None


def _parse(file: Path, content: bytes) -> Owner:
    try:
        owner = Owner(**parse_json(content))
    except (ValueError, TypeError):
        owner = None
    if owner is None or not isinstance(owner.pid, int) or not isinstance(owner.restart, int):
        raise UserError(f"{file} is damaged: it names no start; delete it if no start is using {file.parent}")
    return owner


# -- Whether an owner is over ------------------------------------------------------------------------------------------


def why_alive(owner: Owner, mine: Owner, asks_slurm: bool = True) -> str | None:
    """Why a lock cannot be taken from its owner; None if the owner is over.

    Args:
        asks_slurm: Whether Slurm may be asked about the owner's step.
    """
    is_this_job = owner.job is not None and (owner.job, owner.cluster) == (mine.job, mine.cluster)
    if is_this_job and owner.restart != mine.restart:
        is_later = owner.restart > mine.restart
        return f"{owner} is a later start of this job, whose start {mine.restart} is over" if is_later else None
    is_here = owner.host == mine.host
    if is_here and not _is_process_running(owner):
        return None
    if asks_slurm and owner.job is not None and owner.cluster == mine.cluster:
        is_running = _is_step_running(owner.job, owner.step)
        if is_running is not None:
            return str(owner) if is_running else None
    return str(owner) if is_here else f"{owner}, and {mine.host} cannot find out whether it still runs"


def _is_process_running(owner: Owner) -> bool:
    """Whether the owner's process runs on this host, and not another one that got its number."""
    if owner.process_start is None:  # there was no /proc
        return psutil.pid_exists(owner.pid)
    return owner.process_start == process_start(owner.pid)


def _is_step_running(job: str, step: str | None) -> bool | None:
    """Whether Slurm has the step (the job, if the step has no number) running; None if Slurm cannot be asked."""
    which = [f"--steps={job}.{step}"] if step is not None else [f"--jobs={job}", "--states=RUNNING,SUSPENDED"]
    try:
        done = subprocess.run(["squeue", "--noheader", *which], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return False if "Invalid job" in done.stderr else None
    return bool(done.stdout.strip())


def process_start(pid: int) -> str | None:
    """When a process of this host began, in clock ticks since boot; None if there is no such process or no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
