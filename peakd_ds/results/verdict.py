"""The verdict on a student in one line: how good, how fast and how small it is, beside its teacher."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peakd_ds.data.metrics import higher_is_better
from peakd_ds.data.tasks import AGREEMENT

FP32_BYTES = 4


def verdict(results: Mapping[str, Any], metric: str, teacher_mb: float | None, student_mb: float | None) -> str:
    """The verdict as "98.7 % of the teacher's accuracy, 1.8x faster, 62 MB instead of 91".

    What was not measured is left out: a teacher without weights has neither speed nor size, rows without labels have no
    score.

    Args:
        results: As in results.json.
        metric: The task's main score.
        teacher_mb: Size of the teacher's weights; None if there are none.
        student_mb: Size of the student's.

    Returns:
        "" if there is no student.
    """
    student, teacher = results["student"], results["teacher"]
    if student is None:
        return ""
    parts = [_quality(student, teacher, metric)]
    if teacher is not None and teacher["samples_per_s"]:
        parts.append(_speed(student["samples_per_s"] / teacher["samples_per_s"]))
    if student_mb is not None:
        digits = 0 if student_mb >= 10 else 1
        instead = "" if teacher_mb is None else f" instead of {teacher_mb:.{digits}f}"
        parts.append(f"{student_mb:.{digits}f} MB{instead}")
    return ", ".join(part for part in parts if part)


def _quality(student: Mapping[str, Any], teacher: Mapping[str, Any] | None, metric: str) -> str:
    """The student's score as a share of the teacher's, where a share means something; else both, or what there is."""
    score = student["metrics"].get(metric)
    theirs = None if teacher is None else teacher["metrics"].get(metric)
    name = metric.replace("_", " ")
    if score is None:
        agreement = student.get(AGREEMENT)
        return "" if agreement is None else f"{100 * agreement:.1f} % agreement with the teacher"
    if theirs is None:
        return f"{name} {score:.4f}"
    if not higher_is_better(metric) or theirs <= 0 or score < 0:
        return f"{name} {score:.4f}, the teacher's {theirs:.4f}"
    return f"{100 * score / theirs:.1f} % of the teacher's {name}"


def _speed(ratio: float) -> str:
    """A ratio of speeds in words."""
    if 0.95 <= ratio < 1.05:
        return "as fast"
    return f"{ratio:.1f}x faster" if ratio > 1 else f"{1 / ratio:.1f}x slower"


def weights_mb(folder: Path, num_parameters: int | None) -> float | None:
    """Megabytes (1e6 bytes) of a saved model's weights; of one without files here, of its parameters in fp32.

    Args:
        num_parameters: None if there is no model.
    """
    if num_parameters is None:
        return None
    files = [*folder.glob("*.safetensors")] if folder.is_dir() else []
    num_bytes = sum(file.stat().st_size for file in files) or FP32_BYTES * num_parameters
    return num_bytes / 1e6


def how_to_use(folder: Path) -> str:
    """A line of Python that uses the student in a run folder; "" if there is none."""
    if (folder / "student_unrolled" / "config.json").exists():
        imports, model = "", "student_unrolled"
    elif (folder / "student" / "config.json").exists():
        imports, model = "import peakd_ds.sps; ", "student"
    else:
        return ""
    return f'{imports}from transformers import pipeline; pipeline("text-classification", model="{folder / model}")'
