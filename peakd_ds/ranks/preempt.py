"""Stop requests: a signal reaches some ranks, all ranks agree on it between two steps, save, and leave.

SIGUSR1 asks for a stop that is continued later; Slurm sends it before a time limit or a preemption. SIGTERM asks for a
stop, and so does SIGINT, which is the user's Ctrl-C. A program acts on all in the same way, and cluster/job.py decides
what becomes of the job. signals.py records the signals. A launcher that is gone counts as SIGTERM; parents.py knows the
launcher.
"""

import signal

from peakd_ds.ranks import dist, parents, signals

_has_lost_launcher = False
"""Whether the ranks have agreed to stop because a launcher is gone."""


class Stopped(Exception):
    """Raised on every rank when the run was asked to stop and everything that it needs to continue is saved."""

    def __init__(self, stop: signal.Signals):
        self.signal = stop
        cause = f"stopped by {self.signal.name}" + (" (Ctrl-C)" if stop == signal.SIGINT else "")
        if _has_lost_launcher:
            process = parents.gone()
            cause = f"stopped, since the launcher {f'(process {process})' if process else 'of another rank'} is gone"
        super().__init__(f"{cause}; the same command goes on from here")


def stop_agreed() -> signal.Signals | None:
    """The signal that any rank has received, the same on all ranks (collective); None if there is none.

    SIGUSR1 takes precedence: a SIGTERM follows it when a save takes longer than the time that is left. So does SIGINT,
    which some launchers answer with a SIGTERM. A launcher that is gone counts as SIGTERM.
    """
    global _has_lost_launcher
    order = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    mine = max((number for number, stop in enumerate(order, start=2) if stop in signals.received), default=0)
    if not mine and parents.gone() is not None:
        mine = 1
    agreed = dist.max_over_ranks(mine)
    _has_lost_launcher = agreed == 1
    return (None, signal.SIGTERM, *order)[agreed]


def leave_if(stop: signal.Signals | None) -> None:
    """Raise Stopped if the ranks have agreed to stop. Call it where everything is saved."""
    if stop is not None:
        raise Stopped(stop)
