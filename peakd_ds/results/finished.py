"""Whether a run folder holds everything that a start would make, so that nothing need be done again.

results.json has checksums of itself and of the models that it speaks of. What was changed, damaged or removed since is
made again; what is whole stays as it is.
"""

import glob
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from peakd_ds.command_line import differences, saved_settings
from peakd_ds.config import RunConfig
from peakd_ds.engine import checkpoint
from peakd_ds.errors import UserError
from peakd_ds.files import damage_of, parse_json, sha256_of

RESULTS = "results.json"
ONNX_FILES = ("model.onnx", "model_int8.onnx")
CHECKSUM = "sha256"
"""Key of results.json's own checksum."""
CARD_SETTINGS = ("max_int8_drop", "model_license", "language")
"""Settings that only change what is said of a model."""
WORDS = {
    "README.md": "scores, sizes and speed",
    "results.json": "the same for programs",
    "student": "the student, as small as it is stored (needs import peakd_ds.sps)",
    "student_unrolled": "the student for plain transformers",
    "student_unrolled/model.onnx": "the student for onnxruntime",
    "student_unrolled/model_int8.onnx": "the same with weights in int8",
    "teacher": "the teacher that this run fine-tuned",
}


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of the models in a run folder, by their names below it."""
    names = [
        *(file for name in ("student", "student_unrolled") for file in sorted((folder / name).glob("*.safetensors"))),
        *(file for file in ((folder / "student_unrolled") / name for name in ONNX_FILES) if file.exists()),
    ]
    with ThreadPoolExecutor() as pool:
        return dict(zip((str(file.relative_to(folder)) for file in names), pool.map(sha256_of, names), strict=True))


def with_checksum(results: dict[str, Any]) -> dict[str, Any]:
    """The results with a checksum of their own."""
    content = {name: value for name, value in results.items() if name != CHECKSUM}
    return {**content, CHECKSUM: _digest(content)}


def read(folder: Path) -> dict[str, Any] | None:
    """The results in a run folder; None if there are none that can be relied on."""
    try:
        results = parse_json((folder / RESULTS).read_text(encoding="utf-8"))
        content = {name: value for name, value in results.items() if name != CHECKSUM}
        return results if results[CHECKSUM] == _digest(content) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_whole(folder: Path, results: dict[str, Any], *names: str) -> bool:
    """Whether files of the run are those that its results speak of."""
    try:
        return all(results["files"].get(name) == sha256_of(folder / name) for name in names)
    except OSError:
        return False


def has_student(folder: Path, results: dict[str, Any]) -> bool:
    """Whether the results have the scores of the student that is there."""
    return bool(results.get("student")) and is_whole(folder, results, "student/model.safetensors")


def lacks(config: RunConfig) -> str | None:
    """What a run folder lacks of all that these settings ask for, in words; None if everything is there."""
    folder = Path(config.run_dir)
    results = read(folder)
    if results is None:
        return f"{RESULTS} is missing, or of an earlier version"
    before = results["settings"]
    for stage in config.stages:
        if stage not in before["stages"] and checkpoint.finished(folder / "checkpoints" / stage) is None:
            return f"stage {stage} did not run"
    changed = next((name for name in CARD_SETTINGS if before.get(name) != getattr(config, name)), None)
    if changed is not None:
        return f"{changed} is another"
    if "distill" in config.stages and not results["student"]:
        return "there is no student"
    missing = next((name for name in _wanted(config, results) if not (folder / name).exists()), None)
    if missing is None and results["student"] and config.export_onnx and "onnx" not in results["exports"]:
        missing = "model.onnx"
    if missing is not None:
        return f"{missing} is missing"
    if config.trim_vocabulary and results["student"] and "vocabulary" not in results["student"]:
        return "the vocabulary is not trimmed"
    if checksums(folder) != results["files"]:
        return "the exported models were changed"
    return None


def _wanted(config: RunConfig, results: dict[str, Any]) -> Iterator[str]:
    """Files that a finished run has with these settings."""
    yield "README.md"
    if results["student"]:
        yield "student/README.md"
        if config.export_unrolled:
            yield "student_unrolled/README.md"
        if config.export_onnx:
            yield "student_unrolled/model.onnx"


def say_if_finished(config: RunConfig) -> str | None:
    """What is where, if the run of these settings is finished and its rows are not newer; else None.

    It reads no rows, tokenizers or models, so it takes no more time than the checksums of the exported models.
    """
    folder = Path(config.run_dir)
    try:
        saved_yaml = (folder / "config.yaml").read_text(encoding="utf-8")
        if config.dtype == "auto":
            config = replace(config, dtype=saved_settings(saved_yaml)["dtype"])
        if config.dry_run or differences(config, saved_yaml) or lacks(config) is not None:
            return None
        stages = (read(folder) or {})["finished_stages"]
        if not all(_is_as_left(folder, stage) for stage in stages):
            return None
        written = (folder / RESULTS).stat().st_mtime
        if any(Path(name).stat().st_mtime > written for name in _sources(config)):
            return None
    except (OSError, ValueError, LookupError, TypeError, UserError):
        return None
    forget_failure(folder)
    return f"this run is finished, and nothing is done again\n{where(folder)}"


SAVED = {"teacher": "teacher", "ptp": "checkpoints/ptp/student"}
"""Folders of the models that finished stages have saved for later ones."""


def _is_as_left(folder: Path, stage: str) -> bool:
    """Whether a stage is still finished, and the model that it has saved for later ones is what it saved."""
    if checkpoint.finished(folder / "checkpoints" / stage) is None:
        return False
    model = folder / SAVED[stage] if stage in SAVED else None
    return model is None or damage_of(model) is None


def forget_failure(folder: Path) -> None:
    """Remove peakd-sweep's note of an earlier start that failed."""
    Path(f"{folder}.failed").unlink(missing_ok=True)


def _sources(config: RunConfig) -> Iterator[str]:
    """The user's files that the rows come from."""
    for files in (config.train_file, config.validation_file, config.test_file, config.unlabeled_file):
        for pattern in files or ():
            yield from glob.glob(pattern)
    yield from config.teacher_outputs or ()
    if config.data_dir and config.task:
        yield from glob.glob(f"{glob.escape(config.data_dir)}/{glob.escape(config.task)}/*.parquet")
    if config.dataset_name:
        yield from glob.glob(f"{glob.escape(config.dataset_name)}/**/*.arrow", recursive=True)


def where(folder: Path) -> str:
    """Lines that say what is where in a finished run folder."""
    there = {name: words for name, words in WORDS.items() if (folder / name).exists()}
    width = max(len(f"{folder}/{name}") for name in there) if there else 0
    return "\n".join(f"  {f'{folder}/{name}'.ljust(width)}  {words}" for name, words in there.items())
