"""Words on the command lines: each is taken as what a person means by it, or refused in one line."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peakd_ds import __main__
from peakd_ds.command_line import parse, to_yaml
from peakd_ds.config import SPECS
from peakd_ds.errors import UserError
from peakd_ds.programs import scripts

REQUIRED = ["--task=rte", "--teacher=encoder", "--run_dir=runs/rte"]
NUMBERS = [name for name, spec in SPECS.items() if spec.type in (int, float, int | None, float | None)]
TEXTS = [name for name, spec in SPECS.items() if spec.type is str and not spec.metadata["choices"]]
SWITCHES = [name for name, spec in SPECS.items() if spec.type in (bool, bool | None)]
OTHERS = [name for name in SPECS if name not in (*NUMBERS, *TEXTS, *SWITCHES)]

whole_numbers = st.one_of(
    st.integers(),
    st.integers(0, 5000).map(lambda digits: 10**digits + 7),
    st.integers(-20, 70).map(lambda power: 2**power if power >= 0 else -(2**-power)),
).map(lambda number: str(number) if abs(number) < 10**4000 else "9" * 5000)
real_numbers = st.one_of(st.floats().map(repr), st.integers(-400, 400).map(lambda power: f"1e{power}"))
ODD_WORDS = (
    [
        "",
        " ",
        "-",
        "--",
        "=",
        "1_000",
        " 5 ",
        "5\n",
        "\u0665",
        "\u096b",
        "\xb2",
        "010",
        "0x10",
        "1:30",
        "1,5",
        "1e",
        "e5",
        ".",
        "+",
    ]
    + ["None", "null", "true", "no", "median", "skip", "1:2", "1:2,2:4", "1,2,3", ",", ":", "nan", "-inf", "Infinity"]
    + [
        "\0",
        "a\0b",
        "\ud800",
        "\udcff/x",
        "\x1b[31m",
        "\u2028",
        "a" * 256,
        "a/" * 2000,
        "é" * 120,
        "..",
        "~",
        "%s",
        "{x}",
    ]
)
any_text = st.text(st.characters(exclude_categories=()), max_size=30)
words = st.one_of(whole_numbers, real_numbers, any_text)


def refusal(line: list[str]) -> str | None:
    """The message with which a command line of train.py is refused; None if it is taken. Other errors are raised."""
    try:
        parse(line)
    except UserError as error:
        message = str(error)
        assert message.isprintable() and harness.REMEDY.search(message), message
        assert len(message) < 4000
        return message
    return None


def assert_right_or_refused(name: str, word: str) -> bool:
    """Whether the setting takes the word: its value is in range, is what the word says, and survives YAML."""
    line = [*REQUIRED, f"--{name}={word}"]
    message = refusal(line)
    if message is not None:
        assert name in message
        return False
    value = getattr(parse(line), name)
    if name in NUMBERS:
        assert word.isascii() and word.strip() == word and "_" not in word
        assert value == float(word) and math.isfinite(value)
        assert value in range_of(name)
    elif name in TEXTS:
        assert value == word or (word == "" and name in ("data_dir", "run_dir"))
        word.encode()
    return True


def range_of(name: str) -> Any:
    return SPECS[name].metadata["check"].__self__


@pytest.mark.parametrize("name", [name for name in SPECS if name not in SWITCHES])
def test_any_word_for_any_setting(name: str, tmp_path: Path) -> None:
    seen: Counter[bool] = Counter()

    def check(word: str) -> None:
        taken = assert_right_or_refused(name, word)
        seen[taken] += 1
        if taken:
            config = parse([*REQUIRED, f"--{name}={word}"])
            (tmp_path / "saved.yaml").write_text(to_yaml(config))
            assert parse(["--config", str(tmp_path / "saved.yaml")]) == config

    for odd in ODD_WORDS:
        check(odd)
    harness.examples(15)(given(word=words)(check))()
    assert seen[False] > 5, "nothing was refused: the words are not odd enough"
    assert seen[True] or name not in TEXTS, "nothing was taken: the search compares nothing"


@pytest.mark.parametrize("name", NUMBERS)
def test_the_ends_of_a_range_are_taken_and_what_is_beyond_is_not(name: str) -> None:
    interval = range_of(name)
    if not interval.is_open:
        assert refusal([*REQUIRED, f"--{name}={interval.low}"]) is None
    assert refusal([*REQUIRED, f"--{name}={interval.high}"]) is None
    for word in (f"{interval.high + 1}", f"{interval.low - 1}", "9" * 25, "9" * 5000, f"-{'9' * 25}"):
        message = refusal([*REQUIRED, f"--{name}={word}"])
        assert message is not None and str(interval) in message, word


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_with_a_value_says_what_to_write(name: str) -> None:
    for word in ("true", "false", "1", "", "no", "\0", "\ud800"):
        assert f"write --{name} alone" in str(refusal([*REQUIRED, f"--{name}={word}"]))
        assert f"write --no_{name} alone" in str(refusal([*REQUIRED, f"--no_{name}={word}"]))


# -- Console scripts ---------------------------------------------------------------------------------------------------

PROGRAMS: dict[str, tuple[Callable[[], None], list[str]]] = {
    "train": (__main__.main, REQUIRED),
    "eval": (scripts.evaluate, ["--model=m", "--task=rte"]),
    "shard": (scripts.shard, ["--task=rte", "--teacher=t", "--shard_dir=s"]),
    "plan": (scripts.plan, ["--teacher_layers=4", "--teacher_hidden=128"]),
    "sweep": (scripts.sweep, ["--grid=no/such.yaml"]),
    "report": (scripts.report, ["no/such/folder"]),
    "demo": (scripts.demo, []),
}
WRONG: dict[str, list[str]] = {
    "train": ["--lr", "--lr=fast", "--epochs=1e3", "--run_dir=a\0b", "--run_dir=\ud800", "--seed=1_0", "--sharing=\0"]
    + ["--ptp=true", "--no_ptp=1", "--tempratur=1", "-x", "--", "word", "--config=", "--config=\0", "--config=/", "\0"]
    + ["--rank_timeout=1e308", "--temperature=1e308", "--global_batch_size=4000000000", f"--run_dir={'a' * 256}"],
    "eval": [
        "--model",
        "--model=\0",
        "--micro_batch_size=0",
        "--micro_batch_size=99999999999999999999",
        "--task=\ud800",
    ]
    + ["--max_seq_length=x", "--submission=a\0", "--nope", "word", "--data_dir=\n"],
    "shard": ["--max_seq_length=1e3", "--select_on=x", "--shard_dir=\0", "--scratch_dir=\ud800", "--teacher=\0", "-q"],
    "plan": ["--world_size=0", "--world_size=1_0", "--world_size=9" + "9" * 5000, "--gpu_memory_gib=1e308", "--json=1"]
    + [
        "--gpu_memory_gib=nan",
        "--train_rows=-1",
        "--tokens_per_row=1e99",
        "--layer_map=x",
        "--dtype=fp8",
        "--teacher=\0",
    ]
    + ["--teacher_hidden=100", "--num_hidden_layers=99999999999999999999"],
    "sweep": ["--index=-1", "--index=x", "--index=99999999999", "--ranks=0", "--ranks=1e9", "--at_once=0", "--grid=\0"]
    + ["--list=1", "--options=0.5", "--grid=/", "--grid="],
    "report": ["\0", "a\0b", "\ud800", "", "a" * 300, "[]", "--out=", "--out=\0", "--out", "--nope"],
    "demo": ["--out=", "--out=\0", "--out", "word", "--nope=1"],
}


@pytest.mark.parametrize(("program", "word"), [(program, word) for program in WRONG for word in WRONG[program]])
def test_wrong_words_of_every_console_script(program: str, word: str) -> None:
    start, good = PROGRAMS[program]
    harness.assert_refused(harness.run([*good, word], start))


@pytest.mark.parametrize("program", [name for name, (_, good) in PROGRAMS.items() if good])
def test_no_words(program: str) -> None:
    harness.assert_refused(harness.run([], PROGRAMS[program][0]))


@pytest.mark.parametrize("program", PROGRAMS)
def test_good_words_are_taken(program: str) -> None:
    """Otherwise the tests above would see refusals for another reason."""
    parsers = {"train": parse, "eval": scripts.evaluate_options, "shard": scripts.shard_options}
    parsers |= {"plan": scripts.plan_options, "sweep": scripts.sweep_options, "report": scripts.report_options}
    (parsers | {"demo": scripts.demo_options})[program](PROGRAMS[program][1])


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID"])
@pytest.mark.parametrize("value", ["", "x", "0"])
def test_ranks_that_are_no_numbers(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(name, value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert harness.run(["--lr=fast"]).code == 2
