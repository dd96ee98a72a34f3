"""Ranks: who am I, how many are we, and the few collectives that the training loop needs.

Every function that talks to other ranks says so in its name or first line; all ranks must call it, in the same order.
"""

import hashlib
import os
import random
import socket
import subprocess
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed

from peakd_ds.config import UserError

T = TypeVar("T")


def init(timeout_s: float = 1800.0) -> None:
    """Join the process group (collective): nccl on GPUs, gloo on CPUs.

    Ranks come from the launcher: `deepspeed` and `torchrun` set RANK, LOCAL_RANK, WORLD_SIZE and MASTER_*; `srun` and
    `mpirun` do not, so they are worked out here. Without any launcher this process is the only rank.
    """
    _set_rank_variables()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        # DeepSpeed compiles this optional shared-memory op at start. It needs a C++ compiler, takes minutes, and a
        # killed build leaves a lock on which every later start waits for ever. gloo does without it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.set_num_threads(max(1, _usable_cores() // local_world_size()))
    else:
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout_s))


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Ranks on this node, as the launcher tells."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "WORLD_SIZE")
    return int(next((os.environ[name] for name in names if os.environ.get(name)), "1"))


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def barrier() -> None:
    if world_size() > 1:
        torch.distributed.barrier()


def all_reduce(tensor: torch.Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> torch.Tensor:
    """Reduce `tensor` in place over all ranks (collective) and return it."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor, op=op)
    return tensor


def broadcast(value: T) -> T:
    """Rank 0's `value` on every rank (collective)."""
    holder = [value]
    if world_size() > 1:
        torch.distributed.broadcast_object_list(holder, src=0)
    return holder[0]


def agree(action: Callable[[], T]) -> T:
    """Run `action` on every rank (collective); its ValueError or OSError on any rank is a UserError on all.

    Nobody is left waiting in a later collective for a rank that has given up.
    """
    result, error = None, None
    try:
        result = action()
    except (ValueError, OSError) as caught:
        error = str(caught)
    errors: list[str | None] = [error]
    if world_size() > 1:
        errors = [None] * world_size()
        torch.distributed.all_gather_object(errors, error)
    told = [(number, text) for number, text in enumerate(errors) if text is not None]
    if told:
        on_all = len(told) == world_size()
        raise UserError(told[0][1] if on_all else f"rank {told[0][0]}: {told[0][1]}")
    return result  # type: ignore[return-value]


def on_main(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 only (collective) and return its result everywhere; its ValueError or OSError is raised
    on every rank."""
    return broadcast(agree(lambda: action() if is_main() else None))  # type: ignore[return-value]


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
    if "SLURM_PROCID" in known and "SLURM_STEP_ID" in known:  # the batch shell has the first, only srun's tasks both
        ranks = _ranks_from_srun()
    elif "OMPI_COMM_WORLD_SIZE" in known or "PMI_SIZE" in known or "PMIX_RANK" in known:
        ranks = _ranks_from_mpi()
    else:
        ranks = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    known.update({name: str(value) for name, value in ranks.items()})


def _ranks_from_srun() -> dict[str, object]:
    """One srun task per rank. The port follows from job, step and restart, so that all tasks derive the same one and
    a straggler of an earlier start does not find it."""
    env = os.environ
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", ""))
    master = "127.0.0.1"
    if int(env.get("SLURM_STEP_NUM_NODES", "1")) > 1:
        master = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        ).stdout.split()[0]
    number = int(env["SLURM_JOB_ID"]) * 64 + int(env["SLURM_STEP_ID"]) * 8 + int(env.get("SLURM_RESTART_COUNT", "0"))
    return dict(
        RANK=env["SLURM_PROCID"],
        WORLD_SIZE=env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")),
        LOCAL_RANK=env["SLURM_LOCALID"],
        MASTER_ADDR=master,
        MASTER_PORT=20000 + number % 20000,
        LOCAL_WORLD_SIZE=env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0],
    )


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


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
