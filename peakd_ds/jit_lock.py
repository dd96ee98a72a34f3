"""DeepSpeed's compiled ops: a killed build leaves a lock, on which torch makes every later one wait for ever."""

import os
import time
from pathlib import Path
from typing import Any

from peakd_ds.config import UserError

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
