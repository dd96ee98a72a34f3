"""How a rank's program ends: a note for the batch script, a report to the other ranks, and the exit code."""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Collection, Iterator

from peakd_ds.errors import UserError, first_line
from peakd_ds.ranks import dist, liveness, preempt, signals
from peakd_ds.ranks.notes import note

MEMORY_SIGNS = (
    *("out of memory", "t allocate memory", "bad_alloc", "alloc_failed", "start new thread"),
    "resource temporarily unavailable",  # no thread: its stack is beyond the limit of memory
)
LOSS_SIGNS = (
    *("connection closed", "connection reset", "connection refused", "connection was likely closed", "broken pipe"),
    *("socket closed", "timed out", "pair closure", "remote process exited", "ncclremoteerror"),
)
"""Parts of messages of gloo, NCCL and torch's store, which have no classes of errors."""


@contextlib.contextmanager
def noted(marks_finished: bool = True) -> Iterator[None]:
    """Write a note of how the block ends.

    The note says finished (if `marks_finished`), stopped (by a signal, with everything saved), refused (the user can
    fix it), lost (another rank is gone) or failed. A failure is reported to the other ranks at once. A stop becomes
    the exit code that a shell gives for the signal; of a Ctrl-C, which reaches all ranks, rank 0 alone tells. A rank
    that has lost another one, or has no memory, ends with one line and exit code 1; another start may help.
    """
    try:
        yield
    except preempt.Stopped as stop:
        note("stopped", str(stop), signal=stop.signal.name)
        dist.leave()
        if stop.signal != signal.SIGINT or os.environ.get("RANK", "0") == "0":
            _say(f"{liveness.this_rank()}: {stop}")
        raise SystemExit(128 + stop.signal) from None
    except UserError as error:
        note("refused", str(error))
        liveness.leave()
        raise
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            liveness.leave()
            raise
        line, how = _one_line(error)
        is_interrupted = not line and signal.SIGINT in signals.received
        if is_interrupted:  # Ctrl-C reaches programs that this one has started too, such as a compiler
            reason = first_line(error)[:200]
            line = f"stopped by SIGINT (Ctrl-C) before it could save ({reason}); the same command goes on"
        cause = line or " ".join(f"{type(error).__name__}: {error}".split())[:500]
        if how == "lost":
            liveness.report(cause)
        else:
            liveness.report_failure(cause)
        note(how, cause)
        liveness.leave()
        if not line:
            raise
        _say(f"{liveness.this_rank()} leaves: {line}")
        raise SystemExit(128 + signal.SIGINT if is_interrupted else 1) from None
    if marks_finished:
        note("finished")
    dist.leave()


def _one_line(error: BaseException) -> tuple[str, str]:
    """All that the user has to know about an error, "" if its traceback is needed; and what the note says."""
    if isinstance(error, liveness.LostRank):
        return first_line(error), "lost"
    is_system_error = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or is_system_error or _has_sign(error, MEMORY_SIGNS):
        detail = " ".join(first_line(error).split())[:200]
        remedy = "lower --micro_batch_size, free memory, or raise its limit (--mem of sbatch, ulimit -v)"
        return f"out of memory ({detail}); {remedy}", "failed"
    if dist.world_size() > 1 and _has_sign(error, LOSS_SIGNS):
        return liveness.why_lost(error), "lost"
    return "", "failed"


def _has_sign(error: BaseException, signs: Collection[str]) -> bool:
    """Whether one of torch's errors has a sign in its message."""
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # a launcher that is gone was perhaps the reader of this pipe
        sys.stderr.write(f"{line}\n")  # one write, so that the lines of two ranks stay apart
        sys.stderr.flush()
