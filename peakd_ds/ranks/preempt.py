"""Stop requests: a signal reaches some ranks, all agree at a step boundary, save, and leave.

SIGUSR1 asks to stop and go on later (Slurm sends it before a time limit or a preemption), SIGTERM to stop. Both take
the same way; what becomes of the job is decided in slurm_job.py. This module imports nothing heavy, so that its
handlers stand before imports that take seconds: a signal that came first would kill the rank.
"""

import signal

from peakd_ds.ranks import dist, signals


class Stopped(Exception):
    """Raised on every rank when the run has been asked to stop, with all that it needs to go on saved."""

    def __init__(self, stop: signal.Signals):
        self.signal = stop
        super().__init__(f"stopped by {self.signal.name}; the same command goes on from here")


def stop_agreed() -> signal.Signals | None:
    """The signal that any rank has received, the same on all ranks (collective); None for none."""

    # USR1 counts more than a TERM that follows it, when a save takes longer than the time left.
    mine = 2 if signal.SIGUSR1 in signals._received else 1 if signal.SIGTERM in signals._received else 0
    return (None, signal.SIGTERM, signal.SIGUSR1)[dist.highest(mine)]


def leave_if(stop: signal.Signals | None) -> None:
    """Raise Stopped if there is an agreed stop. For where everything is saved."""
    if stop is not None:
        raise Stopped(stop)
