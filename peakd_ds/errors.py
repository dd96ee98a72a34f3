"""Errors that the user can fix, and how a program ends with one: a single line, exit code 2, no traceback."""

import os
import sys
import time
from typing import NoReturn

_RANK_NAMES = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


class UserError(ValueError):
    """An error that the user can fix. The message gives the value, the rule and the remedy, in one line."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that has text; the name of the error's class if there is none."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def exit_with(error: UserError | OSError, program: str) -> NoReturn:
    """Print an error in one line and leave with exit code 2.

    A UserError is the same on all ranks, so only rank 0 prints it. The others leave three seconds later: launchers kill
    the remaining ranks when the first one fails, and the line must be out by then. An OSError may be one rank's alone.
    """
    is_main = next((int(os.environ[name]) for name in _RANK_NAMES if name in os.environ), 0) == 0
    if is_main or not isinstance(error, UserError):
        print(f"{program}: error: {' '.join(str(error).splitlines())}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)
    raise SystemExit(2)
