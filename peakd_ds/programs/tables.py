"""A table of many runs: peakd-report gathers their results.json into means and standard deviations over seeds.

    peakd-report runs/paper [--out FOLDER]

A row is a task, a method and one set of settings; only the seed differs within it. Runs with other settings, or on
other rows of data, stand in rows of their own, which say what differs. Runs that are missing, unfinished or failed are
listed below the table, and a row tells how many of the seeds that its grid asked for it has.
"""

import argparse
import csv
import io
import json
import os
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peakd_ds.config import RESULT_NEUTRAL, RunConfig
from peakd_ds.data.tasks import get_task
from peakd_ds.errors import UserError
from peakd_ds.files import write_atomically
from peakd_ds.programs import scripts
from peakd_ds.programs.grid import TEACHER_ONLY
from peakd_ds.results import figures

DEFAULTS = json.loads(json.dumps(asdict(RunConfig())))
"""Stand for settings that results of an earlier version lack."""


@dataclass(frozen=True)
class Result:
    """What a finished run says."""

    folder: Path
    task: str
    method: str
    """As the run says; "teacher" where only the teacher stage ran."""
    seed: int
    settings: dict[str, Any]
    """All that change the result, except the seed."""
    metrics: dict[str, float]
    teacher: float | None
    """The teacher's primary metric."""
    params: int
    stored_layers: int
    effective_layers: int


@dataclass
class Row:
    """Runs that differ in their seed alone."""

    task: str
    method: str
    settings: list[str]
    """NAME=VALUE of what sets this row apart from others of the task and method."""
    results: list[Result]
    num_asked: int
    """Seeds that a grid asked for; 0 where no grid is known."""

    def values(self, metric: str) -> list[float]:
        return [result.metrics[metric] for result in self.results]

    def mean(self, metric: str) -> float:
        return statistics.mean(self.values(metric))

    def deviation(self, metric: str) -> float | None:
        """Of the sample (n - 1); None for one seed."""
        return statistics.stdev(self.values(metric)) if len(self.results) > 1 else None

    @property
    def teacher(self) -> float | None:
        """Mean of the runs' teachers, each counted as often as it was used."""
        scores = [result.teacher for result in self.results if result.teacher is not None]
        return statistics.mean(scores) if len(scores) == len(self.results) else None

    @property
    def seeds(self) -> str:
        """How many runs, and of how many."""
        is_whole = self.num_asked in (0, len(self.results))
        return f"{len(self.results)}" + ("" if is_whole else f" of {self.num_asked}")


def gather(folders: Sequence[Path]) -> tuple[list[Row], list[str]]:
    """Rows of all runs at or below the folders, and a line for each run that is in no row.

    Raises:
        UserError: a folder that is not there, no run in any, or two runs that differ in nothing, not even the seed.
    """
    asked = {path: None for folder in folders for path in _asked_for(folder)}
    found = {path: None for folder in folders for path in _run_folders(folder)}
    results, left_out = [], []
    for path in {**asked, **found}:
        try:
            results.append(read_result(path))
        except ValueError as error:
            left_out.append(f"{_shown(path)}: {error}")
    if not results and not left_out:
        raise UserError(f"no run in {', '.join(map(str, folders))}; give a run folder, or a folder of run folders")
    return _rows(results, set(asked)), left_out


def read_result(folder: Path) -> Result:
    """The result of a finished run.

    Raises:
        ValueError: with what is the matter, for a run that is not finished or whose files are damaged.
    """
    file = folder / "results.json"
    reason = _why_failed(folder, file)
    if reason is not None:
        raise ValueError(f"failed: {' '.join(reason.split())}")
    if not file.exists():
        raise ValueError("unfinished (no results.json)" if folder.exists() else "missing")
    try:
        results = json.loads(file.read_text())
        settings = {**DEFAULTS, **results["settings"]}
        task, seed = get_task(results["task"]), int(results["seed"])
        is_student = results["student"] is not None
        if not is_student and (settings["stages"] != ["teacher"] or (folder / "checkpoints" / "ptp").exists()):
            raise ValueError(f"unfinished (stages {','.join(settings['stages'])} ran, there is no student)")
        model = results["student" if is_student else "teacher"]
        changing = {name: settings[name] for name in settings if name not in RESULT_NEUTRAL and name != "seed"}
        if (folder / "data.json").exists():
            changing["data"] = json.loads((folder / "data.json").read_text())
        return Result(
            folder=folder,
            task=task.name,
            method=results["method"] if is_student else TEACHER_ONLY,
            seed=seed,
            settings=changing,
            metrics={name: float(model["metrics"][name]) for name in (*task.metrics, *model["metrics"])},
            teacher=None if results["teacher"] is None else results["teacher"]["metrics"][task.primary_metric],
            params=model["params"],
            stored_layers=model.get("stored_layers", model["effective_layers"]),
            effective_layers=model["effective_layers"],
        )
    except (LookupError, TypeError, AttributeError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"damaged results.json ({type(error).__name__}: {error})") from error


def markdown(rows: Sequence[Row], left_out: Sequence[str]) -> str:
    """The table, and the runs that are not in it."""
    metrics = _metrics_of(rows)
    has_settings = any(row.settings for row in rows)
    header = ["task", "method", *(["settings"] if has_settings else []), "seeds", *metrics, "teacher", "params"]
    lines = [[*header, "layers (stored)"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        first = row.results[0]
        lines.append(
            [
                row.task,
                row.method,
                *([", ".join(row.settings)] if has_settings else []),
                row.seeds,
                *(_with_deviation(row, metric) if metric in first.metrics else "" for metric in metrics),
                "" if row.teacher is None else f"{row.teacher:.4f}",
                f"{first.params / 1e6:.1f} M",
                f"{first.effective_layers} ({first.stored_layers})",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    text += ["", "Metrics are of the whole dev set: mean ± sample standard deviation (n - 1) over the seeds, - for one"]
    text += ["seed. `teacher` is the mean of the main metric of the runs' teachers."]
    if any(result.settings["select_on"] == "dev" for row in rows for result in row.results):
        text += ["Runs with select_on dev picked their epochs on the dev set itself: their figures are optimistic."]
    if left_out:
        text += ["", f"Not in the table: {len(left_out)}", "", *(f"- {line}" for line in left_out)]
    return "\n".join(text) + "\n"


def comma_separated(rows: Sequence[Row]) -> str:
    """The table with a line for each metric, in full precision; std is empty for one seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow("task method settings metric mean std n asked seeds teacher params stored_layers layers".split())
    for row in rows:
        first, seeds = row.results[0], " ".join(str(result.seed) for result in row.results)
        for metric in first.metrics:
            figures_of = [
                metric,
                row.mean(metric),
                row.deviation(metric),
                len(row.results),
                row.num_asked or None,
                seeds,
            ]
            sizes = [first.params, first.stored_layers, first.effective_layers]
            writer.writerow([row.task, row.method, ", ".join(row.settings), *figures_of, row.teacher, *sizes])
    return text.getvalue()


def main(args: argparse.Namespace) -> None:
    """Write report.md, report.csv and report.png, and print the first."""
    rows, left_out = gather(args.runs)
    if not rows:
        raise UserError(
            f"none of the {len(left_out)} runs in {', '.join(map(str, args.runs))} is finished; "
            f"start them again, or give other folders ({left_out[0]})"
        )
    out = args.out or args.runs[0]
    table = markdown(rows, left_out)
    write_atomically(out / "report.md", table)
    write_atomically(out / "report.csv", comma_separated(rows))
    figures.score_panels(_panels(rows), out / "report.png")
    print(table)
    print(f"report.md, report.csv and report.png are in {out}/")


# -- Finding runs ------------------------------------------------------------------------------------------------------


def _asked_for(folder: Path) -> Iterator[Path]:
    """Run folders at or below `folder` that a sweep was asked for, in the grid's order."""
    root = folder.resolve()
    for runs in (root, *root.parents):
        for file in sorted((runs / "grids").glob("*.json")):
            try:
                paths = [runs / name for name in json.loads(file.read_text())]
            except (ValueError, TypeError) as error:
                raise UserError(f"{file} is damaged ({error}); delete it, or start the sweep again") from error
            yield from (path for path in paths if path.is_relative_to(root))


def _run_folders(folder: Path) -> Iterator[Path]:
    """Folders at or below `folder` with a run in them."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give a run folder, or a folder of run folders")
    for path, folders, files in os.walk(folder.resolve()):
        if {"config.yaml", "results.json"} & {*files}:
            yield Path(path)
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _why_failed(folder: Path, results: Path) -> str | None:
    """Why the run's last start failed: as peakd-sweep (RUN.failed) or slurm/distill.sh (RUN/logs/START/) left it.

    It stands even beside earlier results: these may then be of other settings than the run was last started with.
    """
    mark = Path(f"{folder}.failed")
    if mark.exists():
        return mark.read_text()
    starts = {file.parent: _time_in(file) for file in (folder / "logs").glob("*/start.json")}
    start = max(starts, key=starts.__getitem__, default=None)
    if start is None or not (start / "end.json").exists() or starts[start] < _time_in(results):
        return None
    notes = [json.loads(file.read_text()) for file in start.glob("rank-*.json")]
    if not {"refused", "failed", "lost"} & {told["how"] for told in notes}:
        return None
    return json.loads((start / "end.json").read_text())["cause"]


def _time_in(file: Path) -> float:
    """When a start or its results were written, as the file says; 0 if it does not. (A copied file's own time lies.)"""
    try:
        return float(json.loads(file.read_text())["at"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0.0


def _shown(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


# -- Grouping ----------------------------------------------------------------------------------------------------------


def _rows(results: Sequence[Result], asked: set[Path]) -> list[Row]:
    """One row for each task, method and set of settings, in the order of their first appearance."""
    groups: dict[tuple[str, str], list[list[Result]]] = {}
    for result in results:
        rivals = groups.setdefault((result.task, result.method), [])
        group = next((group for group in rivals if all(_differ_in_seed(result, other) for other in group)), None)
        if group is None:
            rivals.append([result])
            continue
        twin = next((other for other in group if other.seed == result.seed), None)
        if twin is not None:
            raise UserError(
                f"{_shown(twin.folder)} and {_shown(result.folder)} are the same run ({result.task}, {result.method}, "
                f"seed {result.seed}, same settings) and would count as two seeds; give one of them"
            )
        group.append(result)
    tasks, methods = ([*dict.fromkeys(key[position] for key in groups)] for position in (0, 1))
    rows = []
    for key in sorted(groups, key=lambda key: (tasks.index(key[0]), methods.index(key[1]))):
        settings = [_common_settings(group) for group in groups[key]]
        for group, its_settings in zip(groups[key], settings, strict=True):
            parents = {result.folder.parent for result in group if result.folder in asked}
            of_grid = {path for path in asked if path.parent in parents}
            num_asked = len(of_grid | {result.folder for result in group}) if of_grid else 0
            by_seed = sorted(group, key=lambda result: result.seed)
            rows.append(Row(*key, _what_differs(its_settings, settings), by_seed, num_asked))
    return rows


def _differ_in_seed(one: Result, other: Result) -> bool:
    """Whether two runs of a task and method have the same settings; a path may hold each one's own seed, as sweeps
    write it (seed-7/)."""
    return one.settings.keys() == other.settings.keys() and all(
        value == other.settings[name]
        or _without_seed(value, one.seed) == _without_seed(other.settings[name], other.seed)
        for name, value in one.settings.items()
    )


def _common_settings(group: Sequence[Result]) -> dict[str, Any]:
    """What the runs have in common: paths that differ in their seeds have seed-N for it."""
    first = group[0]
    return {
        name: value if all(other.settings[name] == value for other in group) else _without_seed(value, first.seed)
        for name, value in first.settings.items()
    }


def _what_differs(settings: dict[str, Any], rivals: Sequence[dict[str, Any]]) -> list[str]:
    """The settings that are not the same in all rivals, as name=value."""
    names = [name for name in settings if any(rival.get(name) != settings[name] for rival in rivals)]
    names += sorted({name for rival in rivals for name in rival} - settings.keys())
    if len(names) > 1 and "layer_pairs" in names:
        names.remove("layer_pairs")  # they follow from the others
    return [f"{name}={_short(settings.get(name))}" for name in names]


def _short(value: Any) -> str:
    if isinstance(value, dict):  # fingerprints of the rows
        return "+".join(f"{split} {str(digest)[:6]}" for split, digest in value.items())
    return ":".join(map(_short, value)) if isinstance(value, list) else str(value)


def _without_seed(value: Any, seed: int) -> Any:
    return re.sub(rf"\bseed-{seed}\b", "seed-N", value) if isinstance(value, str) else value


# -- Showing -----------------------------------------------------------------------------------------------------------


def _metrics_of(rows: Sequence[Row]) -> list[str]:
    return [*dict.fromkeys(metric for row in rows for metric in row.results[0].metrics)]


def _clipped(text: str, length: int = 36) -> str:
    """At most so long: a path keeps its end."""
    return text if len(text) <= length else f"{text[: length // 3]}...{text[3 - length * 2 // 3 :]}"


def _with_deviation(row: Row, metric: str) -> str:
    deviation = row.deviation(metric)
    return f"{row.mean(metric):.4f} ± {'-' if deviation is None else f'{deviation:.4f}'}"


def _panels(rows: Sequence[Row]) -> list[figures.ScorePanel]:
    """A panel for each task, of its main metric."""
    panels = []
    for task in dict.fromkeys(row.task for row in rows):
        metric = get_task(task).primary_metric
        of_task = [row for row in rows if row.task == task]
        labels = ["\n".join([f"{row.method} ({row.seeds})", *map(_clipped, row.settings)]) for row in of_task]
        teachers = {row.teacher for row in of_task}
        panels.append(
            figures.ScorePanel(
                title=task,
                metric=metric,
                labels=labels,
                scores=[row.values(metric) for row in of_task],
                means=[row.mean(metric) for row in of_task],
                deviations=[row.deviation(metric) for row in of_task],
                teacher=teachers.pop() if len(teachers) == 1 else None,
            )
        )
    return panels


if __name__ == "__main__":
    scripts.report()
