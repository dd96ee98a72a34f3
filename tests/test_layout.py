"""The layout: folders import downwards only, nothing is circular, and files and functions stay short.

Imports are read from the source, those inside functions too. main_path.py counts what a reader opens to follow a batch.
"""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import main_path
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "peakd_ds"
# From the top; names in one row do not import each other.
ORDER = (
    ("programs", "__main__"),
    ("train",),
    ("plan", "report", "stages"),
    ("exports",),
    ("run",),
    ("teacher",),
    ("results",),
    ("engine", "model"),
    ("data",),
    ("sps", "ptp"),
    ("packed",),
    ("cluster", "families"),
    ("ranks",),
    ("command_line",),
    ("config",),
    ("files",),
    ("kernels", "errors"),
)
PLACE = {name: place for place, row in enumerate(ORDER) for name in row}
DATA_FOLDERS = {"recipes", "ds_configs"}
"""They hold files, which any room may read through importlib.resources."""
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 70


def source_files() -> dict[str, Path]:
    """Every module of the package by its dotted name below peakd_ds."""
    files = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}
    files |= {f"kernels/{path.stem}": path for path in (ROOT / "kernels").glob("*.py")}
    return {name.replace("/", ".").removesuffix(".__init__"): path for name, path in files.items()}


FILES = source_files()


def imports_of(name: str) -> Iterator[str]:
    """Modules of the package that a module imports, anywhere in its source."""
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            if node.module and node.module.split(".")[0] == "peakd_ds":
                inside = node.module.removeprefix("peakd_ds").removeprefix(".")
                for alias in node.names:
                    full = f"{inside}.{alias.name}".removeprefix(".")
                    yield full if full in FILES else inside
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "peakd_ds":
                    yield alias.name.removeprefix("peakd_ds").removeprefix(".")


def room_of(name: str) -> str:
    return name.split(".")[0]


IMPORTS = {name: {found for found in imports_of(name) if found not in ("", "__init__", name)} for name in FILES}


def test_every_room_has_a_place() -> None:
    rooms = {room_of(name) for name in FILES if name not in ("", "__init__")}
    assert rooms - DATA_FOLDERS == set(PLACE)


@pytest.mark.parametrize("name", sorted(set(FILES) - {"", "__init__"}))
def test_imports_go_downwards(name: str) -> None:
    room = room_of(name)
    if room in DATA_FOLDERS:
        assert IMPORTS[name] == set()
        return
    for found in IMPORTS[name]:
        other = room_of(found)
        if other != room and other not in DATA_FOLDERS:
            assert PLACE[other] > PLACE[room], f"{name} imports {found}, which is not below it"


def test_nothing_is_circular() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(f"circular imports: {' -> '.join(error.args[1])}")


def test_no_name_is_taken() -> None:
    """`deepspeed peakd_ds/train.py` puts peakd_ds/ itself on sys.path: its files and folders become top-level names."""
    ours = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    installed = {name for name, owners in packages_distributions().items() if set(owners) != {"peakd-ds"}}
    assert "train" in ours and "torch" in installed
    assert (ours - {"__init__", "__main__"}) & (set(sys.stdlib_module_names) | installed) == set()


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_and_functions_are_short(name: str) -> None:
    if room_of(name) == "kernels":
        return  # a kernel and its launch read best in one piece
    text = FILES[name].read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


def test_the_main_path_is_short() -> None:
    """From train.main to engine.step() for one distill batch."""
    path = main_path.measure()
    assert "train.py" in path and any(name.startswith("kernels") for name in path), "the path is not the whole one"
    assert len(path) <= 12, "\n".join(path)
    assert sum(map(len, path.values())) <= 1000, main_path.describe(path)


def test_the_picture_of_the_rooms_is_up_to_date() -> None:
    """docs/folders.svg names the rooms in the order above; `python tools/draw.py` draws it anew."""
    text = (ROOT / "docs" / "folders.svg").read_text()
    labels = re.findall(r"<text\b[^>]*>([^<]*)</text>", text)
    rooms = [name for row in ORDER for name in row if not name.startswith("__")]
    expected = [f"{name}.py" if (PACKAGE / f"{name}.py").is_file() else f"{name}/" for name in rooms]
    assert [label.strip() for label in labels if label.strip() != "imports"] == expected, "run tools/draw.py"
