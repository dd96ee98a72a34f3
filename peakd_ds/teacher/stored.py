"""A teacher that does not run here: its outputs are read from `--teacher_outputs`.

It stands where `OnlineTeacher` and `TeacherCache` stand otherwise. There are no hidden states.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor

from peakd_ds.config import RunConfig
from peakd_ds.data import own_files
from peakd_ds.data.division import holds_out
from peakd_ds.data.own_rows import ID, ROW
from peakd_ds.data.tasks import Task
from peakd_ds.data.tokens import TeacherOutputs
from peakd_ds.errors import UserError
from peakd_ds.ranks.device import to_device
from peakd_ds.results.meter import TeacherClock
from peakd_ds.teacher import outputs_file


@dataclass(frozen=True)
class StoredOutputs:
    """Logits float32 [N, C] of all rows of a split."""

    logits_NC: Tensor

    def logits(self, rows_N: Tensor) -> Tensor:
        """float32 [N, C] of int64 rows [N], on the CPU."""
        return self.logits_NC[rows_N]

    def of(self, rows_B: Tensor, with_logits: bool = True) -> TeacherOutputs:
        """Logits float32 [B, C], or None, of int64 rows [B], on the device, and no hidden states."""
        return to_device(self.logits_NC[rows_B.cpu()]) if with_logits else None, []


@dataclass
class StoredTeacher:
    """The outputs of a run, by split."""

    logits_NC: dict[str, Tensor]
    """float32 [N, C] for train, the split that picks epochs, and those that are reported if the files have them."""
    selection_name: str
    """holdout, dev or validation."""
    selection_split: str
    """train, or the split that picks epochs."""

    hidden_size = 1

    def __post_init__(self) -> None:
        self.clock = TeacherClock()

    def is_trained(self) -> bool:
        return True

    def stop(self) -> None:
        """Nothing runs."""

    def check_space(self) -> None:
        """Nothing is written."""

    def outputs(self, say: Callable[[str], None]) -> dict[str, StoredOutputs]:
        """Outputs for "train" and for the rows that pick epochs, by name."""
        return {
            "train": StoredOutputs(self.logits_NC["train"]),
            self.selection_name: StoredOutputs(self.logits_NC[self.selection_split]),
        }


def read(config: RunConfig, task: Task, splits: Mapping[str, datasets.Dataset]) -> dict[str, Tensor]:
    """Logits float32 [N, C] by split, from the files of `--teacher_outputs`.

    Rows are found by `--id_column` where the data has it. Else the files have the rows of the train files, then the
    unlabelled ones, then those of the split that picks epochs, and last, if at all, those that are reported.

    Raises:
        UserError: as `outputs_file.read_outputs`.
    """
    files = _files(config)
    names = ("train", *task.read_splits)
    needed = (
        "" if holds_out(config, task) else task.dev_split
    )  # the split that picks epochs, if it is not train's tenth
    with_ids = [name for name in names if ID in splits[name].column_names]
    has_ids = "train" in with_ids
    if has_ids and needed and needed not in with_ids:
        raise UserError(
            f"train rows have the column {config.id_column!r}, but the {needed} rows do not; give all rows one, or none"
        )
    numbers = {name: _row_numbers(name, splits[name]) for name in names}
    own_row = {name: found for name, found in numbers.items() if found is not None}
    num_rows = {"train": sum(map(len, own_row.values()))} | {
        name: len(splits[name]) for name in names if name not in own_row
    }
    ids: dict[str, Sequence[str] | None] = dict.fromkeys(num_rows)
    if has_ids:
        num_rows = {name: len(splits[name]) for name in with_ids}
        ids = {name: list(splits[name][ID]) for name in with_ids}
    found = outputs_file.read_outputs(
        files,
        config.teacher_weights,
        config.id_column,
        task,
        ids,
        num_rows,
        [name for name in task.eval_splits if name in num_rows and name != needed],
    )
    if has_ids:
        return found
    return {**found, **{name: found["train"][torch.from_numpy(rows)] for name, rows in own_row.items()}}


def fingerprint(config: RunConfig) -> str:
    """A short hash of the files and their weights."""
    return outputs_file.fingerprint(_files(config), config.teacher_weights)


def _files(config: RunConfig) -> list[Path]:
    """The files of `--teacher_outputs` in the order given, which is that of the weights."""
    found = [own_files.find_files("teacher_outputs", [pattern]) for pattern in config.teacher_outputs or ()]
    return list(dict.fromkeys(file for files in found for file in files))


def _row_numbers(name: str, rows: datasets.Dataset) -> np.ndarray | None:
    """Positions of a split's rows among those of the train files; None for a split of other files."""
    if ROW in rows.column_names:
        return np.asarray(rows[ROW], np.int64)
    return np.arange(len(rows)) if name == "train" else None
