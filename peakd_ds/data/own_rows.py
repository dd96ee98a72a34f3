"""The user's own rows as a task and its splits: which columns are read, which rows do what.

    train, validation and test   validation picks epochs, test is reported
    train and validation (or test)   a held-out tenth of train picks epochs, the other split is reported
    train alone                  a tenth of train picks epochs, another is reported; both have all classes alike

Rows of `--unlabeled_file` follow those of train. Their labels are not read.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow
from pyarrow import types

from peakd_ds.config.data import DataSettings
from peakd_ds.data import labels, own_files
from peakd_ds.data.arrow_types import is_text
from peakd_ds.data.division import HOLDOUT_SHARE, stratified_tenth
from peakd_ds.data.label_arrays import is_labeled, label_array
from peakd_ds.data.labels import Labels, LabelSpec, TeacherClasses
from peakd_ds.data.own_files import Rows
from peakd_ds.data.tasks import Task, own_task
from peakd_ds.errors import UserError, shown

PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "context"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("query", "passage"),
)
SINGLES = ("text", "sentence", "content", "review", "body", "message", "title", "question")
LABEL_COLUMNS = ("label", "labels", "target")
ROW = "row"
"""Column of the number of a row among the train files and then the unlabelled ones; other splits lack it."""
ID = "id"


@dataclass(frozen=True)
class OwnRows:
    """A task of the user's own."""

    task: Task
    splits: dict[str, datasets.Dataset]
    """Columns: the texts, label, id (if the files have one) and row."""
    notes: tuple[str, ...]
    """Lines for the plan: what was found and how it was taken."""


def load(settings: DataSettings, teacher: TeacherClasses | None, metric: str = "", needs_train: bool = True) -> OwnRows:
    """Read the rows and find out what they are.

    Args:
        teacher: The classes of a teacher that is a classifier.
        metric: The score that picks the best epoch; "" for the usual one.
        needs_train: Whether there must be rows to train on; a saved model is scored without.

    Raises:
        UserError: a file, column, text or label that cannot be used; names file, row, rule and remedy.
    """
    files = _read(settings)
    if needs_train and not {"train", "unlabeled"} & files.keys():
        raise UserError(
            f"--dataset_name {settings.dataset_name} has no train split; give one that has, or --train_file"
        )
    texts = _text_columns(settings, files)
    column = _label_column(settings, files)
    read = _read_labels(settings, files, column)
    labeled = {name: found for name, found in read.items() if any(file.kind for file in found)}
    notes = []
    if "train" in labeled or (labeled and not needs_train):
        spec = labels.find_spec(labeled, teacher, settings.label_names, needs_train)
    elif labeled:
        raise UserError(f"{files[next(iter(labeled))][0].where} has labels, but no train row has one; label some")
    else:
        spec = labels.of_unlabeled(teacher, settings.label_names)
    others = [name for name in ("validation", "test") if name in files]
    hidden = [name for name in others if name not in labeled and labeled and needs_train]
    for name in hidden:
        notes.append(f"{name} rows have no labels, so they are not used")
    splits = {
        name: _split(settings, name, files[name], read[name], spec, texts)
        for name in files
        if name not in hidden and name != "unlabeled"
    }
    if "unlabeled" in files:
        unlabeled = _split(settings, "unlabeled", files["unlabeled"], read["unlabeled"], spec, texts)
        splits["train"] = _joined(splits["train"], unlabeled) if "train" in splits else unlabeled
    if "train" in splits:
        splits["train"] = splits["train"].append_column(ROW, pyarrow.array(np.arange(len(splits["train"]))))
    if needs_train and not {"validation", "test"} & set(splits):
        splits["train"], splits["test"] = _carve(splits["train"])
    task = own_task(
        name=settings.task_name,
        kind=spec.kind,
        text_columns=texts,
        label_names=spec.names,
        metric=metric,
        eval_splits=(next(name for name in ("test", "validation", "train") if name in splits),),
        selection_split="validation" if {"validation", "test"} <= set(splits) else "",
        has_labels=bool(labeled),
    )
    label_columns = settings.label_columns or (column,)
    where = f"labels in {', '.join(label_columns)}" if labeled else "no labels"
    notes.append(f"columns: {' and '.join(texts)}, {where}")
    unused = _unused_columns(settings, files, (*texts, *label_columns))
    if unused:
        notes.append(f"columns that are not used: {', '.join(unused)}")
    return OwnRows(task, {name: _dataset(task, table) for name, table in splits.items()}, (*notes, *spec.notes))


# -- Files and columns -------------------------------------------------------------------------------------------------


def _read(settings: DataSettings) -> dict[str, list[Rows]]:
    """The files of each split: train, validation, test, unlabeled; those that are given."""
    files: dict[str, list[Rows]] = {}
    if settings.dataset_name:
        found = own_files.read_dataset(settings.dataset_name, settings.dataset_config_name)
        files = {name: [rows] for name, rows in found.items()}
    seen: dict[Path, str] = {}
    for name in ("train", "validation", "test", "unlabeled"):
        option = f"{name}_file"
        patterns = getattr(settings, option)
        if not patterns:
            continue
        paths = own_files.find_files(option, patterns)
        for path in paths:
            other = seen.setdefault(path.resolve(), option)
            if other != option:
                raise UserError(f"--{option} {path} is --{other} too; give each file once")
        files[name] = [own_files.read_file(option, path) for path in paths]
    return files


def _text_columns(settings: DataSettings, files: Mapping[str, Sequence[Rows]]) -> tuple[str, ...]:
    """The given columns of text, or those with a usual name."""
    every = [rows for split in files.values() for rows in split]
    columns = every[0].columns
    if settings.text_columns:
        chosen = settings.text_columns
    else:
        groups = (*PAIRS, *((name,) for name in SINGLES))
        found = next((group for group in groups if set(group) <= set(columns)), None)
        if found is None:
            raise UserError(
                f"{every[0].where} has the columns {shown(columns)}, none of which is called text, sentence or another "
                "usual name; give those that hold the text with --text_columns"
            )
        chosen = found
    for rows in every:
        for name in chosen:
            _check_column("text_columns", name, rows)
    return chosen


def _label_column(settings: DataSettings, files: Mapping[str, Sequence[Rows]]) -> str:
    """The given column of labels, or the one with a usual name; "" if there is none."""
    if settings.label_columns:
        return ""
    labeled = [rows for name, split in files.items() if name != "unlabeled" for rows in split]
    if settings.label_column:
        for rows in labeled:
            _check_column("label_column", settings.label_column, rows)
        return settings.label_column
    columns = {name for rows in labeled for name in rows.columns}
    chosen = next((name for name in LABEL_COLUMNS if name in columns), "")
    for rows in labeled:
        other = next((name for name in LABEL_COLUMNS if name in rows.columns), "")
        if other and chosen not in rows.columns:
            raise UserError(
                f"{rows.where} has labels in {other!r}, but another file in {chosen!r}; give both columns one name, or "
                "say which it is with --label_column"
            )
    return chosen


def _unused_columns(settings: DataSettings, files: Mapping[str, Sequence[Rows]], used: Sequence[str]) -> list[str]:
    columns = dict.fromkeys(name for split in files.values() for rows in split for name in rows.columns)
    return [name for name in columns if name not in used and name != settings.id_column]


def _check_column(option: str, name: str, rows: Rows) -> None:
    if name not in rows.columns:
        raise UserError(
            f"--{option} {name} is no column of {rows.where}, which has {shown(rows.columns)}; give one of them"
        )


def _read_labels(settings: DataSettings, files: Mapping[str, Sequence[Rows]], column: str) -> dict[str, list[Labels]]:
    found: dict[str, list[Labels]] = {}
    for name, split in files.items():
        found[name] = []
        for rows in split:
            for switch in settings.label_columns or ():
                if name != "unlabeled":
                    _check_column("label_columns", switch, rows)
            is_there = bool(settings.label_columns) or column in rows.columns
            if name == "unlabeled" or not is_there:
                found[name].append(Labels(rows.where, [None] * len(rows.table), "", None))
            else:
                found[name].append(labels.read(rows, column, settings.label_columns))
    return found


# -- Splits ------------------------------------------------------------------------------------------------------------


def _split(
    settings: DataSettings,
    name: str,
    files: Sequence[Rows],
    read: Sequence[Labels],
    spec: LabelSpec,
    texts: Sequence[str],
) -> pyarrow.Table:
    """The columns of one split: texts, label, and id if every file has it."""
    own_files.check_set(f"{name}_file", files, texts)
    tables = []
    for rows, found in zip(files, read, strict=True):
        columns = {text: _checked_text(rows, text) for text in texts}
        encoded = found.encode(spec)
        columns["label"] = (
            pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(encoded.reshape(-1)), len(spec.names))
            if encoded.ndim == 2
            else pyarrow.array(encoded)
        )
        if all(settings.id_column in other.columns for other in files):
            columns[ID] = _ids(settings, rows)
        tables.append(pyarrow.table({name: column for name, column in columns.items() if column is not None}))
    whole = pyarrow.concat_tables(tables, promote_options="permissive")
    return whole.drop([ID]) if ID in whole.column_names and whole.column(ID).null_count else whole


def _ids(settings: DataSettings, rows: Rows) -> pyarrow.ChunkedArray | None:
    """The names of the rows as text; None if the column of the usual name names no rows.

    Raises:
        UserError: a column that the user chose has a row without a name, or values that are no names.
    """
    ids = rows.table.column(settings.id_column)
    if types.is_dictionary(ids.type):
        ids = ids.cast(ids.type.value_type)
    if not ids.null_count and (is_text(ids.type) or types.is_integer(ids.type)):
        return ids.cast(pyarrow.string())
    if settings.id_column == ID:
        return None
    raise UserError(
        f"{rows.where} column {settings.id_column!r} must name every row with a word or a whole number, but holds "
        f"{ids.type}, {ids.null_count} of them null; fix it, or give another --id_column"
    )


def _checked_text(rows: Rows, name: str) -> pyarrow.ChunkedArray:
    """A column of text. Raises UserError, with the row, for another type, no text, or text of spaces alone."""
    column = rows.table.column(name)
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not is_text(column.type):
        raise UserError(f"{rows.where} column {name!r} holds {column.type}, not text; give another of --text_columns")
    column = column.cast(pyarrow.large_string())
    for row, value in enumerate(column.to_pylist()):
        problem = _problem_of(value)
        if problem:
            raise UserError(f"{rows.where} row {row} has {problem} in column {name!r}; fix the row or leave it out")
    return column


def _problem_of(text: str | None) -> str:
    """Why a text cannot be tokenised; "" if it can."""
    if text is None:
        return "no text"
    if not text.strip():
        return "text of spaces alone"
    return "a NUL character" if "\0" in text else ""


def _joined(labeled: pyarrow.Table, unlabeled: pyarrow.Table) -> pyarrow.Table:
    """Both, one after the other, with the columns that both have."""
    names = [name for name in labeled.column_names if name in unlabeled.column_names]
    return pyarrow.concat_tables([labeled.select(names), unlabeled.select(names)], promote_options="permissive")


def _carve(train: pyarrow.Table) -> tuple[pyarrow.Table, pyarrow.Table]:
    """The train rows without a fixed stratified tenth of the labelled ones, and that tenth, which is reported."""
    values = label_array(train.column("label"))
    num_labeled = int(is_labeled(values).sum()) or len(train)
    if num_labeled < 2 * HOLDOUT_SHARE:
        raise UserError(
            f"there are {num_labeled} rows{' with a label' if num_labeled < len(train) else ''}, too few to hold out "
            "two tenths; give a --validation_file or a --test_file"
        )
    is_reported = np.zeros(len(train), bool)
    is_reported[stratified_tenth(values, seed=1)] = True
    return train.filter(pyarrow.array(~is_reported)), train.filter(pyarrow.array(is_reported))


def _dataset(task: Task, table: pyarrow.Table) -> datasets.Dataset:
    """Rows as datasets holds them, with a fingerprint of their content and of what their labels mean."""
    digest = hashlib.sha256(repr((task.is_multi_label, task.text_columns, task.label_names)).encode())
    for batch in table.combine_chunks().to_batches(max_chunksize=2**16):
        digest.update(batch.serialize())
    info = datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(table.schema))
    return datasets.Dataset(table, info=info, fingerprint=digest.hexdigest()[:16])
