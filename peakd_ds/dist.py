"""Ranks: who am I, how many are we, and the few collectives that the training loop needs.

Every function that talks to other ranks says so in its name or first line; all ranks must call it, in the same order.
"""

import contextlib
import ctypes
import gc
import hashlib
import os
import platform
import random
import re
import socket
import subprocess
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed

from peakd_ds import jit_lock, liveness
from peakd_ds.config import RANK_TIMEOUT_S, UserError
from peakd_ds.slurm_job import num_nodes_of_this_start

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Longest wait for another rank's work, such as tokenising; a rank that is gone is found out sooner (liveness.py)."""

_local_rank = 0
_cpu_group: Any = None


def init(timeout_s: float = RANK_TIMEOUT_S) -> None:
    """Join the process group (collective): nccl on GPUs, gloo on CPUs.

    Ranks come from the launcher: `deepspeed` and `torchrun` set RANK, LOCAL_RANK, WORLD_SIZE and MASTER_*; `srun` and
    `mpirun` do not, so they are worked out here. Without any launcher this process is the only rank.

    Args:
        timeout_s: A rank that does not come, or falls silent, for so long is given up, and all end.

    Raises:
        UserError: the ranks are not what Slurm gave nodes for, more than a node's GPUs, or some without any. LostRank
            (an OSError): one did not come.
    """
    global _cpu_group
    store = find_ranks(timeout_s)
    jit_lock.never_wait_on_stale()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        # DeepSpeed compiles this optional shared-memory op at start. It needs a C++ compiler, takes minutes, and a
        # killed build leaves a lock on which every later start waits for ever. gloo does without it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        _keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(_cores_of_this_rank())
    else:
        if get_accelerator().device_count() == 1:
            # srun --gpus-per-task=1 shows each task its own GPU alone, as number 0; DeepSpeed compares with mpirun's.
            names = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
            os.environ |= {name: "0" for name in names if name in os.environ}
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    if not torch.distributed.is_initialized():
        gc.collect()
        gc.freeze()  # what libraries hold; DeepSpeed collects garbage six times for an engine, 0.35 s each with it
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=COLLECTIVE_TIMEOUT)
    if store is not None:
        _cpu_group = torch.distributed.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if on_gpu() else None
        liveness.watch(store, timeout_s)


def _keep_freed_memory() -> None:
    """Have glibc keep freed blocks for the next step, where it would give each of over 32 MiB back to the system.

    A step takes and frees the gradients anew, hundreds of MiB, and every fresh page of 4 KiB costs a page fault.
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def leave() -> None:
    """At the end, when no rank waits for another any more: a process that ends with its group open may be aborted."""
    liveness.leave()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def find_ranks(timeout_s: float, needs_devices: bool = True) -> Any:
    """Set the rank variables and wait for the other ranks (collective); the store they met in, None if there is no one
    to wait for. Errors as of `init`.

    Args:
        needs_devices: Whether a rank without a GPU among ranks that have some is an error.
    """
    global _local_rank
    _set_rank_variables()
    _local_rank = int(os.environ["LOCAL_RANK"])
    num_nodes = num_nodes_of_this_start()
    if os.environ["WORLD_SIZE"] == "1":
        if num_nodes > 1:
            raise UserError(
                f"Slurm has given {num_nodes} nodes, but this run has one rank, on {socket.gethostname()} (`deepspeed` "
                "without a hostfile starts it so): use slurm/distill.sh or srun with one task per rank, or "
                "srun -N1 -n1 for one rank"
            )
        return None
    if torch.distributed.is_initialized():
        return None
    device, trouble = _device_and_trouble() if needs_devices else ("cpu", "")
    return liveness.call_roll(timeout_s, device, trouble)


def _device_and_trouble() -> tuple[str, str]:
    """The kind of device that DeepSpeed will choose here, and why there is none for this rank, else ""."""
    count = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
    if count <= 1 or _local_rank < count:  # a single one may be what a launcher shows this rank of many
        return ("cuda" if count else "cpu"), ""
    return "cuda", (
        f"is number {_local_rank + 1} there, and sees {count} GPUs: start at most {count} ranks a node "
        "(--nproc_per_node, --num_gpus, --ntasks-per-node), or set DS_ACCELERATOR=cpu"
    )


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def local_rank() -> int:
    """Number of this rank on its node; not always the number of its GPU."""
    return _local_rank


def local_world_size() -> int:
    """Ranks on this node, as the launcher tells."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "WORLD_SIZE")
    return int(next((os.environ[name] for name in names if os.environ.get(name)), "1"))


def node_rank() -> int:
    """Number of this rank's node: launchers number ranks node by node, and `check_nodes` makes sure."""
    return rank() // local_world_size()


def num_nodes() -> int:
    return max(1, world_size() // local_world_size())


def check_nodes() -> None:
    """Raise UserError (collective) unless each node has the same number of ranks, with neighbouring numbers."""
    nodes: list[tuple[str, int]] = [(socket.gethostname(), local_world_size())]
    if world_size() > 1:
        mine, nodes = nodes[0], nodes * world_size()
        torch.distributed.all_gather_object(nodes, mine)
    size = nodes[0][1]
    for number, (host, its_size) in enumerate(nodes):
        first_host = nodes[number - number % size][0]
        if its_size != size or host != first_host or world_size() % size:
            raise UserError(
                f"rank {number} runs on {host} as one of {its_size} ranks there, rank {number - number % size} on "
                f"{first_host} as one of {size}, of {world_size()} in all; sharded data needs as many ranks on each "
                "node, numbered node by node: set for example srun --ntasks-per-node N --distribution=block"
            )


def is_main() -> bool:
    return rank() == 0


def on_gpu() -> bool:
    """Whether the engines run on GPUs; DS_ACCELERATOR=cpu keeps them off."""
    return device().type == "cuda"


def device() -> torch.device:
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def all_reduce(tensor: torch.Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> torch.Tensor:
    """Reduce `tensor` in place over all ranks (collective) and return it."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor, op=op)
    return tensor


def highest(number: int) -> int:
    """The highest of the ranks' numbers (collective), without waiting for a GPU's queue."""
    if world_size() == 1:
        return number
    holder = torch.tensor([number])
    torch.distributed.all_reduce(holder, op=torch.distributed.ReduceOp.MAX, group=_cpu_group)
    return int(holder.item())


def broadcast(value: T) -> T:
    """Rank 0's `value` on every rank (collective)."""
    holder = [value]
    if world_size() > 1:
        torch.distributed.broadcast_object_list(holder, src=0)
    return holder[0]


def agree(action: Callable[[], T]) -> T:
    """Run `action` on every rank (collective); its ValueError or OSError on any rank is a UserError on all.

    Nobody is left waiting in a later collective for a rank that has given up: any other error, which is a bug, is
    raised as it is on its own rank, and as a UserError that names it on the others.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as caught:
        error = caught
    texts: list[str | None] = [None if error is None else str(error) or type(error).__name__]
    if world_size() > 1:
        mine, texts = texts[0], [None] * world_size()
        torch.distributed.all_gather_object(texts, mine)
    if error is not None and not isinstance(error, ValueError | OSError):
        raise error
    told = [(number, text) for number, text in enumerate(texts) if text is not None]
    if told:
        number, text = told[0]
        raise UserError(text if number == 0 else f"rank {number}: {text}") from error
    return result  # type: ignore[return-value]


def on_main(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 only (collective) and return its result everywhere; errors as in `agree`."""
    return broadcast(agree(lambda: action() if is_main() else None))  # type: ignore[return-value]


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """A host tensor on this rank's device; the host does not wait for the copy, which pinned memory alone allows."""
    return tensor if device().type == "cpu" else tensor.pin_memory().to(device(), non_blocking=True)


def seed_everything(*words: object) -> None:
    """Seed torch, numpy's legacy generator and random from `words`, for example (seed, stage, step, rank)."""
    import numpy

    digest = hashlib.sha256(repr(words).encode()).digest()
    number = int.from_bytes(digest[:4], "little")
    torch.manual_seed(number)
    random.seed(number)
    numpy.random.seed(number)


def _set_rank_variables() -> None:
    known = os.environ
    if all(name in known for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")):
        return
    if "OMPI_COMM_WORLD_SIZE" in known:  # before srun's: mpirun inside a job starts its daemons by srun
        ranks = _ranks_from_mpi()
    elif "SLURM_PROCID" in known and "SLURM_STEP_ID" in known:  # the batch shell has the first, only srun's tasks both
        ranks = _ranks_from_srun()
    elif "PMI_SIZE" in known or "PMIX_RANK" in known:
        ranks = _ranks_from_mpi()
    else:
        ranks = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    known.update({name: str(value) for name, value in ranks.items()})


def _ranks_from_srun() -> dict[str, object]:
    """One srun task per rank. The port follows from job, step and restart, so that all tasks derive the same one and
    a straggler of an earlier start does not find it."""
    env = os.environ
    tasks_per_node = re.sub(r"\(x\d+\)", "", env.get("SLURM_STEP_TASKS_PER_NODE", "1")).split(",")  # "4(x2),1"
    if len(set(tasks_per_node)) > 1:
        raise UserError(
            f"the nodes run {', '.join(tasks_per_node)} ranks, and must run the same number each; set --ntasks-per-node"
        )
    master = "127.0.0.1"
    if num_nodes_of_this_start() > 1:
        hosts = _hosts_of_this_step()
        master = hosts[0]
        _listen_where_others_reach(hosts[1] if int(env.get("SLURM_NODEID", "0")) == 0 else master)
    number = int(env["SLURM_JOB_ID"]) * 64 + int(env["SLURM_STEP_ID"]) * 8 + int(env.get("SLURM_RESTART_COUNT", "0"))
    return dict(
        RANK=env["SLURM_PROCID"],
        WORLD_SIZE=env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")),
        LOCAL_RANK=env["SLURM_LOCALID"],
        MASTER_ADDR=master,
        MASTER_PORT=20000 + number % 20000,
        LOCAL_WORLD_SIZE=tasks_per_node[0],
    )


def _hosts_of_this_step() -> list[str]:
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", ""))
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"scontrol cannot tell which hosts {nodes} are ({error}); Slurm's programs must be on PATH in a task, in a "
            "container too"
        ) from error
    return done.stdout.split()


def _listen_where_others_reach(peer: str) -> None:
    """Name the network interface that leads to another host, where this host's own name does not.

    gloo listens on the address of the host's name. In Debian's /etc/hosts that is 127.0.1.1, which no other reaches.
    """
    with contextlib.suppress(OSError):
        own, peers = socket.gethostbyname(socket.gethostname()), socket.gethostbyname(peer)
        if not own.startswith("127.") or peers.startswith("127."):
            return
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((peer, 9))  # sends nothing: asks for the route
            address = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if address in (known.address for known in addresses):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _ranks_from_mpi() -> dict[str, object]:
    """Ranks as mpi4py tells them, by way of DeepSpeed's own discovery, with a port that is free on rank 0's host."""
    from deepspeed.comm.comm import mpi_discovery
    from mpi4py import MPI

    mpi_discovery(distributed_port=MPI.COMM_WORLD.bcast(_free_port(), root=0), verbose=False)
    return {}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _cores_of_this_rank() -> int:
    """The cores this process may use; where a launcher has not bound it to its own, its share of the node's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env = os.environ
    is_task = (env.get("SLURM_PROCID"), env.get("SLURM_STEP_NUM_TASKS")) == (env.get("RANK"), env.get("WORLD_SIZE"))
    if is_task and "SLURM_CPUS_PER_TASK" in env:  # of all ranks together the node's cores may be visible here
        return min(cores, int(env["SLURM_CPUS_PER_TASK"]))
    is_bound = cores * local_world_size() <= (os.cpu_count() or 1)
    return cores if is_bound else max(1, cores // local_world_size())
