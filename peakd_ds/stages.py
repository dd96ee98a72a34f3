"""The three stages of a run: which model each trains, on which loss, and what picks its best epoch.

train.py drives all of them with one loop; here is what differs between them. B rows, N rows of a split, C classes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from peakd_ds import ptp
from peakd_ds.cluster import run_lock
from peakd_ds.config.outputs import STAGES
from peakd_ds.data import summary
from peakd_ds.data.batches import GlobalBatch
from peakd_ds.data.metrics import compute_metrics, higher_is_better
from peakd_ds.data.tokens import MicroBatch, Split, TeacherOutputs
from peakd_ds.engine import checkpoint, engines
from peakd_ds.files import damage_named, damage_of_file, damaged, is_written, needs_space, write_checked, written_sha256
from peakd_ds.kernels import DistillationLoss, distillation_loss
from peakd_ds.model import vocabulary
from peakd_ds.model.build import MatchedStudent, build_student, build_teacher, load_student_body, ptp_head, task_head
from peakd_ds.ranks import dist
from peakd_ds.ranks.device import device, to_device
from peakd_ds.results import evaluation, figures
from peakd_ds.results.export import export_model, unroll
from peakd_ds.results.log import RunLog
from peakd_ds.run import Run
from peakd_ds.teacher.cache import CachedOutputs
from peakd_ds.teacher.online import OnlineTeacher, with_teacher_outputs
from peakd_ds.teacher.stored import StoredOutputs, StoredTeacher

StageLoss = tuple[DistillationLoss, Tensor | None]
"""A micro-batch's share of the global batch's mean loss, and of each layer pair's distance [K]."""


Outputs = Mapping[str, CachedOutputs | StoredOutputs]
"""A teacher's kept outputs by the name of the split."""


@dataclass
class Stage:
    """What one stage trains and how it is judged."""

    name: str
    build: Callable[[], nn.Module]
    """Makes the module with its first weights, in fp32; the same on every rank."""
    loss: Callable[[DeepSpeedEngine, MicroBatch, GlobalBatch, bool], StageLoss]
    """(engine, micro-batch, its global batch, whether to compute distances) -> the micro-batch's share of the loss."""
    evaluate: Callable[[nn.Module], dict[str, float]]
    """Metrics on the selection rows (collective)."""
    score: str
    """The metric that picks the best epoch."""
    weights: dict[str, float]
    """The weight of each term in the loss, for the log."""
    finish: Callable[[Any], None]
    """Takes the module with the best weights; writes what later stages and the user read (collective)."""
    with_teacher_outputs: Callable[[Iterator[GlobalBatch]], Iterator[GlobalBatch]] = lambda batches: batches
    """Adds the teacher's outputs to the batches of an epoch if the loss reads them."""
    teacher_scores: dict[str, float] = field(default_factory=dict)
    """The teacher's metrics on the selection rows, for the log."""

    @property
    def higher_is_better(self) -> bool:
        return higher_is_better(self.score)


def names_to_run(run: Run, say: Callable[[str], None]) -> Iterator[str]:
    """The stages that are chosen and have something to do (collective); says why others are skipped."""
    for name in STAGES:
        if name in run.config.stages:
            reason = _why_skipped(name, run)
            if reason is None:
                yield name
            else:
                say(f"stage {name} is skipped: {reason}")


def _why_skipped(name: str, run: Run) -> str | None:
    if dist.on_main(lambda: checkpoint.finished(run.checkpoint_folder(name))) is not None:
        return "it is finished"
    if name == "teacher" and isinstance(run.teacher, StoredTeacher):
        return "--teacher_outputs has its predictions"
    if name == "teacher" and isinstance(run.teacher, OnlineTeacher) and run.teacher.source.is_classifier:
        return f"{run.teacher.source.path} is a classifier for {run.task.name} already"
    if name == "ptp" and not run.config.ptp:
        return "--no_ptp"
    if name == "ptp" and not run.runs_ptp:
        kind = "scores" if run.task.is_regression else "several labels a row" if run.task.has_labels else "no labels"
        return f"PTP needs right and wrong classes, and {run.task.name} has {kind}"
    return None


# -- Modules -----------------------------------------------------------------------------------------------------------


def trainable_module(stage: Stage, run: Run) -> tuple[nn.Module, str]:
    """The stage's module with embeddings for the tokens in use only, and the digest of these tokens (collective)."""
    module = build_module(stage, run)
    tokens = run.used_tokens_of(stage.name)
    vocabulary.trim(module, tokens)
    return module, vocabulary.digest(tokens)


def load_best(stage: Stage, run: Run, epoch: int) -> nn.Module:
    """The stage's module with the weights of that epoch and its whole embedding table, in eval mode (collective)."""
    folder = checkpoint.best_folder(run.checkpoint_folder(stage.name), epoch)
    module, tokens = build_module(stage, run), run.used_tokens_of(stage.name)
    whole_table = vocabulary.trim(module, tokens)
    checkpoint.load_weights(module, folder)
    decay = dist.on_main(lambda: checkpoint.state_of(folder).decay)
    vocabulary.restore(module, whole_table, tokens, decay)
    dist.on_main(run_lock.check)
    return module.to(device()).eval()


def build_module(stage: Stage, run: Run) -> nn.Module:
    """The stage's module (collective); new weights (heads, projections) come from the seed, the same on every rank."""
    dist.seed_everything(run.config.seed, stage.name, "weights")
    return dist.agree(stage.build)


# -- The stages --------------------------------------------------------------------------------------------------------


def build_stage(name: str, run: Run, log: RunLog) -> Stage:
    """The stage of that name (collective: ptp and distill compute the teacher's predictions first)."""
    log.title(name)
    return {"teacher": _teacher_stage, "ptp": _ptp_stage, "distill": _distill_stage}[name](run, log)


def _teacher_stage(run: Run, log: RunLog) -> Stage:
    """Fine-tune the encoder with a new head on the task's labels."""

    def loss(engine: DeepSpeedEngine, micro: MicroBatch, batch: GlobalBatch, with_distances: bool) -> StageLoss:
        logits_BC = engine(**micro.inputs).logits[: micro.num_real]
        options = _label_options(run, micro, batch)
        return _hard_loss(run, engine, logits_BC, micro.labels[: micro.num_real], batch, **options), None

    def evaluate(module: nn.Module) -> dict[str, float]:
        logits_NC = _predict_selection(run, "teacher", lambda inputs: module(**inputs).logits, run.task.num_labels)
        return _task_metrics(run, logits_NC)

    teacher = run.teacher
    assert isinstance(teacher, OnlineTeacher)

    def finish(module: PreTrainedModel) -> None:
        tokenizer, pooling = run.teacher_tokenizer, teacher.source.pooling
        dist.on_main(
            lambda: export_model(unroll(module), tokenizer, teacher.folder, "", with_checksums=True, pooling=pooling)
        )

    return Stage(
        name="teacher",
        build=lambda: build_teacher(run.config, run.task, teacher.source),
        loss=loss,
        evaluate=evaluate,
        score=run.score_of("teacher"),
        weights=run.loss_weights("teacher"),
        finish=finish,
    )


def _ptp_stage(run: Run, log: RunLog) -> Stage:
    """Train the student with a 4-class head on whether the teacher was right and confident."""
    train_labels_N, selection_labels_N = _ptp_labels(run, log)

    def loss(engine: DeepSpeedEngine, micro: MicroBatch, batch: GlobalBatch, with_distances: bool) -> StageLoss:
        logits_BC = engine(**micro.inputs).logits[: micro.num_real]
        labels_B = to_device(train_labels_N[micro.rows[: micro.num_real]])
        return _hard_loss(run, engine, logits_BC, labels_B, batch), None

    def predict(module: nn.Module) -> Tensor:
        return _predict_selection(run, "ptp", lambda inputs: module(**inputs).logits, ptp.NUM_PTP_LABELS)

    def evaluate(module: nn.Module) -> dict[str, float]:
        logits_NC = predict(module)
        return {
            "loss": nn.functional.cross_entropy(logits_NC, selection_labels_N).item(),
            "accuracy": (logits_NC.argmax(-1) == selection_labels_N).float().mean().item(),
        }

    def finish(module: PreTrainedModel) -> None:
        predictions_N = predict(module).argmax(-1)
        counts = ptp.summarize(train_labels_N[train_labels_N >= 0])
        log.figure("ptp/label_histogram", figures.label_histogram(ptp.PTP_LABEL_NAMES, list(counts.values())))
        matrix = figures.confusion_matrix(ptp.PTP_LABEL_NAMES, selection_labels_N, predictions_N)
        log.figure("ptp/confusion_matrix", matrix)
        dist.on_main(lambda: export_model(module, run.tokenizer, _ptp_student_folder(run), "", with_checksums=True))

    return Stage(
        name="ptp",
        build=lambda: build_student(run.config, run.student_init, ptp_head()),
        loss=loss,
        evaluate=evaluate,
        score=run.score_of("ptp"),
        weights=run.loss_weights("ptp"),
        finish=finish,
    )


def _distill_stage(run: Run, log: RunLog) -> Stage:
    """Train the student, with a new head in place of PTP's, on labels, teacher logits and teacher hidden states."""
    config = run.config
    cached = run.teacher_cache.outputs(log.say)
    teacher_logits_NC = _teacher_logits(run, cached, *run.selection) if run.teacher.is_trained() else None
    teacher_scores = {} if teacher_logits_NC is None else _task_metrics(run, teacher_logits_NC)
    if teacher_logits_NC is not None:
        log.say(_teacher_score(run, teacher_logits_NC))
    if cached is not None or not run.loss_reads_teacher:
        run.teacher.stop()  # it was needed for the selection rows only
    if config.beta > 0 and not run.pairs:
        log.say(f"--layer_map {config.layer_map} matches no layer pair at these depths: the hidden-state loss is 0")

    def build() -> nn.Module:
        student = build_student(config, run.student_init, task_head(run.task))
        if run.runs_ptp:
            load_student_body(student, _ptp_student_folder(run))
        return MatchedStudent(student, run.pairs, run.teacher.hidden_size, config.hidden_loss)

    def evaluate(module: nn.Module) -> dict[str, float]:
        logits_NC = _predict_selection(run, "distill", lambda inputs: module(**inputs)[0], run.task.num_labels)
        metrics = _task_metrics(run, logits_NC)
        if teacher_logits_NC is not None:
            metrics["agreement"] = evaluation.agreement(run.task, logits_NC, teacher_logits_NC)
        return metrics

    def finish(module: MatchedStudent) -> None:
        dist.on_main(lambda: export_model(module.student, run.tokenizer, run.folder / "student", ""))

    return Stage(
        name="distill",
        build=build,
        loss=lambda *arguments: _distill_loss(run, *arguments),
        evaluate=evaluate,
        score=run.score_of("distill"),
        weights=run.loss_weights("distill"),
        finish=finish,
        with_teacher_outputs=lambda batches: _with_teacher_outputs(run, cached, batches),
        teacher_scores=teacher_scores,
    )


def _distill_loss(
    run: Run, engine: DeepSpeedEngine, micro: MicroBatch, batch: GlobalBatch, with_distances: bool
) -> StageLoss:
    config, n = run.config, micro.num_real
    teacher_logits_BC, teacher_hidden = micro.teacher_outputs or (None, [])
    logits_BC, student_hidden = engine(**micro.inputs)
    student_hidden = [states[:n] for states in student_hidden]

    def compare(student_hidden: list[Tensor], teacher_hidden: list[Tensor]) -> DistillationLoss:
        return distillation_loss(
            logits_BC[:n],
            teacher_logits_BC,
            micro.labels[:n],
            student_hidden,
            teacher_hidden,
            temperature=config.temperature,
            alpha=run.alpha,
            beta=config.beta,
            normalize=config.hidden_loss == "cls",
            **_label_options(run, micro, batch),
            num_items=batch.num_items,
            num_tokens=batch.num_tokens,
            grad_scale=engines.expected_upstream(engine),
            backend=config.loss_backend,
        )

    distances_K = None
    if with_distances and run.pairs:
        pairs = zip(student_hidden, teacher_hidden, strict=True)
        with torch.no_grad():
            distances_K = torch.stack([compare([student], [teacher]).hidden for student, teacher in pairs])
    return compare(student_hidden, teacher_hidden), distances_K


def _with_teacher_outputs(run: Run, cached: Outputs | None, batches: Iterator[GlobalBatch]) -> Iterator[GlobalBatch]:
    """The batches with the teacher's outputs, from the cache or its forward pass, if the loss reads them."""
    if not run.loss_reads_teacher:
        return batches
    layers, with_logits = [teacher_layer for _, teacher_layer in run.pairs], run.alpha > 0
    if cached is not None:
        train = cached["train"]
        return with_teacher_outputs(
            batches, lambda micro: train.of(micro.rows[: micro.num_real], with_logits), run.teacher.clock, False
        )
    teacher = run.teacher
    assert isinstance(teacher, OnlineTeacher)

    def forward(micro: MicroBatch) -> TeacherOutputs:
        return teacher.forward(run.train.micro_batch_for_teacher(micro), layers, with_logits)

    return with_teacher_outputs(batches, forward, teacher.clock, teacher.runs_ahead())


def _label_options(run: Run, micro: MicroBatch, batch: GlobalBatch) -> dict[str, Any]:
    """How the hard loss reads the task's labels: weights of rows, and several labels a row."""
    weights = micro.label_weights
    return {
        "label_weights": None if weights is None else weights[: micro.num_real],
        "label_divisor": batch.label_divisor,
        "multi_label": run.task.is_multi_label,
    }


def _hard_loss(
    run: Run, engine: DeepSpeedEngine, logits_BC: Tensor, labels_B: Tensor, batch: GlobalBatch, **label_options: Any
) -> DistillationLoss:
    return distillation_loss(
        logits_BC,
        None,
        labels_B,
        [],
        [],
        temperature=1.0,
        alpha=0.0,
        beta=0.0,
        num_items=batch.num_items,
        grad_scale=engines.expected_upstream(engine),
        backend=run.config.loss_backend,
        **label_options,
    )


def _predict_selection(run: Run, stage: str, forward: evaluation.Forward, num_columns: int) -> Tensor:
    _, split, rows = run.selection_of(stage)
    return evaluation.predict(forward, split, rows, run.eval_batch_size, num_columns)[0]


def _task_metrics(run: Run, logits_NC: Tensor) -> dict[str, float]:
    _, split, rows = run.selection
    return compute_metrics(run.task, logits_NC, split.labels[rows])


# -- PTP labels --------------------------------------------------------------------------------------------------------


def _ptp_labels(run: Run, log: RunLog) -> tuple[Tensor, Tensor]:
    """PTP labels (collective): int64 [N] of train, -1 for rows not trained on, and those of the selection rows.

    They are computed once and kept, so that a resumed stage trains on the same labels: another number of ranks pads
    differently, and a confidence within rounding of its threshold could change its class.
    """
    file = run.checkpoint_folder("ptp") / "labels.safetensors"
    if not dist.on_main(file.exists):
        _write_ptp_labels(run, log, file)

    labels, thresholds = dist.on_main(lambda: _read_ptp_labels(file))
    counts = ptp.summarize(labels["train"][labels["train"] >= 0])
    log.say(
        f"ptp labels with t_correct {float(thresholds['t_correct']):.4f}, t_wrong "
        f"{float(thresholds['t_wrong']):.4f}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items())
    )
    reason = ptp.why_unbalanced(counts)
    if reason:
        are_medians = _thresholds_of(run) == ("median", "median")
        log.say(f"warning: {reason}" + ("" if are_medians else "; try --t_correct median --t_wrong median"))
    return labels["train"], labels["selection"]


def _read_ptp_labels(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The stored tensors and thresholds. Raises UserError if the file is damaged."""
    remedy = f"delete {file}, and the same command computes it again"
    if is_written(file):  # earlier versions wrote no checksum
        damage = damage_of_file(file, written_sha256(file))
        if damage is not None:
            raise damaged(file, damage, remedy)
    with damage_named(file, remedy), safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in ("train", "selection")}
        metadata = opened.metadata()
        return tensors, {name: str(float(metadata[name])) for name in ("t_correct", "t_wrong")}


def _write_ptp_labels(run: Run, log: RunLog, file: Path) -> None:
    """Compute the labels from the teacher's predictions (collective); medians are over the rows trained on."""
    name, split, rows = run.selection
    cached = run.teacher_cache.outputs(log.say)
    train_rows = run.rows_of("ptp").rows
    selection_logits_NC = _teacher_logits(run, cached, name, split, rows)
    log.say(_teacher_score(run, selection_logits_NC))
    logits_NC = _teacher_logits(run, cached, "train", run.train, train_rows)
    labels_N = run.train.labels[train_rows]
    t_correct, t_wrong = ptp.resolve_thresholds(logits_NC, labels_N, *_thresholds_of(run))
    train_labels_N = torch.full((len(run.train),), -1, dtype=torch.int64)
    train_labels_N[torch.from_numpy(train_rows)] = ptp.ptp_labels(logits_NC, labels_N, t_correct, t_wrong)
    selection_labels_N = ptp.ptp_labels(selection_logits_NC, split.labels[rows], t_correct, t_wrong)

    tensors = {"train": train_labels_N, "selection": selection_labels_N}
    content = save(tensors, metadata={"t_correct": str(t_correct), "t_wrong": str(t_wrong)})

    def write() -> None:
        run_lock.check()
        with needs_space(file):
            write_checked(file, content)

    dist.on_main(write)


def _thresholds_of(run: Run) -> tuple[ptp.Threshold, ptp.Threshold]:
    """(t_correct, t_wrong) as set, else as published for the task, else medians."""
    published, config = run.task.ptp_thresholds or ("median", "median"), run.config
    return (
        published[0] if config.t_correct is None else config.t_correct,
        published[1] if config.t_wrong is None else config.t_wrong,
    )


def _teacher_score(run: Run, logits_NC: Tensor) -> str:
    """The teacher's score on the rows that pick epochs, with a warning if always predicting one class is better."""
    metrics = _task_metrics(run, logits_NC)
    if not metrics:
        return "the teacher cannot be scored, since no row has a label"
    name = run.task.primary_metric
    text = f"the teacher on {run.selection.name}: {name} {metrics[name]:.4f}"
    majority = summary.majority_share(run.task, run.selection.split.labels[run.selection.rows].numpy())
    if majority is not None and "accuracy" in metrics and metrics["accuracy"] < majority:
        text = (
            f"warning: {text}, accuracy {metrics['accuracy']:.4f}, less than {majority:.4f} for the largest class alone"
        )
    return text


def _ptp_student_folder(run: Run) -> Path:
    return run.checkpoint_folder("ptp") / "student"


def _teacher_logits(run: Run, cached: Outputs | None, name: str, split: Split, rows: np.ndarray) -> Tensor:
    """float32 [N, C] over rows of the split of that name, on the CPU: from the cache or the teacher (collective)."""
    if cached is None:
        assert isinstance(run.teacher, OnlineTeacher)
        return run.teacher.logits(split, rows)
    return cached[name].logits(torch.from_numpy(rows))
