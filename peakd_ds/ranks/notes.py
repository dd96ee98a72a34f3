"""Notes of how each rank ended. Ranks that slurm/distill.sh started write them, and cluster/job.py reads them."""

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import NotRequired, TypedDict

from peakd_ds.files import parse_json, write_atomically

START_DIR = "PEAKD_START_DIR"


class Note(TypedDict):
    """How one rank ended."""

    how: str
    """finished, stopped, refused, lost or failed; outcome.py says what each means."""
    rank: int
    world_size: int
    host: str
    cause: str
    at: float
    """Seconds since 1970 on the rank's host."""
    signal: NotRequired[str]
    """Name of the signal that stopped the rank."""


def note(how: str, cause: str = "", signal: str = "") -> None:
    """Write a note of how this rank ended if slurm/distill.sh started it. The first note is kept."""
    folder = os.environ.get(START_DIR)
    if not folder:
        return
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    file = Path(folder) / f"rank-{rank:05d}.json"
    content = Note(
        how=how,
        rank=rank,
        world_size=int(os.environ.get("WORLD_SIZE", "0")),
        host=socket.gethostname(),
        cause=cause,
        at=time.time(),
    )
    if signal:
        content["signal"] = signal
    with contextlib.suppress(OSError):
        if not file.exists():
            write_atomically(file, json.dumps(content) + "\n")


def read_notes(start: Path) -> list[Note]:
    """The notes of one start, by rank. A damaged note is left out, as if its rank had been killed."""
    notes = []
    for file in sorted(start.glob("rank-*.json")):
        with contextlib.suppress(OSError, ValueError):
            content = parse_json(file.read_text())
            if isinstance(content, dict) and content.keys() >= Note.__required_keys__:
                notes.append(Note(**content))  # type: ignore[typeddict-item]
    return notes
