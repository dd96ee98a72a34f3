"""Stop requests: a signal reaches some ranks, all ranks agree on it between two steps, save, and leave.

SIGUSR1 asks for a stop that is continued later; Slurm sends it before a time limit or a preemption. SIGTERM asks for a
stop. A program acts on both in the same way, and cluster/job.py decides what becomes of the job. signals.py records
the signals.
"""

import signal

from peakd_ds.ranks import dist, signals


class Stopped(Exception):
    """Raised on every rank when the run was asked to stop and everything that it needs to continue is saved."""

    def __init__(self, stop: signal.Signals):
        self.signal = stop
        super().__init__(f"stopped by {self.signal.name}; the same command goes on from here")


def stop_agreed() -> signal.Signals | None:
    """The signal that any rank has received, the same on all ranks (collective); None if there is none.

    SIGUSR1 takes precedence: a SIGTERM follows it when a save takes longer than the time that is left.
    """
    mine = 2 if signal.SIGUSR1 in signals.received else 1 if signal.SIGTERM in signals.received else 0
    return (None, signal.SIGTERM, signal.SIGUSR1)[dist.max_over_ranks(mine)]


def leave_if(stop: signal.Signals | None) -> None:
    """Raise Stopped if the ranks have agreed to stop. Call it where everything is saved."""
    if stop is not None:
        raise Stopped(stop)
