"""What a run leaves: sizes, speed, int8 ONNX, cards and permissions; and that nothing is done or deleted twice."""

import json
import os
import re
import shlex
import shutil
import stat
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from peakd_ds import train
from peakd_ds.cluster import run_folder
from peakd_ds.command_line import parse
from peakd_ds.data import reading
from peakd_ds.data.tasks import get_task
from peakd_ds.data.tokens import tokenize
from peakd_ds.errors import UserError
from peakd_ds.programs import compare, scripts
from peakd_ds.results import card, comparison, evaluation, finished, int8, speed

WORDS = "--task sst2 --num_hidden_layers 1 --epochs 1 --global_batch_size 16 --lr 2e-3 --dtype fp32 --log_steps 2"
WORDS += " --layer_map 1:1 --max_seq_length 32 --teacher_mode cached"
ONNX = ["--export_onnx", "--model_license", "mit", "--language", "en,de"]
FILES = ("model.onnx", "model_int8.onnx")


@pytest.fixture(scope="module")
def words(tiny_data: Path, tiny_encoder: Path) -> list[str]:
    return [*WORDS.split(), "--teacher", str(tiny_encoder), "--data_dir", str(tiny_data)]


@pytest.fixture(scope="module")
def first(words: list[str], single_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with ONNX files."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra peakd_ds[onnx]")
    folder = tmp_path_factory.mktemp("outputs") / "run"
    train.main(parse([*words, *ONNX, "--run_dir", str(folder)]))
    return folder


@pytest.fixture
def run(first: Path, tmp_path: Path) -> Path:
    """A copy of it, to change."""
    return shutil.copytree(first, tmp_path / "run")


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def times(folder: Path) -> dict[str, int]:
    """When each file was written, except TensorBoard's and the lock's."""
    files = [path for path in folder.rglob("*") if path.is_file() and "tb" not in path.relative_to(folder).parts]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


@pytest.fixture
def no_evaluation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was evaluated again")

    monkeypatch.setattr(evaluation, "evaluate", fail)
    yield


# -- Results and cards -------------------------------------------------------------------------------------------------


def test_results_have_sizes_speed_and_onnx_files(first: Path) -> None:
    results = results_of(first)
    exports = results["exports"]
    assert set(exports) == {"student_unrolled", "onnx", "onnx_int8"}
    for model in (results["teacher"], results["student"], *exports.values()):
        assert model["disk_mb"] > 0 and model["latency_ms"] > 0 and model["batch_samples_per_s"] > 0
    for name, file in zip(("onnx", "onnx_int8"), FILES, strict=True):
        size = (first / "student_unrolled" / file).stat().st_size
        assert exports[name]["disk_mb"] == pytest.approx(size / 1e6, abs=0.01)
    assert exports["onnx"]["disk_mb"] > exports["onnx_int8"]["disk_mb"]
    assert exports["onnx"]["metrics"] == pytest.approx(results["student"]["metrics"])
    lost = exports["onnx"]["metrics"]["accuracy"] - exports["onnx_int8"]["metrics"]["accuracy"]
    assert exports["onnx_int8"]["drop"] == pytest.approx(lost)
    assert 0 <= exports["onnx_int8"]["agreement_with_fp32"] <= 1
    assert results["speed"] == {"device": "cpu", "threads": torch.get_num_threads(), "batch": 32}
    assert results["majority_class"] == {"name": "negative", "share": 0.5, "metrics": {"accuracy": 0.5}}


def test_the_readme_has_a_row_for_each_form(first: Path) -> None:
    text = (first / "README.md").read_text()
    for row in ("teacher", "student", "student, unrolled", "student, ONNX", "student, int8 ONNX"):
        assert re.search(rf"^\| {row} +\| 0\.0 M +\| \d+\.\d +\| \d+\.\d +\| \d+ +\|", text, re.M), row
    assert "on this machine (CPU, 1 thread)" in text and "model_int8.onnx" in text
    assert "the accuracy of always predicting it" in text


def test_cards_say_what_a_user_needs(first: Path, tiny_encoder: Path) -> None:
    for form in ("student", "student_unrolled"):
        text = (first / form / "README.md").read_text()
        header = yaml.safe_load(text.split("---\n")[1])
        assert header["license"] == "mit" and header["language"] == ["en", "de"]
        assert "| metric | this model | teacher | always negative |" in text
        assert "MB on disk" in text and "latency, batch 1" in text and "truncation=True, max_length=32" in text
        assert "None" not in text and "| log_steps" not in text and "| seed | 42 |" in text
        assert str(tiny_encoder) not in text and str(first) not in text
        (command,) = re.findall(r"^peakd-train .*$", text, re.M)
        again = parse([*shlex.split(command)[1:]])
        assert (again.lr, again.layer_map, again.teacher, again.run_dir) == (2e-3, ((1, 1),), "TEACHER", "RUN_DIR")
        assert ("onnxruntime" in text) == (form == "student_unrolled")


def test_settings_that_matter_are_told() -> None:
    config = parse("--task rte --teacher a/b --run_dir x --no_ptp --seed 7 --save_steps 3".split())
    told = card.worth_telling(asdict(config))
    assert told["seed"] == 7 and told["alpha"] == 0.7 and told["ptp"] is False and told["teacher"] == "a/b"
    assert not set("save_steps ptp_epochs weight_decay dropout epochs run_dir model_license".split()) & told.keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model_license Apache-2.0", "is no licence id; write one of the hub's"),
        ("--language english", "is no language code; write codes such as en, or de,fr"),
        ("--max_int8_drop 2", r"outside its range \[0, 1\]"),
    ],
)
def test_wrong_settings_are_refused(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(["--task", "rte", "--teacher", "x", "--run_dir", "y", *words.split()])


def test_files_have_the_permissions_that_the_umask_gives(first: Path) -> None:
    mask = os.umask(0o022)
    os.umask(mask)
    for path in (first, *first.rglob("*")):
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


# -- int8 --------------------------------------------------------------------------------------------------------------


def entry(drop: float) -> dict[str, Any]:
    return {"drop": drop, "rows": 100, "agreement_with_fp32": 0.97}


def test_the_verdict_on_int8() -> None:
    assert int8.verdict(entry(0.0), 0.01, "accuracy")[0] and int8.verdict(entry(0.01), 0.01, "accuracy")[0]
    is_fine, sentence = int8.verdict(entry(0.0123), 0.01, "accuracy")
    assert not is_fine and "loses 0.0123 of accuracy" in sentence and "so ship model.onnx" in sentence
    assert "gains 0.0200 of" in int8.verdict(entry(-0.02), 0.01, "accuracy")[1]


def test_a_large_loss_is_said_loudly(
    words: list[str],
    run: Path,
    no_evaluation: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A start that lacks one file alone writes that one; the card then recommends the float32 file."""
    (run / "student_unrolled" / FILES[1]).unlink()
    before, score = times(run), int8.score

    def much_worse(*arguments: Any) -> list[dict[str, Any]]:
        entries = score(*arguments)
        return [entries[0], entries[1] | {"drop": 0.3}]

    monkeypatch.setattr(int8, "score", much_worse)
    train.main(parse([*words, *ONNX, "--run_dir", str(run)]))
    assert "warning: model_int8.onnx loses 0.3000 of accuracy" in capfd.readouterr().err
    after = times(run)
    for name in ("student_unrolled/model.onnx", "student_unrolled/model.safetensors", "student/model.safetensors"):
        assert before[name] == after[name]
    assert (run / "student_unrolled" / FILES[1]).exists()
    text = (run / "student_unrolled" / "README.md").read_text()
    assert "so ship model.onnx" in text and "to/this/folder/model.onnx" in text


def test_a_model_that_cannot_be_quantised(
    words: list[str], run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime.quantization

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no such operator\nmore")

    monkeypatch.setattr(onnxruntime.quantization, "quantize_dynamic", fail)
    (run / "student_unrolled" / FILES[1]).unlink()
    train.main(parse([*words, *ONNX, "--run_dir", str(run)]))
    message = "warning: model_int8.onnx is not written: the model cannot be quantised (no such operator)"
    assert message in capfd.readouterr().err
    assert set(results_of(run)["exports"]) == {"student_unrolled", "onnx", "int8_failed"}
    assert finished.lacks(parse([*words, *ONNX, "--run_dir", str(run)])) is None, "it is not tried again"


# -- Starting a finished run again -------------------------------------------------------------------------------------


def test_a_finished_run_is_left_as_it_is(
    words: list[str], run: Path, no_evaluation: None, capfd: pytest.CaptureFixture[str]
) -> None:
    before = times(run)
    for options in (ONNX, ONNX[1:], [*ONNX, "--no_export_unrolled"][1:]):
        train.main(parse([*words, *options, "--run_dir", str(run)]))
        err = capfd.readouterr().err
        assert "nothing is done again" in err and f"{run}/student_unrolled/model_int8.onnx " in err
    assert times(run) == before


def test_finished_runs_are_known_without_reading_rows(
    words: list[str], run: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(reading, "load", None)
    shutil.copytree(tiny_data, tmp_path / "data")
    for path in (tmp_path / "data").rglob("*.parquet"):
        os.utime(path, (1, 1))
    mine = [*words, *ONNX, "--run_dir", str(run), "--data_dir", str(tmp_path / "data"), "--dtype", "auto"]
    text = finished.say_if_finished(parse(mine))
    assert text is not None and "nothing is done again" in text and f"{run}/teacher " in text
    for other in (["--seed", "1"], ["--model_license", "apache-2.0"], ["--trim_vocabulary"], ["--dry_run"]):
        assert finished.say_if_finished(parse([*mine, *other])) is None
    assert finished.say_if_finished(parse([*mine, "--run_dir", str(tmp_path / "new")])) is None
    os.utime(next((tmp_path / "data" / "sst2").glob("*.parquet")))
    assert finished.say_if_finished(parse(mine)) is None, "the rows are newer than the results"


@pytest.mark.parametrize("name", ["results.json", "student/model.safetensors", "student_unrolled/model.onnx"])
@pytest.mark.parametrize("damage", ["changed", "deleted"])
def test_what_is_damaged_is_not_finished(words: list[str], run: Path, name: str, damage: str) -> None:
    config = parse([*words, *ONNX, "--run_dir", str(run)])
    assert finished.lacks(config) is None
    content = (run / name).read_bytes()
    (run / name).unlink()
    if damage == "changed":
        (run / name).write_bytes(content.replace(b"0.5", b"0.6") if name == "results.json" else content[:-1] + b"?")
    assert finished.lacks(config) is not None and finished.say_if_finished(config) is None


def test_a_neutral_setting_does_its_work_and_deletes_nothing(words: list[str], run: Path, no_evaluation: None) -> None:
    (run / "student_unrolled" / "notes.txt").write_text("mine")
    before, scores = times(run), results_of(run)["student"]
    train.main(parse([*words, "--model_license", "apache-2.0", "--run_dir", str(run)]))  # and no --export_onnx
    after = times(run)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    cards = {"README.md", "student/README.md", "student_unrolled/README.md"}
    assert cards <= changed <= {*cards, "results.json", "loss_curves.png"}
    assert "license: apache-2.0" in (run / "student" / "README.md").read_text()
    assert results_of(run)["student"] == scores and "onnx_int8" in results_of(run)["exports"]


def test_files_of_other_weights_are_made_again(words: list[str], run: Path) -> None:
    """A trimmed vocabulary gives every token another id: model.onnx of the whole one would be silently wrong."""
    (run / "student_unrolled" / "notes.txt").write_text("mine")
    before, file = results_of(run)["exports"]["onnx"], run / "student_unrolled" / "model.onnx"
    size = file.stat().st_size
    train.main(parse([*words, "--trim_vocabulary", "--run_dir", str(run)]))
    exports = results_of(run)["exports"]
    assert file.stat().st_size < size and exports["onnx"]["metrics"] == before["metrics"]
    assert (run / "student_unrolled" / "notes.txt").read_text() == "mine"


def test_other_settings_are_refused_with_a_command(words: list[str], run: Path, tiny_encoder: Path) -> None:
    with pytest.raises(UserError, match="take another --run_dir") as caught:
        run_folder.check(parse([*words, "--epochs", "9", "--run_dir", str(run)]))
    command = str(caught.value).partition("A new run with its teacher: ")[2]
    again = parse(shlex.split(command)[1:])
    assert (again.teacher, again.student_init) == (str(run / "teacher"), str(tiny_encoder))
    assert (again.epochs, again.run_dir, again.lr, again.task) == (9, f"{run}-2", 2e-3, "sst2")
    with pytest.raises(UserError) as caught:
        run_folder.check(parse([*words, "--task", "rte", "--run_dir", str(run)]))
    assert "A new run" not in str(caught.value), "it is no teacher of that task"


# -- Comparing runs ----------------------------------------------------------------------------------------------------


def test_runs_are_compared_in_one_table(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = results_of(first)
    other["settings"]["sharing"] = "none"
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "results.json").write_text(json.dumps(finished.with_checksum(other)))
    compare.main(scripts.compare_options([str(first), str(tmp_path / "plain")]))
    lines = capsys.readouterr().out.splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:]
    assert names == ["teacher", "SPS student", "SPS student, int8 ONNX", "plain student", "plain student, int8 ONNX"]
    assert all(f"| {title} " in lines[0] for title in comparison.HEADER)
    assert lines[-1].startswith("Speed: median")
    table = comparison.joint_table([results_of(first)] * 2, ["a", "b"])
    assert "SPS student (a)" in table and "SPS student (b)" in table


def test_runs_that_cannot_be_compared(first: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no results\.json of a finished run"):
        compare.main(scripts.compare_options([str(tmp_path)]))
    (tmp_path / "results.json").write_text(json.dumps(finished.with_checksum(results_of(first) | {"task": "rte"})))
    with pytest.raises(UserError, match="compare runs on one task"):
        compare.main(scripts.compare_options([str(first), str(tmp_path)]))


# -- Speed -------------------------------------------------------------------------------------------------------------


def test_rows_are_padded_as_the_tokenizer_does(tiny_encoder: Path, tiny_data: Path, single_rank: None) -> None:
    task, tokenizer = get_task("rte"), AutoTokenizer.from_pretrained(tiny_encoder)
    texts = reading.load_splits(task, str(tiny_data))["validation"]
    rows = np.array([3, 0, 7])
    expected = tokenizer(*([texts[int(row)][name] for row in rows] for name in task.text_columns), padding=True)
    inputs = speed.padded(tokenize(task, texts, tokenizer, 64), tokenizer, rows)
    assert {name: tensor.tolist() for name, tensor in inputs.items()} == dict(expected)
