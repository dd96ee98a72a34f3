"""How a rank's program ends: a note for the batch script, a report to the other ranks, and the exit code."""

import contextlib
import sys
from collections.abc import Iterator

from peakd_ds.errors import UserError
from peakd_ds.ranks import dist, liveness, preempt
from peakd_ds.ranks.liveness import LostRank
from peakd_ds.ranks.notes import note


@contextlib.contextmanager
def noted(marks_finished: bool = True) -> Iterator[None]:
    """Write a note of how the block ends.

    The note says finished (if `marks_finished`), stopped (by a signal, with everything saved), refused (the user can
    fix it), lost (another rank is gone) or failed. A failure is reported to the other ranks at once. A stop becomes
    the exit code that a shell gives for the signal.
    """
    try:
        yield
    except preempt.Stopped as stop:
        note("stopped", str(stop), signal=stop.signal.name)
        dist.leave()
        print(f"{liveness.this_rank()}: {stop}", file=sys.stderr, flush=True)
        raise SystemExit(128 + stop.signal) from None
    except UserError as error:
        note("refused", str(error))
        liveness.leave()
        raise
    except BaseException as error:
        if not isinstance(error, SystemExit) or error.code not in (None, 0):
            cause = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            liveness.report_failure(cause)
            note("lost" if _is_loss(error) else "failed", cause)
        liveness.leave()
        raise
    if marks_finished:
        note("finished")
    dist.leave()


def _is_loss(error: BaseException) -> bool:
    """Whether a rank failed only because another was gone."""
    text = str(error).lower()
    signs = ("connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "socket closed")
    return isinstance(error, LostRank) or any(sign in text for sign in signs)
