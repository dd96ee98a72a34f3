"""Settings: their names, ranges and help, and YAML and command line as two spellings of the same thing."""

import argparse
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peakd_ds.command_line import build_parser, differences, parse, to_yaml
from peakd_ds.config import RESULT_NEUTRAL, RunConfig
from peakd_ds.errors import UserError, exit_with

REQUIRED = ["--task", "rte", "--teacher", "encoder", "--run_dir", "runs/rte"]
# What other programs call; each name must stay.
PROMISED_OPTIONS = """
--config --task --teacher --run_dir --data_dir --stages --num_hidden_layers --init_layers --sharing --shuffle_qk
--ptp --t_correct --t_wrong --temperature --alpha --beta --layer_map --hidden_loss --teacher_epochs --ptp_epochs
--distill_epochs --epochs --lr --warmup_ratio --weight_decay --max_grad_norm --dropout --max_seq_length
--global_batch_size --micro_batch_size --seed --dtype --student_ds_config --teacher_ds_config --save_steps
--eval_steps --log_steps --early_stopping_patience --select_on --dry_run --teacher_mode --teacher_cache --loss_backend
--export_unrolled --no_ptp --no_shuffle_qk --no_export_unrolled
"""
SPECS = {spec.name: spec for spec in fields(RunConfig)}
SWITCHES = [name for name, spec in SPECS.items() if spec.type in (bool, bool | None)]
CHECKED = [name for name, spec in SPECS.items() if spec.metadata["check"]]
# The nearest values on the wrong side of each border of each range that stands in the metadata.
OUTSIDE = {
    "(0, 100]": ["0", "-1e-9", "100.1", "1e308"],
    "[0, 0.99]": ["-0.001", "0.991", "1"],
    "[0, 1]": ["-0.001", "1.001"],
    "a number for each file in (0, 1000000]": ["0", "-1", "1000001"],
    "[0, 1] or median": ["-0.001", "1.001", "nan", "inf"],
    "[0, 100]": ["-1e-9", "100.1"],
    "[0, 1000000]": ["-1", "1000000.5", "1e308"],
    "[0, 1000000000]": ["-1", "1000000001", "100000000000000000000"],
    "[0, 100000]": ["-1", "100001"],
    "[0, 4294967295]": ["-1", "4294967296"],
    "[0.01, 1000]": ["0.0099", "0", "-1e-9", "1000.1", "1e308"],
    "[1, 10000]": ["0", "-3", "10001", "99999999999999999999"],
    "[1, 100000]": ["0", "-3", "100001"],
    "[1, 1000000]": ["0", "-3", "1000001", "4000000000"],
    "[1, 1000000000]": ["0", "1000000001"],
    "[5, 86400]": ["4.9", "86401", "1e308"],
    "[8, 100000]": ["7", "100001"],
    "n numbers in [1, 10000]": ["0,1,2", "1,2,10001"],
}
FLOATS = [name for name, spec in SPECS.items() if spec.type in (float, float | None)]


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {word for action in parser._actions for word in action.option_strings}


def write_yaml(folder: Path, text: str) -> str:
    (folder / "settings.yaml").write_text(text)
    return str(folder / "settings.yaml")


# -- Names and help ----------------------------------------------------------------------------------------------------


def test_every_promised_option_is_there() -> None:
    assert options(build_parser()) >= set(PROMISED_OPTIONS.split())


def test_help_shows_every_setting_with_unit_range_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("-\n", "-").split())
    for name, spec in SPECS.items():
        start = shown.index(f" --{name} ", shown.index("FILE.yaml YAML file"))
        entry = shown[start : shown.index("]", shown.index("default ", start)) + 1]
        meta = spec.metadata
        assert "[" in entry and "default " in entry, name
        assert " ".join(meta["help"].split())[:30] in entry, name
        assert meta["unit"] in entry, name
        assert meta["range"] in shown[start : start + 600], name
        if meta["choices"]:
            assert "{" + ",".join(meta["choices"]) + "}" in entry, name
    assert "%%" not in shown


def test_help_needs_no_required_setting_and_wins_over_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--task", "rte", "-h"])
    assert "--global_batch_size" in capsys.readouterr().out


def test_every_setting_says_what_is_allowed() -> None:
    for name, spec in SPECS.items():
        numeric = spec.type in (int, float, int | None, float | None)
        assert not numeric or (spec.metadata["range"] and spec.metadata["check"]), name
        assert bool(spec.metadata["check"]) <= bool(spec.metadata["range"]), name
        assert not re.search(r"\s$|^\s|  ", spec.metadata["help"]), name


def test_defaults_are_within_their_ranges_and_the_paper_s() -> None:
    config = parse(REQUIRED)
    assert (config.alpha, config.beta, config.temperature) == (0.7, 100.0, 10.0)
    assert config.ptp_epochs == 4
    assert config.select_on == "holdout"
    assert config.swaps_qk and config.ptp and config.export_unrolled


# -- YAML and the command line -----------------------------------------------------------------------------------------

probability = st.floats(0, 1)
words = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=12)
some_settings = st.fixed_dictionaries(
    {},
    optional={
        "teacher": words,
        "run_dir": words,
        "data_dir": words,
        "stages": st.sampled_from([("teacher",), ("ptp", "distill"), ("teacher", "ptp", "distill")]),
        "num_hidden_layers": st.just(3),
        "init_layers": st.lists(st.integers(1, 24), min_size=3, max_size=3).map(tuple),
        "sharing": st.sampled_from(["sps", "cycle", "cycle_rev", "sequence"]),
        "shuffle_qk": st.sampled_from([None, True, False]),
        "ptp": st.booleans(),
        "t_correct": st.one_of(st.none(), st.just("median"), probability),
        "t_wrong": st.one_of(st.none(), st.just("median"), probability),
        "temperature": st.floats(0.01, 1000),
        "alpha": probability,
        "beta": st.floats(0, 1e6),
        "layer_map": st.one_of(
            st.sampled_from(["skip", "last"]),
            st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)), min_size=1, max_size=4).map(tuple),
        ),
        "hidden_loss": st.sampled_from(["cls", "tokens"]),
        "epochs": st.one_of(st.none(), st.integers(1, 99)),
        "lr": st.floats(1e-8, 100),
        "warmup_ratio": probability,
        "dropout": st.one_of(st.none(), st.floats(0, 0.99)),
        "seed": st.integers(0, 2**32 - 1),
        "dtype": st.sampled_from(["auto", "fp32", "bf16", "fp16"]),
        "save_steps": st.integers(0, 10**6),
        "select_on": st.sampled_from(["holdout", "dev"]),
        "dry_run": st.booleans(),
    },
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(changes=some_settings)
def test_saved_settings_read_back_as_they_were(changes: dict[str, Any], tmp_path: Path) -> None:
    config = replace(RunConfig(task="rte", teacher="encoder", run_dir="runs/rte"), **changes)
    file = write_yaml(tmp_path, to_yaml(config))
    assert parse(["--config", file]) == config
    assert differences(config, Path(file).read_text()) == []


def test_yaml_and_command_line_say_the_same(tmp_path: Path) -> None:
    text = """
        task: rte
        teacher: encoder
        run_dir: runs/rte
        stages: [ptp, teacher]
        init_layers: [1, 3, 5]
        layer_map: [[1, 2], [2, 4]]
        lr: 5e-5          # a string to YAML 1.1
        alpha: 1
        t_correct: median
        t_wrong: 0.6
        ptp: false
        shuffle_qk: yes
        dropout:
    """
    line = """--stages teacher,ptp --init_layers 1,3,5 --layer_map 1:2,2:4 --lr 5e-5 --alpha 1 --t_correct median
        --t_wrong 0.6 --no_ptp --shuffle_qk"""
    config = parse(["--config", write_yaml(tmp_path, text)])
    assert config == parse([*REQUIRED, *line.split()])
    assert config.stages == ("teacher", "ptp"), "stages run in their own order"
    assert isinstance(config.alpha, float) and isinstance(config.t_wrong, float)


@pytest.mark.parametrize("order", [0, 1])
def test_the_command_line_wins(tmp_path: Path, order: int) -> None:
    text = "{task: sst2, alpha: 0.1, ptp: false, export_unrolled: true, init_layers: [1], seed: 7}"
    words = [["--config", write_yaml(tmp_path, text)], [*REQUIRED, "--alpha", "0.9", "--ptp", "--no_export_unrolled"]]
    config = parse([*words[order], *words[1 - order], "--init_layers=2,3,4"])
    assert (config.task, config.alpha, config.ptp, config.export_unrolled) == ("rte", 0.9, True, False)
    assert (config.init_layers, config.seed) == ((2, 3, 4), 7)


def test_all_settings_can_stand_in_yaml(tmp_path: Path) -> None:
    file = write_yaml(tmp_path, to_yaml(parse([*REQUIRED, "--epochs", "2", "--t_correct", "median", "--dropout=0"])))
    assert parse(["--config", file]).epochs == 2


def test_data_dir_comes_from_the_environment_if_nothing_else_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PEAKD_DATA_DIR", "of/the/environment")
    assert parse(REQUIRED).data_dir == "of/the/environment"
    assert parse([*REQUIRED, "--config", write_yaml(tmp_path, "data_dir: of/yaml")]).data_dir == "of/yaml"
    assert parse([*REQUIRED, "--data_dir", "of/the/line"]).data_dir == "of/the/line"


def test_the_launcher_s_local_rank_is_no_setting() -> None:
    assert parse([*REQUIRED, "--local_rank=1"]) == parse(REQUIRED)


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_both_ways(name: str) -> None:
    words = REQUIRED + (["--sharing", "cycle"] if name == "shuffle_qk" else [])
    assert getattr(parse([*words, f"--{name}"]), name) is True
    assert getattr(parse([*words, f"--no_{name}"]), name) is False
    assert getattr(parse([*words, f"--no_{name}", f"--{name}"]), name) is True
    assert getattr(parse(words), name) == SPECS[name].default


# -- What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "suggestion"),
    [
        ("--temprature", "--temperature"),
        ("--no-ptp", "--no_ptp"),
        ("--learning_rate=1", None),
        ("--globalbatchsize", "--global_batch_size"),
    ],
)
def test_unknown_option(word: str, suggestion: str | None) -> None:
    with pytest.raises(UserError) as caught:
        parse([*REQUIRED, word, "3"])
    assert f"unknown option {word}" in str(caught.value)
    assert (f"did you mean {suggestion}?" if suggestion else "--help lists all") in str(caught.value)


def test_a_shortened_option_is_unknown() -> None:
    with pytest.raises(UserError, match="unknown option --temp; "):
        parse([*REQUIRED, "--temp", "3"])


def test_a_word_too_many() -> None:
    with pytest.raises(UserError, match="unknown option wnli; --help"):
        parse([*REQUIRED, "wnli"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temprature: 3", r"unknown setting 'temprature'; did you mean temperature\?"),
        ("config: other.yaml", "unknown setting 'config'"),
        ("local_rank: 0", "unknown setting 'local_rank'; --help lists all"),
        ("7: x", "unknown setting '7'; --help lists all"),
        ("just words", "holds no settings; write lines like 'task: rte'"),
        ("", "holds no settings"),
        ("- task: rte", "holds no settings"),
        ("lr: [1", "is not YAML"),
        ("ptp: 1", "ptp: '1' does not fit; write true or false"),
        ("ptp: 'false'", "write true or false"),
        ("seed: true", "seed: true .* does not fit; write a value"),
        ("lr: fast", "argument --lr: 'fast' is not a finite number; its range is \\(0, 100\\]; the default is 2e-05"),
        ("lr: {a: 1}", "lr: {'a': '1'} does not fit; write one value"),
        ("num_hidden_layers: 2.5", "argument --num_hidden_layers: '2.5' is not a whole number"),
        ("layer_map: 1:2:3", "write for example 1:2,2:4"),
        ("sharing: all", "argument --sharing: invalid choice: 'all'"),
        ("alpha: 2", r"--alpha 2.0 is outside its range \[0, 1\]; the default is 0.7"),
    ],
)
def test_wrong_yaml(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(["--config", write_yaml(tmp_path, text), *REQUIRED])


def test_yaml_file_that_cannot_be_read(tmp_path: Path) -> None:
    for file in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(UserError, match=r"--config .* cannot be read .*; give a YAML file of settings"):
            parse(["--config", str(file), *REQUIRED])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match=r"is not UTF-8 \(byte 0\); save it as UTF-8"):
        parse(["--config", str(tmp_path / "binary.yaml"), *REQUIRED])


@pytest.mark.parametrize("missing", ["task", "teacher", "run_dir"])
def test_required_setting_missing(missing: str) -> None:
    position = REQUIRED.index(f"--{missing}")
    with pytest.raises(UserError, match=f"--{missing} is missing: "):
        parse(REQUIRED[:position] + REQUIRED[position + 2 :])


@pytest.mark.parametrize(("name", "value"), [(n, v) for n in CHECKED for v in OUTSIDE[SPECS[n].metadata["range"]]])
def test_value_outside_its_range(name: str, value: str, tmp_path: Path) -> None:
    for words in ([f"--{name}={value}"], ["--config", write_yaml(tmp_path, f"{name}: '{value}'")]):
        with pytest.raises(UserError) as caught:
            parse([*REQUIRED, *words])
        message = str(caught.value)
        assert f"--{name}" in message and SPECS[name].metadata["range"] in message and "the default is" in message


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_number_that_is_not_finite(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"--{name}: '{value}' is not a finite number; its range is "):
        parse([*REQUIRED, f"--{name}={value}"])


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.metadata["choices"]])
def test_value_that_is_no_choice(name: str) -> None:
    with pytest.raises(UserError) as caught:
        parse([*REQUIRED, f"--{name}", "nothing_of_the_kind"])
    assert all(repr(choice) in str(caught.value) for choice in SPECS[name].metadata["choices"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--num_hidden_layers two", "'two' is not a whole number; its range is \\[1, 10000\\]; the default is 3"),
        ("--num_hidden_layers 2.0", "'2.0' is not a whole number"),
        ("--init_layers 1,x,3", "'1,x,3' is not a value that fits; its range is n numbers in \\[1, 10000\\]"),
        ("--init_layers 1,2", "names 2 layers, but --num_hidden_layers is 3; give one source layer for each"),
        ("--stages teacher,students", "unknown stage 'students'; choose from teacher,ptp,distill"),
        ("--stages=", "unknown stage ''"),
        ("--layer_map skipp", "neither skip, last, nor pairs STUDENT:TEACHER"),
        ("--layer_map 1:2:3", "write for example 1:2,2:4"),
        ("--layer_map 1:x", "write for example 1:2,2:4"),
        ("--t_correct mean", r"range is \[0, 1\] or median"),
        ("--sharing none --shuffle_qk", "--sharing none has no second run; choose --sharing sps, cycle"),
        ("--export_onnx --no_export_unrolled", "--export_onnx writes the unrolled student, .*; drop one"),
        ("--ptp=yes", "ignored explicit argument 'yes'; write --ptp alone, .*, or --no_ptp for the opposite"),
        ("--no_ptp=1", "write --no_ptp alone, .*, or --ptp for the opposite"),
        ("--lr -1e-9", "give the value after it, or as --lr=VALUE"),
        ("--lr", "--lr: expected one argument"),
    ],
)
def test_word_that_does_not_fit(line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse([*REQUIRED, *line.split()])


def test_an_error_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as ended:
        exit_with(UserError("first\nsecond"), "train.py")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "train.py: error: first second\n"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(SystemExit):
        exit_with(UserError("rank 0 prints it"), "train.py")
    assert capsys.readouterr().err == ""


# -- What follows from the settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "method"),
    [
        ("", "pea-kd"),
        ("--no_ptp", "sps+pkd"),
        ("--beta 0", "sps+ptp+kd"),
        ("--sharing none --no_ptp", "pkd"),
        ("--sharing none --no_ptp --beta 0", "kd"),
        ("--sharing none --no_ptp --beta 0 --alpha 0", "finetune"),
        ("--sharing none", "ptp+pkd"),
        ("--no_shuffle_qk", "sps-shuffle_qk+ptp+pkd"),
        ("--sharing cycle --no_ptp", "cycle+pkd"),
        ("--sharing cycle_rev --shuffle_qk --beta 0", "cycle_rev+shuffle_qk+ptp+kd"),
        ("--sharing sequence --no_ptp --beta 0 --alpha 0", "sequence+finetune"),
    ],
)
def test_method_names_what_the_switches_add_up_to(line: str, method: str) -> None:
    assert parse([*REQUIRED, *line.split()]).method == method


def test_epochs_sets_all_three() -> None:
    assert [parse(REQUIRED).epochs_of(stage) for stage in ("teacher", "ptp", "distill")] == [3, 4, 6]
    config = parse([*REQUIRED, "--epochs", "2", "--ptp_epochs", "9"])
    assert [config.epochs_of(stage) for stage in ("teacher", "ptp", "distill")] == [2, 2, 2]


CHANGES = {
    "stages": ("ptp",),
    "init_layers": (1, 2, 3),
    "sharing": "cycle",
    "shuffle_qk": False,
    "t_correct": 0.5,
    "t_wrong": "median",
    "layer_map": ((1, 2),),
    "hidden_loss": "tokens",
    "dtype": "bf16",
    "select_on": "dev",
}


def another_value(name: str) -> Any:
    if name in CHANGES:
        return CHANGES[name]
    value: Any = SPECS[name].default
    if isinstance(value, bool):
        return not value
    return f"{value}x" if isinstance(value, str) else (value or 0) + 1


@pytest.mark.parametrize("name", SPECS)
def test_differences_tell_every_change_but_neutral_ones(name: str) -> None:
    before = parse(REQUIRED)
    after = replace(before, **{name: another_value(name)})
    told = differences(after, to_yaml(before))
    assert [line.split(":")[0] for line in told] == ([] if name in RESULT_NEUTRAL else [name])
    assert all(" -> " in line for line in told)


def test_neutral_settings_are_those_that_do_not_change_the_result() -> None:
    assert set(SPECS) >= RESULT_NEUTRAL
    changing = "task teacher num_hidden_layers sharing ptp alpha beta lr seed dtype global_batch_size max_seq_length"
    assert not RESULT_NEUTRAL & set(changing.split())
    neutral = "micro_batch_size student_ds_config teacher_ds_config teacher_mode teacher_cache log_steps save_steps"
    assert set(neutral.split()) <= RESULT_NEUTRAL


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "word"])
def test_damaged_settings_of_a_run(text: str) -> None:
    with pytest.raises(UserError, match="is damaged: it holds no settings; take another --run_dir"):
        differences(parse(REQUIRED), text)


def test_settings_saved_as_yaml_are_plain() -> None:
    saved = yaml.safe_load(to_yaml(parse([*REQUIRED, "--layer_map", "1:2,2:4"])))
    assert saved["layer_map"] == [[1, 2], [2, 4]]
    assert "shuffle_qk" not in saved and "data_dir" not in saved
    assert saved["lr"] == 2e-5
