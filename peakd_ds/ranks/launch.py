"""TODO ranks.launch."""

import contextlib
import os
import re
import socket
import subprocess
from typing import Any

import psutil
import torch
import torch.distributed

from peakd_ds.errors import UserError
from peakd_ds.ranks import liveness
from peakd_ds.ranks.slurm_env import num_nodes_of_this_start

_local_rank = 0


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


def local_rank() -> int:
    """Number of this rank on its node; not always the number of its GPU."""
    return _local_rank


def local_world_size() -> int:
    """Ranks on this node, as the launcher tells."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "WORLD_SIZE")
    return int(next((os.environ[name] for name in names if os.environ.get(name)), "1"))


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
