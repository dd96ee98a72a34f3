"""Markdown tables."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[object]], is_padded: bool = False) -> str:
    """A Markdown table, without a line break at its end.

    Args:
        header: Column names.
        rows: One cell for each column, shown as `str` does; line breaks become spaces and `|` is escaped.
        is_padded: Whether the cells of a column are padded to one width, for readers of the plain text.

    Raises:
        ValueError: a row has more or fewer cells than the header.
    """
    lines = [[_cell(value) for value in line] for line in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    columns = list(zip(*lines, strict=True))
    if is_padded:
        widths = [max(map(len, column)) for column in columns]
        lines = [list(map(str.ljust, line, widths)) for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
