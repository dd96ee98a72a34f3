"""What a run is about to do: the lines that it prints first, and the work of each stage, for its forecast."""

import math
import os
from collections.abc import Sequence
from typing import Any

from peakd_ds.config import RunConfig
from peakd_ds.data import summary
from peakd_ds.data.division import NUM_SHARDS
from peakd_ds.engine.ds_config import zero_stage
from peakd_ds.engine.schedule import Schedule
from peakd_ds.families import is_packed
from peakd_ds.kernels import choose_backend
from peakd_ds.model import sizes
from peakd_ds.model.contract import Pretrained
from peakd_ds.model.sizes import Parameters
from peakd_ds.ranks import dist, host
from peakd_ds.ranks.device import device
from peakd_ds.results.forecast import Forecast, StageWork, duration
from peakd_ds.run import Run
from peakd_ds.teacher.online import OnlineTeacher

BYTES_OF_CHECKPOINT = 16
"""Of a parameter, at most: fp32 weights, two moments of Adam, and the weights again where the epoch is the best."""
WRITE_BYTES_PER_S = 100e6
"""Assumed speed of writing a checkpoint, with its checksums, to a slow disk or a busy network."""
DEEPSPEED_KILLS_AFTER_S = 30
"""What deepspeed's launcher leaves its ranks after a signal."""


def plan(run: Run) -> str:
    """What is about to run, with every derived number beside the numbers it follows from."""
    config = run.config
    pairs = ", ".join(f"{i}:{j}" for i, j in run.pairs) or "none"
    placement, warnings = [], [f"warning: {host.describe(lock)}" for lock in host.stale_locks()]
    if config.data_placement == "sharded":
        placement = [f"rows of {NUM_SHARDS // dist.num_nodes()} shards on each of {dist.num_nodes()} nodes"]
    if not run.task.has_labels:
        warnings.append("alpha is 1, since no row has a label")
    models = _models(run)
    return "\n".join(
        [
            f"task {run.task.name}, method {run.method}, seed {config.seed}, {config.dtype} on {device().type}",
            f"rows: train {len(run.train_rows):,}, {run.selection.name} {len(run.selection.rows):,} (picks epochs), "
            + ", ".join(f"{name} {len(split):,}" for name, split in run.dev.items()),
            f"batch: global {config.global_batch_size} = micro {run.micro_batch_size} x accum {run.num_accum_steps} x "
            f"world {dist.world_size()}, from {math.gcd(config.global_batch_size, NUM_SHARDS)} of {NUM_SHARDS} shards "
            "at a time",
            *placement,
            f"teacher: {_teacher(run)}",
            f"student: {_family(run.student_init)}, {config.num_hidden_layers} stored layers run as "
            f"{run.student_depth} of {run.student_init.config.hidden_size}, "
            f"ZeRO stage {zero_stage(run.student_ds_config)}, layer pairs {pairs}",
            _parameters(run, *models),
            f"vocabulary: {len(run.used_tokens):,} of {len(run.tokenizer):,} tokens occur and are trained",
            *_trimmed(run),
            f"loss: {_loss_backend(config)}",
            *_stopping(run, *models),
            summary.of_labels(run.task, "train", run.train.labels.numpy()),
            *(summary.of_labels(run.task, name, split.labels.numpy()) for name, split in run.dev.items()),
            *_lengths(run),
            *run.notes,
            *warnings,
        ]
    )


def _lengths(run: Run) -> list[str]:
    """A line on the tokens of the rows for each tokenizer."""
    if run.teacher_tokenizer is run.tokenizer:
        return [summary.of_lengths(run.train, run.config.max_seq_length, run.tokenizer)]
    readers = ("student", run.train, run.tokenizer), ("teacher", run.train.for_teacher(), run.teacher_tokenizer)
    return [summary.of_lengths(split, run.config.max_seq_length, tokenizer, who) for who, split, tokenizer in readers]


def _trimmed(run: Run) -> list[str]:
    """A line on the vocabulary of the exported student, if it is trimmed."""
    if run.trimmed is None:
        return []
    config: Any = run.student_init.config
    kept, whole = len(run.trimmed.kept_ids), config.vocab_size
    saved = (whole - kept) * getattr(config, "embedding_size", config.hidden_size)
    return [
        f"exported vocabulary: {kept:,} of {whole:,} tokens stay, which saves {saved:,} parameters; words outside "
        "become pieces or unknown (--trim_vocabulary)"
    ]


def _models(run: Run) -> tuple[Parameters, Parameters]:
    """Parameters of the teacher and of the student."""
    source = run.teacher.source if isinstance(run.teacher, OnlineTeacher) else run.student_init
    models = sizes.teacher_and_student_on_meta(run.config, run.task, source.config, run.student_init.config)
    return sizes.count_parameters(models[0]), sizes.count_parameters(models[1])


def _parameters(run: Run, teacher: Parameters, student: Parameters) -> str:
    """The parameters of teacher and student; a teacher whose outputs are read from files has none."""
    has_teacher = isinstance(run.teacher, OnlineTeacher)
    return f"sizes: {f'teacher {teacher}, ' if has_teacher else ''}student {student}"


def _stopping(run: Run, teacher: Parameters, student: Parameters) -> list[str]:
    """A warning where deepspeed's launcher would kill ranks before the largest checkpoint is written."""
    if "CROSS_RANK" not in os.environ:  # deepspeed's launcher sets it
        return []
    trained = [student.total - student.embeddings * (1 - len(run.used_tokens) / len(run.tokenizer))]
    is_encoder = isinstance(run.teacher, OnlineTeacher) and not run.teacher.source.is_classifier
    if "teacher" in run.config.stages and is_encoder:
        share_used = len(run.teacher_used_tokens) / len(run.teacher_tokenizer)
        trained.append(teacher.total - teacher.embeddings * (1 - share_used))
    num_bytes = BYTES_OF_CHECKPOINT * max(trained)
    seconds = num_bytes / WRITE_BYTES_PER_S
    if seconds <= DEEPSPEED_KILLS_AFTER_S:
        return []
    return [
        f"warning: a checkpoint has {num_bytes / 1e9:.1f} GB, which takes some {duration(seconds)} to write at "
        f"{WRITE_BYTES_PER_S / 1e6:.0f} MB/s (assumed), but after Ctrl-C deepspeed waits {DEEPSPEED_KILLS_AFTER_S} s "
        f"and kills; start with torchrun --shutdown_timeout {2 * math.ceil(seconds)} instead, whose wait can be set"
    ]


def _loss_backend(config: RunConfig) -> str:
    """What computes the losses, and why."""
    if config.loss_backend != "auto":
        return f"{config.loss_backend} kernels (--loss_backend)"
    chosen, reason = choose_backend(device().type)
    return f"{chosen} kernels, since {reason}"


def _teacher(run: Run) -> str:
    """The teacher's name and size, or the files of its outputs."""
    if not isinstance(run.teacher, OnlineTeacher):
        order = f", classes in the order {', '.join(run.task.label_names)}" if run.task.label_names else ""
        return f"outputs in {' and '.join(run.config.teacher_outputs or ())}{order}"
    source = run.teacher.source
    layers = f"{source.config.num_hidden_layers} layers of {source.config.hidden_size}"
    vectors = {"cls": "first token", "last": "last token", "mean": "mean of its tokens"}
    pooling = f", vector of a row: {vectors[source.pooling]}" if run.pairs and run.config.hidden_loss == "cls" else ""
    return f"{source.path}, {_family(source)}, {layers}, ZeRO stage {run.teacher.zero_stage}{pooling}"


def _family(model: Pretrained) -> str:
    """A model's family, and whether its rows are padded."""
    return f"{model.family.name}{'' if is_packed(model.config) else ' (rows padded)'}"


def forecast(run: Run, names: Sequence[str]) -> Forecast:
    """What the given stages and the report compute; a unit of work is a layer's pass over a row, times its width^2."""
    config, num_selected = run.config, len(run.selection.rows)
    student = run.student_depth * run.student_init.config.hidden_size**2
    teacher = 0
    if isinstance(run.teacher, OnlineTeacher):
        teacher = run.teacher.source.config.num_hidden_layers * run.teacher.source.config.hidden_size**2
    answers = teacher * (len(run.train_rows) + num_selected)
    is_online = config.teacher_mode == "online" or config.hidden_loss == "tokens"
    works = []
    for name in names:
        schedule = Schedule.of(config, name, run.rows_of(name))
        trained = teacher if name == "teacher" else student
        row, before = 3.0 * trained, 0.0  # forward, and backward at twice that
        if name == "ptp" or (name == "distill" and run.loss_reads_teacher and not is_online and "ptp" not in names):
            before = answers
        if name == "distill" and run.loss_reads_teacher and is_online:
            row += teacher
        works.append(
            StageWork(
                name=name,
                num_steps=schedule.num_steps,
                num_epochs=schedule.num_epochs,
                step=row * len(run.rows_of(name)) / max(schedule.steps_per_epoch, 1),
                epoch_end=float(trained * num_selected),
                before=float(before),
            )
        )
    return Forecast(works, report=sum(len(split) for split in run.dev.values()) * float(teacher + student))
