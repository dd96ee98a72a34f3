"""Who is there, and who still is: ranks that do not come or fall silent are named, and nobody waits for them for long.

A collective cannot tell a rank that works from one whose host is gone without a word, and the time that a checkpoint or
a tokenisation may take is far longer than anyone wants to wait for a dead host. So a thread of each rank says every few
seconds, through the store that torch's ranks meet in, that its process lives; when one has been silent for the timeout,
or has failed, all ranks leave, each with a line that names it. Only counters are compared, so clocks may differ.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, TCPStore

from peakd_ds.errors import UserError
from peakd_ds.ranks.slurm_env import num_nodes_of_this_start

GRACE_S = 3.0  # a rank that is leaving by itself gets so long to say so
READ_S = 10.0  # and so long to read that it must


class LostRank(OSError):
    """A rank did not come, or is gone; not the user's mistake, so starting again may help."""


PERIOD_S = 1.0
STOPPED_S = 5.0  # a thread that sleeps so much longer than it asked for was stopped: the job was suspended

_leaving = threading.Event()
_beating: threading.Thread | None = None
_store: Any = None
_on_end: Callable[[str], None]


def me() -> str:
    return f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"


def call_roll(timeout_s: float, device: str = "cpu", trouble: str = "") -> Any:
    """Wait until all ranks are there (collective), before any process group; returns the store they met in.

    Args:
        device: cpu or cuda, the kind that this rank computes on, which must be that of all.
        trouble: Why this rank cannot take part, which all ranks then read and leave.

    Raises:
        LostRank: some rank did not come within the timeout; it is named.
        UserError: some rank has trouble, the ranks do not belong together (another start, another job, another kind
            of device), or are on too few of the job's nodes.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's parent process keeps the store
    try:
        # multi_tenant: torch's own meeting in this process, later, shares the server.
        server = TCPStore(
            address,
            port,
            is_master=rank == 0 and not has_agent,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives ranks
        store = PrefixStore(f"peakd_ds/{attempt}", server)
        start = f"job {os.environ.get('SLURM_JOB_ID', '-')} start {os.environ.get('SLURM_RESTART_COUNT', '0')}"
        store.set(f"here/{rank}", json.dumps([socket.gethostname(), start, device, trouble]))
        if rank == 0:
            store.set("roll", _read_roll(store, world_size, timeout_s, start))
        store.wait(["roll"], timedelta(seconds=timeout_s + 10))
        kind, _, text = store.get("roll").decode().partition(":")
    except RuntimeError as error:  # torch's DistError and its kin
        raise LostRank(
            f"rank 0 at {address}:{port} does not answer {me()} ({str(error).splitlines()[0]}); "
            f"--rank_timeout is {timeout_s:g} s"
        ) from error
    if kind:
        _let_all_read(store, rank, world_size)
        raise (UserError if kind == "user" else LostRank)(text)
    return store


def _let_all_read(store: Any, rank: int, world_size: int) -> None:
    """Rank 0, whose end is the store's, stays until the others that came have read why they cannot stay."""
    with contextlib.suppress(RuntimeError):
        store.set(f"told/{rank}", "")
        deadline = time.monotonic() + READ_S
        while rank == 0 and time.monotonic() < deadline:
            if all(store.check([f"told/{other}"]) or not store.check([f"here/{other}"]) for other in range(world_size)):
                return
            time.sleep(0.05)


def _read_roll(store: Any, world_size: int, timeout_s: float, start: str) -> str:
    """On rank 0: "" if all is well, else kind:text."""
    deadline, missing = time.monotonic() + timeout_s, list(range(world_size))
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
        if missing:
            time.sleep(0.05)
    if missing:
        names = ", ".join(map(str, missing[:20]))
        return (
            f"lost:rank {names} of {world_size} did not come within {timeout_s:g} s of rank 0 on "
            f"{socket.gethostname()}; its own log says why, or give more time with --rank_timeout"
        )
    here = [json.loads(store.get(f"here/{rank}")) for rank in range(world_size)]
    for rank, (host, theirs, device, trouble) in enumerate(here):
        if theirs != start:
            return (
                f"user:rank {rank} on {host} is of {theirs}, rank 0 of {start}: they must not train together; end one "
                "of the two, then start again"
            )
        if trouble:
            return f"user:rank {rank} on {host} {trouble}"
        if device != here[0][2]:
            return (
                f"user:rank {rank} on {host} computes on {device}, rank 0 on {here[0][0]} on {here[0][2]}: leave out "
                "the host that sees no GPU, or set DS_ACCELERATOR=cpu for all"
            )
    hosts = sorted({host for host, *_ in here})
    num_nodes = num_nodes_of_this_start()
    if len(hosts) < num_nodes:
        return (
            f"user:{world_size} ranks are all on {', '.join(hosts)}, but Slurm has given {num_nodes} nodes: the others "
            "would stand idle; start one srun task per rank, as slurm/distill.sh does, or ask for fewer nodes"
        )
    return ""


def watch(store: Any, timeout_s: float, on_end: Callable[[str], None]) -> None:
    """From now on end this process, with a line that says why, when another rank has failed or is silent for too long.

    Args:
        timeout_s: Longest silence.
        on_end: Called with the cause before the process ends.
    """
    global _store, _beating, _on_end
    _store, _on_end = store, on_end
    heard = [time.monotonic()]  # when rank 0's store last answered
    _beating = threading.Thread(target=_beat, args=(store.clone(), timeout_s, heard), daemon=True)
    _beating.start()
    threading.Thread(target=_guard, args=(timeout_s, heard), daemon=True).start()


def leave() -> None:
    """This rank is about to end, as it should: nobody is to miss it, and it misses nobody."""
    _leaving.set()
    if _beating is not None:
        _beating.join(10 * GRACE_S)  # a thread that is inside the store when Python ends aborts the process


def tell(cause: str) -> None:
    """This rank has failed alone: let the others know, now."""
    if _store is not None:
        with contextlib.suppress(RuntimeError):  # rank 0 is gone, and they know
            _store.compare_set("lost", "", f"{me()} failed: {cause}")


def _beat(store: Any, timeout_s: float, heard: list[float]) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    seen = {other: ("", time.monotonic()) for other in range(1, world_size)}
    number, last = 0, time.monotonic()
    while not _leaving.wait(PERIOD_S):
        number, now = number + 1, time.monotonic()
        if now - last > PERIOD_S + STOPPED_S:  # the others could not be heard, or were stopped too
            seen = {other: (beat, now) for other, (beat, _) in seen.items()}
        last = now
        try:
            store.set(f"beat/{rank}", str(number))
            if rank == 0:
                _look_for_silence(store, seen, timeout_s)
            cause = store.get("lost").decode() if store.check(["lost"]) else ""
            heard[0] = time.monotonic()
        except RuntimeError as error:
            cause = f"rank 0 is gone ({str(error).splitlines()[0]})"
        if cause:
            _end(cause)


def _look_for_silence(store: Any, seen: dict[int, tuple[str, float]], timeout_s: float) -> None:
    for other, (last, since) in seen.items():
        beat = store.get(f"beat/{other}").decode() if store.check([f"beat/{other}"]) else ""
        if beat != last:
            seen[other] = (beat, time.monotonic())
        elif time.monotonic() - since > timeout_s:
            host = json.loads(store.get(f"here/{other}"))[0]
            store.compare_set("lost", "", f"rank {other} on {host} has been silent for {timeout_s:g} s")


def _guard(timeout_s: float, heard: list[float]) -> None:
    """A store that is cut off does not refuse, it just never answers."""
    last = time.monotonic()
    while not _leaving.wait(PERIOD_S):
        last, slept = time.monotonic(), time.monotonic() - last
        if slept > PERIOD_S + STOPPED_S:
            heard[0] = last
        if time.monotonic() - heard[0] > timeout_s:
            _end(f"rank 0 has been silent for {timeout_s:g} s")


def _end(cause: str) -> None:
    """Leave with `cause`, unless the rank's own thread is leaving already."""
    if _leaving.wait(GRACE_S):
        return None
    print(f"{me()} leaves: {cause}", file=sys.stderr, flush=True)
    _on_end(cause)
    os._exit(1)
