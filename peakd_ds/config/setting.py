"""A setting: a dataclass field that carries its help, unit, range and check."""

from collections.abc import Callable
from dataclasses import MISSING, Field, field
from typing import Any


def setting(
    default: Any,
    help: str,
    *,
    unit: str = "",
    range: str = "",
    check: Callable[[Any], bool] | None = None,
    choices: tuple[str, ...] = (),
    parse: Callable[[str], Any] | None = None,
    shown_default: str = "",
    is_neutral: bool = False,
) -> Any:
    """A field whose metadata the command line, `--help` and `config.validate` read.

    Args:
        default: The value if neither YAML nor command line sets one.
        help: What the setting does, for `--help`.
        unit: Unit of the value, such as "steps".
        range: Range in words; `check` enforces it.
        check: Whether a value is in range.
        choices: The only words allowed.
        parse: Makes the value of a command-line word; raises ValueError or argparse.ArgumentTypeError.
        shown_default: What `--help` prints for the default.
        is_neutral: Whether two starts in one run folder may differ in it: it changes results by rounding, and by which
            dropout masks are drawn, at most.
    """
    metadata = dict(
        help=help,
        unit=unit,
        range=range,
        check=check,
        choices=choices,
        parse=parse,
        shown_default=shown_default,
        is_neutral=is_neutral,
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
