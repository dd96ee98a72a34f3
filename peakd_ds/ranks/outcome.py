"""TODO ranks.outcome."""

import contextlib
import sys
from collections.abc import Iterator

from peakd_ds.errors import UserError
from peakd_ds.ranks import dist, liveness, preempt
from peakd_ds.ranks.liveness import LostRank
from peakd_ds.ranks.notes import note


@contextlib.contextmanager
def noted(tells_end: bool = True) -> Iterator[None]:
    """Note how the block ends: finished (if `tells_end`), stopped (a signal, all saved), refused (the user can mend
    it), lost (another rank is gone) or failed.

    A stop becomes the exit code that a shell gives the signal. Other ranks hear of a failure at once.
    """

    try:
        yield
    except preempt.Stopped as stop:
        note("stopped", str(stop), signal=stop.signal.name)
        dist.leave()
        print(f"{liveness.me()}: {stop}", file=sys.stderr, flush=True)
        raise SystemExit(128 + stop.signal) from None
    except UserError as error:
        note("refused", str(error))
        liveness.leave()
        raise
    except BaseException as error:
        if not isinstance(error, SystemExit) or error.code not in (None, 0):
            cause = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            liveness.tell(cause)
            note("lost" if _is_loss(error) else "failed", cause)
        liveness.leave()
        raise
    if tells_end:
        note("finished")
    dist.leave()


def _is_loss(error: BaseException) -> bool:
    """Whether a rank failed only because another was gone."""

    text = str(error).lower()
    signs = ("connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "socket closed")
    return isinstance(error, LostRank) or any(sign in text for sign in signs)
