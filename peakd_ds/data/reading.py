"""The rows of a task as they are on disk or on the hub, checked column by column.

Whatever the types in the files, a split has strings, int64 classes or float32 scores, and the task's label names.
"""

import hashlib
import socket
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow
from pyarrow import types

from peakd_ds.config.data import DataSettings
from peakd_ds.data import own_rows, parquet_files
from peakd_ds.data.labels import TeacherClasses
from peakd_ds.data.tasks import Task, get_task
from peakd_ds.errors import UserError, as_user_error, first_line

MAX_SCORE = 5.0
"""Largest score of stsb, the only regression task."""
HUB_DATASET = "nyu-mll/glue"


def load(
    settings: DataSettings,
    teacher: TeacherClasses | None,
    metric: str = "",
    train: bool = True,
    needs_train: bool = True,
) -> tuple[Task, dict[str, datasets.Dataset], tuple[str, ...]]:
    """The task, its splits and notes for the plan, whether the rows are a task of GLUE's or the user's own.

    Args:
        teacher: The classes of a teacher that is a classifier: labels are numbered in its order.
        metric: The score that picks the best epoch of own rows; "" for the usual one.
        train: Whether the train split of a `task` is read.
        needs_train: Whether own rows must have some to train on; a saved model is scored without.

    Raises:
        UserError: as `load_splits` and `own_rows.load`.
    """
    if not settings.task:
        own = own_rows.load(settings, teacher, metric, needs_train)
        return own.task, own.splits, own.notes
    task = get_task(settings.task)
    if metric:
        raise UserError(
            f"--metric {metric} is for rows of your own; task {task.name} is scored by {task.primary_metric}"
        )
    splits = load_splits(task, settings.data_dir, train)
    order = _order_of(task, teacher)
    if order is None or teacher is None:
        return task, splits, unnamed_classes(task, teacher)
    ordered = replace(task, label_names=teacher.names, official_ids=() if order == sorted(order) else tuple(order))
    if not ordered.official_ids:
        return ordered, splits, ()
    note = f"labels are numbered as the teacher does: {', '.join(teacher.names)}"
    return ordered, {name: _in_order(ordered, rows) for name, rows in splits.items()}, (note,)


def unnamed_classes(task: Task, teacher: TeacherClasses | None) -> tuple[str, ...]:
    """A warning if the teacher calls its classes LABEL_0, LABEL_1, ..., so that their order cannot be checked."""
    if teacher is None or teacher.is_named or task.is_regression:
        return ()
    return (f"warning: {teacher.name} does not name its classes; they are taken for {', '.join(task.label_names)}",)


def _order_of(task: Task, teacher: TeacherClasses | None) -> list[int] | None:
    """The task's number of each of the teacher's classes; None if the names are not the same."""
    if teacher is None or not teacher.is_named or task.is_regression:
        return None
    names = [name.casefold() for name in teacher.names]
    return [task.label_names.index(name) for name in names] if sorted(names) == sorted(task.label_names) else None


def _in_order(task: Task, rows: datasets.Dataset) -> datasets.Dataset:
    """Rows with labels as numbers of `task.label_names`; -1, a hidden label, stays."""
    number_of = np.argsort(task.official_ids)
    labels = _column(rows, "label")
    table = rows.data.table.select([name for name in rows.column_names if name != "label"])
    table = table.append_column("label", pyarrow.array(np.where(labels < 0, labels, number_of[labels])))
    digest = hashlib.sha256(f"{rows._fingerprint} {task.official_ids}".encode()).hexdigest()[:16]
    return _dataset(task, table, digest)


def load_splits(task: Task, data_dir: str, train: bool = True) -> dict[str, datasets.Dataset]:
    """The splits of a task: train, its eval splits, and its test splits if there are any.

    Args:
        train: Whether the train split is read; evaluation does not need it.

    Raises:
        UserError: no data found, damaged or missing files, missing columns, or labels out of range; with the file.
    """
    splits: dict[str, datasets.Dataset] = {}
    needed = (*(("train",) if train else ()), *task.eval_splits)
    for name in (*needed, *task.submission_files):
        rows = _read_parquet(task, data_dir, name) if data_dir else _read_hub(task, name, name in needed)
        if rows is not None:
            splits[name] = rows
        elif name in needed:
            raise UserError(
                f"no {task.name}/{name}-*.parquet in data folder {data_dir}; give --data_dir (or "
                f"PEAKD_DATA_DIR) a folder with it, or leave both unset to read {HUB_DATASET} from the hub"
            )
    return splits


def source_of(settings: DataSettings) -> str:
    """Where the rows come from, for messages."""
    if settings.task:
        return settings.data_dir or HUB_DATASET
    return settings.dataset_name or " ".join(settings.train_file or settings.unlabeled_file or ())


def fingerprints(splits: dict[str, datasets.Dataset]) -> dict[str, str]:
    """A short hash of the rows of each split."""
    return {name: rows._fingerprint for name, rows in splits.items()}


def check_equal_on_ranks(
    settings: DataSettings, task: Task, fingerprints: dict[str, str], fingerprints_of_rank_0: dict[str, str]
) -> None:
    """Raise UserError if this rank reads other rows than rank 0, as where each node has its own copy of the data."""
    names = (fingerprints.keys() | fingerprints_of_rank_0.keys()) - task.submission_files.keys()  # no run reads these
    differing = sorted(name for name in names if fingerprints.get(name) != fingerprints_of_rank_0.get(name))
    if differing:
        raise UserError(
            f"{socket.gethostname()} has other rows of {', '.join(differing)} in "
            f"{source_of(settings)} than the host of rank 0; give all nodes the same data"
        )


# -- Reading -----------------------------------------------------------------------------------------------------------


def _read_parquet(task: Task, data_dir: str, split: str) -> datasets.Dataset | None:
    files = parquet_files.find_files(Path(data_dir) / task.name, split)
    if not files:
        return None
    digests: dict[bytes, Path] = {}
    orders: dict[Path, tuple[str, ...] | None] = {}
    tables: list[pyarrow.Table] = []
    optional = ("idx",) if split in task.submission_files else ()
    for file in files:
        table = parquet_files.read_table(file, _needed_columns(task), optional)
        with as_user_error(f"{file} cannot be read", "get it again"):
            digest = hashlib.sha256(file.read_bytes()).digest()
        if digest in digests:
            raise UserError(f"{digests[digest]} and {file} hold the same bytes; delete one of them")
        digests[digest] = file
        orders[file] = parquet_files.label_names(table.schema, str(file))
        _check_order(task, orders, file)
        tables.append(_checked(task, split, table, str(file)))
        if tables[0].column_names != tables[-1].column_names:
            raise UserError(f"{files[0]} and {file} have different columns; get the {split} split of {task.name} again")
    if not any(len(table) for table in tables):
        raise UserError(f"{files[0]} has no rows; get the {split} split of {task.name} again")
    table = pyarrow.concat_tables(tables, promote_options="permissive")  # strings with short and long offsets
    return _dataset(task, table, hashlib.sha256(b"".join(digests)).hexdigest()[:16])


def _read_hub(task: Task, split: str, is_needed: bool) -> datasets.Dataset | None:
    if task.is_own or task.name != task.base or task.base == "movie_reviews":
        raise UserError(
            f"task {task.name} is not on the hub; give --data_dir (or PEAKD_DATA_DIR) the folder that "
            f"holds {task.name}/train-*.parquet"
        )
    try:
        rows = datasets.load_dataset(HUB_DATASET, task.base, split=split)
    except Exception as error:
        if not is_needed:
            return None
        raise UserError(
            f"no data for task {task.name}: the hub's {HUB_DATASET} cannot be read ({first_line(error)}); go online, "
            f"or give --data_dir (or PEAKD_DATA_DIR) a folder with {task.name}/train-*.parquet"
        ) from error
    where, names = f"{HUB_DATASET} {task.name}/{split}", getattr(rows.features.get("label"), "names", None)
    missing = [name for name in _needed_columns(task) if name not in rows.column_names]
    if missing:
        raise UserError(f"{where} has no column {missing[0]!r}; give --data_dir a folder with the task's files")
    _check_order(task, {Path(where): names and tuple(names)}, Path(where))
    columns = [*_needed_columns(task), *(["idx"] if "idx" in rows.column_names else [])]
    table = _checked(task, split, rows.data.table.select(columns), where)
    return _dataset(task, table, rows._fingerprint)


def _needed_columns(task: Task) -> tuple[str, ...]:
    return (*task.text_columns, "label")


def _dataset(task: Task, table: pyarrow.Table, fingerprint: str) -> datasets.Dataset:
    """Rows as datasets holds them, with the task's label names."""
    label = datasets.Value("float32") if task.is_regression else datasets.ClassLabel(names=list(task.label_names))
    features = {field.name: datasets.Value(str(field.type)) for field in table.schema} | {"label": label}
    info = datasets.DatasetInfo(features=datasets.Features(features))
    return datasets.Dataset(table, info=info, fingerprint=fingerprint)


# -- Checks ------------------------------------------------------------------------------------------------------------


def _check_order(task: Task, orders: dict[Path, tuple[str, ...] | None], file: Path) -> None:
    """Raise UserError if a file orders its labels otherwise than the task: its class ids mean other classes."""
    order = orders[file]
    if order is None or order == task.label_names:
        return
    others = "".join(f"{other} {list(names)}, " for other, names in orders.items() if names not in (None, order))
    raise UserError(
        f"{file} orders its labels {list(order)}, {others}the task {list(task.label_names)}; write the file with the "
        "task's order"
    )


def _checked(task: Task, split: str, table: pyarrow.Table, where: str) -> pyarrow.Table:
    """The columns that the task reads, without metadata and in the types of a split."""
    columns = {name: _text(table.column(name), name, where) for name in task.text_columns}
    columns["label"] = _labels(task, split, table.column("label"), where)
    if split in task.submission_files and "idx" in table.column_names:
        index = table.column("idx")
        if not types.is_integer(index.type) or index.null_count:
            raise UserError(f"{where} column 'idx' holds {_kind(index)}; each must be a whole number; fix the data")
        columns["idx"] = index.cast("int64")
    return pyarrow.table(columns)


def _text(column: pyarrow.ChunkedArray, name: str, where: str) -> pyarrow.ChunkedArray:
    """A column of strings. Raises UserError for another type or a row without text."""
    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if types.is_string_view(kind) or types.is_string(kind):
        kind = pyarrow.string()
    elif not types.is_large_string(kind):
        raise UserError(f"{where} column {name!r} holds {_kind(column)}; each must be a string; fix the data")
    with as_user_error(f"{where} column {name!r} cannot be read as strings", "write it again as strings"):
        column = column.cast(kind)
    if column.null_count:
        row = column.is_null().index(True).as_py()
        raise UserError(
            f"{where} column {name!r} holds {_kind(column)} (row {row} first); each must be a string; fix the data"
        )
    return column


def _kind(column: pyarrow.ChunkedArray) -> str:
    return f"{column.type}, {column.null_count} of them null" if column.null_count else f"{column.type}"


def _labels(task: Task, split: str, column: pyarrow.ChunkedArray, where: str) -> pyarrow.ChunkedArray:
    """The labels as int64 classes or float32 scores.

    Raises:
        UserError: a label of another type, none, or one out of range. In test splits -1 stands for a hidden label.
    """
    lowest = -1 if split in task.submission_files else 0
    highest = MAX_SCORE if task.is_regression else task.num_labels - 1
    kind = "number" if task.is_regression else "whole number"
    names = f" ({', '.join(task.label_names)})" if task.label_names else ""
    rule = f"a {kind} from {lowest} to {highest:g}{names}"
    if not (types.is_integer(column.type) or (task.is_regression and types.is_floating(column.type))):
        raise UserError(
            f"{where} column 'label' holds labels of a wrong type, {_kind(column)}; each must be {rule}; fix the data"
        )
    if column.null_count:
        row = column.is_null().index(True).as_py()
        raise UserError(f"{where} row {row} has no label; it must be {rule}; fix the data")
    labels = column.to_numpy()
    bad = ~((labels >= lowest) & (labels <= highest))
    if bad.any():
        row = int(np.argmax(bad))
        raise UserError(f"{where} row {row} has label {labels[row]:g}; it must be {rule}; fix the data")
    return pyarrow.chunked_array([labels.astype(np.float32 if task.is_regression else np.int64)])


def _column(rows: datasets.Dataset, name: str) -> np.ndarray:
    return rows.data.column(name).to_numpy()
