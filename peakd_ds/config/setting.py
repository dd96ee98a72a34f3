"""A setting: a dataclass field that carries its help, unit, range and check."""

import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field
from typing import Any

from peakd_ds.errors import UserError, shown

MAX_NAME_BYTES = 200
"""Longest name in a path. File systems end at 255; files are first written under names that are up to 40 longer."""
MAX_TEXT_BYTES = 3000
"""Longest path. Linux ends at 4096; files of a run have up to 200 more than its folder."""


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may be. `str` gives them as `--help` and messages show them."""

    low: float
    high: float
    is_open: bool = False
    """Whether `low` itself is outside."""
    word: str = ""
    """A word that is allowed in place of a number."""
    each: str = ""
    """What the numbers are called if the setting is a list of them."""

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, str):
            return bool(self.word) and value == self.word
        numbers = value if self.each else (value,)
        return all(
            (self.low < number if self.is_open else self.low <= number) and number <= self.high for number in numbers
        )

    def __str__(self) -> str:
        interval = f"{'(' if self.is_open else '['}{_plain(self.low)}, {_plain(self.high)}]"
        return f"{self.each} in {interval}" if self.each else f"{interval} or {self.word}" if self.word else interval


def setting(
    default: Any,
    help: str,
    *,
    unit: str = "",
    range: Range | str = "",
    choices: tuple[str, ...] = (),
    parse: Callable[[str], Any] | None = None,
    shown_default: str = "",
    is_neutral: bool = False,
    takes_many: bool = False,
) -> Any:
    """A field whose metadata the command line, `--help` and `config.validate` read.

    Args:
        default: The value if neither YAML nor command line sets one.
        help: What the setting does, for `--help`.
        unit: Unit of the value, such as "steps".
        range: The numbers that are allowed, which are checked; or words for `--help`, if `parse` checks the value.
        choices: The only words allowed.
        parse: Makes the value of a command-line word; raises ValueError or argparse.ArgumentTypeError.
        shown_default: What `--help` prints for the default.
        is_neutral: Whether two starts in one run folder may differ in it: it changes results by rounding, and by which
            dropout masks are drawn, at most.
        takes_many: Whether one or several words may follow the option, as in `--train_file a.csv b.csv`; the value is
            a tuple.
    """
    metadata = dict(
        help=help,
        unit=unit,
        range=str(range),
        check=range.__contains__ if isinstance(range, Range) else None,
        choices=choices,
        parse=parse,
        shown_default=shown_default,
        is_neutral=is_neutral,
        takes_many=takes_many,
    )
    return field(default=default, metadata=metadata)


def shown_default(spec: Field[Any]) -> str:
    """The default of a setting as `--help` and messages print it."""
    if spec.metadata["shown_default"]:
        return spec.metadata["shown_default"]
    assert spec.default is not MISSING
    if isinstance(spec.default, bool):
        return "on" if spec.default else "off"
    return ",".join(spec.default) if isinstance(spec.default, tuple) else str(spec.default)


def whole_number(text: str) -> int:
    """The number that a word of digits means. Raises ValueError for all else, such as 1_000, which int() takes."""
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise ValueError(text)
    return int(text)


def finite_number(text: str) -> float:
    """The number that a word such as 0.1 or 2e-5 means. Raises ValueError for every other word, nan and inf too."""
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text) or not math.isfinite(float(text)):
        raise ValueError(text)
    return float(text)


def check_text(option: str, text: str) -> None:
    """Raise UserError for a word that no file can be named after, or that no line of a message or table can show."""
    odd = next((char for char in text if unicodedata.category(char) in ("Cc", "Cs")), None)
    if odd is not None:
        kind = "a control character" if unicodedata.category(odd) == "Cc" else "not UTF-8"
        raise UserError(f"{option} {shown(text)} has {odd!a}, which is {kind}; write it without")
    if max(len(name.encode()) for name in text.split("/")) > MAX_NAME_BYTES or len(text.encode()) > MAX_TEXT_BYTES:
        raise UserError(
            f"{option} {shown(text)} is too long: a path may have {MAX_TEXT_BYTES} bytes, and {MAX_NAME_BYTES} between "
            "two slashes; take a shorter one"
        )


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
