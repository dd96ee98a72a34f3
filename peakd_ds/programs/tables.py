"""peakd-report: means and standard deviations over seeds, from the results.json of many runs.

    peakd-report runs/paper [--out FOLDER]

A row of the table is a task, a method and one set of settings; its runs differ only in the seed. Runs with other
settings, or on other rows of data, get rows of their own, and a column shows what differs. Runs that are missing,
unfinished or failed are listed below the table, and a row shows how many of the seeds in its grid it has.
"""

import argparse
import csv
import io
import json
import os
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peakd_ds.config.setting import check_text
from peakd_ds.data.metrics import higher_is_better
from peakd_ds.data.tasks import AGREEMENT
from peakd_ds.errors import UserError, one_line
from peakd_ds.files import write_atomically
from peakd_ds.programs import scripts
from peakd_ds.programs.run_results import DAMAGE, Result, Unusable, printable, read_result
from peakd_ds.results import figures, markdown


@dataclass
class Row:
    """Runs that differ only in their seed."""

    task: str
    method: str
    settings: list[str]
    """NAME=VALUE of each setting in which the rows of this task and method differ."""
    results: list[Result]
    num_planned: int
    """Seeds in the grid; 0 if no grid is known."""

    def values(self, metric: str) -> list[float]:
        return [result.metrics[metric] for result in self.results]

    def mean(self, metric: str) -> float:
        return statistics.mean(self.values(metric))

    def deviation(self, metric: str) -> float | None:
        """Standard deviation of the sample (n - 1); None for one seed."""
        return statistics.stdev(self.values(metric)) if len(self.results) > 1 else None

    @property
    def teacher(self) -> float | None:
        """Mean score of the runs' teachers, each counted as often as it was used; None if a run has no score."""
        scores = [result.teacher for result in self.results if result.teacher is not None]
        return statistics.mean(scores) if len(scores) == len(self.results) else None

    @property
    def seeds(self) -> str:
        """The number of runs, and the number that the grid has if some are missing: "5", "3 of 5"."""
        is_complete = self.num_planned in (0, len(self.results))
        return f"{len(self.results)}" + ("" if is_complete else f" of {self.num_planned}")


def gather(folders: Sequence[Path]) -> tuple[list[Row], list[str]]:
    """Rows of the finished runs at or below the folders, and a line about each other run.

    Raises:
        UserError: a folder does not exist, there is no run in any of them, or two runs do not differ even in the seed.
    """
    planned = {path: None for folder in folders for path in _planned_runs(folder)}
    results: list[Result] = []
    left_out: list[str] = []
    found = {path: None for folder in folders for path in _run_folders(folder, left_out)}
    for path in {**planned, **found}:
        try:
            results.append(read_result(path))
        except Unusable as error:
            left_out.append(one_line(f"{_relative(path)}: {error}"))
    if not results and not left_out:
        raise UserError(f"no run in {', '.join(map(str, folders))}; give a run folder, or a folder of run folders")
    return _rows(results, set(planned)), left_out


def to_markdown(rows: Sequence[Row], left_out: Sequence[str]) -> str:
    """The table, an explanation of its columns, and the runs that are not in it."""
    metrics = _metrics_of(rows)
    has_settings = any(row.settings for row in rows)
    header = ["task", "method", *(["settings"] if has_settings else []), "seeds", *metrics, "teacher", "params"]
    cells = []
    for row in rows:
        first = row.results[0]
        cells.append(
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
    lines = [markdown.table([*header, "layers (stored)"], cells, is_padded=True), ""]
    lines += ["Metrics on all rows of the dev set: mean ± sample standard deviation (n - 1) over the seeds, or - for a"]
    lines += ["single seed. `teacher` is the mean of the teachers' main metric."]
    if AGREEMENT in metrics:
        lines += ["`agreement` is with the teacher's predictions, of runs whose rows have no labels."]
    lines += [f"Lower is better: {metric}." for metric in metrics if not higher_is_better(metric)]
    if any(result.settings["select_on"] == "dev" for row in rows for result in row.results):
        lines += ["Runs with select_on dev chose their best epoch on the dev set, so their scores are optimistic."]
    if left_out:
        lines += ["", f"Not in the table: {len(left_out)}", "", *(f"- {line}" for line in left_out)]
    return "\n".join(lines) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """A line for each row and metric, in full precision; std is empty for one seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow("task method settings metric mean std n asked seeds teacher params stored_layers layers".split())
    for row in rows:
        first, seeds = row.results[0], " ".join(str(result.seed) for result in row.results)
        for metric in first.metrics:
            scores = [metric, row.mean(metric), row.deviation(metric), len(row.results), row.num_planned or None, seeds]
            sizes = [first.params, first.stored_layers, first.effective_layers]
            writer.writerow([row.task, row.method, ", ".join(row.settings), *scores, row.teacher, *sizes])
    return text.getvalue()


def main(args: argparse.Namespace) -> None:
    """Write report.md, report.csv and report.png, and print the Markdown.

    Raises:
        UserError: as `gather`, or no run is finished.
    """
    rows, left_out = gather(args.runs)
    if not rows:
        raise UserError(
            f"none of the {len(left_out)} runs in {', '.join(map(str, args.runs))} is finished; "
            f"start them again, or give other folders ({left_out[0]})"
        )
    out = args.out or args.runs[0]
    text = to_markdown(rows, left_out)
    write_atomically(out / "report.md", text)
    write_atomically(out / "report.csv", to_csv(rows))
    figures.score_panels(_panels(rows), out / "report.png")
    print(text)
    print(f"report.md, report.csv and report.png are in {out}/")


# -- Finding runs ------------------------------------------------------------------------------------------------------


def _planned_runs(folder: Path) -> Iterator[Path]:
    """Run folders at or below `folder` that are in the grid of a sweep, in the grid's order."""
    root = folder.resolve()
    for runs in (root, *root.parents):
        for file in sorted((runs / "grids").glob("*.json")):
            try:
                names = json.loads(file.read_text(encoding="utf-8"))
                if not isinstance(names, list):
                    raise ValueError("it is not a list")
                for name in names:
                    check_text("name", printable(name))
            except DAMAGE as error:
                raise UserError(
                    f"{file} is damaged ({one_line(str(error))}); delete it, or start the sweep again"
                ) from error
            yield from (path for path in (runs / name for name in names) if path.is_relative_to(root))


def _run_folders(folder: Path, left_out: list[str]) -> Iterator[Path]:
    """Folders at or below `folder` that hold a run; adds a line to `left_out` for each that cannot be read."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a run folder, or a folder of run folders")

    def note_unreadable(error: OSError) -> None:
        left_out.append(one_line(f"{_relative(Path(error.filename))}: cannot be read ({error.strerror})"))

    for path, folders, files in os.walk(folder.resolve(), onerror=note_unreadable):
        if {"config.yaml", "results.json"} & {*files}:
            yield Path(path)
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _relative(path: Path) -> str:
    """The path relative to the working directory if it is below it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


# -- Grouping ----------------------------------------------------------------------------------------------------------


def _rows(results: Sequence[Result], planned: set[Path]) -> list[Row]:
    """One row for each task, method and set of settings: tasks, then methods, in the order of their first results."""
    groups = _groups(results)
    tasks, methods = ([*dict.fromkeys(key[position] for key in groups)] for position in (0, 1))
    rows = []
    for key in sorted(groups, key=lambda key: (tasks.index(key[0]), methods.index(key[1]))):
        settings = [_common_settings(group) for group in groups[key]]
        for group, its_settings in zip(groups[key], settings, strict=True):
            parents = {result.folder.parent for result in group if result.folder in planned}
            in_grid = {path for path in planned if path.parent in parents}
            num_planned = len(in_grid | {result.folder for result in group}) if in_grid else 0
            by_seed = sorted(group, key=lambda result: result.seed)
            rows.append(Row(*key, _differences(its_settings, settings), by_seed, num_planned))
    return rows


def _groups(results: Sequence[Result]) -> dict[tuple[str, str], list[list[Result]]]:
    """Results by task and method, in groups that differ only in the seed.

    Raises:
        UserError: two results of a group have the same seed.
    """
    groups: dict[tuple[str, str], list[list[Result]]] = {}
    for result in results:
        rivals = groups.setdefault((result.task, result.method), [])
        group = next((group for group in rivals if all(_differ_only_in_seed(result, other) for other in group)), None)
        if group is None:
            rivals.append([result])
            continue
        twin = next((other for other in group if other.seed == result.seed), None)
        if twin is not None:
            raise UserError(
                f"{_relative(twin.folder)} and {_relative(result.folder)} are the same run ({result.task}, "
                f"{result.method}, seed {result.seed}, same settings) and would count as two seeds; give one of them"
            )
        group.append(result)
    return groups


def _differ_only_in_seed(one: Result, other: Result) -> bool:
    """Whether two runs of a task and method have the same settings and metrics.

    Paths that differ only in the run's own seed count as the same: sweeps write such paths (seed-7/).
    """
    has_same_names = one.settings.keys() == other.settings.keys() and one.metrics.keys() == other.metrics.keys()
    return has_same_names and all(
        value == other.settings[name]
        or _without_seed(value, one.seed) == _without_seed(other.settings[name], other.seed)
        for name, value in one.settings.items()
    )


def _common_settings(group: Sequence[Result]) -> dict[str, Any]:
    """Settings of all runs of a group, with seed-N in paths that differ in the seed."""
    first = group[0]
    return {
        name: value if all(other.settings[name] == value for other in group) else _without_seed(value, first.seed)
        for name, value in first.settings.items()
    }


def _differences(settings: dict[str, Any], rivals: Sequence[dict[str, Any]]) -> list[str]:
    """The settings that are not the same in all rivals, as NAME=VALUE."""
    names = [name for name in settings if any(rival.get(name) != settings[name] for rival in rivals)]
    names += sorted({name for rival in rivals for name in rival} - settings.keys())
    if len(names) > 1 and "layer_pairs" in names:
        names.remove("layer_pairs")  # it follows from the other settings
    return [f"{name}={_short(settings.get(name))}" for name in names]


def _short(value: object) -> str:
    if isinstance(value, dict):  # digests of the rows, by split
        return "+".join(f"{split} {str(digest)[:6]}" for split, digest in value.items())
    return ":".join(map(_short, value)) if isinstance(value, list) else str(value)


def _without_seed(value: object, seed: int) -> object:
    return re.sub(rf"\bseed-{seed}\b", "seed-N", value) if isinstance(value, str) else value


# -- Showing -----------------------------------------------------------------------------------------------------------


def _metrics_of(rows: Sequence[Row]) -> list[str]:
    return [*dict.fromkeys(metric for row in rows for metric in row.results[0].metrics)]


def _clipped(text: str, length: int = 36) -> str:
    """The text with its middle cut out if it is longer than `length`; a path keeps its end."""
    return text if len(text) <= length else f"{text[: length // 3]}...{text[3 - length * 2 // 3 :]}"


def _with_deviation(row: Row, metric: str) -> str:
    deviation = row.deviation(metric)
    return f"{row.mean(metric):.4f} ± {'-' if deviation is None else f'{deviation:.4f}'}"


def _task_and_metric(row: Row) -> tuple[str, str]:
    return row.task, row.results[0].primary_metric


def _panels(rows: Sequence[Row]) -> list[figures.ScorePanel]:
    """A panel for each task, with its main metric; own data may have the name of a task, or runs with other metrics."""
    panels = []
    for task, metric in dict.fromkeys(map(_task_and_metric, rows)):
        of_task = [row for row in rows if _task_and_metric(row) == (task, metric)]
        labels = ["\n".join([f"{row.method} ({row.seeds})", *map(_clipped, row.settings)]) for row in of_task]
        labels = [label.replace("$", r"\$") for label in labels]  # Matplotlib would set $..$ as a formula
        teachers = {row.teacher for row in of_task}
        panels.append(
            figures.ScorePanel(
                title=task,
                metric=metric if higher_is_better(metric) else f"{metric} (lower is better)",
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
