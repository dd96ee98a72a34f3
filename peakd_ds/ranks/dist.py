"""The process group, and the few collectives that the programs need.

A function that communicates says "collective" in its docstring: all ranks must call it, in the same order.
"""

import gc
import hashlib
import os
import random
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed
from torch.distributed import ProcessGroup, ReduceOp

from peakd_ds.config.engines import RANK_TIMEOUT_S
from peakd_ds.errors import UserError
from peakd_ds.ranks import host, launch, liveness
from peakd_ds.ranks.device import on_gpu
from peakd_ds.ranks.notes import note

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Longest wait in a collective, for example while rank 0 tokenises. liveness.py notices sooner that a rank is gone."""

_cpu_group: ProcessGroup | None = None


def init(timeout_s: float = RANK_TIMEOUT_S) -> None:
    """Join the process group (collective): nccl on GPUs, gloo on CPUs.

    Args:
        timeout_s: All ranks end if one does not come, or falls silent, for this time.

    Raises:
        UserError: the ranks are not what Slurm gave nodes for, are more than a node's GPUs, or lack GPUs on some nodes.
        LostRank: a rank did not come.
    """
    global _cpu_group
    store = launch.find_ranks(timeout_s)
    host.never_wait_on_stale()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        # DeepSpeed would compile this optional shared-memory op at start, which takes minutes and a C++ compiler, and
        # a killed build makes later ones hang. gloo works without it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        host.keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(host.cores_of_this_rank())
    else:
        if get_accelerator().device_count() == 1:
            # srun --gpus-per-task=1 shows each task only its own GPU, as number 0; DeepSpeed reads mpirun's name too.
            names = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
            os.environ |= {name: "0" for name in names if name in os.environ}
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    if not torch.distributed.is_initialized():
        gc.collect()
        gc.freeze()  # libraries' objects; DeepSpeed collects garbage six times per engine, 0.35 s each with them
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=COLLECTIVE_TIMEOUT)
    if store is not None:
        _cpu_group = torch.distributed.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if on_gpu() else None
        liveness.watch(store, timeout_s, on_end=lambda cause: note("lost", cause))


def leave() -> None:
    """Leave the process group when no rank waits for another: a process that ends while in its group may be aborted."""
    liveness.leave()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank() -> int:
    """Number of this rank; 0 without a process group."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def node_rank() -> int:
    """Number of this rank's node, if ranks are numbered node by node. Sharded data has `check_nodes` verify that."""
    return rank() // launch.local_world_size()


def num_nodes() -> int:
    """Number of nodes, if each has as many ranks as this one."""
    return max(1, world_size() // launch.local_world_size())


def check_nodes() -> None:
    """Raise UserError unless all nodes have the same number of ranks, numbered node by node (collective)."""
    nodes: list[tuple[str, int]] = [(socket.gethostname(), launch.local_world_size())]
    if world_size() > 1:
        mine, nodes = nodes[0], nodes * world_size()
        torch.distributed.all_gather_object(nodes, mine)
    size = nodes[0][1]
    for number, (name, its_size) in enumerate(nodes):
        first_host = nodes[number - number % size][0]
        if its_size != size or name != first_host or world_size() % size:
            raise UserError(
                f"rank {number} is one of {its_size} ranks on {name}, but rank {number - number % size} is one of "
                f"{size} on {first_host}, of {world_size()} in all; sharded data needs the same number of ranks on "
                "each node, numbered node by node: set for example srun --ntasks-per-node N --distribution=block"
            )


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def all_reduce(tensor: torch.Tensor, op: ReduceOp.RedOpType = ReduceOp.SUM) -> torch.Tensor:
    """Reduce `tensor` in place over all ranks (collective) and return it."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor, op=op)
    return tensor


def max_over_ranks(number: int) -> int:
    """The largest of the ranks' numbers (collective). It does not wait for work queued on a GPU."""
    if world_size() == 1:
        return number
    holder = torch.tensor([number])
    torch.distributed.all_reduce(holder, op=ReduceOp.MAX, group=_cpu_group)
    return int(holder.item())


def broadcast(value: T) -> T:
    """Rank 0's `value` on every rank (collective)."""
    holder = [value]
    if world_size() > 1:
        torch.distributed.broadcast_object_list(holder, src=0)
    return holder[0]


def agree(action: Callable[[], T]) -> T:
    """Run `action` on every rank (collective); a ValueError or OSError on any rank becomes a UserError on all.

    So no rank is left waiting in a later collective for one that has failed. Any other error is a bug: its own rank
    raises it unchanged, and the others raise a UserError that names it.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as caught:
        error = caught
    messages: list[str | None] = [None if error is None else str(error) or type(error).__name__]
    if world_size() > 1:
        mine, messages = messages[0], [None] * world_size()
        torch.distributed.all_gather_object(messages, mine)
    if error is not None and not isinstance(error, ValueError | OSError):
        raise error
    failures = [(number, message) for number, message in enumerate(messages) if message is not None]
    if failures:
        number, message = failures[0]
        raise UserError(message if number == 0 else f"rank {number}: {message}") from error
    return result  # type: ignore[return-value]


def on_main(action: Callable[[], T]) -> T:
    """The result of `action`, which runs on rank 0, on every rank (collective); errors as in `agree`."""
    return broadcast(agree(lambda: action() if is_main() else None))  # type: ignore[return-value]


def seed_everything(*words: object) -> None:
    """Seed torch, numpy's legacy generator and random from `words`, for example (seed, stage, step, rank)."""
    import numpy

    digest = hashlib.sha256(repr(words).encode()).digest()
    number = int.from_bytes(digest[:4], "little")
    torch.manual_seed(number)
    random.seed(number)
    numpy.random.seed(number)
