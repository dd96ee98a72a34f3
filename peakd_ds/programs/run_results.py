"""Results of runs: what results.json and the notes beside it say, or why a run cannot be in a table."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peakd_ds.config import RESULT_NEUTRAL, RunConfig
from peakd_ds.config.setting import check_text
from peakd_ds.data.tasks import AGREEMENT, get_task
from peakd_ds.errors import one_line, shown
from peakd_ds.programs.grid import TEACHER_ONLY

DAMAGE = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, OSError, RecursionError)
"""What reading a damaged file raises."""
DEFAULTS = json.loads(json.dumps(asdict(RunConfig())))
"""Values of settings that the results of an earlier version do not have."""


class Unusable(ValueError):
    """A run that cannot be in the table; the message says why."""


@dataclass(frozen=True)
class Result:
    """The result of a finished run."""

    folder: Path
    task: str
    method: str
    """As in results.json; "teacher" where only the teacher stage ran."""
    seed: int
    settings: dict[str, Any]
    """All settings that change the result, except the seed."""
    metrics: dict[str, float]
    primary_metric: str
    """The one of `metrics` that picks the best epoch."""
    teacher: float | None
    """The teacher's primary metric; None without a teacher, and where it is the agreement with the teacher."""
    params: int
    stored_layers: int
    effective_layers: int


def read_result(folder: Path) -> Result:
    """The result of a finished run.

    Raises:
        ValueError: the run is missing, unfinished or failed, or its files are damaged; the message says which.
    """
    file = folder / "results.json"
    try:
        failure = _failure(folder, file)
        if failure is not None:
            raise Unusable(f"failed: {' '.join(failure.split())}")
        if not file.exists():
            raise Unusable("unfinished (no results.json)" if folder.exists() else "missing")
        return _result_in(folder, json.loads(file.read_text(encoding="utf-8")))
    except Unusable:
        raise
    except DAMAGE as error:
        raise Unusable(f"damaged results.json ({type(error).__name__}: {one_line(str(error))})") from error


def _result_in(folder: Path, results: Any) -> Result:
    """The result in the content of results.json. Raises Unusable for an unfinished run, `DAMAGE` for a damaged one."""
    settings = {**DEFAULTS, **results["settings"]}
    task, primary, expected = _task_of(results)
    is_student = results["student"] is not None
    if not is_student and (settings["stages"] != ["teacher"] or (folder / "checkpoints" / "ptp").exists()):
        raise Unusable(f"unfinished (stages {','.join(settings['stages'])} ran, there is no student)")
    model = results["student" if is_student else "teacher"]
    changing = {name: settings[name] for name in settings if name not in RESULT_NEUTRAL and name != "seed"}
    if (folder / "data.json").exists():
        changing["data"] = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    for value in (*settings, *settings.values(), changing.get("data")):
        _check_shallow(value)
    scores, teacher = model["metrics"], results["teacher"]
    if primary == AGREEMENT:
        if model["agreement"] is None:
            raise Unusable("no score: no row has a label, and the teacher's outputs of the reported rows are not known")
        scores, teacher = {AGREEMENT: model["agreement"]}, None
    return Result(
        folder=folder,
        task=task,
        method=printable(results["method"]) if is_student else TEACHER_ONLY,
        seed=_whole(results["seed"]),
        settings=changing,
        metrics={printable(name): _score(scores[name]) for name in (*scores, *expected)},
        primary_metric=primary,
        teacher=None if teacher is None else _score(teacher["metrics"][primary]),
        params=_whole(model["params"]),
        stored_layers=_whole(model.get("stored_layers", model["effective_layers"])),
        effective_layers=_whole(model["effective_layers"]),
    )


def _task_of(results: Any) -> tuple[str, str, tuple[str, ...]]:
    """The task's name, the metric that picks its epochs, and those that each run has; of own data, results.json says.

    Raises:
        ValueError: no task has the name, or a name is none.
    """
    if "primary_metric" in results:
        primary = printable(results["primary_metric"])
        return printable(results["task"]), primary, (primary,)
    task = get_task(results["task"])
    return task.name, task.primary_metric, task.metrics


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 10**15:
        raise ValueError(f"{shown(value)} is not a count")
    return value


def _score(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 10**15:
        raise ValueError(f"{shown(value)} is not a score")
    return float(value)


def printable(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{shown(value)} is not a name")
    return value


def _check_shallow(value: Any, depth: int = 4) -> None:
    """Raise ValueError for what no setting is: a long text, many nested lists, an unprintable character."""
    if isinstance(value, dict | list):
        if not depth or len(value) > 10_000:
            raise ValueError(f"{shown(value)} is not the value of a setting")
        for inner in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_shallow(inner, depth - 1)
    elif isinstance(value, str):
        check_text("settings:", value)


def _failure(folder: Path, results: Path) -> str | None:
    """Why the last start of a run failed, as peakd-sweep (RUN.failed) or slurm/distill.sh (RUN/logs/START/) noted it.

    None if it did not fail. A failure counts even if there are earlier results: these may have other settings than the
    last start.
    """
    note = Path(f"{folder}.failed")
    if note.exists():
        return note.read_text(errors="replace")
    starts = {file.parent: _time_in(file) for file in (folder / "logs").glob("*/start.json")}
    start = max(starts, key=starts.__getitem__, default=None)
    if start is None or not (start / "end.json").exists() or starts[start] < _time_in(results):
        return None
    try:
        outcomes = {json.loads(file.read_text())["how"] for file in start.glob("rank-*.json")}
        if not outcomes & {"refused", "failed", "lost"}:
            return None
        return printable(json.loads((start / "end.json").read_text())["cause"])
    except DAMAGE as error:
        raise Unusable(f"damaged notes in logs/{start.name} ({one_line(str(error))})") from error


def _time_in(file: Path) -> float:
    """When a start began or its results were written, from the file's "at" [s]; 0 without one.

    The file system's own time would be wrong for a copied file.
    """
    try:
        at = float(json.loads(file.read_text())["at"])
        return at if math.isfinite(at) else 0.0
    except DAMAGE:
        return 0.0
