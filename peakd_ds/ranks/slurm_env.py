"""TODO ranks.slurm_env."""

import os
import socket

# -- In the ranks ------------------------------------------------------------------------------------------------------


def num_nodes_of_this_start() -> int:
    """Nodes that Slurm has given to this srun step, or outside a step to the job; 1 without Slurm."""
    names = ("SLURM_STEP_NUM_NODES",) if "SLURM_STEP_ID" in os.environ else ("SLURM_JOB_NUM_NODES", "SLURM_NNODES")
    return int(next((os.environ[name] for name in names if name in os.environ), "1"))


def job_name() -> str | None:
    """What Slurm's commands take for this job alone; None without Slurm. An element of an array is ARRAY_INDEX: the
    number of its last element is the number of the whole array too, and would requeue or signal them all."""
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")


def describe_start(world_size: int) -> str:
    """Where this start runs, for people."""
    env = os.environ
    if "SLURM_JOB_ID" not in env:
        return f"{world_size} ranks, rank 0 on {socket.gethostname()}"
    restart, nodes = env.get("SLURM_RESTART_COUNT", "0"), env.get("SLURM_JOB_NODELIST", socket.gethostname())
    return f"Slurm job {env['SLURM_JOB_ID']}, restart {restart}, nodes {nodes}, {world_size} ranks"
