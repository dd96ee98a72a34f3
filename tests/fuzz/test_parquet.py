"""Damaged and unusual parquet files: each is refused in one line with file and remedy, or gives the rows it holds."""

import datetime
import decimal
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import made_up_rows, write_split
from harness import FACTOR, REMEDY, assert_refused, examples, run, snapshot
from hypothesis import given
from hypothesis import strategies as st

from peakd_ds.data import reading
from peakd_ds.data.tasks import Task, get_task
from peakd_ds.errors import UserError

NUM_ROWS = 12
COLUMNS = made_up_rows("rte", NUM_ROWS, "fuzz")
TEXTS = ("sentence1", "sentence2")
FILE = "train-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with small splits of rte and stsb."""
    folder = tmp_path_factory.mktemp("data")
    for task_name in ("rte", "stsb"):
        for split in ("train", "validation"):
            write_split(folder, task_name, split, made_up_rows(task_name, NUM_ROWS, "fuzz"))
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy, to damage."""
    return Path(shutil.copytree(good, tmp_path / "data"))


def rows_of(data_dir: Path, task: Task, split: str) -> dict[str, list[Any]]:
    """The text and labels of a split."""
    rows = reading.load_splits(task, str(data_dir), train=split == "train")[split]
    return {name: rows[name] for name in (*task.text_columns, "label")}


def read_or_refuse(data_dir: Path, what: str, task_name: str = "rte", split: str = "train") -> Any:
    """The rows, or the message if they are refused as they should be; nothing on disk changes."""
    before = snapshot(data_dir)
    try:
        return rows_of(data_dir, get_task(task_name), split)
    except UserError as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and len(message) < 2000, f"{what}: {message}"
        assert str(data_dir / task_name) in message and REMEDY.search(message), f"{what}: {message}"
        return message
    finally:
        assert snapshot(data_dir) == before, what


def write(data_dir: Path, columns: dict[str, Any], task_name: str = "rte", **settings: Any) -> Path:
    """A train file of these columns in place of the good one."""
    file = data_dir / task_name / FILE
    pyarrow.parquet.write_table(pyarrow.table(columns), file, **settings)
    return file


# -- Bytes -------------------------------------------------------------------------------------------------------------


@given(st.data())
@examples(250)
def test_changed_bytes(good: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Pages have checksums here, so no change of a value goes unseen; a change in the footer may be harmless."""
    folder = tmp_path_factory.getbasetemp() / "changed"
    if not folder.exists():
        shutil.copytree(good, folder)
    checked = data.draw(st.booleans(), "checksums")
    compression = data.draw(st.sampled_from(["none", "snappy", "zstd"]), "compression")
    settings: dict[str, Any] = {"write_page_checksum": checked, "compression": compression}
    file = write(folder, COLUMNS, **settings, use_dictionary=data.draw(st.booleans(), "dictionary"))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4), "changes")):
        place = data.draw(st.integers(0, len(content) - 1), "place")
        content[place] = data.draw(st.integers(0, 255), "byte")
    length = data.draw(st.sampled_from([None, None, None, data.draw(st.integers(0, len(content)), "length")]), "cut")
    file.write_bytes(bytes(content[:length]))
    found = read_or_refuse(folder, "changed bytes")
    if isinstance(found, dict):
        assert {type(text) for name in TEXTS for text in found[name]} <= {str} and set(found["label"]) <= {0, 1}
        assert len({len(values) for values in found.values()}) == 1


def test_changed_values_of_pages_with_checksums(folder: Path) -> None:
    """A change in a page is seen, whatever it makes of the text."""
    file = write(folder, COLUMNS, write_page_checksum=True, compression="none", use_dictionary=False)
    content, generator = file.read_bytes(), random.Random(0)
    words = " ".join(COLUMNS["sentence1"]).split()
    for _ in range(30 * FACTOR):
        word = generator.choice(words).encode()
        places = [place for place in range(len(content)) if content.startswith(word, place)]
        place = generator.choice(places)
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        found = read_or_refuse(folder, str(place))
        assert isinstance(found, str) or found == COLUMNS, "a statistic in the footer"


@pytest.mark.parametrize("codec", ["ARROW:schema", "huggingface"])
def test_changed_bytes_of_the_schema_s_metadata(folder: Path, codec: str) -> None:
    file = folder / "rte" / FILE
    content, generator = file.read_bytes(), random.Random(1)
    first = content.rindex(codec.encode())
    for _ in range(60 * FACTOR):
        place = first + generator.randrange(300)
        file.write_bytes(content[:place] + bytes([generator.randrange(256)]) + content[place + 1 :])
        found = read_or_refuse(folder, str(place))
        assert isinstance(found, str) or found == COLUMNS


def test_a_declared_size_that_nothing_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peakd_ds.data.parquet_files.MAX_ROWS", NUM_ROWS - 1)
    assert "it declares 12 rows, but at most 11 can be read" in read_or_refuse(folder, "rows")
    monkeypatch.setattr("peakd_ds.data.parquet_files.MAX_ROWS", NUM_ROWS)
    monkeypatch.setattr("peakd_ds.data.parquet_files.MAX_COLUMN_BYTES", 99)
    assert "bytes of rows; at most" in read_or_refuse(folder, "bytes")


# -- Types -------------------------------------------------------------------------------------------------------------

DAY, TIME = datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1)
LABEL_TYPES: dict[str, tuple[Any, Any, bool]] = {
    # name: type, values for 0 and 1, whether the type is right
    **{f"{sign}int{bits}": (f"{sign}int{bits}", (0, 1), True) for bits in (8, 16, 32, 64) for sign in ("", "u")},
    **{name: (name, (0.0, 1.0), False) for name in ("float", "double")},
    "bool": (pyarrow.bool_(), (False, True), False),
    "string": (pyarrow.string(), ("0", "1"), False),
    "large_string": (pyarrow.large_string(), ("0", "1"), False),
    "binary": (pyarrow.binary(), (b"0", b"1"), False),
    "date32": (pyarrow.date32(), (DAY, DAY), False),
    "date64": (pyarrow.date64(), (DAY, DAY), False),
    "timestamp": (pyarrow.timestamp("ms"), (TIME, TIME), False),
    "duration": (pyarrow.duration("s"), (0, 1), False),
    "time32": (pyarrow.time32("s"), (0, 1), False),
    "decimal": (pyarrow.decimal128(5, 1), (decimal.Decimal(0), decimal.Decimal(1)), False),
    "null": (pyarrow.null(), (None, None), False),
    "list": (pyarrow.list_(pyarrow.int64()), ([0], [1]), False),
    "struct": (pyarrow.struct({"label": pyarrow.int64()}), ({"label": 0}, {"label": 1}), False),
    "map": (pyarrow.map_(pyarrow.string(), pyarrow.int64()), ([("a", 0)], [("a", 1)]), False),
    "dictionary": (pyarrow.dictionary(pyarrow.int8(), pyarrow.int64()), (0, 1), True),  # parquet stores whole numbers
}


@pytest.mark.parametrize("name", LABEL_TYPES)
@pytest.mark.parametrize("task_name", ["rte", "stsb"])
def test_types_of_labels(folder: Path, task_name: str, name: str) -> None:
    kind, values, is_right = LABEL_TYPES[name]
    labels = pyarrow.array([values[number % 2] for number in range(NUM_ROWS)], kind)
    columns = made_up_rows(task_name, NUM_ROWS, "fuzz")
    file = write(folder, {**columns, "label": labels}, task_name)
    found = read_or_refuse(folder, name, task_name)
    if is_right or (task_name == "stsb" and name in ("float", "double")):
        assert found["label"] == [0, 1] * (NUM_ROWS // 2)
        assert {type(label) for label in found["label"]} == {float if task_name == "stsb" else int}
    else:
        assert str(file) in found and "column 'label' holds labels of a wrong type" in found
        assert str(pyarrow.parquet.read_schema(file).field("label").type) in found


TEXT_TYPES: dict[str, tuple[Callable[[list[str]], Any], bool]] = {
    "string": (lambda texts: pyarrow.array(texts, pyarrow.string()), True),
    "large_string": (lambda texts: pyarrow.array(texts, pyarrow.large_string()), True),
    "dictionary": (lambda texts: pyarrow.array(texts).dictionary_encode(), True),
    "large dictionary": (lambda texts: pyarrow.array(texts, pyarrow.large_string()).dictionary_encode(), True),
    "chunks": (lambda texts: pyarrow.chunked_array([texts[:5], texts[5:5], texts[5:]]), True),
    "binary": (lambda texts: pyarrow.array([text.encode() for text in texts]), False),
    "int64": (lambda texts: pyarrow.array([len(text) for text in texts]), False),
    "list": (lambda texts: pyarrow.array([text.split() for text in texts]), False),
    "struct": (lambda texts: pyarrow.array([{"text": text} for text in texts]), False),
    "null": (lambda texts: pyarrow.nulls(len(texts)), False),
    "a null": (lambda texts: pyarrow.array([*texts[:-1], None]), False),
    "a null in a dictionary": (lambda texts: pyarrow.array([*texts[:-1], None]).dictionary_encode(), False),
    "dictionary of numbers": (lambda texts: pyarrow.array([1] * len(texts)).dictionary_encode(), False),
}


@pytest.mark.parametrize("name", TEXT_TYPES)
@pytest.mark.parametrize("row_group_size", [1, 5, 100])
def test_types_of_text(folder: Path, name: str, row_group_size: int) -> None:
    make, is_right = TEXT_TYPES[name]
    columns = {**COLUMNS, "sentence2": make(COLUMNS["sentence2"])}
    file = write(folder, columns, row_group_size=row_group_size)
    found = read_or_refuse(folder, name)
    if is_right:
        assert found == COLUMNS
    else:
        assert f"{file} column 'sentence2' holds" in found


@given(st.data())
@examples(60)
def test_text_that_is_not_utf8(good: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "utf8"
    if not folder.exists():
        shutil.copytree(good, folder)
    values = data.draw(st.lists(st.binary(max_size=8) | st.text(max_size=8).map(str.encode), min_size=12, max_size=12))
    size = data.draw(st.sampled_from(["", "large_"]), "offsets")
    texts = pyarrow.array(values, f"{size}binary").view(f"{size}string")
    file = write(folder, {**COLUMNS, "sentence2": texts}, row_group_size=data.draw(st.sampled_from([2, 100])))
    found = read_or_refuse(folder, str(values))
    bad = [row for row, value in enumerate(values) if not _is_utf8(value)]
    if bad:
        assert f"{file} row {bad[0]} has text in column 'sentence2' that is not UTF-8" in found
    else:
        assert found["sentence2"] == [value.decode() for value in values]


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
        return True
    except UnicodeDecodeError:
        return False


def test_columns_that_are_there_twice(folder: Path) -> None:
    arrays = [pyarrow.array(values) for values in COLUMNS.values()]
    for name in COLUMNS:
        table = pyarrow.Table.from_arrays([*arrays, pyarrow.array(COLUMNS[name])], [*COLUMNS, name])
        pyarrow.parquet.write_table(table, folder / "rte" / FILE)
        assert f"has 2 columns '{name}'" in read_or_refuse(folder, name)


def test_other_columns_are_not_read(folder: Path) -> None:
    days = pyarrow.array([DAY] * NUM_ROWS)
    nested = pyarrow.array([{"label": [1]}] * NUM_ROWS)
    arrays = [pyarrow.array(values) for values in COLUMNS.values()]
    table = pyarrow.Table.from_arrays([days, nested, *arrays, days], ["day", "nested", *COLUMNS, "day"])
    pyarrow.parquet.write_table(table, folder / "rte" / FILE)
    assert read_or_refuse(folder, "more columns") == COLUMNS


# -- Metadata ----------------------------------------------------------------------------------------------------------

NOTES: dict[str, Any] = {
    # name: what the schema notes under 'huggingface', whether the rows are read
    "no JSON": ("{", False),
    "bytes": (b"\xff\xfe", False),
    "a list": ([], False),
    "null": (None, False),
    "no info": ({}, True),
    "a null info": ({"info": None}, True),
    "a number as info": ({"info": 3}, False),
    "no features": ({"info": {}}, True),
    "a list of features": ({"info": {"features": []}}, False),
    "features without label": ({"info": {"features": {"sentence1": {"dtype": "string", "_type": "Value"}}}}, False),
    "label is null": ({"info": {"features": {"label": None}}}, True),
    "label is a number": ({"info": {"features": {"label": 3}}}, False),
    "label without type": ({"info": {"features": {"label": {"names": ["a"]}}}}, False),
    "a value": ({"info": {"features": {"label": {"dtype": "int64", "_type": "Value"}}}}, True),
    "no names": ({"info": {"features": {"label": {"_type": "ClassLabel"}}}}, False),
    "names of numbers": ({"info": {"features": {"label": {"_type": "ClassLabel", "names": [0, 1]}}}}, False),
    "one name": ({"info": {"features": {"label": {"_type": "ClassLabel", "names": ["entailment"]}}}}, False),
    "names in one word": ({"info": {"features": {"label": {"_type": "ClassLabel", "names": "ab"}}}}, False),
    "nested": ("[" * 100_000, False),
    "nested and closed": ("[" * 50_000 + "]" * 50_000, False),
}


@pytest.mark.parametrize("name", NOTES)
def test_notes_of_datasets(folder: Path, name: str) -> None:
    note, is_right = NOTES[name]
    raw = note if isinstance(note, str | bytes) else json.dumps(note)
    table = pyarrow.table(COLUMNS).replace_schema_metadata({"huggingface": raw})
    pyarrow.parquet.write_table(table, folder / "rte" / FILE)
    found = read_or_refuse(folder, name)
    assert found == COLUMNS if is_right else str(folder / "rte" / FILE) in found


def write_part(data_dir: Path, name: str, rows: dict[str, list[Any]], names: tuple[str, ...] | None) -> Path:
    """A file of rte with class ids in the order of `names`, noted in its metadata; None: in rte's, without a note."""
    order = names or get_task("rte").label_names
    labels = [order.index(get_task("rte").label_names[label]) for label in rows["label"]]
    features = {**dict.fromkeys(TEXTS, datasets.Value("string")), "label": datasets.ClassLabel(names=list(order))}
    file = data_dir / "rte" / name
    table = datasets.Dataset.from_dict({**rows, "label": labels}, features=datasets.Features(features)).data.table
    pyarrow.parquet.write_table(table if names else table.replace_schema_metadata(None), file)
    return file


@pytest.mark.parametrize("first", [0, 1, None])
@pytest.mark.parametrize("second", [0, 1, None])
def test_label_orders_of_two_files(folder: Path, first: int | None, second: int | None) -> None:
    orders = {0: ("entailment", "not_entailment"), 1: ("not_entailment", "entailment"), None: None}
    (folder / "rte" / FILE).unlink()
    halves = [{name: values[part] for name, values in COLUMNS.items()} for part in (slice(6), slice(6, None))]
    files = [
        write_part(folder, f"train-0000{number}-of-00002.parquet", rows, orders[order])
        for number, (rows, order) in enumerate(zip(halves, (first, second), strict=True))
    ]
    found = read_or_refuse(folder, f"{first} {second}")
    if 1 not in (first, second):
        assert found == COLUMNS
        return
    wrong = files[0] if first == 1 else files[1]
    assert f"{wrong} orders its labels ['not_entailment', 'entailment'], " in found
    assert "the task ['entailment', 'not_entailment']; write the file with the task's order" in found
    if (first, second) == (0, 1):
        assert f"{files[0]} ['entailment', 'not_entailment']" in found


# -- Several files -----------------------------------------------------------------------------------------------------

NAMES: dict[str, tuple[list[str], bool]] = {
    # name: the numbers of the files, in the order of their rows; whether they are one split
    "one": (["00000-of-00001"], True),
    "three": (["00000-of-00003", "00001-of-00003", "00002-of-00003"], True),
    "with hashes": (["00000-of-00002-a09b74b3ef9c3b56", "00001-of-00002-0123456789abcdef"], True),
    "own names": (["a", "b"], True),
    "more than ten": ([f"{number}-of-12" for number in (0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)], True),
    "a gap at the end": (["00000-of-00002"], False),
    "a gap at the start": (["00001-of-00002"], False),
    "a gap inside": (["00000-of-00003", "00002-of-00003"], False),
    "from one": (["00001-of-00002", "00002-of-00002"], False),
    "another export": (["00000-of-00002", "00001-of-00002", "00000-of-00003"], False),
    "a copy": (["00000-of-00001", "00000-of-00001 (copy)"], False),
    "a number twice": (["00000-of-00001", "00000-of-00001-a09b74b3ef9c3b56"], False),
    "numbers and own names": (["00000-of-00001", "more"], False),
    "none of none": (["00000-of-00000"], False),
    "number beyond": (["00000-of-00001", "00005-of-00001"], False),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files(folder: Path, name: str) -> None:
    numbers, is_right = NAMES[name]
    (folder / "rte" / FILE).unlink()
    parts = np.array_split(np.arange(NUM_ROWS), len(numbers))
    for number, part in zip(sorted(numbers), parts, strict=True):
        rows = {column: [values[row] for row in part] for column, values in COLUMNS.items()}
        write_part(folder, f"train-{number}.parquet", rows, None)
    found = read_or_refuse(folder, name)
    if name == "more than ten":
        assert sorted(found["sentence1"]) == sorted(COLUMNS["sentence1"])
    elif is_right:
        assert found == COLUMNS
    else:
        assert f"train-{numbers[0]}.parquet" in found


def test_the_same_bytes_twice(folder: Path) -> None:
    file = folder / "rte" / FILE
    shutil.copy(file, file.with_name("train-00001-of-00002.parquet"))
    file.rename(file.with_name("train-00000-of-00002.parquet"))
    assert "hold the same bytes; delete one of them" in read_or_refuse(folder, "twice")


def test_types_may_differ_between_files(folder: Path) -> None:
    (folder / "rte" / FILE).unlink()
    for number, (label, text) in enumerate((("int8", "string"), ("int64", "large_string"))):
        part = slice(6 * number, 6 * number + 6)
        columns = {name: pyarrow.array(COLUMNS[name][part], text) for name in TEXTS}
        columns["label"] = pyarrow.array(COLUMNS["label"][part], label)
        file = folder / "rte" / f"train-0000{number}-of-00002.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
    assert read_or_refuse(folder, "types") == COLUMNS


@pytest.mark.parametrize("what", ["folder", "folder with files", "dangling link", "empty", "no rows"])
def test_other_things_with_a_file_s_name(folder: Path, what: str) -> None:
    file = folder / "rte" / FILE
    good = folder / "rte" / "validation-00000-of-00001.parquet"
    file.unlink()
    if what.startswith("folder"):
        file.mkdir()
        if what == "folder with files":
            shutil.copy(good, file / "part-0.parquet")
    elif what == "dangling link":
        file.symlink_to(folder / "nothing")
    elif what == "empty":
        file.write_bytes(b"")
    else:
        write(folder, {**{name: pyarrow.array([], "string") for name in TEXTS}, "label": pyarrow.array([], "int64")})
    assert str(file) in read_or_refuse(folder, what)


def test_hidden_labels_of_test_rows(folder: Path) -> None:
    """GLUE hides them behind -1; their type and the index of each row still count."""
    for labels, index, is_right in (
        ([-1] * 4, [3, 2, 1, 0], True),
        ([0, 1, -1, 1], None, True),
        (["-1"] * 4, None, False),
        ([-2] * 4, None, False),
        ([-1] * 4, ["a", "b", "c", "d"], False),
        ([-1] * 4, [0, 1, 2, None], False),
    ):
        columns = {**{name: values[:4] for name, values in COLUMNS.items()}, "label": labels}
        columns |= {} if index is None else {"idx": index}
        file = folder / "rte" / "test-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
        found = read_or_refuse(folder, str(labels), split="test")
        assert found["label"] == labels if is_right else str(file) in found


# -- The program -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["utf-8", "labels", "gap", "cut"])
def test_the_program_refuses(folder: Path, tiny_encoder: Path, tmp_path: Path, what: str) -> None:
    file = folder / "rte" / FILE
    if what == "utf-8":
        write(folder, {**COLUMNS, "sentence1": pyarrow.array([b"\xff"] * NUM_ROWS).view("string")})
    elif what == "labels":
        write(folder, {**COLUMNS, "label": [str(label) for label in COLUMNS["label"]]})
    elif what == "gap":
        file.rename(file.with_name("train-00000-of-00002.parquet"))
    else:
        file.write_bytes(file.read_bytes()[:-9])
    before = snapshot(tmp_path)
    words = ["--task", "rte", "--teacher", str(tiny_encoder), "--data_dir", str(folder), "--num_hidden_layers", "1"]
    words += ["--max_seq_length", "32", "--run_dir", str(tmp_path / "run"), "--dtype", "fp32", "--dry_run"]
    assert_refused(run(words), str(folder / "rte"))
    assert snapshot(tmp_path) == before
