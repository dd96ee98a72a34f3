"""How ranks find each other: the same rank variables from every launcher, then the roll call.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*. `srun` and `mpirun` do not, so the variables
are worked out here from theirs. Without a launcher this process is the only rank.
"""

import contextlib
import os
import re
import socket
import subprocess

import psutil
import torch
import torch.distributed
from torch.distributed import PrefixStore

from peakd_ds.errors import UserError
from peakd_ds.ranks import liveness
from peakd_ds.ranks.slurm_env import num_nodes_of_this_start

_local_rank = 0


def find_ranks(timeout_s: float, needs_devices: bool = True) -> PrefixStore | None:
    """Set the rank variables and wait for the other ranks (collective).

    Args:
        timeout_s: Longest wait for a rank.
        needs_devices: Whether it is an error if some ranks have a GPU and this one has none.

    Returns:
        The store in which the ranks met; None if there is no other rank, or the process group exists already.

    Raises:
        UserError: there is one rank but Slurm has given several nodes, a node has fewer GPUs than ranks, or as
            `liveness.call_roll` does.
        LostRank: a rank did not come.
    """
    global _local_rank
    _set_rank_variables()
    _local_rank = int(os.environ["LOCAL_RANK"])
    num_nodes = num_nodes_of_this_start()
    if os.environ["WORLD_SIZE"] == "1":
        if num_nodes > 1:
            raise UserError(
                f"Slurm has given {num_nodes} nodes, but this run has one rank, on {socket.gethostname()} (this is how "
                "`deepspeed` without a hostfile starts it); use slurm/distill.sh or srun with one task per rank, or "
                "srun -N1 -n1 for one rank"
            )
        return None
    if torch.distributed.is_initialized():
        return None
    _use_loopback_on_one_host()
    device, trouble, gpu = _device_of_this_rank() if needs_devices else ("cpu", "", "")
    return liveness.call_roll(timeout_s, device, trouble, gpu)


def _device_of_this_rank() -> tuple[str, str, str]:
    """The kind of device that DeepSpeed will choose here, why this rank gets none ("" if it does), and a GPU's UUID."""
    count = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
    if not count:
        return "cpu", "", ""
    if count == 1 or _local_rank < count:  # a launcher may show each rank one GPU, its own
        properties = torch.cuda.get_device_properties(0 if count == 1 else _local_rank)
        return "cuda", "", str(getattr(properties, "uuid", ""))
    trouble = (
        f"has local rank {_local_rank} but sees only {count} GPUs; start at most {count} ranks per node "
        "(--nproc_per_node, --num_gpus, --ntasks-per-node), or set DS_ACCELERATOR=cpu"
    )
    return "cuda", trouble, ""


def local_rank() -> int:
    """Number of this rank on its node. It may differ from the number of its GPU."""
    return _local_rank


def local_world_size() -> int:
    """Number of ranks on this node, from the launcher's variables."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "WORLD_SIZE")
    return int(next((os.environ[name] for name in names if os.environ.get(name)), "1"))


def _set_rank_variables() -> None:
    env = os.environ
    if all(name in env for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")):
        return
    if "OMPI_COMM_WORLD_SIZE" in env:  # checked before srun's: in a job, mpirun starts its daemons with srun
        _set_variables_from_mpi()
    elif "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:  # the batch shell has only the first
        env.update(_ranks_from_srun())
    elif "PMI_SIZE" in env or "PMIX_RANK" in env:
        _set_variables_from_mpi()
    else:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))


def _ranks_from_srun() -> dict[str, str]:
    """Rank variables of an srun task, one task per rank.

    The port follows from job, step and restart: all tasks derive the same one, and a rank of an earlier start does not
    find the ranks of this one.
    """
    env = os.environ
    tasks_per_node = re.sub(r"\(x\d+\)", "", env.get("SLURM_STEP_TASKS_PER_NODE", "1")).split(",")  # "4(x2),1"
    if len(set(tasks_per_node)) > 1:
        raise UserError(
            f"the nodes run {', '.join(tasks_per_node)} ranks, but each must run the same number; set --ntasks-per-node"
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
        MASTER_PORT=str(20000 + number % 20000),
        LOCAL_WORLD_SIZE=tasks_per_node[0],
    )


def _use_loopback_on_one_host() -> None:
    """Have gloo listen on the loopback interface, which no other host can reach, if all ranks meet there."""
    if liveness.is_loopback(os.environ["MASTER_ADDR"]):
        for name, addresses in psutil.net_if_addrs().items():
            if "127.0.0.1" in (entry.address for entry in addresses):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _hosts_of_this_step() -> list[str]:
    """Names of the hosts of this srun step, in Slurm's order."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", ""))
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"scontrol cannot list the hosts of {nodes} ({error}); Slurm's programs must be on PATH in a task, in a "
            "container too"
        ) from error
    return done.stdout.split()


def _listen_where_others_reach(peer: str) -> None:
    """Have gloo and NCCL use the network interface that leads to another host, if this host's name does not lead there.

    gloo listens on the address of the host's name. In Debian's /etc/hosts that is 127.0.1.1, out of other hosts' reach.
    """
    with contextlib.suppress(OSError):
        own_address, peer_address = socket.gethostbyname(socket.gethostname()), socket.gethostbyname(peer)
        if not own_address.startswith("127.") or peer_address.startswith("127."):
            return
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((peer, 9))  # sends nothing, but finds the route
            address = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if address in (entry.address for entry in addresses):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _set_variables_from_mpi() -> None:
    """Set the rank variables with DeepSpeed's discovery, which uses mpi4py; the port is free on rank 0's host."""
    from deepspeed.comm.comm import mpi_discovery
    from mpi4py import MPI

    mpi_discovery(distributed_port=MPI.COMM_WORLD.bcast(_free_port(), root=0), verbose=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
