"""Damaged and odd files of the user's own: refused in one line with file and remedy, or read as rows of text."""

import gzip
import json
from pathlib import Path
from typing import Any

import conftest
import pyarrow
import pyarrow.parquet
import pytest
from harness import REMEDY, examples
from hypothesis import given
from hypothesis import strategies as st

from peakd_ds.config.data import DataSettings
from peakd_ds.data import own_rows
from peakd_ds.data.own_rows import OwnRows
from peakd_ds.data.tasks import own_task
from peakd_ds.errors import UserError
from peakd_ds.teacher import outputs_file

ROWS = conftest.ticket_rows(30, "fuzz")
TASK = own_task("mine", "classes", ("text",), ("a", "b"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same rows in each format."""
    folder = tmp_path_factory.mktemp("own")
    lines = ["text,label", *(f"{row['text']},{row['label']}" for row in ROWS)]
    (folder / "a.csv").write_text("\n".join(lines))
    (folder / "a.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "a.json").write_text(json.dumps(ROWS))
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "a.parquet", compression="none")
    return folder


def load_or_refuse(file: Path, what: Any) -> OwnRows | None:
    """The rows of a file that is read, None if it is refused as it should be."""
    before = file.read_bytes()
    try:
        found = own_rows.load(DataSettings(train_file=(str(file),)), None)
    except UserError as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and len(message) < 3100, what
        assert REMEDY.search(message), f"{what}: no remedy in {message}"
        assert file.name in message or "there are" in message, f"{what}: {message}"
        return None
    finally:
        assert file.read_bytes() == before, what
    for rows in found.splits.values():
        assert all(isinstance(text, str) and text.strip() for text in rows[found.task.text_columns[0]]), what
    return found


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.json", "a.jsonl", "a.parquet"])
@given(st.data())
@examples(60)
def test_changed_bytes(good: Path, tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    content = bytearray((good / name).read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position:] = b""
    else:
        content[position] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.mktemp("changed") / name
    file.write_bytes(content)
    load_or_refuse(file, f"{name} at {position}")


@given(st.lists(VALUES, min_size=1, max_size=4), st.sampled_from(["text", "label"]))
@examples(150)
def test_odd_values(tmp_path_factory: pytest.TempPathFactory, values: list[Any], column: str) -> None:
    records = [row | {column: values[number % len(values)]} for number, row in enumerate(ROWS)]
    file = tmp_path_factory.mktemp("odd") / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, records)), encoding="utf-8", errors="replace")
    load_or_refuse(file, (column, values))


@given(st.lists(VALUES, min_size=1, max_size=3), st.sampled_from(["logits", "probabilities", "id"]))
@examples(150)
def test_odd_outputs(tmp_path_factory: pytest.TempPathFactory, values: list[Any], column: str) -> None:
    records = [{"id": str(number), "probabilities": [0.25, 0.75]} for number in range(4)]
    for number, record in enumerate(records):
        if column == "logits":
            del record["probabilities"]
        record[column] = values[number % len(values)]
    file = tmp_path_factory.mktemp("outputs") / "o.jsonl"
    file.write_text("\n".join(map(json.dumps, records)), encoding="utf-8", errors="replace")
    try:
        found = outputs_file.read_outputs([file], None, "id", TASK, {"train": ["0", "1", "2", "3"]}, {"train": 4}, ())
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and REMEDY.search(str(error)) and "o.jsonl" in str(error), values
    else:
        assert found["train"].shape == (4, 2) and found["train"].isfinite().all(), values
