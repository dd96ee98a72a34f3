"""Stop signals are recorded from a program's first moment on; preempt.py acts on them.

The first Ctrl-C (SIGINT) is recorded as SIGTERM is. A later one ends the process at once, but not within two seconds:
one Ctrl-C may arrive twice, from the terminal and from the launcher. A SIGTERM after it never does, since deepspeed's
launcher answers one Ctrl-C with both. The later Ctrl-C is noticed by a thread, since the main thread may be waiting for
a rank that does not answer, where Python runs no handler.

This module imports nothing heavy: the handlers must be set before imports that take seconds, since a signal that comes
first would kill the rank.
"""

import os
import signal
import threading
import time
from types import FrameType

from peakd_ds.ranks import parents

AGAIN_S = 2.0
"""A SIGINT this long after the first is the user's second Ctrl-C."""

received: set[int] = set()


def listen() -> None:
    """Record SIGUSR1, SIGTERM and SIGINT from now on, instead of dying of them, and remember who started this process.

    A second SIGINT, at least AGAIN_S after the first, ends the process at once.
    """
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _record)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_end_if_asked_again, args=(reading,), daemon=True).start()
    parents.remember()
    # When a connection is lost, torch warns with stack frames; liveness.py says in one line what it means.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _record(number: int, frame: FrameType | None) -> None:
    received.add(number)


def _end_if_asked_again(reading: int) -> None:
    """Read the number of each signal as it comes, and end the process at the user's second Ctrl-C."""
    first: float | None = None
    while numbers := os.read(reading, 1):
        if numbers[0] != signal.SIGINT or signal.getsignal(signal.SIGINT) is not _record:
            continue
        now = time.monotonic()
        first = now if first is None else first
        if now - first >= AGAIN_S:
            if os.environ.get("RANK", "0") == "0":
                os.write(2, b"ended at once by a second Ctrl-C; the same command goes on from the last checkpoint\n")
            os._exit(128 + signal.SIGINT)
