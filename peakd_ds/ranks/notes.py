"""Notes in which ranks that slurm/distill.sh started say how they ended; cluster/job.py reads them."""

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from peakd_ds.files import write_atomically

START_DIR = "PEAKD_START_DIR"


def note(how: str, cause: str = "", **more: Any) -> None:
    """Leave a note of how this rank ended, if slurm/distill.sh started it; the first one stands."""
    folder = os.environ.get(START_DIR)
    if not folder:
        return
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    file = Path(folder) / f"rank-{rank:05d}.json"
    facts = {"how": how, "rank": rank, "world_size": int(os.environ.get("WORLD_SIZE", "0"))}
    told = {**facts, "host": socket.gethostname(), "cause": cause, "at": time.time(), **more}
    with contextlib.suppress(OSError):
        if not file.exists():
            write_atomically(file, json.dumps(told) + "\n")


def read_notes(start: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(start.glob("rank-*.json"))]
