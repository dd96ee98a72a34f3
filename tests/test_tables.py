"""peakd-report: which runs are averaged, which are listed instead, and the three files that it writes."""

import csv
import errno
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from peakd_ds.command_line import to_yaml
from peakd_ds.config import RunConfig
from peakd_ds.errors import UserError
from peakd_ds.programs import scripts, tables

SCORES = {1: 0.61, 2: 0.655, 3: 0.627}
MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run("rte/kd/seed-1", lr=1e-4)` writes the files of a finished run; `data` is the digest of its rows."""

    def make(name: str, data: str = "aa", metrics: dict[str, float] | None = None, **settings: Any) -> Path:
        task, _, seed = name.split("/")
        folder = tmp_path / "runs" / name
        given = {"task": task, "seed": int(re.sub(r"\D", "", seed)), "run_dir": str(folder), "dtype": "fp32"}
        config = RunConfig(**(given | {"teacher": "t", "ptp": False, "sharing": "none", "beta": 0.0} | settings))
        model = {"params": 45_700_000, "effective_layers": 6, "samples_per_s": 10.0}
        metrics = metrics or {"accuracy": SCORES[config.seed]}
        results = {
            "task": task,
            "method": config.method,
            "seed": config.seed,
            "world_size": 2,
            "selected_on": config.select_on,
            "settings": {**asdict(config), "layer_pairs": []},
            "teacher": {**model, "metrics": {name: 0.7 for name in metrics}},
            "student": {**model, "metrics": metrics, "stored_layers": 3, "agreement": 0.9},
        }
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "data.json").write_text(json.dumps({"train": data, "validation": data}))
        (folder / "results.json").write_text(json.dumps(results))
        return folder

    return make


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    results = json.loads((folder / "results.json").read_text())
    change(results)
    (folder / "results.json").write_text(json.dumps(results))


def plan_runs(runs: Path, names: list[str], grid: str = "grid") -> None:
    (runs / "grids").mkdir(parents=True, exist_ok=True)
    (runs / "grids" / f"{grid}.json").write_text(json.dumps(names))


def written(runs: Path, *words: str) -> tuple[str, list[dict[str, str]]]:
    """The Markdown and the lines of the CSV that peakd-report writes."""
    tables.main(scripts.report_options([str(runs), *words]))
    return (runs / "report.md").read_text(), list(csv.DictReader((runs / "report.csv").open()))


# -- Averages ----------------------------------------------------------------------------------------------------------


def test_mean_and_sample_deviation_over_seeds(make_run: MakeRun, runs: Path, capsys: pytest.CaptureFixture) -> None:
    for seed in (3, 1, 2):
        make_run(f"rte/kd/seed-{seed}")
    make_run("rte/finetune/seed-1", alpha=0.0)
    text, lines = written(runs)
    values = list(SCORES.values())
    mean, deviation = sum(values) / 3, (sum((value - sum(values) / 3) ** 2 for value in values) / 2) ** 0.5
    assert f"| rte  | kd       | 3     | {mean:.4f} ± {deviation:.4f} | 0.7000  | 45.7 M | 6 (3)" in text
    assert "| rte  | finetune | 1     | 0.6100 ± -      |" in text
    by_method = {line["method"]: line for line in lines}
    assert float(by_method["kd"]["mean"]) == pytest.approx(mean, rel=1e-12)
    assert float(by_method["kd"]["std"]) == pytest.approx(deviation, rel=1e-12)
    assert (by_method["kd"]["n"], by_method["kd"]["seeds"]) == ("3", "1 2 3")
    assert by_method["finetune"]["std"] == "" and by_method["finetune"]["n"] == "1"
    assert text in capsys.readouterr().out


def test_every_metric_of_every_task(make_run: MakeRun, runs: Path) -> None:
    make_run("mnli/kd/seed-1", metrics={"accuracy": 0.8, "accuracy_mismatched": 0.9})
    make_run("cola/kd/seed-1", metrics={"matthews_correlation": -0.1})
    text, lines = written(runs)
    assert [(line["task"], line["metric"], line["mean"]) for line in lines] == [
        ("cola", "matthews_correlation", "-0.1"),
        ("mnli", "accuracy", "0.8"),
        ("mnli", "accuracy_mismatched", "0.9"),
    ]
    header = [cell.strip() for cell in text.splitlines()[0].split("|")]
    assert header[4:7] == ["matthews_correlation", "accuracy", "accuracy_mismatched"]


def test_other_settings_get_rows_of_their_own(make_run: MakeRun, runs: Path) -> None:
    for seed in (1, 2):
        make_run(f"rte/a/seed-{seed}")
        make_run(f"rte/b/seed-{seed}", lr=5e-5, dropout=0.0)
    text, lines = written(runs)
    assert [(line["settings"], line["n"]) for line in lines] == [
        ("lr=2e-05, dropout=None", "2"),
        ("lr=5e-05, dropout=0.0", "2"),
    ]
    assert "| lr=5e-05, dropout=0.0" in text


def test_other_data_gets_rows_of_its_own(make_run: MakeRun, runs: Path) -> None:
    make_run("rte/a/seed-1")
    make_run("rte/a/seed-2", data="bb")
    assert {line["settings"] for line in written(runs)[1]} == {
        "data=train aa+validation aa",
        "data=train bb+validation bb",
    }


def test_settings_that_do_not_change_the_result_do_not_matter(make_run: MakeRun, runs: Path) -> None:
    make_run("rte/a/seed-1", save_steps=7, micro_batch_size=4, data_dir="here")
    edit(make_run("rte/a/seed-2"), lambda results: results["settings"].pop("hidden_loss"))  # of an earlier version
    make_run("rte/a/seed-3", data_dir="there")
    (line,) = written(runs)[1]
    assert (line["n"], line["settings"]) == ("3", "")


def test_the_teacher_of_one_seed_serves_all(make_run: MakeRun, runs: Path) -> None:
    """The run with the teacher's own seed is in the same row as the others."""
    for seed in (1, 2, 3):
        make_run(f"rte/a/seed-{seed}", teacher="runs/rte/teacher/seed-2/teacher")
        make_run(f"rte/b/seed-{seed}", teacher=f"runs/rte/teacher/seed-{seed}/teacher", lr=1e-4)
    lines = written(runs)[1]
    assert [(line["n"], line["seeds"]) for line in lines] == [("3", "1 2 3")] * 2
    assert "teacher=runs/rte/teacher/seed-N/teacher" in lines[1]["settings"]


def test_a_teacher_for_each_seed_is_one_setting(make_run: MakeRun, runs: Path) -> None:
    for seed in (1, 2):
        make_run(f"rte/a/seed-{seed}", teacher=f"runs/rte/teacher/seed-{seed}/teacher")
    make_run("rte/a/seed-3", teacher="runs/rte/teacher/seed-1/teacher")
    assert [(line["seeds"], line["settings"]) for line in written(runs)[1]] == [
        ("1 2", "teacher=runs/rte/teacher/seed-N/teacher"),
        ("3", "teacher=runs/rte/teacher/seed-1/teacher"),
    ]


def test_two_equal_runs_are_refused_but_a_folder_may_be_given_twice(make_run: MakeRun, runs: Path) -> None:
    make_run("rte/a/seed-1")
    tables.main(scripts.report_options([str(runs), str(runs / "rte"), str(runs / "rte" / "a" / "seed-1")]))
    make_run("rte/b/seed-1")
    with pytest.raises(UserError, match=r"rte/a/seed-1 and \S+rte/b/seed-1 are the same run .* count as two seeds"):
        tables.main(scripts.report_options([str(runs)]))


def test_runs_of_the_teacher_stage_alone(make_run: MakeRun, runs: Path) -> None:
    for seed in (1, 2):
        edit(
            make_run(f"rte/teacher/seed-{seed}"),
            lambda results: results.update(student=None, settings={**results["settings"], "stages": ["teacher"]}),
        )
    make_run("rte/kd/seed-1")
    (runs / "rte/teacher/seed-2/checkpoints/ptp").mkdir(parents=True)
    text, lines = written(runs)
    assert [(line["method"], line["mean"], line["n"]) for line in lines] == [
        ("kd", "0.61", "1"),
        ("teacher", "0.7", "1"),
    ]
    assert "- " + tables._relative(runs / "rte/teacher/seed-2") + ": unfinished (stages teacher ran" in text


# -- Own data ----------------------------------------------------------------------------------------------------------


def make_own(make_run: MakeRun, name: str, metrics: dict[str, float], primary: str, **settings: Any) -> Path:
    """A finished run on rows of the user's own; `metrics` without "agreement", as of rows without labels."""
    folder = make_run(name, metrics=metrics, task="", train_file=("x.csv",), **settings)
    edit(folder, lambda results: results.update(primary_metric=primary))
    return folder


def test_own_data_says_itself_which_score_is_the_main_one(make_run: MakeRun, runs: Path) -> None:
    for seed in (1, 2):
        make_own(make_run, f"stars/kd/seed-{seed}", {"pearson": 0.5, "rmse": float(seed)}, "rmse", metric="rmse")
    text, lines = written(runs)
    assert [(line["task"], line["metric"], line["mean"], line["teacher"]) for line in lines] == [
        ("stars", "pearson", "0.5", "0.7"),
        ("stars", "rmse", "1.5", "0.7"),
    ]
    assert "Lower is better: rmse." in text and "Lower is better: pearson" not in text
    (panel,) = tables._panels(tables.gather([runs])[0])
    assert (panel.title, panel.metric, panel.means) == ("stars", "rmse (lower is better)", [1.5])


def test_runs_without_labels_are_compared_by_agreement(make_run: MakeRun, runs: Path) -> None:
    for seed in (1, 2, 3):
        folder = make_own(make_run, f"mails/kd/seed-{seed}", {"accuracy": 0.1}, "agreement")
        edit(folder, lambda results: [results[model]["metrics"].clear() for model in ("teacher", "student")])
    edit(folder, lambda results: results["student"].update(agreement=None))
    text, (line,) = written(runs)
    assert [line[name] for name in ("metric", "mean", "n", "teacher")] == ["agreement", "0.9", "2", ""]
    assert "| mails | kd     | 2     | 0.9000 ± 0.0000 |" in text and "Lower is better" not in text
    assert "seed-3: no score: no row has a label, and the teacher's outputs of the reported rows are not known" in text


def test_own_data_may_have_the_name_of_a_task(make_run: MakeRun, runs: Path) -> None:
    make_run("rte/kd/seed-1")
    make_own(make_run, "rte/own/seed-1", {"macro_f1": 0.4, "accuracy": 0.5}, "macro_f1", metric="macro_f1")
    text, lines = written(runs)
    assert [(line["metric"], line["mean"]) for line in lines] == [
        ("accuracy", "0.61"),
        ("macro_f1", "0.4"),
        ("accuracy", "0.5"),
    ]
    assert "task=rte" in text and [panel.metric for panel in tables._panels(tables.gather([runs])[0])] == [
        "accuracy",
        "macro_f1",
    ]


def test_a_damaged_main_score_is_listed(make_run: MakeRun, runs: Path) -> None:
    make_run("rte/kd/seed-1")
    folder = make_own(make_run, "stars/kd/seed-2", {"rmse": 1.0}, "rmse")
    for value in (*VALUES, "pearson", "agreement "):
        edit(folder, lambda results, value=value: results.update(primary_metric=value))
        rows, (line,) = tables.gather([runs])
        assert len(rows) == 1 and "stars/kd/seed-2: damaged results.json" in line, value


# -- What is not in the table ------------------------------------------------------------------------------------------


def test_missing_unfinished_failed_and_damaged_runs_are_listed(make_run: MakeRun, runs: Path) -> None:
    names = [f"rte/kd/seed-{seed}" for seed in (1, 2, 3)]
    plan_runs(runs, [*names, *(f"rte/kd/seed-{seed}" for seed in (4, 5, 6))])
    for name in names:
        make_run(name)
    (runs / "rte/kd/seed-2/results.json").unlink()
    (runs / "rte/kd/seed-3/results.json").write_text('{"task": "rte", ')
    (runs / "rte/kd/seed-5.failed").write_text("exit code 2: train.py: error: no data\n")
    make_run("sst2/kd/seed-1", metrics={"f1": 0.5})
    text, (line,) = written(runs)
    assert (line["n"], line["asked"]) == ("1", "6") and "| 1 of 6 |" in text
    listed = [row.removeprefix("- ").rpartition("rte/kd/")[2] for row in text.splitlines() if row.startswith("- ")]
    assert listed[0] == "seed-2: unfinished (no results.json)"
    assert listed[1].startswith("seed-3: damaged results.json (JSONDecodeError")
    assert listed[2:5] == [
        "seed-4: missing",
        "seed-5: failed: exit code 2: train.py: error: no data",
        "seed-6: missing",
    ]
    assert "sst2/kd/seed-1: damaged results.json (KeyError: 'accuracy')" in listed[5]
    assert "Not in the table: 6" in text


def test_results_of_a_run_whose_last_start_failed_do_not_count(make_run: MakeRun, runs: Path) -> None:
    """Its settings may not be those that the grid has now."""
    make_run("rte/kd/seed-1")
    make_run("rte/kd/seed-2")
    (runs / "rte/kd/seed-2.failed").write_text("exit code 2: --run_dir holds a run with other settings\n")
    text, (line,) = written(runs)
    assert line["seeds"] == "1" and "seed-2: failed: exit code 2: --run_dir holds" in text


def test_a_failure_on_a_cluster_is_listed(make_run: MakeRun, runs: Path) -> None:
    """Starts of a run as slurm/distill.sh records them."""
    plan_runs(runs, [f"rte/kd/seed-{seed}" for seed in (1, 2, 3, 4)])
    for seed, how in ((1, "finished"), (2, "refused"), (3, "stopped")):
        start = (make_run(f"rte/kd/seed-{seed}") if seed < 3 else runs / f"rte/kd/seed-{seed}") / "logs" / "7_0-0"
        start.mkdir(parents=True)
        (start / "start.json").write_text("{}")
        (start / "rank-00000.json").write_text(json.dumps({"how": how}))
        (start / "end.json").write_text(json.dumps({"is_idle": True, "cause": "rank 0 on node1: other settings"}))
    text, (line,) = written(runs)
    assert line["seeds"] == "1" and "| 1 of 4 |" in text
    listed = [row.rpartition("rte/kd/")[2] for row in text.splitlines() if row.startswith("- ")]
    assert listed == [
        "seed-2: failed: rank 0 on node1: other settings",
        "seed-3: unfinished (no results.json)",
        "seed-4: missing",
    ]


def test_a_failed_start_before_the_results_does_not_count(make_run: MakeRun, runs: Path) -> None:
    """A second start of a running job is refused; the first one finishes. The times noted in the files decide."""
    for seed, began, counts in ((1, 90.0, True), (2, 110.0, False)):
        folder = make_run(f"rte/kd/seed-{seed}")
        edit(folder, lambda results: results.update(at=100.0))
        start = folder / "logs" / "8-0"
        start.mkdir(parents=True)
        (start / "start.json").write_text(json.dumps({"at": began}))
        (start / "rank-00000.json").write_text(json.dumps({"how": "refused"}))
        (start / "end.json").write_text(json.dumps({"is_idle": True, "cause": "in use"}))
        listed = tables.gather([runs])[1]
        assert any(f"seed-{seed}: failed: in use" in line for line in listed) != counts


def test_seeds_that_a_grid_no_longer_has(make_run: MakeRun, runs: Path) -> None:
    for seed in (1, 2, 3):
        make_run(f"rte/kd/seed-{seed}")
    plan_runs(runs, ["rte/kd/seed-3", "rte/kd/seed-4"])
    (line,) = written(runs)[1]
    assert (line["n"], line["asked"]) == ("3", "4")


def test_a_part_of_a_sweep_knows_its_grid(make_run: MakeRun, runs: Path) -> None:
    plan_runs(runs, ["rte/kd/seed-1", "rte/kd/seed-2", "sst2/kd/seed-1"])
    make_run("rte/kd/seed-1")
    tables.main(scripts.report_options([str(runs / "rte")]))
    text = (runs / "rte" / "report.md").read_text()
    assert "| 1 of 2 |" in text and "Not in the table: 1" in text and "sst2" not in text


def test_rows_follow_the_grid(make_run: MakeRun, runs: Path) -> None:
    names = [f"{task}/{method}/seed-1" for task in ("sst2", "rte") for method in ("pkd", "kd")]
    plan_runs(runs, names)
    for name in names:
        make_run(name, beta=float(name.split("/")[1] == "pkd"))
    assert [f"{line['task']}/{line['method']}/seed-1" for line in written(runs)[1]] == names


def test_optimistic_scores_are_marked(make_run: MakeRun, runs: Path) -> None:
    make_run("rte/kd/seed-1", select_on="dev")
    assert "optimistic" in written(runs)[0]


# -- Wrong input -------------------------------------------------------------------------------------------------------


def test_what_holds_no_run_is_refused(make_run: MakeRun, runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none is not a folder"):
        tables.main(scripts.report_options([str(tmp_path / "none")]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no run in .*empty; give a run folder"):
        tables.main(scripts.report_options([str(tmp_path / "empty")]))
    (make_run("rte/kd/seed-1") / "results.json").unlink()
    with pytest.raises(UserError, match=r"none of the 1 runs in .* is finished; start them again.*\(.*unfinished"):
        tables.main(scripts.report_options([str(runs)]))
    plan_runs(runs, [])
    (runs / "grids" / "grid.json").write_text("[")
    with pytest.raises(UserError, match=r"grid\.json is damaged .*delete it"):
        tables.main(scripts.report_options([str(runs)]))
    assert not list(runs.glob("report.*"))


VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    3,
    10**400,
    1e999,
    "x",
    "a\0b",
    "\ud800",
    [],
    [1],
    {},
    {"a": 1},
    [[[[[[1]]]]]],
)
CONTENTS = (
    "",
    "[",
    "[]",
    "{}",
    "1",
    "null",
    '"x"',
    "[" * 100_000,
    '{"a": ' * 100_000,
    "9" * 5000,
    "NaN",
    b"\xff\xfe",
    b"\0",
)


def write(file: Path, content: str | bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def assert_listed_or_right(runs: Path, name: str) -> bool:
    """Whether the run is listed below the table; if not, it is in the table. Either way the files are written."""
    text, lines = written(runs)
    listed = [line for line in text.splitlines() if line.startswith("- ") and name in line]
    assert bool(listed) != any(line["seeds"] in ("2", "1 2", "0 1", "1 3") for line in lines), text
    assert all(line.isprintable() for line in listed)
    return bool(listed)


@pytest.mark.parametrize("name", ["results.json", "data.json"])
def test_any_content_of_a_file_of_a_run_is_listed(make_run: MakeRun, runs: Path, name: str) -> None:
    make_run("rte/kd/seed-1")
    folder = make_run("rte/kd/seed-2")
    for content in CONTENTS:
        write(folder / name, content)
        is_listed = assert_listed_or_right(runs, "rte/kd/seed-2")
        assert is_listed or name == "data.json", content
    assert assert_listed_or_right(runs, "rte/kd/seed-2"), "the last content is no JSON"


def test_any_value_in_results_is_listed_or_right(make_run: MakeRun, runs: Path) -> None:
    """Each value of results.json, at each depth, takes each shape."""
    make_run("rte/kd/seed-1")
    folder = make_run("rte/kd/seed-2")
    good = (folder / "results.json").read_text()
    places = [(name,) for name in json.loads(good)] + [("student", name) for name in json.loads(good)["student"]]
    places += [("student", "metrics", "accuracy"), ("teacher", "metrics"), ("teacher", "metrics", "accuracy")]
    places += [("settings", name) for name in ("stages", "lr", "select_on", "teacher", "layer_pairs", "seed", "new")]
    num_listed = 0
    for place in places:
        for value in VALUES:
            results = json.loads(good)
            inner = results
            for name in place[:-1]:
                inner = inner[name]
            inner[place[-1]] = value
            (folder / "results.json").write_text(json.dumps(results))
            rows, left_out = tables.gather([runs])
            assert rows and len(left_out) <= 1 and all(line.isprintable() for line in left_out), (place, value)
            tables.to_markdown(rows, left_out)
            tables.to_csv(rows)
            num_listed += len(left_out)
    assert 50 < num_listed < len(places) * len(VALUES)


@pytest.mark.parametrize("content", CONTENTS)
def test_any_content_of_notes(make_run: MakeRun, runs: Path, content: str | bytes) -> None:
    make_run("rte/kd/seed-1")
    start = make_run("rte/kd/seed-2") / "logs" / "1-0"
    for damaged in ("start.json", "rank-00000.json", "end.json"):
        write(start / "start.json", "{}")
        write(start / "rank-00000.json", json.dumps({"how": "failed" if damaged == "end.json" else "finished"}))
        write(start / "end.json", '{"cause": "x"}')
        write(start / damaged, content)
        rows, left_out = tables.gather([runs])
        assert rows and len(left_out) == (damaged != "start.json"), (damaged, left_out)
    write(Path(f"{runs / 'rte/kd/seed-2'}.failed"), content)
    assert any("seed-2: failed" in line and line.isprintable() for line in tables.gather([runs])[1])


@pytest.mark.parametrize("content", [*CONTENTS, "[1]", "[null]", '["a\\u0000b"]', '["\\ud800"]', "[[]]", '{"a": 1}'])
def test_any_content_of_a_grid(make_run: MakeRun, runs: Path, content: str | bytes) -> None:
    make_run("rte/kd/seed-1")
    write(runs / "grids" / "grid.json", content)
    if content == "[]":
        assert written(runs)
        return
    with pytest.raises(UserError, match=r"grid\.json is damaged .*; delete it, or start the sweep again") as caught:
        tables.main(scripts.report_options([str(runs)]))
    assert str(caught.value).isprintable()


def test_a_folder_that_cannot_be_read_is_listed(make_run: MakeRun, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read every folder, so the refusal is the file system's only in name."""
    make_run("rte/kd/seed-1")
    (runs / "locked").mkdir()
    scandir = os.scandir

    def refusing(path: str) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert "locked: cannot be read (Permission denied)" in written(runs)[0]


def test_dollars_in_a_path_are_no_formula(make_run: MakeRun, runs: Path) -> None:
    for number, teacher in enumerate(("a$x_{$b", "$\\frac$", "c")):
        make_run(f"rte/{number}/seed-1", teacher=teacher)
    assert len(written(runs)[1]) == 3


def test_the_program_ends_with_code_2_and_one_line(tmp_path: Path, env: dict[str, str]) -> None:
    command = [str(Path(sys.executable).with_name("peakd-report")), str(tmp_path / "none")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"peakd-report: error: \S+none is not a folder; give .*\n", done.stderr)


# -- The figure -------------------------------------------------------------------------------------------------------


def test_the_figure_shows_the_same_scores_as_the_table(make_run: MakeRun, runs: Path, tmp_path: Path) -> None:
    for seed in SCORES:
        make_run(f"rte/kd/seed-{seed}")
    make_run("sst2/kd/seed-1")
    rows, _ = tables.gather([runs])
    rte, sst2 = tables._panels(rows)
    assert (rte.title, rte.metric, rte.labels) == ("rte", "accuracy", ["kd (3)"])
    assert rte.teacher == pytest.approx(0.7)
    assert rte.scores == [list(SCORES.values())] and rte.means == [statistics.mean(SCORES.values())]
    assert rte.deviations == [statistics.stdev(SCORES.values())] and sst2.deviations == [None]
    tables.main(scripts.report_options([str(runs), "--out", str(tmp_path / "out")]))
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["report.csv", "report.md", "report.png"]
    assert not list(runs.glob("report.*"))
