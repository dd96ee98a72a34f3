"""Errors that the user can fix, and how a program ends with one: a single line, exit code 2, no traceback."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

_RANK_NAMES = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
_MAX_MESSAGE = 3000
_MAX_VALUE = 80


class UserError(ValueError):
    """An error that the user can fix. The message gives the value, the rule and the remedy, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """The text in one line of printable characters; a long one loses its middle, since the remedy is at the end."""
    joined = " ".join(text.splitlines())
    if len(joined) > _MAX_MESSAGE:
        joined = f"{joined[: _MAX_MESSAGE // 2]} ... {joined[-_MAX_MESSAGE // 2 :]}"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in joined)


def shown(value: object) -> str:
    """A value as messages show it: in quotes if it is text, without its middle if it is long."""
    text = repr(value)
    return text if len(text) <= _MAX_VALUE else f"{text[: _MAX_VALUE // 2]}...{text[-_MAX_VALUE // 4 :]}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message that has text; the name of the error's class if there is none."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


@contextmanager
def as_user_error(problem: str, remedy: str) -> Iterator[None]:
    """Turn any error of a library into a UserError of one line: the problem, the error's first line and the remedy."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic in a Rust library is no Exception
        raise UserError(f"{problem} ({first_line(error)[:300]}); {remedy}") from error


def exit_with(error: UserError | OSError, program: str) -> NoReturn:
    """Print an error in one line and leave with exit code 2.

    A UserError is the same on all ranks, so only rank 0 prints it. The others leave three seconds later: launchers kill
    the remaining ranks when the first one fails, and the line must be out by then. An OSError may be one rank's alone.
    """
    rank = next((os.environ[name] for name in _RANK_NAMES if name in os.environ), "0")
    message = str(error) if isinstance(error, UserError) else f"{error}; free some space, or give another path"
    if rank == "0" or not isinstance(error, UserError):
        print(f"{program}: error: {one_line(message)}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)
    raise SystemExit(2)
