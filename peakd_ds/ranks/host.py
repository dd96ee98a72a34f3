"""DeepSpeed's compiled ops: a killed build leaves a lock, on which torch makes every later one wait for ever."""

import ctypes
import os
import platform
import time
from pathlib import Path
from typing import Any

from peakd_ds.errors import UserError
from peakd_ds.ranks import launch

STALE_S = 600.0  # longer than any op takes to build


def stale_locks() -> list[Path]:
    """Locks in torch's folder of compiled ops that no living build can hold, by their age."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return [lock for lock in sorted(root.glob("**/lock")) if _age_s(lock) > STALE_S]


def never_wait_on_stale() -> None:
    """From now on a build that finds such a lock raises UserError, with its name, and waits only on younger ones."""
    from torch.utils.file_baton import FileBaton

    def wait(self: Any) -> None:
        while os.path.exists(self.lock_file_path):
            if _age_s(Path(self.lock_file_path)) > STALE_S:
                raise UserError(describe(Path(self.lock_file_path)))
            time.sleep(self.wait_seconds)

    FileBaton.wait = wait  # type: ignore[method-assign]


def describe(lock: Path) -> str:
    return (
        f"{lock} is {_age_s(lock) / 60:.0f} minutes old: a killed build has left it, and builds of this op "
        "would wait for it; delete it, or set TORCH_EXTENSIONS_DIR to another folder"
    )


def _age_s(lock: Path) -> float:
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _keep_freed_memory() -> None:
    """Have glibc keep freed blocks for the next step, where it would give each of over 32 MiB back to the system.

    A step takes and frees the gradients anew, hundreds of MiB, and every fresh page of 4 KiB costs a page fault.
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def _cores_of_this_rank() -> int:
    """The cores this process may use; where a launcher has not bound it to its own, its share of the node's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env = os.environ
    is_task = (env.get("SLURM_PROCID"), env.get("SLURM_STEP_NUM_TASKS")) == (env.get("RANK"), env.get("WORLD_SIZE"))
    if is_task and "SLURM_CPUS_PER_TASK" in env:  # of all ranks together the node's cores may be visible here
        return min(cores, int(env["SLURM_CPUS_PER_TASK"]))
    is_bound = cores * launch.local_world_size() <= (os.cpu_count() or 1)
    return cores if is_bound else max(1, cores // launch.local_world_size())
