"""What a column of labels means: classes, several classes of a row, or scores; and the labels as numbers.

Names and order of the classes come, first that exists, from `--label_names`, the teacher, the ids in the data, or the
sorted labels. Labels are matched to them by name, whatever their case. A row without a label has -1 (classes), NaN
(scores) or -1 for every class (several labels).

N rows, C classes.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pyarrow import types

from peakd_ds.data.arrow_types import is_list, is_text
from peakd_ds.data.label_arrays import UNLABELED
from peakd_ds.data.own_files import Rows
from peakd_ds.errors import UserError, shown

CLASSES, SCORES, MULTI_LABEL = "classes", "scores", "multi_label"
MAX_CLASSES = 10_000


@dataclass(frozen=True)
class TeacherClasses:
    """What the teacher says of its classes."""

    name: str
    """The option and path, for messages."""
    names: tuple[str, ...]
    """In the order of its outputs."""
    is_named: bool
    """Whether the names are more than LABEL_0, LABEL_1, ..."""
    is_multi_label: bool = False
    """Whether it was trained on several labels a row."""

    @property
    def num_labels(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class LabelSpec:
    """What labels are numbers of."""

    kind: str
    """classes, scores or multi_label."""
    names: tuple[str, ...]
    """Name of each class; empty for scores."""
    notes: tuple[str, ...]
    """What the user should know of how the labels were taken."""
    are_ids: bool = False
    """Whether whole numbers in the data are class ids, not names of classes."""
    has_minus_one: bool = False
    """Whether -1 is a class; otherwise it stands for no label, as in hidden test splits."""


def of_unlabeled(teacher: TeacherClasses | None, label_names: Sequence[str] | None) -> LabelSpec:
    """The classes where no row has a label: the given names, or the teacher's. Raises UserError if there are none."""
    kind = MULTI_LABEL if teacher is not None and teacher.is_multi_label else CLASSES
    if label_names and (teacher is None or not teacher.is_named):
        return LabelSpec(kind, tuple(label_names), ())
    if teacher is None:
        raise UserError(
            "no row has a label, so nothing says which classes there are; give their names with --label_names, or a "
            "classifier as --teacher"
        )
    return LabelSpec(SCORES, (), ()) if teacher.num_labels == 1 else LabelSpec(kind, teacher.names, ())


def find_spec(
    labels: Mapping[str, Sequence["Labels"]],
    teacher: TeacherClasses | None,
    label_names: Sequence[str] | None,
    needs_train: bool = True,
) -> LabelSpec:
    """What the labels of all splits mean.

    Args:
        labels: The label values of each split's files.
        needs_train: Whether there must be rows of two classes to train on.

    Raises:
        UserError: files of different kinds, fewer than two classes, or names that do not fit the teacher's.
    """
    files = [file for split in labels.values() for file in split if file.kind]
    kinds = {file.kind for file in files}
    if kinds == {"int", "float"}:
        kinds = {"float"}
    if len(kinds) > 1:
        first, other = files[0], next(file for file in files if file.kind != files[0].kind)
        raise UserError(
            f"labels are {_KINDS[first.kind]} in {first.where}, but {_KINDS[other.kind]} in {other.where}; give all "
            "files one kind"
        )
    kind = kinds.pop()
    is_whole = kind == "int" or (kind == "float" and all(file.is_whole for file in files))
    expects_scores = teacher is not None and teacher.num_labels == 1
    if kind in ("int", "float") and (expects_scores or not (is_whole and (kind == "int" or teacher is not None))):
        if label_names:
            raise UserError(f"--label_names names classes, but the labels of {files[0].where} are scores; leave it out")
        if teacher is not None and not expects_scores:
            raise UserError(
                f"the labels of {files[0].where} are scores, but {teacher.name} has the classes "
                f"{shown(list(teacher.names))}; take a model with one output, or give classes"
            )
        return LabelSpec(SCORES, (), ())
    return _classes_of(MULTI_LABEL if kind == "lists" else CLASSES, labels, teacher, label_names, needs_train)


def _classes_of(
    kind: str,
    labels: Mapping[str, Sequence["Labels"]],
    teacher: TeacherClasses | None,
    label_names: Sequence[str] | None,
    needs_train: bool,
) -> LabelSpec:
    files = [file for split in labels.values() for file in split if file.kind]
    given = label_names or (teacher.names if teacher is not None and teacher.is_named else ())
    has_minus_one = "-1" in given
    for file in files:
        file.check_class_numbers(has_minus_one)
    observed = {
        name: set().union(*(file.observed() for file in split)) - (set() if has_minus_one else {UNLABELED})
        for name, split in labels.items()
    }
    everywhere = set().union(*observed.values())
    declared = next((file.class_names for file in files if file.class_names), None)
    if declared is not None:
        _check_known(_sorted_names(everywhere), declared, "another file of the data", files[0].where, is_declared=False)
    in_order = declared or _sorted_names(everywhere)
    _check_spelling(in_order, files[0].where)
    notes = _notes_of_minus_one(files, has_minus_one)
    names, are_ids = in_order, False
    if given:
        source = "--label_names" if label_names or teacher is None else teacher.name
        names = tuple(given)
        are_ids = declared is None and _are_ids(everywhere, names)
        if are_ids:
            notes.append(f"warning: labels 0 to {len(names) - 1} are taken for {', '.join(names)}")
        else:
            _check_known(in_order, names, source, files[0].where, is_declared=declared is not None)
    if label_names and teacher is not None and teacher.is_named:
        _check_same_order(label_names, teacher)
    if teacher is not None and teacher.num_labels != len(names):
        raise UserError(
            f"{teacher.name} has {teacher.num_labels} classes, but {files[0].where} has {len(names)} "
            f"({shown(list(names))}); take a teacher with these classes, or an encoder, which is fine-tuned first"
        )
    if teacher is not None and not teacher.is_named:
        notes.append(f"warning: {teacher.name} does not name its classes; they are taken for {', '.join(names)}")
    spec = LabelSpec(kind, names, tuple(notes), are_ids, has_minus_one)
    if needs_train:
        _check_observed(spec, observed, files[0].where)
    return spec


def _check_same_order(label_names: Sequence[str], teacher: TeacherClasses) -> None:
    """Raise UserError unless `--label_names` are the teacher's classes in its order, which its outputs have."""
    if [name.casefold() for name in label_names] != [name.casefold() for name in teacher.names]:
        raise UserError(
            f"--label_names are {shown(list(label_names))}, but {teacher.name} has {shown(list(teacher.names))}, in "
            "the order of its outputs; leave --label_names out, or write them so"
        )


def _notes_of_minus_one(files: Sequence["Labels"], has_minus_one: bool) -> list[str]:
    num = 0 if has_minus_one else sum(file.values.count(UNLABELED) for file in files)
    return [f"warning: {num:,} labels are -1, which stands for no label; if it is a class, write words"] if num else []


def _check_observed(spec: LabelSpec, observed: Mapping[str, set[Any]], where: str) -> None:
    """Raise UserError if there are fewer than two classes, too many, or some that train lacks."""
    if len(spec.names) < 2 or (spec.kind == CLASSES and len(observed.get("train", spec.names)) < 2):
        raise UserError(
            f"{where} has one class only ({shown(list(observed.get('train') or spec.names))}), so there is nothing to "
            "learn; give rows of at least two"
        )
    if len(spec.names) > MAX_CLASSES:
        raise UserError(
            f"{where} has {len(spec.names):,} different labels, more than {MAX_CLASSES:,} classes; give another "
            "--label_column, or give scores as numbers with a decimal point"
        )
    for split, found in observed.items():
        extra = sorted(map(str, found - observed.get("train", found)))
        if extra:
            raise UserError(
                f"the {split} rows have the label {extra[0]!r}, which no train row has; add rows of it to train"
            )


def _sorted_names(observed: Iterable[Any]) -> tuple[str, ...]:
    values = list(observed)
    if all(isinstance(value, int) or _WHOLE.fullmatch(value) for value in values):
        return tuple(map(str, sorted(values, key=int)))
    return tuple(sorted(map(str, values)))


def _are_ids(observed: Iterable[Any], names: Sequence[str]) -> bool:
    """Whether labels are whole numbers that no class is called by, and each is a position in `names`."""
    values, known = list(observed), {name.casefold() for name in names}
    return all(isinstance(value, int) and 0 <= value < len(names) and str(value) not in known for value in values)


def _check_spelling(names: Sequence[str], where: str) -> None:
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise UserError(
                f"{where} has the labels {other!r} and {name!r}, which differ in case only; write one of them"
            )


def _check_known(names: Sequence[str], known: Sequence[str], source: str, where: str, is_declared: bool) -> None:
    """Raise UserError, listing both sides, if names are not known, or if a declared list lacks a known one."""
    ours, theirs = {name.casefold() for name in names}, {name.casefold() for name in known}
    if ours - theirs or (is_declared and theirs - ours):
        raise UserError(
            f"{where} has the labels {shown(sorted(names))}, but {source} has {shown(sorted(known))}; write "
            "equal names (case does not matter)"
        )


# -- Values ------------------------------------------------------------------------------------------------------------

_KINDS = {"int": "whole numbers", "float": "numbers", "str": "words", "lists": "lists of classes"}


@dataclass(frozen=True)
class Labels:
    """The labels of one file, as values: str, int, float, a tuple of classes, or None where a row has no label."""

    where: str
    values: list[Any]
    kind: str
    """int, float, str or lists; "" if no row has a label."""
    class_names: tuple[str, ...] | None
    """Names of class ids, where the file says them; values are names then."""

    @property
    def is_whole(self) -> bool:
        return all(value is None or float(value).is_integer() for value in self.values)

    def observed(self) -> set[Any]:
        """The different labels; whole numbers are int."""
        if self.kind == "lists":
            return {name for value in self.values if value is not None for name in value}
        found = {value for value in self.values if value is not None}
        return {int(value) for value in found} if self.kind == "float" and self.is_whole else found

    def check_class_numbers(self, has_minus_one: bool) -> None:
        """Raise UserError for a class number below 0; -1 may stand for no label."""
        if self.kind not in ("int", "float") or has_minus_one:
            return
        wrong = next((row for row, value in enumerate(self.values) if value is not None and value < UNLABELED), None)
        if wrong is not None:
            raise UserError(
                f"{self.where} row {wrong} has label {self.values[wrong]}; it must be 0 or more, or -1 or null for "
                "none: fix it, or write classes as words"
            )

    def encode(self, spec: LabelSpec) -> np.ndarray:
        """int64 [N] classes, float32 [N] scores, or float32 [N, C] of 0 and 1."""
        if spec.kind == SCORES:
            return np.array([math.nan if value is None else value for value in self.values], np.float32)
        number_of = {name.casefold(): number for number, name in enumerate(spec.names)}

        def number(value: Any) -> int:
            if isinstance(value, float):
                value = int(value)
            return value if spec.are_ids else number_of[str(value).casefold()]

        if spec.kind == CLASSES:
            missing = (None,) if spec.has_minus_one else (None, UNLABELED)
            return np.array([UNLABELED if value in missing else number(value) for value in self.values], np.int64)
        encoded = np.zeros((len(self.values), len(spec.names)), np.float32)
        for row, value in enumerate(self.values):
            if value is None:
                encoded[row] = UNLABELED
            else:
                encoded[row, [number(name) for name in value]] = 1
        return encoded


def read(rows: Rows, column: str, columns: Sequence[str] | None) -> Labels:
    """The label values of a file.

    Args:
        columns: Columns of 0 and 1, one for each class, in place of `column`.

    Raises:
        UserError: labels of a type that has no meaning, of mixed types, or numbers that are not finite; names the row.
    """
    if columns:
        return _read_switches(rows, columns)
    column_type, values = rows.table.column(column).type, rows.table.column(column).to_pylist()
    value_type = column_type.value_type if types.is_dictionary(column_type) else column_type
    names = rows.class_names.get(column)
    where = f"{rows.where} column {column!r}"
    if types.is_null(value_type):
        kind = ""
    elif is_list(value_type):
        return _read_lists(rows.where, where, values, names)
    elif types.is_boolean(value_type):
        kind, values = "str", [None if value is None else str(value) for value in values]
    elif types.is_integer(value_type):
        values = _named(values, names, where) if names else values
        kind = "str" if names else "int"
    elif types.is_floating(value_type):
        kind, values = "float", [None if value is None or math.isnan(value) else value for value in values]
    elif is_text(value_type):
        kind, values = _read_text(where, values, may_be_numbers=rows.is_text)
    else:
        raise UserError(
            f"{where} holds {column_type}, which are no labels; give words, whole numbers, numbers or lists"
        )
    infinite = next(
        (row for row, value in enumerate(values) if kind == "float" and value in (math.inf, -math.inf)), None
    )
    if infinite is not None:
        raise UserError(f"{where} row {infinite} has the score {values[infinite]}; give a finite number, or none")
    if all(value in (None, UNLABELED) for value in values):  # a hidden test split
        kind, values = "", [None] * len(values)
    return Labels(rows.where, values, kind, names)


def _named(values: Sequence[int | None], names: tuple[str, ...], where: str) -> list[str | None]:
    """The names of class ids, None for -1, which stands for a hidden label."""
    wrong = next((row for row, value in enumerate(values) if value is not None and not -1 <= value < len(names)), None)
    if wrong is not None:
        raise UserError(
            f"{where} row {wrong} has label {values[wrong]}; it must be 0 to {len(names) - 1}, or -1 or null for none: "
            "fix it"
        )
    return [None if value is None or value == UNLABELED else names[value] for value in values]


_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def _read_text(where: str, values: Sequence[str | None], may_be_numbers: bool) -> tuple[str, list[Any]]:
    """Words; in files where everything is text, numbers if all are. Labels of spaces alone are none."""
    stripped = [value.strip() or None if value is not None else None for value in values]
    present = [value for value in stripped if value is not None]
    if not may_be_numbers or not present:
        return "str", stripped
    are_numbers = [bool(_NUMBER.fullmatch(value)) for value in present]
    if all(_WHOLE.fullmatch(value) for value in present):
        return "int", [None if value is None else int(value) for value in stripped]
    if all(are_numbers):
        return "float", [None if value is None else float(value) for value in stripped]
    if any(are_numbers):
        numeric = next(row for row, value in enumerate(stripped) if value is not None and _NUMBER.fullmatch(value))
        word = next(row for row, value in enumerate(stripped) if value is not None and not _NUMBER.fullmatch(value))
        raise UserError(
            f"{where} holds numbers and words (row {numeric} {stripped[numeric]!r}, row {word} {stripped[word]!r}); "
            "write all labels as words, or all as numbers"
        )
    return "str", stripped


def _read_lists(file: str, where: str, values: Sequence[Any], names: tuple[str, ...] | None) -> Labels:
    found: list[tuple[Any, ...] | None] = []
    for row, value in enumerate(values):
        if value is None:
            found.append(None)
            continue
        if names:
            value = _named(value, names, f"{where} row {row}")
        if not all(isinstance(name, str) for name in value):
            raise UserError(
                f"{where} row {row} holds {shown(value)}; a list of labels must name classes as words (for 0 and 1 "
                "give a column for each class with --label_columns)"
            )
        if len(set(value)) < len(value):
            raise UserError(f"{where} row {row} names a class twice ({shown(value)}); write each once")
        found.append(tuple(value))
    return Labels(file, found, "lists" if any(value is not None for value in found) else "", names)


_SWITCH = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}


def _read_switches(rows: Rows, columns: Sequence[str]) -> Labels:
    found: list[tuple[str, ...] | None] = []
    table = [rows.table.column(name).to_pylist() for name in columns]
    for row, values in enumerate(zip(*table, strict=True)):
        if all(value is None or str(value).strip() in ("-1", "-1.0") for value in values):
            found.append(None)
            continue
        switches = [_SWITCH.get(str(value).strip().lower()) for value in values]
        if None in switches:
            wrong = switches.index(None)
            raise UserError(
                f"{rows.where} row {row} column {columns[wrong]!r} is {shown(values[wrong])}; it must be 0 or 1: fix it"
            )
        found.append(tuple(name for name, is_on in zip(columns, switches, strict=True) if is_on))
    is_any = any(value is not None for value in found)
    return Labels(rows.where, found, "lists" if is_any else "", tuple(columns))
