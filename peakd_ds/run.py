"""A run: its settings, data and models' sources, read and checked against each other before any engine starts.

Every user error is found here, on all ranks together, before anything saved is touched.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from peakd_ds import families
from peakd_ds.cluster import run_folder
from peakd_ds.config import SPECS, RunConfig
from peakd_ds.config.optimisation import EVAL_BATCH_FACTOR
from peakd_ds.data import reading, summary
from peakd_ds.data import shards as shard_files
from peakd_ds.data.division import TrainRows, check_holdout, divide_rows, holds_out
from peakd_ds.data.label_arrays import is_labeled, label_array, label_weights
from peakd_ds.data.shards import Manifest
from peakd_ds.data.tasks import Task
from peakd_ds.data.tokens import Split, tokenize_for_both, used_tokens
from peakd_ds.engine import checkpoint
from peakd_ds.engine.ds_config import batch_plan, has_fast_bf16, resolve
from peakd_ds.errors import UserError
from peakd_ds.kernels import check_backend
from peakd_ds.model import contract
from peakd_ds.model.build import layer_pairs
from peakd_ds.model.contract import Pretrained
from peakd_ds.ranks import dist
from peakd_ds.ranks.device import device
from peakd_ds.results.export import require_onnx
from peakd_ds.results.trim import Trimmed, check_trimmable, trimmed_tokenizer
from peakd_ds.sps import execution_order
from peakd_ds.teacher import stored
from peakd_ds.teacher.cache import TeacherCache
from peakd_ds.teacher.online import OnlineTeacher
from peakd_ds.teacher.stored import StoredTeacher


class Selection(NamedTuple):
    """The rows that pick the best epoch of every stage."""

    name: str
    """holdout, dev, or validation of the user's own rows."""
    split: Split
    rows: np.ndarray
    """int64 [N], positions in `split`."""

    def for_teacher(self) -> "Selection":
        """The same rows with the teacher's tokens."""
        return self._replace(split=self.split.for_teacher())


@dataclass
class Run:
    """What the stages share."""

    config: RunConfig
    """With dtype resolved."""
    task: Task
    teacher: OnlineTeacher | StoredTeacher
    teacher_cache: TeacherCache | StoredTeacher
    student_init: Pretrained
    tokenizer: PreTrainedTokenizerBase
    """The student's."""
    teacher_tokenizer: PreTrainedTokenizerBase
    """The same object if the student's gives the same ids."""
    student_ds_config: dict[str, Any]
    pairs: tuple[tuple[int, int], ...]
    """Matched (student, teacher) layers, 1-based; none without a hidden-state loss."""
    train: Split
    trained: TrainRows
    """Rows of `train` that are trained on."""
    selection: Selection
    dev: dict[str, Split]
    used_tokens: torch.Tensor
    """Ids of the student's tokens that occur in `train` and the selection rows, int64 [K]."""
    teacher_used_tokens: torch.Tensor
    """Those of the teacher's tokens."""
    dev_texts: dict[str, datasets.Dataset]
    """The rows of `dev` before they were tokenised."""
    trimmed: Trimmed | None = None
    """The tokenizer of the exported student, with --trim_vocabulary."""
    notes: tuple[str, ...] = ()
    """Lines of the plan on the rows."""

    @property
    def train_rows(self) -> np.ndarray:
        """Rows of `train` that are trained on, int64 [N]."""
        return self.trained.rows

    def rows_of(self, stage: str) -> TrainRows:
        """Rows that a stage trains on: all in distillation, those with a label before."""
        return self.trained if stage == "distill" else self.trained.only(is_labeled(self.train.labels.numpy()))

    def train_of(self, stage: str) -> Split:
        """`train` with the tokens of the model that a stage trains."""
        return self.train.for_teacher() if stage == "teacher" else self.train

    def selection_of(self, stage: str) -> Selection:
        """`selection` with the tokens of the model that a stage trains."""
        return self.selection.for_teacher() if stage == "teacher" else self.selection

    def used_tokens_of(self, stage: str) -> torch.Tensor:
        """Ids of the tokens that occur in what a stage reads, int64 [K]."""
        return self.teacher_used_tokens if stage == "teacher" else self.used_tokens

    @property
    def alpha(self) -> float:
        """Weight of the soft loss: 1 where no row has a label."""
        return self.config.alpha if self.task.has_labels else 1.0

    def loss_weights(self, stage: str) -> dict[str, float]:
        """The weight of each term in a stage's loss, by the names of meter.TERMS; those of weight 0 are left out."""
        if stage != "distill":
            return {"hard_loss": 1.0}
        beta = self.config.beta if self.pairs else 0.0
        weights = {"hard_loss": 1 - self.alpha, "soft_loss": self.alpha, "hidden_loss": beta}
        return {name: weight for name, weight in weights.items() if weight}

    def score_of(self, stage: str) -> str:
        """The metric that picks a stage's best epoch."""
        return "loss" if stage == "ptp" else self.task.primary_metric

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
        return self.config.runs_ptp(self.task.has_right_and_wrong)

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
    teacher_tokenizer: PreTrainedTokenizerBase
    student_ds_config: dict[str, Any]
    teacher_ds_config: dict[str, Any]
    pairs: tuple[tuple[int, int], ...]
    splits: dict[str, datasets.Dataset]
    fingerprints: dict[str, str]
    shards: Manifest | None
    notes: tuple[str, ...]
    stored_logits: dict[str, torch.Tensor] | None
    """Logits [N, C] by split, from `--teacher_outputs`."""


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
    dist.agree(lambda: reading.check_equal_on_ranks(config, task, fingerprints, fingerprints_of_rank_0))
    names = ("train", *task.read_splits)
    train = None if checked.shards is None else shard_files.load(config, task, checked.shards)
    if not config.dry_run:
        dist.on_main(lambda: run_folder.create(config, fingerprints))

    cache = None if config.dry_run else Path(config.run_dir) / "cache"
    wanted = task.read_splits if train is not None else names
    tokenizers = checked.tokenizer, checked.teacher_tokenizer
    tokenized = {
        name: tokenize_for_both(task, checked.splits[name], *tokenizers, config.max_seq_length, cache)
        for name in wanted
    }
    checked.notes += tuple(dist.on_main(lambda: summary.of_repeats(task, checked.splits)))
    run = _assemble(checked, tokenized.pop("train") if train is None else train, tokenized)
    dist.on_main(run.teacher_cache.check_space)
    return run


def _assemble(checked: _Checked, train: Split, dev: dict[str, Split]) -> Run:
    """The run of checked settings and tokenised rows (collective)."""
    config, task = checked.config, checked.task
    trained, selection = _select(config, task, train, dev)
    train.label_weights = label_weights(train.labels.numpy(), trained.rows, task.num_labels, config.class_weights)
    dev = {name: split for name, split in dev.items() if name in task.eval_splits}
    teacher, teacher_cache = _teacher_of(checked, train, selection)
    splits = train, selection.split
    tokens = teacher_tokens = _used_tokens(checked.student_init, checked.tokenizer, splits)
    if _reads_other_tokens(checked):
        teacher_splits = [split.for_teacher() for split in splits]
        teacher_tokens = _used_tokens(checked.teacher_source, checked.teacher_tokenizer, teacher_splits)
    return Run(
        config=config,
        task=task,
        teacher=teacher,
        teacher_cache=teacher_cache,
        student_init=checked.student_init,
        tokenizer=checked.tokenizer,
        teacher_tokenizer=checked.teacher_tokenizer,
        student_ds_config=checked.student_ds_config,
        pairs=checked.pairs,
        train=train,
        trained=trained,
        selection=selection,
        dev=dev,
        used_tokens=tokens,
        teacher_used_tokens=teacher_tokens,
        dev_texts={name: checked.splits[name] for name in dev},
        trimmed=dist.agree(lambda: trimmed_tokenizer(checked.tokenizer, tokens)) if config.trim_vocabulary else None,
        notes=checked.notes,
    )


def _reads_other_tokens(checked: _Checked) -> bool:
    """Whether the teacher reads other token ids than the student, padding included."""
    pads = [not families.is_packed(source.config) for source in (checked.teacher_source, checked.student_init)]
    return checked.teacher_tokenizer is not checked.tokenizer or pads[0] != pads[1]


def _used_tokens(model: Pretrained, tokenizer: PreTrainedTokenizerBase, splits: Sequence[Split]) -> torch.Tensor:
    """Ids of the tokens that a model reads in the splits, int64 [K] (collective); padding is one where rows have it."""
    found = used_tokens(splits, max(tokenizer.get_vocab().values()) + 1)
    padding = [] if families.is_packed(model.config) else [model.config.pad_token_id]
    return torch.cat([found, found.new_tensor(padding, dtype=found.dtype)]).unique()


def _teacher_of(
    checked: _Checked, train: Split, selection: Selection
) -> tuple[OnlineTeacher | StoredTeacher, TeacherCache | StoredTeacher]:
    """The teacher, and what keeps its outputs."""
    config, task = checked.config, checked.task
    if checked.stored_logits is not None:
        split = "train" if selection.split is train else task.dev_split
        stored = StoredTeacher(checked.stored_logits, selection.name, split)
        return stored, stored
    eval_batch_size = _eval_batch_size(config)
    folder = Path(config.run_dir) / "teacher"
    teacher = OnlineTeacher(config, task, checked.teacher_source, folder, checked.teacher_ds_config, eval_batch_size)
    reads_teacher = _loss_reads_teacher(config, checked.pairs)
    reads_teacher |= "ptp" in config.stages and config.runs_ptp(task.has_right_and_wrong)
    teacher_cache = TeacherCache(
        config=config,
        task=task,
        teacher=teacher,
        tokenizer=checked.teacher_tokenizer,
        layers=tuple(teacher_layer for _, teacher_layer in checked.pairs),
        is_needed=reads_teacher,
        fingerprints=checked.fingerprints,
        train=train,
        selection_name=selection.name,
        selection_split=selection.split,
        eval_batch_size=eval_batch_size,
    )
    return teacher, teacher_cache


def _check(config: RunConfig, is_bf16_fast: bool) -> _Checked:
    """Everything about a run that one rank can check alone. Raises UserError."""
    dtype, student_ds_config, teacher_ds_config = resolve(config, is_bf16_fast)
    config = replace(config, dtype=dtype)
    run_folder.check(config)
    _check_loss_backend(config)
    _batch_plan(config)
    option = "teacher" if config.teacher else "student_init"
    teacher = contract.find_encoder(config.teacher or config.student_init, option)
    student_init = contract.find_encoder(config.student_init, "student_init") if config.student_init else teacher
    tokenizer, teacher_tokenizer = contract.load_tokenizers(teacher, student_init)
    is_sharded, shards = config.data_placement == "sharded", None
    # Of sharded rows of a task, rank 0 alone reads the files, to see that the shards were made from them.
    task, splits, notes = reading.load(
        config,
        contract.classes_of(teacher) if config.teacher else None,
        config.metric,
        train=not is_sharded or dist.is_main() or bool(config.teacher_outputs),
    )
    stored_logits = stored.read(config, task, splits) if config.teacher_outputs else None
    contract.check_contract(config, task, teacher, student_init, tokenizer, teacher_tokenizer)
    _check_labels(config, task)
    pairs = layer_pairs(config.layer_map, _student_depth(config), teacher.config.num_hidden_layers)
    if config.beta > 0 and config.hidden_loss == "cls" and config.teacher:
        pooling = contract.teacher_pooling(config.teacher_pooling, teacher, teacher_tokenizer)
        teacher = replace(teacher, pooling=pooling)
    _check_stages(config, task, teacher)
    if config.export_onnx:
        require_onnx()
    if config.trim_vocabulary:
        check_trimmable(tokenizer)
    fingerprints = reading.fingerprints(splits)
    if is_sharded:
        shards = shard_files.find(config, task, tokenizer, fingerprints.get("train"), teacher_tokenizer)
        fingerprints["train"] = shards.data_fingerprint
    elif holds_out(config, task):
        check_holdout(task, label_array(splits["train"].data.column("label")))
    if stored_logits is not None:
        fingerprints["teacher_outputs"] = stored.fingerprint(config)
    run_folder.check_data(config, fingerprints, reading.source_of(config))
    return _Checked(
        config,
        task,
        teacher,
        student_init,
        tokenizer,
        teacher_tokenizer,
        student_ds_config,
        teacher_ds_config,
        pairs if config.beta > 0 else (),
        splits,
        fingerprints,
        shards,
        notes,
        stored_logits,
    )


def _select(config: RunConfig, task: Task, train: Split, others: dict[str, Split]) -> tuple[TrainRows, Selection]:
    """Rows of `train` to train on, and the rows that pick epochs."""
    trained, held_out = divide_rows(task, train.labels.numpy(), holds_out(config, task))
    if len(held_out):
        return trained, Selection("holdout", train, held_out)
    name = task.selection_split or "dev"
    split = others[task.dev_split]
    rows = np.arange(len(split))
    return trained, Selection(name, split, rows[is_labeled(split.labels.numpy())] if task.has_labels else rows)


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


def _check_labels(config: RunConfig, task: Task) -> None:
    """Raise UserError for settings of the hard loss that do not apply to these labels."""
    if config.class_weights != "none" and (task.is_regression or task.is_multi_label or not task.has_labels):
        raise UserError(
            f"--class_weights {config.class_weights} weighs the one class of each row, which rows of {task.name} do "
            "not have; leave it out"
        )
    if not task.has_labels and config.alpha not in (SPECS["alpha"].default, 1):
        raise UserError(
            f"--alpha {config.alpha:g} gives labels a weight, but no row has one; leave it out, and it is 1"
        )


def _check_stages(config: RunConfig, task: Task, teacher: Pretrained) -> None:
    """Raise UserError if a chosen stage needs the output of one that has not run."""
    folder, runs_ptp = Path(config.run_dir), config.runs_ptp(task.has_right_and_wrong)
    needs_teacher = "ptp" in config.stages and runs_ptp
    needs_teacher |= "distill" in config.stages and (config.alpha > 0 or config.beta > 0)
    if not task.has_labels and not (teacher.is_classifier or config.teacher_outputs):
        raise UserError(
            f"no row has a label, and --teacher {teacher.path} is an encoder, which cannot be fine-tuned without; give "
            "a classifier, or rows with labels"
        )
    is_there = teacher.is_classifier or "teacher" in config.stages or (folder / "teacher" / "config.json").exists()
    if needs_teacher and not is_there and not config.teacher_outputs:
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
