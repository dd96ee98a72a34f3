"""What a rank sets up on its host: builds of DeepSpeed's ops that cannot hang, memory that is reused, threads.

DeepSpeed compiles its ops when they are first used. A killed build leaves a lock, and torch makes every later build of
that op wait for the lock without end.
"""

import ctypes
import os
import platform
import time
from pathlib import Path

from torch.utils.file_baton import FileBaton

from peakd_ds.errors import UserError
from peakd_ds.ranks import launch

STALE_S = 600.0  # longer than any op takes to build


def stale_locks() -> list[Path]:
    """Locks in torch's folder of compiled ops that are too old for a live build to hold them."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return [lock for lock in sorted(root.glob("**/lock")) if _age_s(lock) > STALE_S]


def never_wait_on_stale() -> None:
    """Have builds raise a UserError that names a stale lock, from now on; they still wait for younger locks."""

    def wait(self: FileBaton) -> None:
        while os.path.exists(self.lock_file_path):
            if _age_s(Path(self.lock_file_path)) > STALE_S:
                raise UserError(describe(Path(self.lock_file_path)))
            time.sleep(self.wait_seconds)

    FileBaton.wait = wait  # type: ignore[method-assign]


def describe(lock: Path) -> str:
    """A message about a stale lock, with its age and what to do."""
    return (
        f"{lock} is {_age_s(lock) / 60:.0f} minutes old: a killed build has left it, and builds of this op "
        "would wait for it; delete it, or set TORCH_EXTENSIONS_DIR to another folder"
    )


def _age_s(lock: Path) -> float:
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks for the next step, instead of giving blocks over 32 MiB back to the system.

    Each step allocates and frees hundreds of MiB of gradients, and each fresh page of 4 KiB costs a page fault.
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def cores_of_this_rank() -> int:
    """Number of cores that this rank may use: its own if the launcher has bound it, else its share of the node's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env = os.environ
    is_task = (env.get("SLURM_PROCID"), env.get("SLURM_STEP_NUM_TASKS")) == (env.get("RANK"), env.get("WORLD_SIZE"))
    if is_task and "SLURM_CPUS_PER_TASK" in env:  # an unbound task sees the cores of all tasks on the node
        return min(cores, int(env["SLURM_CPUS_PER_TASK"]))
    is_bound = cores * launch.local_world_size() <= (os.cpu_count() or 1)
    return cores if is_bound else max(1, cores // launch.local_world_size())
