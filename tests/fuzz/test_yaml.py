"""YAML files of settings and grids: read as a person reads them, or refused in one line that names the file."""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import harness
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from peakd_ds.command_line import parse
from peakd_ds.config import SPECS
from peakd_ds.config.data import OWN_DATA
from peakd_ds.config.yaml_file import MAX_BYTES, NotSettings, load
from peakd_ds.errors import UserError
from peakd_ds.programs import scripts
from peakd_ds.programs.grid import read_grid

GOOD = "task: rte\nteacher: encoder\nrun_dir: runs/rte\n"
SETTINGS = GOOD + "lr: 5e-5\nstages: [ptp, distill]\nlayer_map: [[1, 2], [2, 4]]\nptp: yes\nseed: 7 # a number\n"
GRID = "teacher: encoder\nrun_dir: runs\ngrid:\n  task: [rte, mrpc]\n  method: [pea-kd, kd]\n  seed: [1, 2]\n"
SWITCH_WORDS = {"yes": True, "true": True, "on": True, "no": False, "off": False, "False": False, "ON": True}

plain = st.sampled_from(
    ["010", "1:30", "190:20:30", "2020-01-01", "2020-13-45", "2001-12-14t21:59:43.10-05:00", "0x1F", "0b1", "0o7"]
    + ["1_000", "1e-5", "5E3", ".5", "5.", "+1", ".inf", ".NaN", "~", "null", "=", "<<", "yes", "no", "on", "off", "y"]
    + [
        "True",
        "rte",
        "1:2",
        "é",
        "9" * 5000,
        "-" + "9" * 30,
        "''",
        '""',
        "'1'",
        '"\\uD800"',
        '"a\\0b"',
        "'no'",
        "1e308",
    ]
    + ['"\\UFFFFFFFF"', "!!int abc", "!!bool abc", "!!timestamp abc", "!!float x", "!!binary x", "!x 1", "! 1"]
    + [
        "!!python/object:os.system x",
        "!!python/object/apply:os.getcwd []",
        "&a 1",
        "*a",
        "!!set {a}",
        "!!str 5",
        "|\n  x",
    ]
    + ["[", "]", "{", "}", "- 1", "? a", "%a", "@a", "`a", "\t1", "a: b", "#", "'", '"', ">", "[1, [2, [3]]]", "{1: 2}"]
)
nodes = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.lists(st.tuples(inner, inner), max_size=2).map(
            lambda pairs: "{" + ", ".join(f"{name}: {value}" for name, value in pairs) + "}"
        ),
        inner.map(lambda item: f"&x {item}"),
        st.integers(2, 3000).map(lambda depth: "[" * depth + "]" * depth),
    ),
    max_leaves=5,
)


def refusal(path: Path, content: str | bytes, read: Callable[[str], object]) -> str | None:
    """The message with which a file is refused; None if it is taken. Other errors are raised."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        read(str(path))
    except UserError as error:
        message = str(error)
        assert message.isprintable() and harness.REMEDY.search(message), message
        return message
    return None


def read_settings(file: str) -> object:
    return parse(["--config", file])


@pytest.mark.parametrize("name", SPECS)
def test_any_value_of_any_setting(name: str, tmp_path: Path) -> None:
    good = "".join(line + "\n" for line in GOOD.splitlines() if not line.startswith(f"{name}:"))
    seen: Counter[bool] = Counter()

    @harness.examples(15)
    @given(node=nodes)
    def search(node: str) -> None:
        message = refusal(tmp_path / "a.yaml", f"{good}{name}: {node}\n", read_settings)
        seen[message is None] += 1

    search()
    assert seen[False], "nothing was refused"
    assert refusal(tmp_path / "a.yaml", f"{good}{name}: !!int 5\n", read_settings) is not None
    assert refusal(tmp_path / "a.yaml", f"{good}{name}: {{a: b}}\n", read_settings) is not None


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.type not in (bool, bool | None)])
def test_a_plain_word_means_what_it_means_on_the_command_line(name: str, tmp_path: Path) -> None:
    # Rows on the command line win over other rows in the file, so the others given are of the same kind.
    rows = {"dataset_name": "name: mine", "dataset_config_name": "dataset_name: mine"}.get(name, "train_file: a.csv")
    given = GOOD.replace("task: rte", rows) if name in (*OWN_DATA, "metric") else GOOD
    required = [f"--{line.replace(': ', '=')}" for line in given.splitlines() if not line.startswith(f"{name}:")]

    def result(*words: str) -> object:
        try:
            return parse([*required, *words])
        except UserError as error:
            return str(error)

    for word in ("010", "1:30", "2020-01-01", "1_000", "0x1F", "5e-1", "7", "1:2", "cls", "1e3", ".5"):
        (tmp_path / "a.yaml").write_text(f"{name}: {word}\n")
        assert result("--config", str(tmp_path / "a.yaml")) == result(f"--{name}={word}")


@pytest.mark.parametrize("name", SPECS)
def test_yes_and_no_are_for_switches(name: str, tmp_path: Path) -> None:
    good = "".join(line + "\n" for line in GOOD.splitlines() if not line.startswith(f"{name}:"))
    for word, value in SWITCH_WORDS.items():
        file, text = tmp_path / "a.yaml", f"{good}{name}: {word}\n"
        message = refusal(file, text, read_settings)
        if SPECS[name].type not in (bool, bool | None):
            assert "in quotes if it is one of these words" in str(message)
        elif name != "export_unrolled":  # off, it needs another change
            assert message is None and getattr(parse(["--config", str(file)]), name) is value


CONTENTS: dict[str, tuple[str | bytes, str]] = {
    "twice": ("lr: 1\nlr: 2\n", "line 2 gives lr a second time; delete one"),
    "twice in a map": ("{task: rte, task: mrpc}", "gives task a second time"),
    "laughs": (
        "a: &a [x]\n" + "".join(f"{n}: &{n} [*a, *a]\n" for n in "bcdefghi"),
        "line 1 has an anchor or an alias",
    ),
    "loop": ("a: &a [*a]", "an anchor or an alias"),
    "merge": ("<<: {lr: 1}", "unknown setting '<<'"),
    "documents": ("lr: 1\n---\nlr: 2\n", "line 2 starts a second document"),
    "object": ("!!python/object/apply:os.getcwd []", "has the tag !!python/object/apply:os.getcwd"),
    "lists": ("lr: " + "[" * 2000 + "]" * 2000, "nests lists or maps more than 6 deep"),
    "dashes": ("lr:\n" + "- " * 2000 + "1", "more than 6 deep"),
    "open": ("[" * 100_000, "more than 6 deep"),
    "tabs": ("lr:\t1\n\tseed: 2", "is not YAML"),
    "utf-16": ("lr: 1\n".encode("utf-16"), "is not UTF-8"),
    "latin-1": ("task: \xe9\n".encode("latin-1"), "is not UTF-8 (byte 6)"),
    "nul": (b"task: a\0b", "is not YAML"),
    "large": ("#" * (MAX_BYTES + 1), f"has more than {MAX_BYTES} bytes"),
    "list as name": ("? [a]\n: b", "a list or a map where a name belongs"),
    "word": ("rte", "holds no settings"),
    "null": ("~", "holds no settings"),
    "chr": ('lr: "\\UFFFFFFFF"', "is not YAML"),
}


@pytest.mark.parametrize("case", CONTENTS)
@pytest.mark.parametrize("option", ["--config", "--grid"])
def test_whole_files(case: str, option: str, tmp_path: Path) -> None:
    content, part = CONTENTS[case]
    read = read_settings if option == "--config" else read_grid
    message = refusal(tmp_path / "a.yaml", content, read)
    assert message is not None and message.startswith(f"{option} {tmp_path / 'a.yaml'}")
    assert part in message or option == "--grid"


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path / "a.yaml", b"\xef\xbb\xbf" + SETTINGS.replace("\n", "\r\n").encode(), read_settings) is None
    )


@pytest.mark.parametrize(("text", "read"), [(SETTINGS, read_settings), (GRID, read_grid)], ids=["settings", "grid"])
def test_any_damage_to_a_good_file(text: str, read: Callable[[str], object], tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.yaml", text, read) is None
    seen: Counter[bool] = Counter()
    pieces = st.one_of(st.binary(max_size=3), plain.map(lambda word: word.encode("utf-8", "surrogatepass")))

    @harness.examples(200)
    @given(start=st.integers(0, len(text)), length=st.integers(0, 12), piece=pieces)
    def search(start: int, length: int, piece: bytes) -> None:
        content = text.encode()[:start] + piece + text.encode()[start + length :]
        seen[refusal(tmp_path / "a.yaml", content, read) is None] += 1

    search()
    assert seen[True] > 10 and seen[False] > 30, seen


@harness.examples(100)
@given(axes=st.dictionaries(st.one_of(st.sampled_from(["method", *SPECS]), plain), nodes, min_size=1, max_size=2))
def test_any_lists_of_a_grid(axes: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> None:
    lists = "".join(f"  {name}: {node}\n" for name, node in axes.items())
    refusal(tmp_path_factory.getbasetemp() / "grid.yaml", f"{GOOD}grid:\n{lists}", read_grid)


@pytest.mark.parametrize(
    ("lists", "part"),
    [
        ("{method: [[a]]}", "method ['a'] is not a word"),
        ("{method: [{a: b}]}", "is not a word"),
        ("{method: [yes]}", "method True is not a word"),
        ("{seed: [[1, 2]]}", "seed: ['1', '2'] does not fit; write one value"),
        ("{seed: [{a: 1}]}", "does not fit"),
        ("{task: [on, rte]}", "task: true"),
        ("{seed: [1, ~]}", "write a list of values"),
        (
            "{lr: [" + ", ".join(map(str, range(1, 200))) + "], seed: [" + ", ".join(map(str, range(100))) + "]}",
            "19900",
        ),
        ("[1]", "has no lists to multiply"),
        ("{[seed]: [1]}", "where a name belongs"),
    ],
)
def test_grids_of_other_shapes(lists: str, part: str, tmp_path: Path) -> None:
    base = "teacher: encoder\nrun_dir: runs\n" + ("" if "task" in lists else "task: rte\n")
    assert part in str(refusal(tmp_path / "a.yaml", f"{base}grid: {lists}\n", read_grid))


def test_the_programs_end_with_one_line(tmp_path: Path) -> None:
    for case, option in itertools.product(("laughs", "lists", "latin-1", "object"), ("--config", "--grid")):
        content = CONTENTS[case][0]
        (tmp_path / "a.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        words = [option, str(tmp_path / "a.yaml")]
        harness.assert_refused(
            harness.run(words, scripts.sweep) if option == "--grid" else harness.run(words), words[1]
        )


@harness.examples(100)
@given(value=st.recursive(st.one_of(st.text(), st.none(), st.booleans()), lambda inner: st.lists(inner, max_size=3)))
def test_what_is_saved_is_read_back(value: object) -> None:
    try:
        assert load(yaml.safe_dump({"a": value})) == {"a": value}
    except NotSettings as error:
        assert "deep" in str(error) or "not YAML" in str(error)
