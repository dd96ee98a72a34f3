"""One run, one owner: RUN/lock.json names the start that may write there, and every other start keeps its hands off.

A start takes the lock where there is none, or where its owner is over: a process of this host that is gone, a Slurm
step that Slurm no longer has, an earlier start of the same job. An earlier start that was cut off and comes back finds
a new owner before its next write, and stops. Rank 0 holds the lock for all.
"""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peakd_ds.errors import UserError
from peakd_ds.files import create_file, hidden_sibling
from peakd_ds.ranks import dist
from peakd_ds.ranks.slurm_env import job_name

NAME = "lock.json"

_held: tuple[Path, str] | None = None


def take(run_dir: Path) -> None:
    """Become the owner of a run folder.

    Raises:
        UserError: a live owner has it, or a later start of this job does; nothing is changed then.
    """
    global _held
    file, me = run_dir / NAME, describe_me()
    for _ in range(10):
        if create_file(file, json.dumps(me, indent=2) + "\n"):
            break
        text = _text(file)
        owner = _parse(text)
        reason = None if owner is None else why_alive(owner, me)
        if reason is not None:
            raise UserError(
                f"--run_dir {run_dir} is in use: {reason}; wait for its end or take another --run_dir "
                f"(if you know that it is over, delete {file})"
            )
        remove_dead(file, text)
    _held = (file, me["token"])
    check()


def check() -> None:
    """Before a write: that this process still is the owner, if it ever was.

    Raises:
        UserError: another start has taken the folder.
    """
    if _held is None:
        return
    file, token = _held
    for _ in range(10):
        owner = _read(file)
        if owner is not None:
            break
        time.sleep(0.1)  # another start looks whether it is a dead one's, and gives it back (remove_dead)
    if owner is None or owner["token"] != token:
        now = "nobody" if owner is None else name_of(owner)
        raise UserError(f"{file.parent} now belongs to {now}; this start writes nothing more and stops")


@contextlib.contextmanager
def owned(run_dir: Path) -> Iterator[None]:
    """Own the run folder in the block (collective), and give it back at its end if it still is ours.

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
            give_back(file, token)


def give_back(file: Path, token: str) -> None:
    """Delete a lock that still is this start's; a user may have deleted it, and another start taken it since."""
    with contextlib.suppress(OSError, KeyError, TypeError):
        owner = _read(file)
        if owner is not None and owner["token"] == token:
            file.unlink()


def remove_dead(file: Path, text: str) -> None:
    """Delete a lock with this text, whose owner is over; one that another start has put in its place stays."""
    if _text(file) != text:
        return
    aside = hidden_sibling(file, "dead")
    with contextlib.suppress(FileNotFoundError):
        file.rename(aside)
        if _text(aside) != text:
            with contextlib.suppress(FileExistsError):
                os.link(aside, file)
        aside.unlink()


def describe_me() -> dict[str, Any]:
    """The content of a lock of this process, with a token of its own."""
    env = os.environ
    return {
        "token": secrets.token_hex(8),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": process_start(os.getpid()),
        "cluster": env.get("SLURM_CLUSTER_NAME"),
        "job": job_name(),
        "step": env.get("SLURM_STEP_ID"),
        "restart": int(env.get("SLURM_RESTART_COUNT", "0")),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def name_of(owner: dict[str, Any]) -> str:
    job = f"job {owner['job']}, start {owner['restart']}, " if owner["job"] else ""
    return f"{job}process {owner['pid']} on {owner['host']}, since {owner['since']}"


def why_alive(owner: dict[str, Any], me: dict[str, Any]) -> str | None:
    """Why a lock cannot be taken from its owner; None if the owner is over."""
    name = name_of(owner)
    same_job = owner["job"] is not None and (owner["job"], owner["cluster"]) == (me["job"], me["cluster"])
    if same_job and owner["restart"] != me["restart"]:
        is_later = owner["restart"] > me["restart"]
        return f"{name} is a later start of this job, whose start {me['restart']} is over" if is_later else None
    if owner["host"] == me["host"] and owner["process_start"] != process_start(owner["pid"]):
        return None
    if owner["job"] is not None and owner["cluster"] == me["cluster"]:
        is_running = _is_step_running(owner["job"], owner["step"])
        if is_running is not None:
            return name if is_running else None
    return name if owner["host"] == me["host"] else f"{name}, of which nothing can be learnt from {me['host']}"


def _is_step_running(job: str, step: str | None) -> bool | None:
    """Whether Slurm has the step (or without a number the job) running; None if it cannot be asked."""
    which = [f"--steps={job}.{step}"] if step is not None else [f"--jobs={job}", "--states=RUNNING,SUSPENDED"]
    try:
        done = subprocess.run(["squeue", "--noheader", *which], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return False if "Invalid job" in done.stderr else None
    return bool(done.stdout.strip())


def process_start(pid: int) -> str | None:
    """When a process of this host began, in clock ticks since boot; None if there is none (or no /proc)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _read(file: Path) -> dict[str, Any] | None:
    return _parse(_text(file))


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def _parse(text: str) -> dict[str, Any] | None:
    try:
        return json.loads(text)
    except ValueError:
        return None
