"""A teacher's outputs in files of the user's: read for distillation, and written by peakd-predict and peakd-eval.

A file is parquet or jsonl with a column `logits` or `probabilities`: for each row a list with one number for each
class, in the order of the student's classes, or an object of numbers by class name. It holds one teacher; several files
are several teachers, averaged:

    p = sum_t w_t softmax(logits_t) / sum_t w_t        logits = log p, with p at least 1e-30

(sigmoid in place of softmax for several labels a row, the plain mean for scores). A single file of logits is taken as
it is. N rows, C classes.
"""

import csv
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import torch
from numpy.typing import NDArray
from pyarrow import types
from torch import Tensor

from peakd_ds.data import own_files
from peakd_ds.data.arrow_types import is_list
from peakd_ds.data.own_files import Rows
from peakd_ds.data.tasks import Task
from peakd_ds.errors import UserError, shown
from peakd_ds.files import whole_file

LOGITS, PROBABILITIES = "logits", "probabilities"
PREDICTED = "label"
FLOOR = 1e-30
"""Least probability, whose logarithm is still finite in float32."""
SUM_TOLERANCE = 1e-3


def read_outputs(
    files: Sequence[Path],
    weights: Sequence[float] | None,
    id_column: str,
    task: Task,
    ids: Mapping[str, Sequence[str] | None],
    num_rows: Mapping[str, int],
    optional_splits: Collection[str],
) -> dict[str, Tensor]:
    """Logits float32 [N, C] of the rows of each split, on the CPU.

    Args:
        files: One for each teacher.
        weights: One for each file; None: equal ones.
        id_column: Column of the files that names a row, if `ids` are given.
        ids: Name of each row of a split. None for all splits: files have the rows in the order of `num_rows`.
        num_rows: Rows of each split.
        optional_splits: Splits that are left out of the result if the files do not have all of their rows.

    Raises:
        UserError: a file that cannot be read, a wrong number of rows or classes, a row without output or with two, or
            numbers that are no logits or probabilities; names file and row.
    """
    if weights is not None and len(weights) != len(files):
        raise UserError(
            f"--teacher_weights gives {len(weights)} numbers, but --teacher_outputs names {len(files)} files; give one "
            "for each"
        )
    weighted, total = None, 0.0
    for file, weight in zip(files, weights or [1.0] * len(files), strict=True):
        rows = own_files.read_file("teacher_outputs", file)
        values_NC, is_logits = _values(rows, task)
        by_split = _by_split(rows, values_NC, id_column, ids, num_rows, optional_splits)
        if len(files) == 1 and is_logits:
            return {name: torch.tensor(found, dtype=torch.float32) for name, found in by_split.items()}
        by_split = {name: _probabilities(found, task) if is_logits else found for name, found in by_split.items()}
        if weighted is None:
            weighted = {name: weight * found for name, found in by_split.items()}
        else:
            weighted = {name: found + weight * by_split[name] for name, found in weighted.items() if name in by_split}
        total += weight
    assert weighted is not None, "no file was given"
    return {name: torch.from_numpy(_logits(found / total, task)).float() for name, found in weighted.items()}


def fingerprint(files: Sequence[Path], weights: Sequence[float] | None) -> str:
    """A short hash of the files' bytes and weights."""
    digest = hashlib.sha256(repr(tuple(weights or ())).encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


# -- Numbers -----------------------------------------------------------------------------------------------------------


def _values(rows: Rows, task: Task) -> tuple[np.ndarray, bool]:
    """The column of logits or probabilities as float64 [N, C], checked, and whether it holds logits."""
    present = [name for name in (LOGITS, PROBABILITIES) if name in rows.columns]
    if len(present) != 1:
        found = "both columns" if present else f"the columns {shown(rows.columns)}, but neither"
        raise UserError(f"{rows.where} has {found} logits and probabilities; give one of the two")
    name = present[0]
    if name == PROBABILITIES and task.is_regression:
        raise UserError(f"{rows.where} has probabilities, but task {task.name} has scores; give them as logits")
    values_NC = _numbers(rows, name, task)
    where = f"{rows.where} row {{}} has {name} {{}}"
    _refuse(~np.isfinite(values_NC).all(axis=1), values_NC, f"{where}, which are not all finite; fix the row")
    if name == LOGITS:
        return values_NC, True
    is_outside = np.any((values_NC < 0) | (values_NC > 1 + SUM_TOLERANCE), axis=1)
    _refuse(is_outside, values_NC, f"{where}, which are not all from 0 to 1; fix the row, or name the column logits")
    if not task.is_multi_label:
        sums_N1 = values_NC.sum(axis=1, keepdims=True)
        is_off = np.any(np.abs(sums_N1 - 1) > SUM_TOLERANCE, axis=1)
        _refuse(is_off, values_NC, f"{where}, which do not add up to 1; fix the row, or name the column logits")
        values_NC = values_NC / sums_N1
    return values_NC, False


def _refuse(is_wrong: NDArray[np.bool_], values_NC: np.ndarray, message: str) -> None:
    """Raise UserError for the first row that is wrong; `message` has places for its number and values."""
    if is_wrong.any():
        row = int(is_wrong.argmax())
        raise UserError(message.format(row, shown([float(value) for value in values_NC[row]])))


def _numbers(rows: Rows, name: str, task: Task) -> np.ndarray:
    """A column of lists, or of objects by class name, as float64 [N, C] in the order of the task's classes."""
    column = rows.table.column(name).combine_chunks()
    where, kind = f"{rows.where} column {name!r}", column.type
    if task.is_regression and (types.is_floating(kind) or types.is_integer(kind)):
        column = pyarrow.FixedSizeListArray.from_arrays(column.cast("float64"), 1)
        kind = column.type
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise UserError(f"{where} row {row} has no value; give each row one, or leave the row out")
    if types.is_struct(kind):
        return _by_name(column, where, task)
    if not is_list(kind) or not (types.is_floating(kind.value_type) or types.is_integer(kind.value_type)):
        raise UserError(f"{where} holds {kind}; give each row a list of {task.num_labels} numbers, or numbers by class")
    sizes = pyarrow.compute.list_value_length(column).to_numpy(zero_copy_only=False)
    if (sizes != task.num_labels).any():
        row = int((sizes != task.num_labels).argmax())
        raise UserError(
            f"{where} row {row} has {sizes[row]} numbers, but task {task.name} has {task.num_labels} classes "
            f"({shown(list(task.label_names))}); give one for each"
        )
    flat = column.flatten().cast("float64")
    return flat.to_numpy(zero_copy_only=False).reshape(-1, task.num_labels)  # a null becomes NaN, which is refused


def _by_name(column: pyarrow.StructArray, where: str, task: Task) -> np.ndarray:
    """Numbers by class name, whatever its case, in the order of the task's classes."""
    names = {field.name.casefold(): field.name for field in column.type}
    if sorted(names) != sorted(name.casefold() for name in task.label_names):
        raise UserError(
            f"{where} has the classes {shown(sorted(names.values()))}, but task {task.name} has "
            f"{shown(sorted(task.label_names))}; write equal names (case does not matter)"
        )
    columns: list[np.ndarray] = []
    for name in task.label_names:
        values = column.field(names[name.casefold()])
        if not (types.is_floating(values.type) or types.is_integer(values.type)):
            raise UserError(f"{where} class {name!r} holds {values.type}; write numbers")
        columns.append(values.cast("float64").to_numpy(zero_copy_only=False))
    return np.stack(columns, axis=1)


def _probabilities(logits_NC: np.ndarray, task: Task) -> np.ndarray:
    if task.is_regression:
        return logits_NC
    logits = torch.from_numpy(logits_NC)
    return (logits.sigmoid() if task.is_multi_label else logits.softmax(dim=1)).numpy()


def _logits(probabilities_NC: np.ndarray, task: Task) -> np.ndarray:
    if task.is_regression:
        return probabilities_NC
    log = np.log(np.maximum(probabilities_NC, FLOOR))
    return log - np.log(np.maximum(1 - probabilities_NC, FLOOR)) if task.is_multi_label else log


# -- Rows --------------------------------------------------------------------------------------------------------------


def _by_split(
    rows: Rows,
    values_NC: np.ndarray,
    id_column: str,
    ids: Mapping[str, Sequence[str] | None],
    num_rows: Mapping[str, int],
    optional_splits: Collection[str],
) -> dict[str, np.ndarray]:
    """The values of each split's rows, in their order."""
    if all(names is None for names in ids.values()):
        return _by_order(rows, values_NC, id_column, num_rows, optional_splits)
    if id_column not in rows.columns:
        raise UserError(
            f"{rows.where} has no column {id_column!r}, which names the rows of the data, but "
            f"{shown(rows.columns)}; add "
            "it, or name another --id_column"
        )
    place: dict[str, int] = {}
    for row, value in enumerate(rows.table.column(id_column).to_pylist()):
        if place.setdefault(str(value), row) != row:
            raise UserError(
                f"{rows.where} row {row} has the {id_column} {shown(str(value))} of row {place[str(value)]}; a row has "
                "one output: leave one of them out"
            )
    found: dict[str, np.ndarray] = {}
    named_before: set[str] = set()
    for name, names in ids.items():
        assert names is not None
        again = next((one for one in names if one in named_before), None) or _first_repeated(names)
        named_before |= set(names)
        if again is not None:
            if name in optional_splits:
                continue  # its rows have names of their own
            raise UserError(
                f"the data has two rows with {id_column} {shown(again)}, so {rows.where} cannot tell them apart; give "
                "each row an id of its own, or leave the ids out of the data, and rows are taken in order"
            )
        places = np.array([place.get(str(one), -1) for one in names])
        missing = np.flatnonzero(places < 0)
        if not len(missing):
            found[name] = values_NC[places]
        elif name not in optional_splits:
            raise UserError(
                f"{rows.where} has no output for {len(missing):,} of {len(names):,} {name} rows, the first with "
                f"{id_column} {shown(str(names[missing[0]]))}; add them"
            )
    return found


def _first_repeated(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


def _by_order(
    rows: Rows, values_NC: np.ndarray, id_column: str, num_rows: Mapping[str, int], optional_splits: Collection[str]
) -> dict[str, np.ndarray]:
    """The values of splits that follow each other; the optional ones may be missing at the end."""
    if id_column in rows.columns:
        names = list(map(str, rows.table.column(id_column).to_pylist()))
        if names != [str(number) for number in range(len(names))]:
            raise UserError(
                f"{rows.where} names its rows in {id_column!r}, but the data has no such column in every file, so they "
                "cannot be matched; give the data this column, or drop it there, and rows are taken in order"
            )
    needed = {name: size for name, size in num_rows.items() if name not in optional_splits}
    present = next((sizes for sizes in (num_rows, needed) if sum(sizes.values()) == len(values_NC)), None)
    if present is None:
        sizes = " and ".join(f"{size:,} of {name}" for name, size in needed.items())
        more = "".join(f", or with {num_rows[name]:,} of {name}" for name in num_rows if name not in needed)
        raise UserError(
            f"{rows.where} has {len(values_NC):,} rows, but without ids it must have those of the data in their order: "
            f"{sizes}{more}; give as many, or name the rows by --id_column"
        )
    bounds = np.cumsum([0, *present.values()])
    return {name: values_NC[bounds[i] : bounds[i + 1]] for i, name in enumerate(present)}


# -- Writing -----------------------------------------------------------------------------------------------------------


def write_outputs(file: Path, ids: Sequence[str], logits_NC: Tensor, task: Task, id_column: str) -> None:
    """Write logits as `read_outputs` reads them: parquet or jsonl, by the file's ending.

    Args:
        ids: Name of each row, in the column `id_column`.
        logits_NC: float32 [N, C].
    """
    rows = logits_NC.float().tolist()
    # By class name: the run that reads them may number its classes otherwise.
    values = rows if task.is_regression else [dict(zip(task.label_names, row, strict=True)) for row in rows]
    with whole_file(file) as new:
        if file.suffix == ".parquet":
            float32 = pyarrow.float32()
            kind = (
                pyarrow.list_(float32)
                if task.is_regression
                else pyarrow.struct(dict.fromkeys(task.label_names, float32))
            )
            table = pyarrow.table(
                {id_column: pyarrow.array(ids, pyarrow.string()), LOGITS: pyarrow.array(values, kind)}
            )
            pyarrow.parquet.write_table(table, new)
        else:
            records = ({id_column: name, LOGITS: value} for name, value in zip(ids, values, strict=True))
            new.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


def write_predictions(file: Path, ids: Sequence[str], logits_NC: Tensor, task: Task, id_column: str) -> None:
    """Write what a model predicts for each row: csv, tsv, jsonl or parquet, by the file's ending.

    The columns are the id, `label` (a class, classes joined by spaces, or a score), and for classes the probability of
    each, under its name.

    Args:
        ids: Name of each row, in the column `id_column`.
        logits_NC: float32 [N, C].
    """
    id_column = "id" if id_column == PREDICTED else id_column
    probabilities_NC = _probabilities(logits_NC.double().numpy(), task)
    records: list[dict[str, Any]] = []
    for name, logits, probabilities in zip(ids, logits_NC, probabilities_NC, strict=True):
        if task.is_regression:
            records.append({id_column: name, PREDICTED: logits.item()})
            continue
        if task.is_multi_label:
            label = " ".join(other for other, value in zip(task.label_names, logits, strict=True) if value > 0)
        else:
            label = task.label_names[int(logits.argmax())]
        by_class = {f"p_{other}": float(value) for other, value in zip(task.label_names, probabilities, strict=True)}
        records.append({id_column: name, PREDICTED: label} | by_class)
    with whole_file(file) as new:
        if file.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), new)
        elif file.suffix == ".jsonl":
            new.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
        else:
            with new.open("w", newline="", encoding="utf-8") as opened:
                writer = csv.DictWriter(
                    opened, list(records[0]), delimiter="\t" if file.suffix == ".tsv" else ",", lineterminator="\n"
                )
                writer.writeheader()
                writer.writerows(records)
