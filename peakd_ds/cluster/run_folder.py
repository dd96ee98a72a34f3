"""The run folder: whose it is, and whether a start with these settings may write to it.

A folder that exists is a run's if its config.yaml is one that a run wrote. Before config.yaml a start writes data.json,
lock.json and, under Slurm, logs/; a folder that holds nothing else of a run may be one whose first start was cut off.
Every other folder that holds a name that a run writes belongs to the user and is refused: nothing there is replaced.
"""

import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from peakd_ds.command_line import differences, set_values, to_words, to_yaml
from peakd_ds.config import SPECS, RunConfig
from peakd_ds.config.data import SOURCES
from peakd_ds.errors import UserError, first_line
from peakd_ds.files import obstacle, parse_json, write_atomically

CONFIG = "config.yaml"
DATA = "data.json"
NAMES = frozenset(
    [
        *(CONFIG, DATA, "README.md", "results.json", "metrics.jsonl", "loss_curves.png", "lock.json", "logs", "tb"),
        *("teacher", "student", "student_unrolled", "checkpoints", "cache", "teacher_cache"),
    ]
)
"""What a run writes into its folder."""
SETTINGS_OF_EARLIER_VERSIONS: frozenset[str] = frozenset()
"""Keys that config.yaml of an earlier version may have and that are no settings any more."""
_MARKS = {"run_dir", "num_hidden_layers", "seed"}
"""Settings that every run saves, beside one of SOURCES."""
_OF_THE_TEACHER = frozenset(
    [
        *("task", "teacher", "name", "text_columns", "label_column", "label_columns", "label_names", "metric"),
        *("dataset_config_name", "teacher_weights", "teacher_epochs"),
    ]
)
"""Settings that a fine-tuned teacher does not outlive: with others, it is no teacher of the rows."""
_CHECKSUM = "# sha256 of the lines above: "


def check(config: RunConfig) -> None:
    """Raise UserError unless the run folder is new, or holds a run with these settings, and can be written.

    Args:
        config: With dtype resolved, as the saved settings have it.
    """
    folder = Path(config.run_dir)
    check_owner(folder)
    _check_place(config)
    saved = folder / CONFIG
    if saved.exists():
        changed = differences(config, _read_text(saved))
        if changed:
            raise UserError(
                f"--run_dir {folder} holds a run with other settings ({'; '.join(changed)}); nothing was "
                "changed there: take another --run_dir, or the settings it was started with"
                f"{_with_its_teacher(config, changed)}"
            )
    in_the_way = obstacle(folder)
    if in_the_way is not None:
        raise UserError(
            f"--run_dir {folder} cannot be written ({in_the_way} is no folder you may write to); take another --run_dir"
        )


def _with_its_teacher(config: RunConfig, changed: list[str]) -> str:
    """The end of the refusal: the command of a new run with the teacher that the run in the folder has fine-tuned.

    Nothing if there is none, or if the teacher's own settings are among the changed ones.
    """
    folder = Path(config.run_dir)
    names = {line.partition(":")[0] for line in changed}
    if not (folder / "teacher" / "config.json").exists() or names & _OF_THE_TEACHER:
        return ""
    values = set_values(config)
    settings = {name: value for name, value in values.items() if value != _as_saved(SPECS[name].default)}
    settings.pop("dry_run", None)
    settings |= {"teacher": str(folder / "teacher"), "run_dir": f"{folder}-2"}
    settings |= {"student_init": config.student_init or config.teacher}
    command = shlex.join(["peakd-train", *to_words("", settings)])
    return f". A new run with its teacher: {command}"


def _as_saved(value: Any) -> Any:
    return list(map(_as_saved, value)) if isinstance(value, tuple) else value


def check_owner(folder: Path) -> None:
    """Raise UserError if the folder is not a run's and holds a name that a run writes."""
    if not folder.is_dir():
        return
    if (folder / CONFIG).exists():
        _check_saved_settings(folder / CONFIG)
        return
    for name in sorted(NAMES & {path.name for path in folder.iterdir()}):
        if not _is_of_a_first_start(folder / name):
            raise UserError(
                f"--run_dir {folder} holds {name}, which a run would write, but no config.yaml of a run; nothing was "
                "changed there: take another --run_dir"
            )


def check_data(config: RunConfig, fingerprints: dict[str, str], source: str) -> None:
    """Raise UserError if the folder's labels and checkpoints were made from other rows.

    Args:
        fingerprints: Those of the rows of each split.
        source: Where the rows come from, for the message.
    """
    saved = Path(config.run_dir) / DATA
    if not saved.exists():
        return
    if not _is_fingerprints(saved):
        raise UserError(
            f"{saved} is damaged; delete it, and the run continues without the check that its rows are the same, or "
            "take another --run_dir"
        )
    if parse_json(_read_text(saved)) != fingerprints:
        raise UserError(
            f"--run_dir {config.run_dir} holds a run on other rows than {source} has now, by its {DATA}; nothing was "
            "changed there: take another --run_dir, or the data it was started with"
        )


def create(config: RunConfig, fingerprints: dict[str, str]) -> None:
    """Write data.json and config.yaml where they are missing."""
    folder = Path(config.run_dir)
    settings = to_yaml(config)
    for name, text in ((DATA, json.dumps(fingerprints)), (CONFIG, f"{settings}{_CHECKSUM}{_digest(settings)}\n")):
        if not (folder / name).exists():
            write_atomically(folder / name, text)


# -- Whose folder ------------------------------------------------------------------------------------------------------


def _check_saved_settings(file: Path) -> None:
    """Raise UserError unless the file is a config.yaml that a run wrote and nobody has changed."""
    text = _read_text(file)
    settings, separator, digest = text.rpartition(_CHECKSUM)
    if separator and digest.strip() != _digest(settings):
        raise UserError(
            f"{file} is damaged or was edited (its checksum differs); restore it, or take another --run_dir"
        )
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is no config.yaml of a run ({first_line(error)}); take another --run_dir") from error
    known = SPECS.keys() | SETTINGS_OF_EARLIER_VERSIONS
    if not isinstance(values, dict) or not _MARKS <= values.keys() <= known or not set(SOURCES) & values.keys():
        raise UserError(
            f"{file} is no config.yaml that a run wrote, so the folder is not a run's; nothing was changed there: take "
            "another --run_dir"
        )


def _is_of_a_first_start(path: Path) -> bool:
    """Whether a file or folder is what a start writes before config.yaml, and nothing else."""
    if path.name == DATA:
        return _is_fingerprints(path)
    if path.name == "lock.json":
        owner = _read_json(path)
        return isinstance(owner, dict) and {"token", "host", "pid"} <= owner.keys()
    if path.name == "logs" and path.is_dir():
        return all(_is_start(start) for start in path.iterdir())
    return False


def _is_start(folder: Path) -> bool:
    """Whether a folder in logs/ is that of a Slurm job's start: JOB-RESTART with start.json, or empty yet."""
    if not folder.is_dir() or not re.fullmatch(r".+-\d+", folder.name):
        return False
    facts = _read_json(folder / "start.json")
    return (isinstance(facts, dict) and {"job", "restart"} <= facts.keys()) or not any(folder.iterdir())


def _is_fingerprints(file: Path) -> bool:
    content = _read_json(file)
    return isinstance(content, dict) and bool(content) and all(isinstance(value, str) for value in content.values())


def _read_json(file: Path) -> Any:
    """The content of a JSON file; None if it cannot be read."""
    try:
        return parse_json(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None


def _read_text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}); take another --run_dir") from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# -- Where the folder lies ---------------------------------------------------------------------------------------------


def _check_place(config: RunConfig) -> None:
    """Raise UserError if the run folder is one that the run reads, or lies inside a model, a cache or shards."""
    folder = Path(config.run_dir).resolve()
    for name in ("teacher", "student_init", "shard_dir", "teacher_cache", "data_dir", "dataset_name"):
        value = getattr(config, name)
        if value and Path(value).exists() and Path(value).resolve() == folder:
            raise UserError(f"--run_dir {config.run_dir} is --{name} too; take another --run_dir")
    for outer in (folder, *folder.parents):
        kind = _kind_of(outer)
        if kind is not None:
            raise UserError(f"--run_dir {config.run_dir} lies in {outer}, which is {kind}; take another --run_dir")


def _kind_of(folder: Path) -> str | None:
    """What a folder of ours or of transformers is, if it is one that a run must not write to."""
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return "a model"
    if (folder / "manifest.json").is_file():
        if any(folder.glob("shard-*.safetensors")):
            return "a folder of shards"
        if any(folder.glob("*part-*.safetensors")):
            return "a teacher cache"
    return None
