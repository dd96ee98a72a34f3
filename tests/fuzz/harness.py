"""What every wrong input must lead to: a right run, or one line with exit code 2 and nothing of the user's changed.

The programs run in this process, as their console scripts start them; a traceback is an exception that leaves one.
`make fuzz` sets PEAKD_FUZZ to multiply the number of generated examples.
"""

import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

from hypothesis import HealthCheck, settings

from peakd_ds import __main__
from peakd_ds.ranks import dist, liveness

FACTOR = int(os.environ.get("PEAKD_FUZZ", "1"))
REMEDY = re.compile(
    r"\b(set|take|give|get|use|choose|add|write|lower|raise|fix|save|free|drop|delete|leave|go online|start|run|stop|"
    r"did you mean|the default is|the settings it was started with|help lists all)\b"
)
"""Words by which a message says what to do."""


def examples(number: int) -> settings:
    """Hypothesis settings for this many examples, or a multiple of it under `make fuzz`."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=number * FACTOR, deadline=None, suppress_health_check=checks, derandomize=FACTOR == 1)


class Outcome:
    """How a program ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def __repr__(self) -> str:
        return f"exit code {self.code}, stderr:\n{self.err[-2000:]}"


def run(words: Sequence[str], program: Callable[[], None] = __main__.main) -> Outcome:
    """Run a console script's function with these words. Any exception but SystemExit is a traceback, and is raised."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["program", *words]),
        _signals_kept(),
        mock.patch.object(dist, "leave"),  # the process group belongs to other tests too
        mock.patch.object(liveness, "leave"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            program()
            code: int | str | None = 0
        except SystemExit as ended:
            code = ended.code
    assert code is None or isinstance(code, int), f"the program ended with {code!r}"
    return Outcome(code or 0, out.getvalue(), err.getvalue())


def assert_refused(outcome: Outcome, *names: str) -> None:
    """Exit code 2 and one line that names the value or file, and a remedy."""
    lines = [line for line in outcome.err.splitlines() if line.strip()]
    assert outcome.code == 2, outcome
    assert len(lines) == 1 and ": error: " in lines[0], outcome
    assert REMEDY.search(lines[0]), f"no remedy in: {lines[0]}"
    for name in names:
        assert name in lines[0], f"{name!r} is not named in: {lines[0]}"


def assert_refused_or_right(outcome: Outcome, *names: str) -> None:
    """Refused as `assert_refused` says, or exit code 0 without a traceback in what was printed."""
    if outcome.code != 0:
        assert_refused(outcome, *names)
    assert "Traceback" not in outcome.err, outcome


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Content of every file below a folder, by name; None for folders."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Undo the signal handlers that a program sets."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
