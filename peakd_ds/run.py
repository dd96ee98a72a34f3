"""A run: its settings, data and models' sources, read and checked against each other before any engine starts.

Every user error is found here, on all ranks together, before anything saved is touched.
"""

import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from peakd_ds.cluster import run_folder
from peakd_ds.config import RunConfig
from peakd_ds.config.optimisation import EVAL_BATCH_FACTOR
from peakd_ds.data import reading
from peakd_ds.data import shards as shard_files
from peakd_ds.data.batches import NUM_SHARDS, check_holdout, split_holdout
from peakd_ds.data.shards import Manifest
from peakd_ds.data.tasks import Task, get_task
from peakd_ds.data.tokens import Split, tokenize, used_tokens
from peakd_ds.engine import checkpoint
from peakd_ds.engine.ds_config import batch_plan, has_fast_bf16, resolve, zero_stage
from peakd_ds.errors import UserError
from peakd_ds.kernels import check_backend, choose_backend
from peakd_ds.model import contract
from peakd_ds.model.build import layer_pairs
from peakd_ds.model.contract import Pretrained
from peakd_ds.ranks import dist, host
from peakd_ds.ranks.device import device
from peakd_ds.results.export import require_onnx
from peakd_ds.sps import execution_order
from peakd_ds.teacher.cache import TeacherCache
from peakd_ds.teacher.online import OnlineTeacher


class Selection(NamedTuple):
    """The rows that pick the best epoch of every stage."""

    name: str
    """holdout or dev."""
    split: Split
    rows: np.ndarray
    """int64 [N], positions in `split`."""


@dataclass
class Run:
    """What the stages share."""

    config: RunConfig
    """With dtype resolved."""
    task: Task
    teacher: OnlineTeacher
    teacher_cache: TeacherCache
    student_init: Pretrained
    tokenizer: PreTrainedTokenizerBase
    student_ds_config: dict[str, Any]
    pairs: tuple[tuple[int, int], ...]
    """Matched (student, teacher) layers, 1-based; none without a hidden-state loss."""
    train: Split
    train_rows: np.ndarray
    """int64 [N], rows of `train` that are trained on."""
    selection: Selection
    dev: dict[str, Split]
    used_tokens: torch.Tensor
    """Ids of the tokens that occur in `train` and the selection rows, int64 [K]."""

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    def checkpoint_folder(self, stage: str) -> Path:
        return _checkpoint_folder(self.config, stage)

    @property
    def micro_batch_size(self) -> int:
        return _batch_plan(self.config)[0]

    @property
    def num_accum_steps(self) -> int:
        return _batch_plan(self.config)[1]

    @property
    def eval_batch_size(self) -> int:
        return _eval_batch_size(self.config)

    @property
    def student_depth(self) -> int:
        """Layers that the student runs."""
        return _student_depth(self.config)

    @property
    def method(self) -> str:
        """Name of the method as it runs here: no PTP for scores, no hidden-state loss without a layer pair."""
        return replace(self.config, ptp=self.runs_ptp, beta=self.config.beta if self.pairs else 0.0).method

    @property
    def runs_ptp(self) -> bool:
        """Whether the student is pretrained with the teacher's predictions."""
        return self.config.runs_ptp(self.task.is_regression)

    @property
    def loss_reads_teacher(self) -> bool:
        """Whether the distill stage's loss has a term that compares with the teacher."""
        return _loss_reads_teacher(self.config, self.pairs)


@dataclass
class _Checked:
    """A run whose settings, models and data fit together; no rows are tokenised and nothing is written yet."""

    config: RunConfig
    task: Task
    teacher_source: Pretrained
    student_init: Pretrained
    tokenizer: PreTrainedTokenizerBase
    student_ds_config: dict[str, Any]
    teacher_ds_config: dict[str, Any]
    pairs: tuple[tuple[int, int], ...]
    splits: dict[str, datasets.Dataset]
    fingerprints: dict[str, str]
    shards: Manifest | None


def open_run(config: RunConfig) -> Run:
    """Read data and model configs and check them against each other (collective).

    Only when everything fits are config.yaml, data.json and the tokenised rows written to the run folder; a dry run
    writes nothing.

    Raises:
        UserError: on every rank, with value, rule and remedy.
    """
    is_bf16_fast = dist.max_over_ranks(int(not has_fast_bf16())) == 0  # on all ranks, or none computes in it
    if config.data_placement == "sharded":
        dist.check_nodes()
    checked = dist.agree(lambda: _check(config, is_bf16_fast))
    config, task, fingerprints = checked.config, checked.task, checked.fingerprints
    fingerprints_of_rank_0 = dist.broadcast(fingerprints)
    names = ("train", *task.eval_splits)
    dist.agree(lambda: _check_equal_on_ranks(config, names, fingerprints, fingerprints_of_rank_0))
    train = None if checked.shards is None else shard_files.load(config, checked.shards)
    if not config.dry_run:
        dist.on_main(lambda: run_folder.create(config, fingerprints))

    cache = None if config.dry_run else Path(config.run_dir) / "cache"
    wanted = task.eval_splits if train is not None else names
    tokenized = {
        name: tokenize(task, checked.splits[name], checked.tokenizer, config.max_seq_length, cache) for name in wanted
    }
    run = _assemble(checked, tokenized.pop("train") if train is None else train, tokenized)
    dist.on_main(run.teacher_cache.check_space)
    return run


def _assemble(checked: _Checked, train: Split, dev: dict[str, Split]) -> Run:
    """The run of checked settings and tokenised rows (collective)."""
    config, task = checked.config, checked.task
    train_rows, selection = _select(config, task, train, dev)
    teacher = OnlineTeacher(
        config,
        task,
        checked.teacher_source,
        Path(config.run_dir) / "teacher",
        checked.teacher_ds_config,
        _eval_batch_size(config),
    )
    reads_teacher = _loss_reads_teacher(config, checked.pairs)
    reads_teacher |= "ptp" in config.stages and config.runs_ptp(task.is_regression)
    teacher_cache = TeacherCache(
        config=config,
        task=task,
        teacher=teacher,
        tokenizer=checked.tokenizer,
        layers=tuple(teacher_layer for _, teacher_layer in checked.pairs),
        is_needed=reads_teacher,
        fingerprints=checked.fingerprints,
        train=train,
        selection_name=selection.name,
        selection_split=selection.split,
        eval_batch_size=_eval_batch_size(config),
    )
    return Run(
        config=config,
        task=task,
        teacher=teacher,
        teacher_cache=teacher_cache,
        student_init=checked.student_init,
        tokenizer=checked.tokenizer,
        student_ds_config=checked.student_ds_config,
        pairs=checked.pairs,
        train=train,
        train_rows=train_rows,
        selection=selection,
        dev=dev,
        used_tokens=used_tokens((train, selection.split), max(checked.tokenizer.get_vocab().values()) + 1),
    )


def _check(config: RunConfig, is_bf16_fast: bool) -> _Checked:
    """Everything about a run that one rank can check alone. Raises UserError."""
    task = get_task(config.task)
    dtype, student_ds_config, teacher_ds_config = resolve(config, is_bf16_fast)
    config = replace(config, dtype=dtype)
    run_folder.check(config)
    _check_loss_backend(config)
    _batch_plan(config)
    teacher = contract.find_encoder(config.teacher, "teacher")
    student_init = contract.find_encoder(config.student_init, "student_init") if config.student_init else teacher
    tokenizer = contract.load_tokenizer(teacher)
    contract.check_contract(config, task, teacher, student_init, tokenizer)
    pairs = layer_pairs(config.layer_map, _student_depth(config), teacher.config.num_hidden_layers)
    _check_stages(config, task, teacher)
    if config.export_onnx:
        require_onnx()
    is_sharded, shards = config.data_placement == "sharded", None
    # Of sharded rows, rank 0 alone reads the files, to see that the shards were made from them.
    splits = reading.load_splits(task, config.data_dir, train=not is_sharded or dist.is_main())
    fingerprints = reading.fingerprints(splits)
    if is_sharded:
        shards = shard_files.find(config, task, tokenizer, fingerprints.get("train"))
        fingerprints["train"] = shards.data_fingerprint
    elif config.select_on == "holdout":
        check_holdout(task, len(splits["train"]))
    run_folder.check_data(config, fingerprints, config.data_dir or reading.HUB_DATASET)
    return _Checked(
        config,
        task,
        teacher,
        student_init,
        tokenizer,
        student_ds_config,
        teacher_ds_config,
        pairs if config.beta > 0 else (),
        splits,
        fingerprints,
        shards,
    )


def _select(config: RunConfig, task: Task, train: Split, dev: dict[str, Split]) -> tuple[np.ndarray, Selection]:
    """Rows of `train` to train on, and the rows that pick epochs."""
    if config.select_on == "holdout":
        train_rows, holdout_rows = split_holdout(len(train))
        return train_rows, Selection("holdout", train, holdout_rows)
    first = dev[task.eval_splits[0]]
    return np.arange(len(train)), Selection("dev", first, np.arange(len(first)))


# -- What follows from settings ----------------------------------------------------------------------------------------


def _checkpoint_folder(config: RunConfig, stage: str) -> Path:
    return Path(config.run_dir) / "checkpoints" / stage


def _batch_plan(config: RunConfig) -> tuple[int, int]:
    return batch_plan(config.global_batch_size, config.micro_batch_size, dist.world_size())


def _eval_batch_size(config: RunConfig) -> int:
    """Rows of a forward pass without gradients. It keeps one layer's states at a time where training keeps all, so more
    rows fit, in fewer and larger products; with token losses it keeps the states of all matched layers."""
    return (1 if config.hidden_loss == "tokens" else EVAL_BATCH_FACTOR) * _batch_plan(config)[0]


def _student_depth(config: RunConfig) -> int:
    return len(execution_order(config.num_hidden_layers, config.sharing, config.swaps_qk))


def _loss_reads_teacher(config: RunConfig, pairs: Sequence[tuple[int, int]]) -> bool:
    return config.alpha > 0 or (config.beta > 0 and bool(pairs))


# -- Checks ------------------------------------------------------------------------------------------------------------


def _check_loss_backend(config: RunConfig) -> None:
    try:
        check_backend(config.loss_backend, device())
    except ValueError as error:
        raise UserError(f"--loss_backend {config.loss_backend}: {error}") from error


def _check_equal_on_ranks(
    config: RunConfig, names: Sequence[str], fingerprints: dict[str, str], fingerprints_of_rank_0: dict[str, str]
) -> None:
    """Raise UserError if this rank reads other rows than rank 0, as where each node has its own copy of the data."""
    differing = [name for name in names if fingerprints[name] != fingerprints_of_rank_0[name]]
    if differing:
        raise UserError(
            f"{socket.gethostname()} has other rows of {', '.join(differing)} in "
            f"{config.data_dir or reading.HUB_DATASET} than the host of rank 0; give all nodes the same data"
        )


def _check_stages(config: RunConfig, task: Task, teacher: Pretrained) -> None:
    """Raise UserError if a chosen stage needs the output of one that has not run."""
    folder, runs_ptp = Path(config.run_dir), config.runs_ptp(task.is_regression)
    needs_teacher = "ptp" in config.stages and runs_ptp
    needs_teacher |= "distill" in config.stages and (config.alpha > 0 or config.beta > 0)
    is_there = teacher.is_classifier or "teacher" in config.stages or (folder / "teacher" / "config.json").exists()
    if needs_teacher and not is_there:
        raise UserError(
            f"--stages {','.join(config.stages)} needs a trained teacher, but --teacher {teacher.path} is "
            "an encoder without a head for the task; add the teacher stage, or give a classifier"
        )
    is_ptp_missing = runs_ptp and checkpoint.finished(_checkpoint_folder(config, "ptp")) is None
    if "distill" in config.stages and "ptp" not in config.stages and is_ptp_missing:
        raise UserError(
            f"--stages {','.join(config.stages)} distils a PTP student, but the ptp stage has not run in "
            f"{folder}; add it, or set --no_ptp"
        )


# -- The plan ----------------------------------------------------------------------------------------------------------


def plan(run: Run) -> str:
    """What is about to run, with every derived number beside the numbers it follows from."""
    config, source = run.config, run.teacher.source
    pairs = ", ".join(f"{i}:{j}" for i, j in run.pairs) or "none"
    placement, warnings = [], [f"warning: {host.describe(lock)}" for lock in host.stale_locks()]
    if config.data_placement == "sharded":
        placement = [f"rows of {NUM_SHARDS // dist.num_nodes()} shards on each of {dist.num_nodes()} nodes"]
    if source.is_classifier and not run.task.is_regression and contract.has_unnamed_labels(source):
        names = ", ".join(run.task.label_names)
        warnings.insert(0, f"warning: the teacher does not name its classes; they are taken for {names}")
    return "\n".join(
        [
            f"task {run.task.name}, method {run.method}, seed {config.seed}, {config.dtype} on {device().type}",
            f"rows: train {len(run.train_rows):,}, {run.selection.name} {len(run.selection.rows):,} (picks epochs), "
            + ", ".join(f"{name} {len(split):,}" for name, split in run.dev.items()),
            f"batch: global {config.global_batch_size} = micro {run.micro_batch_size} x accum {run.num_accum_steps} x "
            f"world {dist.world_size()}, from {math.gcd(config.global_batch_size, NUM_SHARDS)} of {NUM_SHARDS} shards "
            "at a time",
            *placement,
            f"teacher: {source.path}, {source.config.num_hidden_layers} layers of {source.config.hidden_size}, "
            f"ZeRO stage {run.teacher.zero_stage}",
            f"student: {config.num_hidden_layers} stored layers run as {run.student_depth} of "
            f"{run.student_init.config.hidden_size}, ZeRO stage {zero_stage(run.student_ds_config)}, "
            f"layer pairs {pairs}",
            f"vocabulary: {len(run.used_tokens):,} of {len(run.tokenizer):,} tokens occur and are trained",
            f"loss: {_loss_backend(config)}",
            *warnings,
        ]
    )


def _loss_backend(config: RunConfig) -> str:
    """What computes the losses, and why."""
    if config.loss_backend != "auto":
        return f"{config.loss_backend} kernels (--loss_backend)"
    chosen, reason = choose_backend(device().type)
    return f"{chosen} kernels, since {reason}"
