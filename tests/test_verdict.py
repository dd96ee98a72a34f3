"""The line at the end of a run: how good, fast and small the student is, from what was measured."""

from pathlib import Path
from typing import Any

import pytest

from peakd_ds.results.verdict import how_to_use, verdict, weights_mb


def model(score: float | None, samples_per_s: float | None = 100.0, **more: Any) -> dict[str, Any]:
    return {"metrics": {} if score is None else {"accuracy": score}, "samples_per_s": samples_per_s, **more}


@pytest.mark.parametrize(
    ("student", "teacher", "teacher_mb", "student_mb", "text"),
    [
        (model(0.888, 180.0), model(0.9), 91.2, 62.3, "98.7 % of TEACHER, 1.8x faster, 62 MB instead of 91"),
        (model(0.9, 50.0), model(0.9), 9.26, 9.24, "100.0 % of TEACHER, 2.0x slower, 9.2 MB instead of 9.3"),
        (model(0.5, 104.0), model(0.0), 20, 10, "accuracy 0.5000, the teacher's 0.0000, as fast, 10 MB instead of 20"),
        (model(0.8), None, None, 62.3, "accuracy 0.8000, 62 MB"),
        (model(0.8), model(0.9, None), None, 62.3, "88.9 % of TEACHER, 62 MB"),
        (model(None, agreement=0.932), model(None, None), None, 62, "93.2 % agreement with the teacher, 62 MB"),
        (model(None, agreement=None), None, None, 62.3, "62 MB"),
        (None, model(0.9), 91.0, None, ""),
    ],
)  # fmt: skip
def test_verdict(student: Any, teacher: Any, teacher_mb: float | None, student_mb: float | None, text: str) -> None:
    assert verdict({"student": student, "teacher": teacher}, "accuracy", teacher_mb, student_mb) == text.replace(
        "TEACHER", "the teacher's accuracy"
    )


def test_a_share_of_an_error_means_nothing() -> None:
    models = {
        name: {"metrics": {"rmse": rmse}, "samples_per_s": None} for name, rmse in (("student", 0.5), ("teacher", 0.4))
    }
    assert verdict(models, "rmse", None, None) == "rmse 0.5000, the teacher's 0.4000"


def test_weights_are_those_on_disk_or_of_the_parameters(tmp_path: Path) -> None:
    assert weights_mb(tmp_path, 2_000_000) == weights_mb(tmp_path / "none", 2_000_000) == 8.0
    for name in ("model-1.safetensors", "model-2.safetensors", "config.json"):
        (tmp_path / name).write_bytes(bytes(500_000))
    assert weights_mb(tmp_path, 2_000_000) == 1.0
    assert weights_mb(tmp_path, None) is None


def test_how_to_use_the_smallest_thing_that_needs_nothing_of_ours(tmp_path: Path) -> None:
    assert how_to_use(tmp_path) == ""
    for name, start in (("student", "import peakd_ds.sps; from"), ("student_unrolled", "from")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
        line = how_to_use(tmp_path)
        assert (
            line == f'{start} transformers import pipeline; pipeline("text-classification", model="{tmp_path / name}")'
        )
        compile(line, "line", "exec")
