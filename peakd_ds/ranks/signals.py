"""Stop signals are recorded from a program's first moment on; preempt.py acts on them.

This module imports nothing heavy: the handlers must be set before imports that take seconds, since a signal that comes
first would kill the rank.
"""

import os
import signal
from types import FrameType

from peakd_ds.ranks import parents

received: set[int] = set()


def listen() -> None:
    """Record SIGUSR1 and SIGTERM from now on, instead of dying of them, and remember who started this process."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, _record)
    parents.remember()
    # When a connection is lost, torch warns with stack frames; liveness.py says in one line what it means.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _record(number: int, frame: FrameType | None) -> None:
    received.add(number)
