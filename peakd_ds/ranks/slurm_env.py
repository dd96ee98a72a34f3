"""What Slurm's environment variables say about this start: its job, its nodes, its number."""

import os
import socket


def num_nodes_of_this_start() -> int:
    """Number of nodes that Slurm has given to this srun step, or to the job outside a step; 1 without Slurm."""
    names = ("SLURM_STEP_NUM_NODES",) if "SLURM_STEP_ID" in os.environ else ("SLURM_JOB_NUM_NODES", "SLURM_NNODES")
    return int(next((os.environ[name] for name in names if name in os.environ), "1"))


def job_name() -> str | None:
    """The name by which Slurm's commands find this job and no other; None without Slurm.

    An array's element is ARRAY_INDEX: its last element has the number of the array, which stands for all elements.
    """
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")


def describe_start(world_size: int) -> str:
    """Where this start runs, as text for people."""
    env = os.environ
    if "SLURM_JOB_ID" not in env:
        return f"{world_size} ranks, rank 0 on {socket.gethostname()}"
    restart, nodes = env.get("SLURM_RESTART_COUNT", "0"), env.get("SLURM_JOB_NODELIST", socket.gethostname())
    return f"Slurm job {env['SLURM_JOB_ID']}, restart {restart}, nodes {nodes}, {world_size} ranks"
