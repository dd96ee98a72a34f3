"""Ranks: who am I, how many are we, and the few collectives that the training loop needs.

Every function that talks to other ranks says so in its name or first line; all ranks must call it, in the same order.
"""

import gc
import hashlib
import os
import random
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed

from peakd_ds.config.engines import RANK_TIMEOUT_S
from peakd_ds.errors import UserError
from peakd_ds.ranks import host, launch, liveness
from peakd_ds.ranks.device import on_gpu
from peakd_ds.ranks.notes import note

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Longest wait for another rank's work, such as tokenising; a rank that is gone is found out sooner (liveness.py)."""


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
    store = launch.find_ranks(timeout_s)
    host.never_wait_on_stale()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        # DeepSpeed compiles this optional shared-memory op at start. It needs a C++ compiler, takes minutes, and a
        # killed build leaves a lock on which every later start waits for ever. gloo does without it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        host._keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(host._cores_of_this_rank())
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
        liveness.watch(store, timeout_s, on_end=lambda cause: note("lost", cause))


def leave() -> None:
    """At the end, when no rank waits for another any more: a process that ends with its group open may be aborted."""
    liveness.leave()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def node_rank() -> int:
    """Number of this rank's node: launchers number ranks node by node, and `check_nodes` makes sure."""
    return rank() // launch.local_world_size()


def num_nodes() -> int:
    return max(1, world_size() // launch.local_world_size())


def check_nodes() -> None:
    """Raise UserError (collective) unless each node has the same number of ranks, with neighbouring numbers."""
    nodes: list[tuple[str, int]] = [(socket.gethostname(), launch.local_world_size())]
    if world_size() > 1:
        mine, nodes = nodes[0], nodes * world_size()
        torch.distributed.all_gather_object(nodes, mine)
    size = nodes[0][1]
    for number, (name, its_size) in enumerate(nodes):
        first_host = nodes[number - number % size][0]
        if its_size != size or name != first_host or world_size() % size:
            raise UserError(
                f"rank {number} runs on {name} as one of {its_size} ranks there, rank {number - number % size} on "
                f"{first_host} as one of {size}, of {world_size()} in all; sharded data needs as many ranks on each "
                "node, numbered node by node: set for example srun --ntasks-per-node N --distribution=block"
            )


def is_main() -> bool:
    return rank() == 0


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


def seed_everything(*words: object) -> None:
    """Seed torch, numpy's legacy generator and random from `words`, for example (seed, stage, step, rank)."""
    import numpy

    digest = hashlib.sha256(repr(words).encode()).digest()
    number = int.from_bytes(digest[:4], "little")
    torch.manual_seed(number)
    random.seed(number)
    numpy.random.seed(number)
