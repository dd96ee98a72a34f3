"""docs/families.md says what families.py says, and each of its columns stands on a test over all its families."""

import re
from pathlib import Path

import pytest

from peakd_ds.families import FAMILIES, Family

ROOT = Path(__file__).resolve().parents[1]
# The tests behind each column; each is parametrised over, or loops over, the families of the table.
TESTS = {
    "teaches": ("test_families_teachers", "test_families_runs"),
    "learns": ("test_families_sps.test_student_equals_the_model_with_copied_weights", "test_families_runs"),
    "rows": ("test_families_sps.test_packed_rows_equal_padded_rows", "test_families_teachers"),
    "exchange of query and key": ("test_families_sps.test_exchange_transposes_scores",),
    "ZeRO 0 and 3": ("test_families_teachers", "test_families_runs"),
    "ONNX": ("test_families_sps.test_onnx",),
}


def cells_of(family: Family) -> list[str]:
    rows = "packed" if family.is_packed else "padded"
    if not family.can_learn:
        return [family.name, family.model_type, "yes", f"no: {family.why_no_student}", rows, "", "yes", ""]
    exchange = "projections only" if family.has_relative_scores else "transposed scores"
    return [family.name, family.model_type, "yes", "yes", rows, exchange, "yes", "yes"]


def test_table_of_families() -> None:
    lines = (ROOT / "docs" / "families.md").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| family |"))
    found = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    assert found == [cells_of(family) for family in FAMILIES.values()]
    assert [cell.strip() for cell in lines[first].strip("|").split("|")][2:] == list(TESTS)


@pytest.mark.parametrize("name", sorted({name for names in TESTS.values() for name in names}))
def test_tests_behind_the_table_are_there(name: str) -> None:
    file, _, function = name.partition(".")
    text = (ROOT / "tests" / f"{file}.py").read_text()
    assert re.search(r"\b(FAMILIES|TEACHERS|STUDENTS|OTHERS)\b", text), f"{file}.py runs over no table of families"
    assert not function or f"def {function}(" in text
