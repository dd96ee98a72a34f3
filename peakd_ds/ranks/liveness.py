"""Liveness of ranks: those that do not come, fail or fall silent are named, and the others leave soon.

A collective cannot tell a busy rank from one whose host is gone, and it must wait as long as a checkpoint or a
tokenisation may take. So a thread of each rank sends a heartbeat every second through a store on rank 0. When a rank
has been silent for the timeout, or has failed, every other rank leaves with a line that names it. Heartbeats are
counters, so clocks need not agree.
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
from typing import NamedTuple

from torch.distributed import PrefixStore, Store, TCPStore

from peakd_ds.errors import UserError, first_line
from peakd_ds.ranks import parents
from peakd_ds.ranks.slurm_env import num_nodes_of_this_start

PERIOD_S = 1.0  # between heartbeats
STOPPED_S = 5.0  # a thread that oversleeps by this much was stopped: Slurm suspended the job
NUM_MISSED = 3.5  # heartbeats that a rank which is gone has missed
GRACE_S = 3.0  # time for a rank that is leaving by itself to print why
READ_S = 10.0  # time for the others to read why they must leave


class LostRank(OSError):
    """A rank did not come, or is gone. This is not the user's mistake, so another start may help."""


def this_rank() -> str:
    """Number and host of this rank, for messages."""
    return f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"


# -- The roll call, before any process group ---------------------------------------------------------------------------


class _Arrival(NamedTuple):
    """What a rank says of itself."""

    host: str
    start: str
    device: str
    trouble: str
    gpu: str = ""
    """UUID of its GPU; "" on a CPU, or where the driver tells none."""


def call_roll(timeout_s: float, device: str = "cpu", trouble: str = "", gpu: str = "") -> PrefixStore:
    """Wait until all ranks have come (collective); returns the store in which they met.

    Args:
        device: The kind that this rank computes on, cpu or cuda; it must be the same on all ranks.
        trouble: Why this rank cannot take part; if there is a reason, all ranks raise it.
        gpu: UUID of this rank's GPU, which no other rank may have.

    Raises:
        LostRank: a rank did not come within the timeout; the message names it.
        UserError: a rank has trouble, the ranks do not belong together (another start, another job, another kind of
            device), two of them have one GPU, or they run on fewer nodes than the job has.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's parent process keeps the store
    try:
        # multi_tenant: the process group that torch makes later in this process shares the server.
        is_master = rank == 0 and not has_agent
        server = TCPStore(
            address,
            port,
            is_master=is_master,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=_listening_socket(address, port) if is_master else None,
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives its ranks
        store = PrefixStore(f"peakd_ds/{attempt}", server)
        start = f"job {os.environ.get('SLURM_JOB_ID', '-')} start {os.environ.get('SLURM_RESTART_COUNT', '0')}"
        store.set(f"here/{rank}", json.dumps(_Arrival(socket.gethostname(), start, device, trouble, gpu)))
        if rank == 0:
            store.set("roll", _read_roll(store, world_size, timeout_s))
        store.wait(["roll"], timedelta(seconds=timeout_s + 10))
        kind, _, text = store.get("roll").decode().partition(":")
    except RuntimeError as error:  # torch's DistError is one
        raise LostRank(
            f"rank 0 at {address}:{port} does not answer {this_rank()} ({first_line(error)}); "
            f"--rank_timeout is {timeout_s:g} s"
        ) from error
    if kind:
        _wait_for_readers(store, rank, world_size)
        raise (UserError if kind == "user" else LostRank)(text)
    return store


def _listening_socket(address: str, port: int) -> int | None:
    """A socket that listens on rank 0's address alone, for the store; None if torch has to listen on all interfaces.

    That is so if the address belongs to no interface of this host, or if the host's own name leads to the loopback
    interface, which is out of other hosts' reach.
    """
    try:
        family, _, _, _, found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        if is_loopback(str(found[0])) and not is_loopback(address):
            return None
        return socket.create_server(found[:2], family=family, backlog=2048).detach()
    except OSError:
        return None


def is_loopback(address: str) -> bool:
    """Whether ranks that meet at this address are all on one host."""
    return address in ("localhost", "::1") or address.startswith("127.")


def _read_roll(store: Store, world_size: int, timeout_s: float) -> str:
    """Wait for all ranks, on rank 0. Returns "" if all can start, else KIND:TEXT of the error that all raise."""
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
    arrivals = [_Arrival(*json.loads(store.get(f"here/{rank}"))) for rank in range(world_size)]
    message = _why_not_together(arrivals)
    return f"user:{message}" if message else ""


def _why_not_together(arrivals: list[_Arrival]) -> str:
    """Why these ranks cannot train together; "" if they can."""
    first, rank_of_gpu = arrivals[0], dict[tuple[str, str], int]()
    for rank, (host, start, device, trouble, gpu) in enumerate(arrivals):
        if start != first.start:
            return (
                f"rank {rank} on {host} belongs to {start}, but rank 0 to {first.start}; they must not train together: "
                "end one of the two, then start again"
            )
        if trouble:
            return f"rank {rank} on {host} {trouble}"
        if device != first.device:
            return (
                f"rank {rank} on {host} computes on {device}, but rank 0 on {first.host} on {first.device}; leave out "
                "the host that sees no GPU, or set DS_ACCELERATOR=cpu for all"
            )
        other = rank_of_gpu.setdefault((host, gpu), rank) if gpu else rank
        if other != rank:
            return (
                f"ranks {other} and {rank} on {host} have one GPU, {gpu}; start one rank a GPU (--num_gpus, "
                "--nproc_per_node, --gpus-per-task=1), or set DS_ACCELERATOR=cpu"
            )
    hosts, num_nodes = sorted({host for host, *_ in arrivals}), num_nodes_of_this_start()
    if len(hosts) < num_nodes:
        return (
            f"all {len(arrivals)} ranks are on {', '.join(hosts)}, but Slurm has given {num_nodes} nodes, and the "
            "others would be idle; start one srun task per rank, as slurm/distill.sh does, or ask for fewer nodes"
        )
    return ""


def _wait_for_readers(store: Store, rank: int, world_size: int) -> None:
    """Keep rank 0, and with it the store, until the other ranks that came have read the error."""
    with contextlib.suppress(RuntimeError):
        store.set(f"read/{rank}", "")
        deadline = time.monotonic() + READ_S
        while rank == 0 and time.monotonic() < deadline:
            if all(store.check([f"read/{other}"]) or not store.check([f"here/{other}"]) for other in range(world_size)):
                return
            time.sleep(0.05)


# -- Heartbeats --------------------------------------------------------------------------------------------------------


class _Monitor:
    """Sends this rank's heartbeat, and ends the process when another rank is gone."""

    def __init__(self, store: PrefixStore, timeout_s: float, on_end: Callable[[str], None]) -> None:
        self.store, self.timeout_s, self.on_end = store, timeout_s, on_end
        self.is_leaving = threading.Event()
        self.last_answer = time.monotonic()
        """When the store on rank 0 last answered."""
        self.cause = ""
        """Why this rank has to end."""
        self.heart = threading.Thread(target=self.beat, args=(store.clone(),), daemon=True)  # type: ignore[attr-defined]

    def start(self) -> None:
        self.heart.start()
        threading.Thread(target=self.guard, daemon=True).start()

    def beat(self, store: Store) -> None:
        """Send heartbeats until this rank leaves. Rank 0 finds the ranks that send none, and they find it.

        Under torchrun, whose launcher has the store, rank 0 may be silent while the store answers.
        """
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        watched = range(1, world_size) if rank == 0 else (0,)
        seen = {other: ("", time.monotonic()) for other in watched}
        number, last = 0, time.monotonic()
        while not self.is_leaving.wait(PERIOD_S):
            number, now = number + 1, time.monotonic()
            if now - last > PERIOD_S + STOPPED_S:  # this process was stopped, and perhaps the others too
                seen = {other: (beat, now) for other, (beat, _) in seen.items()}
            last = now
            try:
                store.set(f"beat/{rank}", str(number))
                self.find_silent_rank(store, seen, now)
                cause = store.get("lost").decode() if store.check(["lost"]) else ""
                self.last_answer = time.monotonic()
            except RuntimeError as error:
                cause = _why_no_answer(error)
            if cause:
                self.end(cause)

    def find_silent_rank(self, store: Store, seen: dict[int, tuple[str, float]], now: float) -> None:
        """Report a rank whose heartbeat has not changed for the timeout.

        Args:
            seen: The last heartbeat of each rank and when it came; updated here.
            now: Read before any wait in which this process may have been stopped.
        """
        for other, (last, since) in seen.items():
            beat = store.get(f"beat/{other}").decode() if store.check([f"beat/{other}"]) else ""
            if beat != last:
                seen[other] = (beat, now)
            elif now - since > self.timeout_s:
                host = _host_of(store, other)
                store.compare_set("lost", "", f"rank {other} on {host} has been silent for {self.timeout_s:g} s")

    def guard(self) -> None:
        """End this rank if the store has not answered for the timeout: one that is cut off never raises an error."""
        last = time.monotonic()
        while not self.is_leaving.wait(PERIOD_S):
            last, slept = time.monotonic(), time.monotonic() - last
            if slept > PERIOD_S + STOPPED_S:
                self.last_answer = last
            if last - self.last_answer > self.timeout_s:
                self.end(f"rank 0 has been silent for {self.timeout_s:g} s")

    def find_gone_rank(self) -> str:
        """Which rank is gone, after an error that says only that one is: "" if all send heartbeats."""
        own, deadline = os.environ["RANK"], time.monotonic() + NUM_MISSED * PERIOD_S
        try:
            before = self.heartbeats()
            while time.monotonic() < deadline:
                cause = self.cause or (self.store.get("lost").decode() if self.store.check(["lost"]) else "")
                if cause:
                    return cause
                time.sleep(0.05)
            now = self.heartbeats()
            gone = [rank for rank, beat in now.items() if beat == before[rank] and rank != int(own)]
            names = [f"rank {rank} on {_host_of(self.store, rank)}" for rank in gone[:20]]
        except RuntimeError as error:
            return self.cause or _why_no_answer(error)
        return f"{', '.join(names)} is gone" if names else ""

    def heartbeats(self) -> dict[int, str]:
        """The last heartbeat of each rank, "" before its first."""
        names = {rank: f"beat/{rank}" for rank in range(int(os.environ["WORLD_SIZE"]))}
        return {rank: self.store.get(name).decode() if self.store.check([name]) else "" for rank, name in names.items()}

    def end(self, cause: str) -> None:
        """End the process with `cause`, unless its main thread is leaving already."""
        self.cause = self.cause or cause
        if self.is_leaving.wait(GRACE_S if parents.gone() is None else self.timeout_s):  # the latter: to save first
            return
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{this_rank()} leaves: {cause}\n")
            sys.stderr.flush()
        self.on_end(cause)
        os._exit(1)


def _why_no_answer(error: RuntimeError) -> str:
    """Why the store is gone. torchrun's is in the launcher, all others' in rank 0."""
    launcher = parents.gone()
    return f"rank 0 is gone ({first_line(error)})" if launcher is None else f"the launcher (process {launcher}) is gone"


def _host_of(store: Store, rank: int) -> str:
    """Name of a rank's host, from the roll call."""
    return _Arrival(*json.loads(store.get(f"here/{rank}"))).host


_monitor: _Monitor | None = None


def watch(store: PrefixStore, timeout_s: float, on_end: Callable[[str], None]) -> None:
    """End this process, from now on, when another rank has failed or is silent; a line on stderr says why.

    Args:
        timeout_s: Longest silence.
        on_end: Called with the cause before the process ends.
    """
    global _monitor
    _monitor = _Monitor(store, timeout_s, on_end)
    _monitor.start()


def why_lost(error: BaseException) -> str:
    """Which rank is gone, after an error that says only that one is; takes a few seconds."""
    return (_monitor.find_gone_rank() if _monitor is not None else "") or first_line(error)


def leave() -> None:
    """Stop the heartbeat: this rank is about to end as it should, so it neither misses others nor is missed."""
    if _monitor is not None:
        _monitor.is_leaving.set()
        _monitor.heart.join(10 * GRACE_S)  # a thread that is inside the store when Python ends aborts the process


def report_failure(cause: str) -> None:
    """Tell the other ranks at once that this rank has failed."""
    report(f"{this_rank()} failed: {cause}")


def report(cause: str) -> None:
    """Tell the other ranks at once why all must end. The first report is kept."""
    if _monitor is not None:
        with contextlib.suppress(RuntimeError):  # rank 0 is gone, and the others notice that by themselves
            _monitor.store.compare_set("lost", "", cause)
