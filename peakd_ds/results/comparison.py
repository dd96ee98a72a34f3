"""The table that says how much smaller and faster students are, and at what loss: teacher, students, ONNX files.

It is made from results.json alone, of one run or of several.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from peakd_ds.results.markdown import table

Results = Mapping[str, Any]
"""The content of a results.json."""
HEADER = ("parameters", "MB on disk", "ms, batch 1", "samples/s, batch 32")


class Row(NamedTuple):
    """One model of the table; None where a figure is not known."""

    name: str
    params: int | None
    disk_mb: float | None
    latency_ms: float | None
    batch_samples_per_s: float | None
    metrics: Mapping[str, float]
    agreement: float | None = None


def rows_of(results: Results, name: str = "student", with_teacher: bool = True, with_all: bool = True) -> list[Row]:
    """The rows of one run.

    Args:
        name: What its student is called.
        with_teacher: Whether the teacher comes first.
        with_all: Whether to list every form of the student, or the stored one and int8 ONNX alone.
    """
    rows, exports = [], results.get("exports", {})
    if with_teacher and results["teacher"] is not None:
        rows.append(_row("teacher", results["teacher"]))
    student = results["student"]
    if student is not None:
        rows.append(_row(name, student))
        scores = {"metrics": student["metrics"]}
        unrolled = exports.get("student_unrolled")
        if with_all and unrolled is not None and unrolled["params"] != student["params"]:
            rows.append(_row(f"{name}, unrolled", {**scores, **unrolled}))
        for key, label in (("onnx", "ONNX"), ("onnx_int8", "int8 ONNX")):
            if key in exports and (with_all or key == "onnx_int8"):
                rows.append(_row(f"{name}, {label}", {**(unrolled or {}), **exports[key]}))
    return rows


def _row(name: str, model: Mapping[str, Any]) -> Row:
    params, disk_mb, *speed = (model.get(key) for key in ("params", "disk_mb", "latency_ms", "batch_samples_per_s"))
    return Row(name, params, disk_mb, speed[0], speed[1], model["metrics"], model.get("agreement"))


def table_of(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, padded for readers of the plain text."""
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.metrics))
    has_agreement = any(row.agreement is not None for row in rows)
    header = ["", *HEADER, *metrics, *(["agreement"] if has_agreement else [])]
    return table(header, [_cells(row, metrics, has_agreement) for row in rows], is_padded=True)


def _cells(row: Row, metrics: Iterable[str], has_agreement: bool) -> list[str]:
    agreement = [_shown(row.agreement, ".4f")] if has_agreement else []
    return [
        row.name,
        "" if row.params is None else f"{row.params / 1e6:.1f} M",
        _shown(row.disk_mb, ".1f"),
        _shown(row.latency_ms, ".1f"),
        _shown(row.batch_samples_per_s, ".0f"),
        *(_shown(row.metrics.get(metric), ".4f") for metric in metrics),
        *agreement,
    ]


def _shown(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def student_name(results: Results) -> str:
    """What a run's student is called beside those of other runs."""
    sharing = results["settings"]["sharing"]
    return {"none": "plain student", "sps": "SPS student"}.get(sharing, f"{sharing} student")


def joint_table(runs: Sequence[Results], names: Sequence[str]) -> str:
    """One table of several runs: each teacher once, and for each run its student and the int8 ONNX of it.

    Args:
        names: What tells students of one name apart, such as the folders of the runs.
    """
    called = [student_name(results) for results in runs]
    rows: list[Row] = []
    seen: set[tuple[Any, ...]] = set()
    for results, label, name in zip(runs, called, names, strict=True):
        teacher = results["teacher"]
        key = () if teacher is None else (teacher["params"], *teacher["metrics"].items())
        label = label if called.count(label) == 1 else f"{label} ({name})"
        rows += rows_of(results, label, with_teacher=key not in seen, with_all=False)
        seen.add(key)
    return table_of(rows)


def files_table(results: Results, verdict: str) -> str:
    """For the card of the unrolled student: its files beside each other, and which to ship; "" without ONNX."""
    exports = results["exports"]
    if "onnx" not in exports:
        return ""
    files = {"model.safetensors": {"metrics": results["student"]["metrics"], **exports["student_unrolled"]}}
    files["model.onnx"] = exports["onnx"]
    if "onnx_int8" in exports:
        files["model_int8.onnx"] = exports["onnx_int8"]
    rows = [_row(name, {**entry, "params": exports["student_unrolled"]["params"]}) for name, entry in files.items()]
    return f"{table_of(rows)}\n\n{verdict}"
