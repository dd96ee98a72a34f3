"""Rows of the user's own files: csv, tsv, json, jsonl and parquet, also compressed, as Arrow columns.

Values of csv and tsv are text, and an empty field is null; what a column of text means is for labels.py to say. Files
are read with pyarrow, not through `datasets.load_dataset`, which keeps a copy in the user's home, reads the words NA
and None as missing, and names no row in its errors. Datasets of the hub and folders of `save_to_disk` are read by
datasets.
"""

import bz2
import glob
import gzip
import json
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow
import pyarrow.compute
import pyarrow.csv

from peakd_ds.data import parquet_files
from peakd_ds.errors import UserError, as_user_error, first_line, shown

SEPARATORS = {".csv": ",", ".tsv": "\t"}
JSON_ENDINGS = (".json", ".jsonl", ".ndjson")
ENDINGS = (*SEPARATORS, *JSON_ENDINGS, ".parquet")
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DATASET_SPLITS = {"train": ("train",), "validation": ("validation", "dev", "valid", "val"), "test": ("test",)}
"""Names that the splits of a dataset have on the hub."""


@dataclass(frozen=True)
class Rows:
    """The columns of one file, or of one split of a dataset."""

    where: str
    """The file, for messages."""
    table: pyarrow.Table
    class_names: dict[str, tuple[str, ...]]
    """Names of the classes for each column of class ids that has them, in the order of the ids."""
    is_text: bool = False
    """Whether every value is text whatever it means, as in csv."""

    @property
    def columns(self) -> list[str]:
        return self.table.column_names


def find_files(option: str, patterns: Sequence[str]) -> list[Path]:
    """The files that paths and patterns name, sorted by name, each once.

    Raises:
        UserError: a path or pattern names no file, or a file whose ending says no known format.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        paths = [Path(pattern)] if Path(pattern).is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        files = [path for path in paths if path.is_file()]
        if not files:
            kind = (
                "is a folder; name its files, such as" if Path(pattern).is_dir() else "names no file; give one, such as"
            )
            raise UserError(f"--{option} {pattern} {kind} {option.removesuffix('_file')}.csv or 'rows-*.parquet'")
        for file in files:
            _ending(option, file)
            found.setdefault(file.resolve(), file)
    return sorted(found.values(), key=lambda file: (file.name, str(file)))


def read_file(option: str, file: Path) -> Rows:
    """The columns of a file. Raises UserError, with file and row, if it is empty, damaged or not in UTF-8."""
    ending = _ending(option, file)
    if ending == ".parquet":
        rows = _read_parquet(file)
    elif ending in JSON_ENDINGS:
        rows = _read_json(file, is_lines=ending != ".json")
    else:
        rows = _read_csv(file, SEPARATORS[ending])
    if not len(rows.table):
        raise UserError(f"--{option} {file} has no rows; give a file that has some")
    return rows


def read_dataset(name: str, config_name: str) -> dict[str, Rows]:
    """The splits train, validation and test of a dataset of the hub or of `save_to_disk`, those that are there.

    Raises:
        UserError: there is no such dataset, or it has none of these splits.
    """
    problem, remedy = f"--dataset_name {name} cannot be read", "give a hub id, or a folder that save_to_disk wrote"
    with as_user_error(problem, remedy):
        if Path(name).is_dir():
            loaded: Any = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, config_name or None)
        splits = {"train": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
    found = {}
    for split, names in DATASET_SPLITS.items():
        there = [other for other in names if other in splits]
        if len(there) > 1:
            raise UserError(f"--dataset_name {name} has the splits {there}, which mean the same; leave one of them")
        if there:
            found[split] = _of_dataset(f"{name} ({there[0]})", splits[there[0]])
    if not found:
        raise UserError(f"--dataset_name {name} has the splits {shown(list(splits))}; give one with train or test rows")
    return found


# -- Formats -----------------------------------------------------------------------------------------------------------


def _ending(option: str, file: Path) -> str:
    """The ending that says the format, without that of a compression."""
    name = file.with_suffix("") if file.suffix.lower() in COMPRESSED else file
    ending = name.suffix.lower()
    if ending not in ENDINGS or (ending == ".parquet" and name != file):
        raise UserError(
            f"--{option} {file} has an ending that says no format that is read; give one of {', '.join(ENDINGS)}, or "
            f"of text files one compressed as {', '.join(COMPRESSED)}"
        )
    return ending


def _open(file: Path) -> IO[bytes]:
    """The file's uncompressed bytes."""
    opened: IO[bytes] = COMPRESSED.get(file.suffix.lower(), open)(file, "rb")  # type: ignore[operator]
    return opened


def _read_bytes(file: Path) -> bytes:
    """The whole content of a text file. Raises UserError if it cannot be read, has NUL, or is not UTF-8."""
    with as_user_error(f"{file} cannot be read", "get it again"), _open(file) as opened:
        content = opened.read()
    content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        content.decode()
        position, problem = content.find(b"\0"), "a NUL byte"
    except UnicodeDecodeError as error:
        position, problem = error.start, f"a byte that is not UTF-8 ({error.reason})"
    if position >= 0:
        line = content.count(b"\n", 0, position) + 1
        raise UserError(f"{file} line {line} has {problem}; save the file as UTF-8 text")
    return content


def _read_csv(file: Path, separator: str) -> Rows:
    content = _read_bytes(file)
    names = next(iter(content.splitlines()), b"").decode()
    with as_user_error(f"{file} is not a table of values separated by {separator!r}", "fix the file"):
        parse = pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True)
        header = pyarrow.csv.read_csv(
            pyarrow.BufferReader(_first_record(content)), parse_options=parse, read_options=_ONE_THREAD
        ).column_names
        _check_names(header, f"{file} (its first line is {shown(names)})")
        table = pyarrow.csv.read_csv(
            pyarrow.BufferReader(content),
            read_options=_ONE_THREAD,
            parse_options=parse,
            convert_options=pyarrow.csv.ConvertOptions(
                column_types={name: pyarrow.string() for name in header},
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=True,
            ),
        )
    if separator == "\t":
        _check_quotes(file, table)
    return Rows(str(file), table, {}, is_text=True)


def _check_quotes(file: Path, table: pyarrow.Table) -> None:
    """Raise UserError for a field with a tab and a line break: a quote without its partner has joined lines."""
    for name in table.column_names:
        joined = pyarrow.compute.match_substring_regex(table.column(name), r"(?s)\t.*\n|\n.*\t")
        row = pyarrow.compute.index(joined, True).as_py()
        if row >= 0:
            raise UserError(
                f"{file} row {row} has a line break and a tab in column {name!r}, as after a quote that nothing "
                "closes; write quotes in a field twice, and the field in quotes"
            )


_ONE_THREAD = pyarrow.csv.ReadOptions(use_threads=False, block_size=2**28)


def _first_record(content: bytes) -> bytes:
    """The line of column names; quoted names may hold line breaks."""
    end = -1
    while True:
        end = content.find(b"\n", end + 1)
        if end < 0 or content.count(b'"', 0, end) % 2 == 0:
            return content if end < 0 else content[: end + 1]


def _read_json(file: Path, is_lines: bool) -> Rows:
    """A list of objects, or an object on each line; a .json file may be either."""
    content = _read_bytes(file)
    is_lines = is_lines or not content.lstrip().startswith(b"[")
    records: list[dict[str, Any]] = []
    for row, text in enumerate(content.splitlines() if is_lines else [content]):
        if not text.strip():
            continue
        place = f"{file} line {row + 1}" if is_lines else str(file)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place} is not JSON ({first_line(error)}); write an object for each row") from error
        records += [value] if is_lines else value
    wrong = next((row for row, record in enumerate(records) if not isinstance(record, dict)), None)
    if wrong is not None:
        raise UserError(
            f'{file} row {wrong} is {shown(records[wrong])}, not an object such as {{"text": ..., ...}}; fix it'
        )
    names = list(dict.fromkeys(name for record in records for name in record))
    columns = {}
    for name in names:
        with as_user_error(f"{file} column {name!r} has values of different types", "give all rows one type"):
            columns[name] = pyarrow.array([record.get(name) for record in records])
    return Rows(str(file), pyarrow.table(columns), {})


def _read_parquet(file: Path) -> Rows:
    with as_user_error(f"{file} is not a complete parquet file", "get it again"):
        names = pyarrow.parquet.read_schema(file).names
    _check_names(names, str(file))
    table = parquet_files.read_table(file, names)
    return Rows(str(file), table, parquet_files.class_names(table.schema, str(file)))


def _of_dataset(where: str, rows: datasets.Dataset) -> Rows:
    with as_user_error(f"{where} cannot be read", "get it again"):
        rows = rows.flatten_indices() if rows._indices is not None else rows
        table = rows.data.table
    names = {name: _names_of(feature) for name, feature in rows.features.items()}
    return Rows(where, table, {name: found for name, found in names.items() if found})


def _names_of(feature: Any) -> tuple[str, ...]:
    """Names of the classes of a column, or of the elements of its lists."""
    inner = getattr(feature, "feature", feature)
    return tuple(getattr(inner, "names", None) or ())


def _check_names(names: Sequence[str], where: str) -> None:
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where} has two columns {twice!r}; give each its own name")
    if any(not name.strip() for name in names):
        raise UserError(f"{where} has a column without a name; give each one")


# -- Several files -----------------------------------------------------------------------------------------------------


def check_set(option: str, files: Sequence[Rows], needed: Sequence[str]) -> None:
    """Raise UserError unless the files of one split have the same columns and classes, and no two the same rows."""
    first = files[0]
    for other in files[1:]:
        missing = sorted(set(first.columns) ^ set(other.columns))
        if missing:
            lacking = other if missing[0] in first.columns else first
            raise UserError(
                f"--{option} {first.where} and {other.where} are not one set: {lacking.where} has no column "
                f"{missing[0]!r}; give files with the same columns"
            )
        for name in first.class_names.keys() | other.class_names.keys():
            one, two = first.class_names.get(name), other.class_names.get(name)
            if one != two:
                raise UserError(
                    f"--{option} {first.where} and {other.where} order the classes of column {name!r} differently: "
                    f"{shown(one)} and {shown(two)}; write both with one order"
                )
    for number, rows in enumerate(files):
        for other in files[:number]:
            if len(rows.table) == len(other.table) and all(
                rows.table.column(name).equals(other.table.column(name)) for name in needed
            ):
                raise UserError(f"--{option} {other.where} and {rows.where} hold the same rows; leave one of them out")
