"""A run: its settings, data and models' sources, read and checked against each other before any engine starts.

Every mistake of the user's is met here, on all ranks together, and nothing saved has been touched by then.
"""

import json
import math
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from peakd_ds.command_line import differences, to_yaml
from peakd_ds.config import RunConfig
from peakd_ds.config.optimisation import EVAL_BATCH_FACTOR
from peakd_ds.data import reading
from peakd_ds.data import shards as shard_files
from peakd_ds.data.batches import NUM_SHARDS, check_holdout, split_holdout
from peakd_ds.data.tasks import Task, get_task
from peakd_ds.data.tokens import Split, tokenize, used_tokens
from peakd_ds.engine import checkpoint, engines
from peakd_ds.engine.ds_config import batch_plan, has_fast_bf16, resolve, zero_stage
from peakd_ds.errors import UserError
from peakd_ds.files import write_atomically
from peakd_ds.kernels import check_backend, choose_backend
from peakd_ds.model import contract
from peakd_ds.model.build import Teacher, layer_pairs, load_teacher
from peakd_ds.model.contract import Pretrained, has_unnamed_labels
from peakd_ds.ranks import dist, host
from peakd_ds.ranks.device import device
from peakd_ds.results import evaluation
from peakd_ds.results.export import require_onnx
from peakd_ds.results.meter import TeacherClock
from peakd_ds.sps import execution_order


@dataclass
class Run:
    """What the stages share: settings, data and the frozen teacher."""

    config: RunConfig
    """With dtype resolved."""
    task: Task
    teacher_source: Pretrained
    student_init: Pretrained
    tokenizer: PreTrainedTokenizerBase
    student_ds_config: dict[str, Any]
    teacher_ds_config: dict[str, Any]
    pairs: tuple[tuple[int, int], ...]
    """Matched (student, teacher) layers, 1-based."""
    train: Split = field(init=False)
    train_rows: np.ndarray = field(init=False)
    """Rows of `train` that are trained on."""
    selection: tuple[str, Split, np.ndarray] = field(init=False)
    """(holdout or dev, split, rows) that picks the best epoch of every stage."""
    dev: dict[str, Split] = field(init=False)
    used_tokens: torch.Tensor = field(init=False)
    """Ids of the tokens that occur in `train` and the rows that pick epochs, int64 [K]."""
    teacher_clock: TeacherClock = field(default_factory=TeacherClock)
    answers: Any = None
    """What teacher_cache.py has opened: split name -> Answers; None where the teacher is asked online."""
    _teacher: Any = None

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def micro_and_accum(self) -> tuple[int, int]:
        return batch_plan(self.config.global_batch_size, self.config.micro_batch_size, dist.world_size())

    @property
    def eval_batch_size(self) -> int:
        """Rows of a forward pass without gradients, which keeps one layer's states at a time, where a training step
        keeps every layer's: more rows make fewer and larger products. With token losses it keeps matched layers'."""
        return (1 if self.config.hidden_loss == "tokens" else EVAL_BATCH_FACTOR) * self.micro_and_accum[0]

    @property
    def student_depth(self) -> int:
        """Layers that the student runs."""
        return len(execution_order(self.config.num_hidden_layers, self.config.sharing, self.config.swaps_qk))

    @property
    def method(self) -> str:
        """Name of the method as it runs here: no PTP for scores, no hidden-state loss without a layer pair."""
        has_ptp, beta = self.config.ptp and not self.task.is_regression, self.config.beta if self.pairs else 0.0
        return replace(self.config, ptp=has_ptp, beta=beta).method

    @property
    def loss_reads_teacher(self) -> bool:
        """Whether the distill stage's loss has a term that compares with the teacher."""
        return self.config.alpha > 0 or (self.config.beta > 0 and bool(self.pairs))

    def has_teacher(self) -> bool:
        """Whether there is a trained teacher (collective): given as a classifier, or this run's own."""
        return self.teacher_source.is_classifier or dist.on_main((self.folder / "teacher" / "config.json").exists)

    def teacher(self) -> Any:
        """The frozen teacher's engine (collective at the first call)."""
        if self._teacher is None:

            def load() -> Any:
                folder = self.folder / "teacher"
                return Teacher(load_teacher(self.config, self.task, self.teacher_source, folder))

            self._teacher = engines.teacher_engine(dist.agree(load), self.teacher_ds_config)
        return self._teacher

    def drop_teacher(self) -> None:
        """Give the teacher engine's memory back; the next `teacher()` starts another (collective)."""
        if self._teacher is not None:
            self._teacher.destroy()
            self._teacher = None

    def teacher_logits(self, split: Split, rows: np.ndarray) -> torch.Tensor:
        """float32 [N, C] of the frozen teacher over the given rows (collective)."""
        teacher = self.teacher()
        logits, _ = evaluation.predict(
            lambda inputs: teacher(**inputs)[0],
            split,
            rows,
            self.eval_batch_size,
            self.task.num_labels,
        )
        return logits


def open_run(config: RunConfig) -> Run:
    """Read data and model configs and check them against each other (collective).

    Only when all is right are config.yaml, data.json and the tokenised rows written to the run folder; a dry run writes
    nothing.

    Raises:
        UserError: on every rank, with value, rule and remedy.
    """
    is_bf16_fast = dist.highest(int(not has_fast_bf16())) == 0  # on all ranks, or none computes in it

    def look() -> tuple[Run, dict[str, Any], dict[str, str], Any]:
        task = get_task(config.task)
        dtype, student_ds_config, teacher_ds_config = resolve(config, is_bf16_fast)
        resolved = replace(config, dtype=dtype)
        check_run_folder(resolved)
        _check_loss_backend(config)
        batch_plan(config.global_batch_size, config.micro_batch_size, dist.world_size())
        teacher = contract.find_encoder(config.teacher, "teacher")
        student_init = teacher
        if config.student_init:
            student_init = contract.find_encoder(config.student_init, "student_init")
        tokenizer = contract.load_tokenizer(teacher)
        contract.check_contract(config, task, teacher, student_init, tokenizer)
        depth = len(execution_order(config.num_hidden_layers, config.sharing, config.swaps_qk))
        pairs = layer_pairs(config.layer_map, depth, teacher.config.num_hidden_layers)
        _check_stages(resolved, task, teacher)
        if config.export_onnx:
            require_onnx()
        # Of sharded rows one rank reads the files, to see that the shards were made from them.
        splits = reading.load_splits(task, config.data_dir, train=not is_sharded or dist.is_main())
        fingerprints, shards = reading.fingerprints(splits), None
        if is_sharded:
            shards = shard_files.find(config, task, tokenizer, fingerprints.get("train"))
            fingerprints["train"] = shards.data_fingerprint
        elif config.select_on == "holdout":
            check_holdout(task, len(splits["train"]))
        _check_same_data(resolved, fingerprints)
        run = Run(
            resolved,
            task,
            teacher,
            student_init,
            tokenizer,
            student_ds_config,
            teacher_ds_config,
            pairs if config.beta > 0 else (),
        )
        return run, splits, fingerprints, shards

    is_sharded = config.data_placement == "sharded"
    if is_sharded:
        dist.check_nodes()
    run, splits, fingerprints, shards = dist.agree(look)
    of_first = dist.broadcast(fingerprints)
    dist.agree(lambda: _check_alike(config, ("train", *run.task.eval_splits), fingerprints, of_first))
    config, train = run.config, None if shards is None else shard_files.load(config, shards)
    cache = None if config.dry_run else Path(config.run_dir) / "cache"
    if not config.dry_run:
        dist.on_main(lambda: _create_run_folder(config, fingerprints))

    def tokenized(name: str) -> Split:
        return tokenize(run.task, splits[name], run.tokenizer, config.max_seq_length, cache)

    run.train = tokenized("train") if train is None else train
    run.dev = {name: tokenized(name) for name in run.task.eval_splits}
    run.train_rows = np.arange(len(run.train))
    if config.select_on == "holdout":
        run.train_rows, holdout_rows = split_holdout(len(run.train))
        run.selection = ("holdout", run.train, holdout_rows)
    else:
        first = run.task.eval_splits[0]
        run.selection = ("dev", run.dev[first], np.arange(len(run.dev[first])))
    run.used_tokens = used_tokens((run.train, run.selection[1]), max(run.tokenizer.get_vocab().values()) + 1)
    return run


def check_run_folder(config: RunConfig) -> None:
    """Raise UserError where the run folder holds a run with other settings, or cannot be written."""
    folder = Path(config.run_dir)
    saved = folder / "config.yaml"
    if saved.exists():
        changed = differences(config, saved.read_text())
        if changed:
            raise UserError(
                f"--run_dir {folder} holds a run with other settings ({'; '.join(changed)}); nothing was "
                "changed there: take another --run_dir, or the settings it was started with"
            )
    elif any((folder / name).exists() for name in ("teacher", "student", "checkpoints")):
        raise UserError(
            f"--run_dir {folder} holds models or checkpoints but no config.yaml, so it cannot be told what made them; "
            "take another --run_dir"
        )
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(
            f"--run_dir {folder} cannot be written ({nearest} is no folder you may write to); take another --run_dir"
        )


def _check_loss_backend(config: RunConfig) -> None:
    try:
        check_backend(config.loss_backend, device())
    except ValueError as error:
        raise UserError(f"--loss_backend {config.loss_backend}: {error}") from error


def _check_same_data(config: RunConfig, fingerprints: dict[str, str]) -> None:
    """The folder's labels and checkpoints belong to the rows that they were made from."""
    saved = Path(config.run_dir) / "data.json"
    if saved.exists() and json.loads(saved.read_text()) != fingerprints:
        raise UserError(
            f"--run_dir {config.run_dir} holds a run on other rows than {config.data_dir or reading.HUB_DATASET} has "
            "now; "
            "nothing was changed there: take another --run_dir, or the data it was started with"
        )


def _check_alike(
    config: RunConfig, names: Sequence[str], fingerprints: dict[str, str], of_first: dict[str, str]
) -> None:
    """All ranks read the same rows in the splits of these names, also where each node has its own copy of the data."""
    differing = [name for name in names if fingerprints[name] != of_first[name]]
    if differing:
        raise UserError(
            f"{socket.gethostname()} has other rows of {', '.join(differing)} in "
            f"{config.data_dir or reading.HUB_DATASET} than the host of rank 0; give all nodes the same data"
        )


def _create_run_folder(config: RunConfig, fingerprints: dict[str, str]) -> None:
    folder = Path(config.run_dir)
    for name, text in (("data.json", json.dumps(fingerprints)), ("config.yaml", to_yaml(config))):
        if not (folder / name).exists():
            write_atomically(folder / name, text)


def _check_stages(config: RunConfig, task: Task, teacher: Pretrained) -> None:
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


def plan(run: Run) -> str:
    """What is about to run, with every derived number beside what it is derived from."""
    config = run.config
    micro, accum = run.micro_and_accum
    pairs = ", ".join(f"{i}:{j}" for i, j in run.pairs) or "none"
    placement, unnamed = [], []
    if config.data_placement == "sharded":
        placement = [f"rows of {NUM_SHARDS // dist.num_nodes()} shards on each of {dist.num_nodes()} nodes"]
    if run.teacher_source.is_classifier and not run.task.is_regression and has_unnamed_labels(run.teacher_source):
        unnamed = [f"warning: the teacher does not name its classes; taken for {', '.join(run.task.label_names)}"]
    return "\n".join(
        [
            f"task {run.task.name}, method {run.method}, seed {config.seed}, {config.dtype} on {device().type}",
            f"rows: train {len(run.train_rows):,}, {run.selection[0]} {len(run.selection[2]):,} (picks epochs), "
            + ", ".join(f"{name} {len(split):,}" for name, split in run.dev.items()),
            f"batch: global {config.global_batch_size} = micro {micro} x accum {accum} x world {dist.world_size()}, "
            f"from {math.gcd(config.global_batch_size, NUM_SHARDS)} of {NUM_SHARDS} shards at a time",
            *placement,
            f"teacher: {run.teacher_source.path}, {run.teacher_source.config.num_hidden_layers} layers of "
            f"{run.teacher_source.config.hidden_size}, ZeRO stage {zero_stage(run.teacher_ds_config)}",
            f"student: {config.num_hidden_layers} stored layers run as {run.student_depth} of "
            f"{run.student_init.config.hidden_size}, ZeRO stage {zero_stage(run.student_ds_config)}, "
            f"layer pairs {pairs}",
            f"vocabulary: {len(run.used_tokens):,} of {len(run.tokenizer):,} tokens occur and are trained",
            f"loss: {loss_backend(config)}",
            *unnamed,
            *(f"warning: {host.describe(lock)}" for lock in host.stale_locks()),
        ]
    )


def loss_backend(config: RunConfig) -> str:
    """What computes the losses, and why."""
    if config.loss_backend != "auto":
        return f"{config.loss_backend} kernels (--loss_backend)"
    chosen, reason = choose_backend(device().type)
    return f"{chosen} kernels, since {reason}"
