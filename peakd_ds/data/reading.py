"""The rows of a task as they are on disk or on the hub, checked column by column."""

import hashlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet

from peakd_ds.data.tasks import Task
from peakd_ds.errors import UserError, first_line

MAX_SCORE = 5.0
"""Largest score of stsb, the only regression task."""
HUB_DATASET = "nyu-mll/glue"


def load_splits(task: Task, data_dir: str, train: bool = True) -> dict[str, datasets.Dataset]:
    """The splits of a task: train, its eval splits, and its test splits if there are any.

    Args:
        train: Whether the train split is read; evaluation does not need it.

    Raises:
        UserError: no data found, an empty or damaged file, missing columns, or labels out of range; with the file.
    """
    splits: dict[str, datasets.Dataset] = {}
    needed = (*(("train",) if train else ()), *task.eval_splits)
    for name in (*needed, *task.submission_files):
        rows = _read_parquet(task, data_dir, name) if data_dir else _read_hub(task, name, name in needed)
        if rows is not None:
            _check_columns(task, name, rows)
            splits[name] = rows
        elif name in needed:
            raise UserError(
                f"no {task.name}/{name}-*.parquet in data folder {data_dir}; give --data_dir (or "
                f"PEAKD_DATA_DIR) a folder with it, or leave both unset to read {HUB_DATASET} from the hub"
            )
    return splits


def fingerprints(splits: dict[str, datasets.Dataset]) -> dict[str, str]:
    """A short hash of the rows of each split."""
    return {name: rows._fingerprint for name, rows in splits.items()}


def _read_parquet(task: Task, data_dir: str, split: str) -> datasets.Dataset | None:
    files = sorted((Path(data_dir) / task.name).glob(f"{split}-*.parquet"))
    tables = []
    for file in files:
        try:
            tables.append(pyarrow.parquet.read_table(file))
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file} is not a complete parquet file ({first_line(error)}); get it again") from error
    if not tables:
        return None
    try:
        table = pyarrow.concat_tables(tables)
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{files[0]} and the files beside it have different columns; get the {split} split of {task.name} again"
        ) from error
    if table.num_rows == 0:
        raise UserError(f"{files[0]} has no rows; get the {split} split of {task.name} again")
    digest = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
    return datasets.Dataset(table, fingerprint=digest[:16])


def _read_hub(task: Task, split: str, is_needed: bool) -> datasets.Dataset | None:
    if task.name != task.base or task.base == "movie_reviews":
        raise UserError(
            f"task {task.name} is not on the hub; give --data_dir (or PEAKD_DATA_DIR) the folder that "
            f"holds {task.name}/train-*.parquet"
        )
    try:
        return datasets.load_dataset(HUB_DATASET, task.base, split=split)
    except Exception as error:
        if not is_needed:
            return None
        raise UserError(
            f"no data for task {task.name}: the hub's {HUB_DATASET} cannot be read ({first_line(error)}); go online, "
            f"or give --data_dir (or PEAKD_DATA_DIR) a folder with {task.name}/train-*.parquet"
        ) from error


def _check_columns(task: Task, split: str, rows: datasets.Dataset) -> None:
    missing = [name for name in (*task.text_columns, "label") if name not in rows.column_names]
    if missing:
        raise UserError(
            f"{task.name}/{split} has no column {missing[0]!r} but {rows.column_names}; "
            f"the task needs {[*task.text_columns, 'label']}; fix the data"
        )
    for name in task.text_columns:
        column = rows.data.column(name)
        is_text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
        if not is_text or column.null_count:
            raise UserError(
                f"{task.name}/{split} column {name!r} holds {column.type}, {column.null_count} of them null; it must "
                "be a string in every row; fix the data"
            )
    if split in task.submission_files:
        return  # GLUE hides test labels behind -1
    rule = f"a whole number from 0 to {task.num_labels - 1} ({', '.join(task.label_names)})"
    if task.is_regression:
        rule = f"a number from 0 to {MAX_SCORE:g}"
    try:
        labels = _column(rows, "label").astype(np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{task.name}/{split} has labels of a wrong kind ({error}); each must be {rule}; fix the data"
        ) from error
    if task.is_regression:
        bad = ~((labels >= 0) & (labels <= MAX_SCORE))
    else:
        bad = ~np.isin(labels, np.arange(task.num_labels))
    if bad.any():
        where = int(np.argmax(bad))
        raise UserError(f"{task.name}/{split} row {where} has label {labels[where]:g}; it must be {rule}; fix the data")
    names = getattr(rows.features["label"], "names", None)
    if names and tuple(names) != task.label_names:
        raise UserError(
            f"{task.name}/{split} orders its labels {list(names)}, the task {list(task.label_names)}; "
            f"write the file with the task's order"
        )


def _column(rows: datasets.Dataset, name: str) -> np.ndarray:
    return rows.data.column(name).to_numpy()
