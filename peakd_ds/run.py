"""A run: its settings, data and models' sources, read and checked against each other before any engine starts.

Every mistake of the user's is met here, on all ranks together, and nothing saved has been touched by then.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from peakd_ds import checkpoint, data, dist, ds_engine, glue_eval, modeling
from peakd_ds.config import RunConfig, UserError, differences, to_yaml
from peakd_ds.data import Split
from peakd_ds.modeling import Encoder
from peakd_ds.run_log import TeacherClock
from peakd_ds.sps import execution_order
from peakd_ds.tasks import Task, get_task


@dataclass
class Run:
    """What the stages share: settings, data and the frozen teacher."""

    config: RunConfig
    """With dtype resolved."""
    task: Task
    teacher_source: Encoder
    student_init: Encoder
    tokenizer: PreTrainedTokenizerBase
    train: Split
    train_rows: np.ndarray
    """Rows of `train` that are trained on."""
    selection: tuple[str, Split, np.ndarray]
    """(holdout or dev, split, rows) that picks the best epoch of every stage."""
    dev: dict[str, Split]
    student_ds_config: dict[str, Any]
    teacher_ds_config: dict[str, Any]
    pairs: tuple[tuple[int, int], ...]
    """Matched (student, teacher) layers, 1-based."""
    teacher_clock: TeacherClock = field(default_factory=TeacherClock)
    _teacher: Any = None

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def micro_and_accum(self) -> tuple[int, int]:
        return ds_engine.batch_plan(self.config.global_batch_size, self.config.micro_batch_size, dist.world_size())

    def has_teacher(self) -> bool:
        """Whether there is a trained teacher: given as a classifier, or this run's own."""
        return self.teacher_source.is_classifier or (self.folder / "teacher" / "config.json").exists()

    def teacher(self) -> Any:
        """The frozen teacher's engine (collective at the first call)."""
        if self._teacher is None:
            folder = self.folder / "teacher"
            if self.teacher_source.is_classifier:
                model = modeling.build_teacher(self.config, self.task, self.teacher_source)
            else:
                model = modeling.load_classifier(folder)
            self._teacher = ds_engine.teacher_engine(model, self.teacher_ds_config)
        return self._teacher

    def teacher_logits(self, split: Split, rows: np.ndarray) -> torch.Tensor:
        """float32 [N, C] of the frozen teacher over the given rows (collective)."""
        teacher = self.teacher()
        logits, _ = glue_eval.predict(
            lambda inputs: teacher(**inputs).logits,
            split,
            rows,
            self.micro_and_accum[0],
            self.task.num_labels,
        )
        return logits


def open_run(config: RunConfig) -> Run:
    """Read data and model configs and check them against each other (collective). Writes nothing but, later, the
    tokenised rows in the run folder.

    Raises:
        UserError: on every rank, with value, rule and remedy.
    """

    def look() -> tuple:
        task = get_task(config.task)
        dtype, student_ds_config, teacher_ds_config = ds_engine.resolve(config)
        resolved = replace(config, dtype=dtype)
        _check_run_folder(resolved)
        ds_engine.batch_plan(config.global_batch_size, config.micro_batch_size, dist.world_size())
        teacher = modeling.find_encoder(config.teacher, "teacher")
        student_init = teacher
        if config.student_init:
            student_init = modeling.find_encoder(config.student_init, "student_init")
        tokenizer = modeling.load_tokenizer(teacher)
        modeling.check_contract(config, task, teacher, student_init, tokenizer)
        depth = len(execution_order(config.num_hidden_layers, config.sharing, config.swaps_qk))
        pairs = modeling.layer_pairs(config.layer_map, depth, teacher.config.num_hidden_layers)
        _check_stages(resolved, task, teacher)
        splits = data.load_splits(task, config.data_dir)
        if config.select_on == "holdout" and len(splits["train"]) < data.HOLDOUT_SHARE:
            raise UserError(
                f"task {task.name} has {len(splits['train'])} training rows, too few to hold out a tenth; "
                "set --select_on dev"
            )
        return (
            task,
            resolved,
            student_ds_config,
            teacher_ds_config,
            teacher,
            student_init,
            tokenizer,
            pairs,
            splits,
        )

    task, config, student_ds_config, teacher_ds_config, teacher, student_init, tokenizer, pairs, splits = dist.agree(
        look
    )
    cache = None if config.dry_run else Path(config.run_dir) / "cache"
    if not config.dry_run:
        dist.on_main(lambda: _create_run_folder(config))
    tokenized = {
        name: data.tokenize(task, rows, tokenizer, config.max_seq_length, cache)
        for name, rows in splits.items()
        if name == "train" or name in task.eval_splits
    }
    dev = {name: tokenized[name] for name in task.eval_splits}
    train, train_rows = tokenized["train"], np.arange(len(tokenized["train"]))
    if config.select_on == "holdout":
        train_rows, holdout_rows = data.split_holdout(len(train))
        selection = ("holdout", train, holdout_rows)
    else:
        selection = ("dev", dev[task.eval_splits[0]], np.arange(len(dev[task.eval_splits[0]])))
    return Run(
        config,
        task,
        teacher,
        student_init,
        tokenizer,
        train,
        train_rows,
        selection,
        dev,
        student_ds_config,
        teacher_ds_config,
        pairs if config.beta > 0 else (),
    )


def _check_run_folder(config: RunConfig) -> None:
    folder = Path(config.run_dir)
    saved = folder / "config.yaml"
    if saved.exists():
        changed = differences(config, saved.read_text())
        if changed:
            raise UserError(
                f"--run_dir {folder} holds a run with other settings ({'; '.join(changed)}); nothing was "
                "changed there: take another --run_dir, or the settings it was started with"
            )
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(
            f"--run_dir {folder} cannot be written ({nearest} is no folder you may write to); take another --run_dir"
        )


def _create_run_folder(config: RunConfig) -> None:
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.yaml").exists():
        temporary = folder / "config.yaml.tmp"
        temporary.write_text(to_yaml(config))
        temporary.replace(folder / "config.yaml")


def _check_stages(config: RunConfig, task: Task, teacher: Encoder) -> None:
    """Each chosen stage needs what the ones before it leave."""
    folder = Path(config.run_dir)
    needs_teacher = "ptp" in config.stages and config.ptp and not task.is_regression
    needs_teacher |= "distill" in config.stages and (config.alpha > 0 or config.beta > 0)
    is_there = teacher.is_classifier or "teacher" in config.stages or (folder / "teacher" / "config.json").exists()
    if needs_teacher and not is_there:
        raise UserError(
            f"--stages {','.join(config.stages)} needs a trained teacher, but --teacher {teacher.path} is "
            "an encoder without a head for the task; add the teacher stage, or give a classifier"
        )
    if (
        "distill" in config.stages
        and "ptp" not in config.stages
        and config.ptp
        and not task.is_regression
        and checkpoint.finished(folder / "checkpoints" / "ptp") is None
    ):
        raise UserError(
            f"--stages {','.join(config.stages)} distils a PTP student, but the ptp stage has not run in "
            f"{folder}; add it, or set --no_ptp"
        )
