"""Kinds of Arrow columns that have several types."""

from pyarrow import DataType, types


def is_text(kind: DataType) -> bool:
    """Whether values are strings, whatever the width of their offsets."""
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def is_list(kind: DataType) -> bool:
    """Whether values are lists, of one length or of any."""
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
