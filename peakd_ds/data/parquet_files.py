"""The parquet files of one split: which belong together, and what each holds, with damage told in one line."""

import json
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from peakd_ds.errors import UserError, as_user_error, shown

MAX_ROWS = 100_000_000
MAX_COLUMN_BYTES = 2**36
"""Most rows and largest column that a file may declare: damaged files declare any, and memory is taken for them."""
NUMBERED = re.compile(r"-(\d+)-of-(\d+)(-[0-9a-f]+)?\.parquet")
"""The end of a file name that datasets writes: the number of the file from 0, and the number of files."""


def find_files(folder: Path, split: str) -> list[Path]:
    """The files SPLIT-*.parquet of a folder, in order; none if there are none.

    Raises:
        UserError: numbered files of which one is missing, twice there, or left over from another export.
    """
    files = sorted(folder.glob(f"{split}-*.parquet"))
    matches = {file: NUMBERED.fullmatch(file.name.removeprefix(split)) for file in files}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is not a file, though it is named like one; delete it or give it another name")
    numbers = {file: (int(match[1]), int(match[2])) for file, match in matches.items() if match}
    if not numbers:
        return files
    first = next(iter(numbers))
    count = numbers[first][1]
    for file in files:
        if file not in numbers or numbers[file][1] != count:
            raise UserError(f"{first} and {file} are files of different exports; delete those that do not belong")
        same = next(other for other in numbers if numbers[other] == numbers[file])
        if same != file:
            raise UserError(f"{same} and {file} have the same number; delete one of them")
    present = {number for number, _ in numbers.values()}
    missing = next((number for number in range(count) if number not in present), None)
    if missing is not None or len(present) != count:
        number = f"lacks number {missing}" if missing is not None else f"has number {max(present)}"
        raise UserError(f"{folder} holds {first.name}, but {number} of its {count} files; get all of them")
    return files


def read_table(file: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> pyarrow.Table:
    """Columns of a parquet file with its schema's metadata; every value is valid for its type.

    Raises:
        UserError: the file is damaged, lacks a column or has it twice, or a text is not UTF-8; names file and row.
    """
    problem, remedy = f"{file} is not a complete parquet file", "get it again"
    with as_user_error(problem, remedy):
        opened = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)
        names = opened.schema_arrow.names
    for name in (*needed, *optional):
        if name in needed and name not in names:
            raise UserError(
                f"{file} has no column {name!r} but {shown(names)}; the task needs {list(needed)}; fix the data"
            )
        if names.count(name) > 1:
            raise UserError(f"{file} has {names.count(name)} columns {name!r}; leave one of them")
    with as_user_error(problem, remedy):
        _check_declared_sizes(opened.metadata)
        # In threads and with pre_buffer, pyarrow hangs or aborts where the limit of memory lets no thread start.
        table = opened.read([name for name in (*needed, *optional) if name in names], use_threads=False)
        if len(table) != opened.metadata.num_rows:
            raise ValueError(f"it declares {opened.metadata.num_rows:,} rows, but holds {len(table):,}")
        try:
            table.validate(full=True)
        except pyarrow.ArrowInvalid:
            _check_utf8(table, file)
            raise
    return table


def _check_declared_sizes(metadata: pyarrow.parquet.FileMetaData) -> None:
    """Raise ValueError for sizes that no file of a task has."""
    if not 0 <= metadata.num_rows <= MAX_ROWS:
        raise ValueError(f"it declares {metadata.num_rows:,} rows, but at most {MAX_ROWS:,} can be read")
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)  # not its columns: pyarrow ends the process if their statistics are damaged
        limit = MAX_COLUMN_BYTES * group.num_columns
        if not 0 <= group.total_byte_size <= limit:
            raise ValueError(f"it declares {group.total_byte_size:,} bytes of rows; at most {limit:,} can be read")


def _check_utf8(table: pyarrow.Table, file: Path) -> None:
    """Raise UserError for the first text that is not UTF-8."""
    for name in table.column_names:
        first, column = 0, table.column(name)
        for chunk in column.chunks:
            if pyarrow.types.is_dictionary(chunk.type):
                chunk = chunk.dictionary_decode()
            if not pyarrow.types.is_string(chunk.type) and not pyarrow.types.is_large_string(chunk.type):
                continue
            is_large = pyarrow.types.is_large_string(chunk.type)
            for row, value in enumerate(chunk.view(pyarrow.large_binary() if is_large else pyarrow.binary()), first):
                try:
                    (value.as_py() or b"").decode()
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{file} row {row} has text in column {name!r} that is not UTF-8 ({error.reason} at byte "
                        f"{error.start}); save the file in UTF-8"
                    ) from error
            first += len(chunk)


def label_names(schema: pyarrow.Schema, where: str) -> tuple[str, ...] | None:
    """Names of the classes of `label` in the order of their ids, as datasets notes them; None if it does not.

    Raises:
        UserError: a note from which the order of the labels cannot be read.
    """
    with _note_is_readable(where):
        features = _features(schema)
        return None if features is None else _names_of_classes(features["label"])


def class_names(schema: pyarrow.Schema, where: str) -> dict[str, tuple[str, ...]]:
    """Names of the classes, in the order of their ids, of each column of class ids or of lists of them.

    Raises:
        UserError: a note from which the order of the classes cannot be read.
    """
    with _note_is_readable(where):
        features = _features(schema) or {}
        inner = {
            name: feature.get("feature", feature) for name, feature in features.items() if isinstance(feature, dict)
        }
        names = {name: _names_of_classes(feature) for name, feature in inner.items() if feature.get("_type")}
    return {name: found for name, found in names.items() if found is not None}


def _note_is_readable(where: str) -> AbstractContextManager[None]:
    """Turn any error of a note of datasets into a UserError."""
    problem = f"{where} has metadata ('huggingface' in its schema) from which the order of the labels cannot be read"
    return as_user_error(problem, "write the file again with to_parquet of datasets")


def _features(schema: pyarrow.Schema) -> dict[str, Any] | None:
    """What datasets notes of the columns in a schema; None if it does not."""
    note = (schema.metadata or {}).get(b"huggingface")
    return None if note is None else (json.loads(note).get("info") or {}).get("features")


def _names_of_classes(feature: dict[str, Any] | None) -> tuple[str, ...] | None:
    """The names in the note of a column; None if it does not hold class ids."""
    if feature is None or feature["_type"] != "ClassLabel":
        return None
    names = feature["names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"names are {shown(names)}")
    return tuple(names)
