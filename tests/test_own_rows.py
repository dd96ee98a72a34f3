"""The user's own rows: formats, columns, labels and splits, and what is refused, with file, row and remedy."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from peakd_ds.config.data import DataSettings, check_data_source
from peakd_ds.data import own_rows
from peakd_ds.data.division import divide_rows, stratified_tenth
from peakd_ds.data.label_arrays import is_labeled, label_array, label_weights
from peakd_ds.data.labels import TeacherClasses
from peakd_ds.data.own_rows import OwnRows
from peakd_ds.errors import UserError

Record = dict[str, Any]
NAMES = ("billing", "bug", "praise")


def rows_of(num: int, **columns: Any) -> list[Record]:
    """Rows with a text and a label of NAMES in turn; `columns` are functions of the row's number."""
    made = {"text": lambda i: f"text {i}", "label": lambda i: NAMES[i % 3]} | columns
    return [{name: make(i) for name, make in made.items()} for i in range(num)]


def write(file: Path, records: Sequence[Record]) -> Path:
    """Write rows in the format that the file's ending says."""
    names = list(records[0])
    if file.suffix in (".csv", ".tsv", ".gz"):
        separator = "\t" if ".tsv" in file.name else ","
        cells = [["" if record[name] is None else str(record[name]) for name in names] for record in records]
        lines = [separator.join(f'"{cell}"' if separator in cell else cell for cell in row) for row in (names, *cells)]
        content = "\n".join(lines).encode()
        file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    elif file.suffix == ".json":
        file.write_text(json.dumps(records))
    elif file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, records)))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), file)
    return file


def load(teacher: TeacherClasses | None = None, metric: str = "", **settings: Any) -> OwnRows:
    chosen = DataSettings(
        **{name: (str(value),) if isinstance(value, Path) else value for name, value in settings.items()}
    )
    check_data_source(chosen)
    return own_rows.load(chosen, teacher, metric)


def labels_of(found: OwnRows, split: str = "train") -> np.ndarray:
    return label_array(found.splits[split].data.column("label"))


def teacher_of(*names: str) -> TeacherClasses:
    return TeacherClasses("--teacher model", names, not names[0].startswith("LABEL_"))


# -- Formats and columns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz", "json", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    train = write(tmp_path / f"tickets.{ending}", rows_of(30, text=lambda i: f"a, text {i}"))
    dev = write(tmp_path / f"dev.{ending}", rows_of(6))
    found = load(train_file=train, validation_file=dev)
    assert (found.task.name, found.task.label_names, found.task.eval_splits) == ("tickets", NAMES, ("validation",))
    assert labels_of(found).tolist() == [i % 3 for i in range(30)]
    assert found.splits["train"]["text"][:2] == ["a, text 0", "a, text 1"]
    assert found.splits["train"]._fingerprint == FINGERPRINTS.setdefault("train", found.splits["train"]._fingerprint)


FINGERPRINTS: dict[str, str] = {}
"""The first format's; the others must have the same."""


def test_several_files_and_a_pattern_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number in (2, 1):
        write(tmp_path / f"part-{number}.csv", rows_of(6, text=lambda i, number=number: f"{number} {i}"))
    dev = write(tmp_path / "dev.csv", rows_of(6))
    found = load(train_file=(str(tmp_path / "part-*.csv"), str(tmp_path / "part-1.csv")), validation_file=dev)
    assert [text.split()[0] for text in found.splits["train"]["text"]] == ["1"] * 6 + ["2"] * 6


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"text": [f"t{i}" for i in range(20)], "label": [0, 1] * 10}, features=features)
    DatasetDict({"train": rows.shuffle(seed=1), "test": rows}).save_to_disk(str(tmp_path / "mine"))
    found = load(dataset_name=str(tmp_path / "mine"))
    assert (found.task.name, found.task.label_names, found.task.eval_splits) == ("mine", ("no", "yes"), ("test",))
    assert labels_of(found, "test").tolist() == [0, 1] * 10


def test_a_dataset_without_train_rows_can_only_be_scored(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": [f"t{i}" for i in range(6)], "label": ["a", "b"] * 3})
    DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "mine"))
    with pytest.raises(UserError, match="mine has no train split; give one that has"):
        load(dataset_name=str(tmp_path / "mine"))
    found = own_rows.load(DataSettings(dataset_name=str(tmp_path / "mine")), teacher_of("b", "a"), needs_train=False)
    assert labels_of(found, "test").tolist() == [1, 0] * 3


def test_pairs_of_texts_and_unused_columns(tmp_path: Path) -> None:
    columns = {"premise": lambda i: f"p{i}", "hypothesis": lambda i: f"h{i}", "source": lambda i: "web"}
    records = [{name: row[name] for name in (*columns, "label")} for row in rows_of(9, **columns)]
    found = load(train_file=write(tmp_path / "a.jsonl", records), validation_file=write(tmp_path / "b.jsonl", records))
    assert found.task.text_columns == ("premise", "hypothesis")
    assert "columns: premise and hypothesis, labels in label" in found.notes
    assert "columns that are not used: source" in found.notes


# -- Labels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "names", "expected"),
    [
        ([0, 1, 2], ("0", "1", "2"), [0, 1, 2]),
        ([10, 2, 1], ("1", "2", "10"), [2, 1, 0]),
        ([True, False, True], ("False", "True"), [1, 0, 1]),
        (["b", "a", None], ("a", "b"), [1, 0, -1]),
        ([1, 0, -1], ("0", "1"), [1, 0, -1]),
        (["b", "a", " "], ("a", "b"), [1, 0, -1]),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_classes(tmp_path: Path, ending: str, values: list[Any], names: tuple[str, ...], expected: list[int]) -> None:
    records = rows_of(9, label=lambda i: values[i % 3])
    dev = write(tmp_path / f"b.{ending}", records)
    found = load(train_file=write(tmp_path / f"a.{ending}", records), validation_file=dev)
    assert found.task.label_names == names
    assert labels_of(found).tolist() == expected * 3


def test_scores(tmp_path: Path) -> None:
    records = rows_of(30, label=lambda i: None if i == 3 else i / 2 - 4)
    for ending in ("jsonl", "csv", "parquet"):
        found = load(train_file=write(tmp_path / f"a.{ending}", records))
        assert found.task.is_regression and found.task.primary_metric == "spearmanr"
        values = np.concatenate([labels_of(found), labels_of(found, "test")])
        assert np.isnan(values).sum() == 1 and np.nanmin(values) == -4


def test_whole_numbers_are_scores_for_a_teacher_of_one_output(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", rows_of(30, label=lambda i: i % 5))
    assert load(teacher_of("LABEL_0"), train_file=file).task.is_regression
    assert not load(train_file=file).task.is_regression


def test_several_labels_by_names_and_by_columns(tmp_path: Path) -> None:
    lists = [[], ["bug"], ["praise", "bug"], None]
    by_names = rows_of(40, label=lambda i: lists[i % 4])
    by_columns = [
        {"text": row["text"]}
        | {name: None if row["label"] is None else int(name in row["label"]) for name in ("bug", "praise")}
        for row in by_names
    ]
    one = load(train_file=write(tmp_path / "a.jsonl", by_names))
    two = load(train_file=write(tmp_path / "b.csv", by_columns), label_columns=("bug", "praise"))
    for found in (one, two):
        assert found.task.is_multi_label and found.task.label_names == ("bug", "praise")
        labels = labels_of(found)
        assert set(map(tuple, labels)) == {(0, 0), (1, 0), (1, 1), (-1, -1)}
        assert is_labeled(labels_of(found, "test")).all()
    assert (labels_of(one) == labels_of(two)).all()


def test_names_and_order_are_the_teachers(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", rows_of(60))
    found = load(
        teacher_of("Praise", "BUG", "Billing"), train_file=file, validation_file=write(tmp_path / "b.csv", rows_of(6))
    )
    assert found.task.label_names == ("Praise", "BUG", "Billing")
    assert labels_of(found)[:3].tolist() == [2, 1, 0]
    unnamed = load(teacher_of("LABEL_0", "LABEL_1", "LABEL_2"), train_file=file)
    assert unnamed.task.label_names == NAMES
    assert any(note.startswith("warning: --teacher model does not name its classes") for note in unnamed.notes)


def test_numbers_are_ids_of_a_teachers_named_classes(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", rows_of(60, label=lambda i: i % 3))
    found = load(teacher_of("x", "y", "z"), train_file=file)
    assert found.task.label_names == ("x", "y", "z")
    assert "warning: labels 0 to 2 are taken for x, y, z" in found.notes


def test_given_names_win_over_sorted_ones(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", rows_of(60))
    assert load(train_file=file, label_names=("praise", "billing", "bug")).task.label_names[0] == "praise"


# -- Which rows do what ------------------------------------------------------------------------------------------------


def test_splits(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", rows_of(200))
    dev, test = (write(tmp_path / f"{name}.csv", rows_of(20)) for name in ("dev", "test"))
    alone = load(train_file=file)
    assert {name: len(rows) for name, rows in alone.splits.items()} == {"train": 180, "test": 20}
    assert sorted(labels_of(alone, "test")).count(0) in (6, 7)
    all_three = load(train_file=file, validation_file=dev, test_file=test)
    assert (all_three.task.selection_split, all_three.task.eval_splits) == ("validation", ("test",))
    assert len(all_three.splits["train"]) == 200


def test_unlabeled_rows_follow_those_of_train(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", rows_of(100))
    more = write(tmp_path / "b.jsonl", rows_of(50, label=lambda i: "ignored"))
    found = load(train_file=file, unlabeled_file=more)
    labels = labels_of(found)
    assert len(labels) == 140 and (labels < 0).sum() == 50
    trained, held_out = divide_rows(found.task, labels, holds_out=True)
    assert len(held_out) == 9 and (labels[held_out] >= 0).all()
    assert sorted([*trained.rows, *held_out]) == list(range(140))
    labeled = trained.only(is_labeled(labels))
    sizes = np.diff(labeled.bounds)
    assert len(labeled) == 81 and sizes.max() - sizes.min() <= 1  # every shard has its share of them
    slots = labeled.slots(16, seed=1, epoch=0)
    assert sorted(slots[slots >= 0]) == list(range(81))


def test_no_labels_at_all(tmp_path: Path) -> None:
    more = write(tmp_path / "b.jsonl", rows_of(60))
    found = load(teacher_of("yes", "no"), unlabeled_file=more)
    assert not found.task.has_labels and found.task.primary_metric == "agreement"
    assert found.task.label_names == ("yes", "no") and len(found.splits["test"]) == 6
    with pytest.raises(UserError, match=r"no row has a label, .* --label_names, or a classifier as --teacher"):
        load(unlabeled_file=more)


def test_a_stratified_tenth_has_each_class() -> None:
    labels = np.repeat([0, 1, 2], [500, 400, 100])
    counts = np.bincount(labels[stratified_tenth(labels, seed=0)])
    assert counts.tolist() == [50, 40, 10]


def test_balanced_weights() -> None:
    labels = np.array([0, 0, 0, 1, -1, 2])
    weights = label_weights(labels, np.arange(5), 3, "balanced")
    assert weights is not None
    assert weights[:5].tolist() == pytest.approx([4 / 9, 4 / 9, 4 / 9, 4 / 3, 0])
    assert label_weights(labels[:4], np.arange(4), 3, "none") is None
    assert label_weights(labels, np.arange(6), 3, "none").tolist() == [1, 1, 1, 1, 0, 1]  # type: ignore[union-attr]


# -- Refusals ----------------------------------------------------------------------------------------------------------


def broken(records: list[Record], row: int, **values: Any) -> list[Record]:
    return [record | values if number == row else record for number, record in enumerate(records)]


@pytest.mark.parametrize(
    ("records", "settings", "message"),
    [
        (
            rows_of(30),
            {"text_columns": ("body",)},
            r"--text_columns body is no column of .*a.jsonl, which has \['text'",
        ),
        (rows_of(30), {"label_column": "class"}, "--label_column class is no column of"),
        (rows_of(30), {"label_columns": ("x", "y")}, "--label_columns x is no column of"),
        (rows_of(30, label=lambda i: "a"), {}, "has one class only"),
        (broken(rows_of(30), 7, text=None), {}, "a.jsonl row 7 has no text in column 'text'; fix the row or leave"),
        (broken(rows_of(30), 7, text=" \t "), {}, "row 7 has text of spaces alone"),
        (broken(rows_of(30), 7, text="a\0b"), {}, "row 7 has a NUL character"),
        (broken(rows_of(30), 7, label=3), {}, "column 'label' has values of different types"),
        (rows_of(30, label=lambda i: f"2020-01-{i + 1:02}T00:00:00" if False else {"a": 1}), {}, "which are no labels"),
        (rows_of(30, label=lambda i: i % 3 - 2), {}, "row 0 has label -2; it must be 0 or more, or -1 or null"),
        (rows_of(30, label=lambda i: [i % 3]), {}, "a list of labels must name classes as words"),
        (rows_of(30, label=lambda i: ["a", "a"]), {}, "names a class twice"),
        (rows_of(30, label=lambda i: ("Spam", "spam")[i % 2]), {}, "differ in case only"),
        (
            rows_of(30),
            {"label_names": ("billing", "bug")},
            r"has the labels .*, but --label_names has .*write equal names",
        ),
        (rows_of(12), {}, "there are 12 rows, too few to hold out two tenths"),
        (rows_of(30, text=lambda i: i), {}, "column 'text' holds int64, not text"),
    ],
)
def test_wrong_rows(tmp_path: Path, records: list[Record], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(train_file=write(tmp_path / "a.jsonl", records), **settings)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is not a table of values"),
        ("a.csv", b"text,label\n", "has no rows; give a file that has some"),
        ("a.csv", b"text,label\na,b\nc\n", "is not a table of values .*#3"),
        ("a.csv", b"text,text\na,b\n", "has two columns 'text'"),
        ("a.csv", b"text,\na,b\n", "has a column without a name"),
        ("a.csv", b"text,label\n\xff\xfe,b\n", "line 2 has a byte that is not UTF-8"),
        ("a.csv", b"text,label\na\0,b\n", "line 2 has a NUL byte"),
        ("a.csv", b"text,label\na,1\nb,spam\n", "holds numbers and words"),
        ("a.json", b"[{", "is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"row 1 is \[1\], not an object"),
        ("a.jsonl", b"[" * 100_000, "is not JSON"),
        ("a.parquet", b"PAR1 nothing", "is not a complete parquet file"),
        ("a.csv.gz", b"text,label\na,b\n", "cannot be read"),
        ("a.xlsx", b"", "has an ending that says no format that is read"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(train_file=tmp_path / name)


def test_files_of_one_split_are_one_set(tmp_path: Path) -> None:
    """Found in public reports: of two files with other class orders, all labels of the second were inverted."""
    for number, names in enumerate((["no", "yes"], ["yes", "no"])):
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        Dataset.from_dict({"text": [f"{number}"] * 20, "label": [0, 1] * 10}, features=features).to_parquet(
            tmp_path / f"part-{number}.parquet"
        )
    with pytest.raises(UserError, match="order the classes of column 'label' differently"):
        load(train_file=tmp_path / "part-*.parquet")
    write(tmp_path / "a.csv", rows_of(30))
    write(tmp_path / "b.csv", rows_of(30))
    write(tmp_path / "c.csv", rows_of(30, source=lambda i: "web", text=lambda i: f"other {i}"))
    with pytest.raises(UserError, match=r"a.csv and .*b.csv hold the same rows"):
        load(train_file=(str(tmp_path / "a.csv"), str(tmp_path / "b.csv")))
    with pytest.raises(UserError, match=r"are not one set: .*a.csv has no column 'source'"):
        load(train_file=(str(tmp_path / "a.csv"), str(tmp_path / "c.csv")))
    with pytest.raises(UserError, match=r"--validation_file .*a.csv is --train_file too"):
        load(train_file=tmp_path / "a.csv", validation_file=tmp_path / "a.csv")


def test_a_class_that_train_lacks(tmp_path: Path) -> None:
    dev = write(tmp_path / "dev.csv", rows_of(9, label=lambda i: "refund"))
    with pytest.raises(UserError, match="the validation rows have the label 'refund', which no train row has"):
        load(train_file=write(tmp_path / "a.csv", rows_of(30)), validation_file=dev)


def test_a_teacher_with_other_classes(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", rows_of(30))
    with pytest.raises(UserError, match=r"has the labels \['billing', 'bug', 'praise'\], but --teacher model has"):
        load(teacher_of("bug", "praise", "question"), train_file=file)
    with pytest.raises(UserError, match=r"--teacher model has 2 classes, but .*a.csv has 3"):
        load(teacher_of("LABEL_0", "LABEL_1"), train_file=file)
    with pytest.raises(UserError, match="are scores, but --teacher model has the classes"):
        load(teacher_of("a", "b"), train_file=write(tmp_path / "s.csv", rows_of(30, label=lambda i: i + 0.5)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "rte", "train_file": ("a",)}, "--task rte brings its own rows, .* --train_file is given too"),
        ({}, "--task is missing: give a task of GLUE, or rows of your own"),
        ({"dataset_name": "a", "train_file": ("a",)}, "--dataset_name a and --train_file are both given"),
        ({"train_file": ("a",), "name": "a/b"}, "--name 'a/b' becomes part of paths"),
        ({"train_file": ("a",), "text_columns": ("a", "b", "c")}, "are 3 columns, but a row has one or two texts"),
        ({"train_file": ("a",), "label_columns": ("a",)}, "--label_columns a is one column"),
        ({"train_file": ("a",), "label_names": ("A", "a")}, "--label_names has 'a' twice"),
        ({"train_file": ("no.csv",)}, "--train_file no.csv names no file"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(**settings)


# -- What went wrong without a word ------------------------------------------------------------------------------------


def test_minus_one_is_a_class_where_it_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", rows_of(60, label=lambda i: i % 3 - 1))
    named = load(train_file=file, label_names=("-1", "0", "1"))
    assert named.task.label_names == ("-1", "0", "1") and (labels_of(named) >= 0).all()
    hidden = load(train_file=file)
    assert "warning: 20 labels are -1, which stands for no label; if it is a class, write words" in hidden.notes


def test_scores_may_be_minus_one_but_not_all(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", rows_of(60, label=lambda i: i / 10 - 2))
    dev = write(tmp_path / "b.csv", rows_of(6, label=lambda i: i - 2))
    assert np.isfinite(labels_of(load(train_file=file, validation_file=dev), "validation")).all()
    hidden = write(tmp_path / "c.csv", rows_of(6, label=lambda i: -1.0))
    assert "test rows have no labels, so they are not used" in load(train_file=file, test_file=hidden).notes


def test_tenths_do_not_depend_on_the_order_of_the_classes(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", rows_of(200))
    reported = [
        load(train_file=file, label_names=names).splits["test"]["text"]
        for names in (("billing", "bug", "praise"), ("praise", "billing", "bug"))
    ]
    assert reported[0] == reported[1]
    rare = load(train_file=write(tmp_path / "b.csv", rows_of(60, label=lambda i: "c" if i == 7 else NAMES[i % 2])))
    assert 2 in labels_of(rare)  # the one row of class c is trained on


def test_class_numbers_in_words_are_sorted_as_numbers(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", rows_of(120, label=lambda i: str(i % 12)))
    assert load(train_file=file).task.label_names == tuple(map(str, range(12)))


def test_labels_under_two_names_are_refused(tmp_path: Path) -> None:
    dev = [{"text": row["text"], "labels": row["label"]} for row in rows_of(6)]
    with pytest.raises(UserError, match=r"b.csv has labels in 'labels', but another file in 'label'; give both"):
        load(train_file=write(tmp_path / "a.csv", rows_of(60)), validation_file=write(tmp_path / "b.csv", dev))


def test_label_names_in_another_order_than_the_teachers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="in the order of its outputs; leave --label_names out"):
        load(teacher_of(*reversed(NAMES)), train_file=write(tmp_path / "a.csv", rows_of(60)), label_names=NAMES)


def test_classes_that_another_file_does_not_declare(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bug", "billing", "x"])})
    dev = Dataset.from_dict({"text": ["a"] * 6, "label": [0, 1] * 3}, features=features)
    dev.to_parquet(tmp_path / "b.parquet")
    with pytest.raises(UserError, match="but another file of the data has"):
        load(train_file=write(tmp_path / "a.csv", rows_of(60)), validation_file=tmp_path / "b.parquet")


def test_a_quote_that_nothing_closes_in_a_tsv(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\n"Hello\ta\nfoo\tb\nthe end" x\ta\n')
    with pytest.raises(UserError, match="row 0 has a line break and a tab in column 'text'"):
        load(train_file=tmp_path / "a.tsv")


def test_a_model_of_several_labels_on_rows_without(tmp_path: Path) -> None:
    model = TeacherClasses("--model m", ("a", "b"), is_named=True, is_multi_label=True)
    file = str(write(tmp_path / "a.jsonl", [{"text": f"t{i}"} for i in range(5)]))
    found = own_rows.load(DataSettings(test_file=(file,)), model, needs_train=False)
    assert found.task.is_multi_label and len(found.splits["test"]) == 5
