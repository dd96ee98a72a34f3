"""The three stages of a run: which model is trained, on which loss, and what picks its best epoch.

`train.py` drives them all with one loop; here stands only what differs between them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from peakd_ds import ptp
from peakd_ds.cluster import run_lock
from peakd_ds.config.outputs import STAGES
from peakd_ds.data.batches import GlobalBatch
from peakd_ds.data.tasks import compute_metrics
from peakd_ds.data.tokens import MicroBatch, Split
from peakd_ds.engine import checkpoint, engines
from peakd_ds.engine.ds_config import zero_stage
from peakd_ds.files import whole_file
from peakd_ds.kernels import DistillationLoss, distillation_loss
from peakd_ds.model.build import MatchedStudent, build_student, build_teacher, load_student_body, ptp_head, task_head
from peakd_ds.ranks import dist
from peakd_ds.ranks.device import on_gpu, to_device
from peakd_ds.results import evaluation, figures
from peakd_ds.results.export import export_model, unroll
from peakd_ds.results.log import RunLog
from peakd_ds.run import Run
from peakd_ds.teacher import cache as teacher_cache
from peakd_ds.teacher import online


@dataclass
class Stage:
    """What one stage trains and how it is judged."""

    name: str
    build: Callable[[], nn.Module]
    """A new module with the stage's first weights, in fp32; the same on every rank."""
    loss: Callable[[Any, MicroBatch, GlobalBatch, bool], tuple[DistillationLoss, torch.Tensor | None]]
    """(engine, micro-batch, its global batch, whether to look closely) -> this micro-batch's share of the global
    batch's mean loss, and the share of each layer pair's distance [K] if looked at closely."""
    evaluate: Callable[[nn.Module], dict[str, float]]
    """Metrics on the selection rows (collective)."""
    score: str
    """Metric that picks the best epoch."""
    higher_is_better: bool
    finish: Callable[[Any], None]
    """Takes the module with the best weights and writes what later stages and the user read (collective)."""
    answered: Callable[[Iterator[GlobalBatch]], Iterator[GlobalBatch]] = lambda batches: batches
    """The batches of an epoch, with the teacher's answers where the loss needs them."""


def skipped_because(name: str, run: Run) -> str | None:
    """Why a stage has nothing to do in this run (collective); None if it has."""
    if dist.on_main(lambda: checkpoint.finished(run.folder / "checkpoints" / name)) is not None:
        return "it is finished"
    if name == "teacher" and run.teacher_source.is_classifier:
        return f"{run.teacher_source.path} already is a classifier for {run.task.name}"
    if name == "ptp" and not run.config.ptp:
        return "--no_ptp"
    if name == "ptp" and run.task.is_regression:
        return f"PTP asks whether the teacher's class is right, and {run.task.name} has scores, not classes"
    return None


# -- The stages --------------------------------------------------------------------------------------------------------


def build_stage(name: str, run: Run, log: RunLog) -> Stage:
    """The stage of that name (collective: ptp and distill ask the teacher first)."""
    assert name in STAGES
    return {"teacher": _teacher_stage, "ptp": _ptp_stage, "distill": _distill_stage}[name](run, log)


def _teacher_stage(run: Run, log: RunLog) -> Stage:
    """Fine-tune the encoder with a new head on the task's labels."""

    def loss(engine: Any, micro: MicroBatch, batch: GlobalBatch, closely: bool) -> tuple[DistillationLoss, None]:
        logits = engine(**micro.inputs).logits[: micro.num_real]
        return _hard_loss(run, engine, logits, micro.labels[: micro.num_real], batch), None

    def evaluate(module: nn.Module) -> dict[str, float]:
        return _task_metrics(run, _predict_selection(run, lambda inputs: module(**inputs).logits, run.task.num_labels))

    def finish(module: Any) -> None:
        dist.on_main(lambda: export_model(unroll(module), run.tokenizer, run.folder / "teacher", ""))

    return Stage(
        "teacher",
        lambda: build_teacher(run.config, run.task, run.teacher_source),
        loss,
        evaluate,
        run.task.primary_metric,
        True,
        finish,
    )


def _ptp_stage(run: Run, log: RunLog) -> Stage:
    """Train the student with a 4-class head to tell whether the teacher was right and whether it was sure."""
    ptp_labels = _ptp_labels_of(run, log)
    selection_name = run.selection[0]

    def loss(engine: Any, micro: MicroBatch, batch: GlobalBatch, closely: bool) -> tuple[DistillationLoss, None]:
        logits = engine(**micro.inputs).logits[: micro.num_real]
        labels = to_device(ptp_labels["train"][micro.rows[: micro.num_real]])
        return _hard_loss(run, engine, logits, labels, batch), None

    def evaluate(module: nn.Module) -> dict[str, float]:
        logits = _predict_selection(run, lambda inputs: module(**inputs).logits, ptp.NUM_PTP_LABELS)
        labels = ptp_labels[selection_name]
        return {
            "loss": nn.functional.cross_entropy(logits, labels).item(),
            "accuracy": (logits.argmax(-1) == labels).float().mean().item(),
        }

    def finish(module: Any) -> None:
        logits = _predict_selection(run, lambda inputs: module(**inputs).logits, ptp.NUM_PTP_LABELS)
        counts = ptp.summarize(ptp_labels["train"][ptp_labels["train"] >= 0])
        log.figure("ptp/label_histogram", figures.label_histogram(ptp.PTP_LABEL_NAMES, list(counts.values())))
        log.figure(
            "ptp/confusion_matrix",
            figures.confusion_matrix(ptp.PTP_LABEL_NAMES, ptp_labels[selection_name], logits.argmax(-1)),
        )
        dist.on_main(lambda: export_model(module, run.tokenizer, run.folder / "checkpoints" / "ptp" / "student", ""))

    return Stage(
        "ptp",
        lambda: build_student(run.config, run.student_init, ptp_head()),
        loss,
        evaluate,
        "loss",
        False,
        finish,
    )


def _distill_stage(run: Run, log: RunLog) -> Stage:
    """Train the student, its PTP head dropped for a new one, on labels, teacher logits and teacher hidden states."""
    config = run.config
    answers = teacher_cache.answers_of(run, log.say)
    teacher = run.teacher() if run.loss_reads_teacher and answers is None else None
    teacher_logits = _teacher_logits(run, answers, *run.selection) if run.has_teacher() else None
    if teacher is None:
        run.drop_teacher()  # it was asked about the rows that pick epochs, and no more
    if config.beta > 0 and not run.pairs:
        log.say(f"--layer_map {config.layer_map} matches no layer pair at these depths: the hidden-state loss is 0")

    def build() -> nn.Module:
        student = build_student(config, run.student_init, task_head(run.task))
        if config.ptp and not run.task.is_regression:
            load_student_body(student, run.folder / "checkpoints" / "ptp" / "student")
        return MatchedStudent(student, run.pairs, run.teacher_source.config.hidden_size, config.hidden_loss)

    def ask(micro: MicroBatch) -> online.Answer:
        n, layers, needs_logits = micro.num_real, [j for _, j in run.pairs], config.alpha > 0
        if answers is not None:
            logits, states = answers["train"].of(micro.rows[:n])
        else:
            assert teacher is not None
            logits, states = teacher(layers, config.hidden_loss, needs_logits, **micro.inputs)
        return logits[:n] if needs_logits else None, [tensor[:n] for tensor in states]

    def answered(batches: Iterator[GlobalBatch]) -> Iterator[GlobalBatch]:
        if not run.loss_reads_teacher:
            return batches
        is_ahead = teacher is not None and on_gpu() and zero_stage(run.teacher_ds_config) == 0
        return online.answered(batches, ask, run.teacher_clock, is_ahead)

    def loss(
        engine: Any, micro: MicroBatch, batch: GlobalBatch, closely: bool
    ) -> tuple[DistillationLoss, torch.Tensor | None]:
        n = micro.num_real
        teacher_scores, teacher_hidden = micro.answer or (None, [])
        logits, hidden = engine(**micro.inputs)
        hidden = [states[:n] for states in hidden]

        def compare(student_hidden: list[torch.Tensor], teacher_hidden: list[torch.Tensor]) -> DistillationLoss:
            return distillation_loss(
                logits[:n],
                teacher_scores,
                micro.labels[:n],
                student_hidden,
                teacher_hidden,
                temperature=config.temperature,
                alpha=config.alpha,
                beta=config.beta,
                normalize=config.hidden_loss == "cls",
                num_items=batch.num_items,
                num_tokens=batch.num_tokens,
                grad_scale=engines.expected_upstream(engine),
                backend=config.loss_backend,
            )

        distances = None
        if closely and run.pairs:
            with torch.no_grad():
                distances = torch.stack([compare([s], [t]).hidden for s, t in zip(hidden, teacher_hidden, strict=True)])
        return compare(hidden, teacher_hidden), distances

    def evaluate(module: nn.Module) -> dict[str, float]:
        logits = _predict_selection(run, lambda inputs: module(**inputs)[0], run.task.num_labels)
        metrics = _task_metrics(run, logits)
        if teacher_logits is not None:
            metrics["agreement"] = evaluation.agreement(run.task, logits, teacher_logits)
        return metrics

    def finish(module: Any) -> None:
        dist.on_main(lambda: export_model(module.student, run.tokenizer, run.folder / "student", ""))

    return Stage("distill", build, loss, evaluate, run.task.primary_metric, True, finish, answered)


def _ptp_labels_of(run: Run, log: RunLog) -> dict[str, torch.Tensor]:
    """PTP labels of the rows trained on (-1 for others), and of the selection rows under its name (collective).

    The medians are those of the rows trained on.

    They are made once and kept, so that a resumed stage trains on the same ones: another number of ranks pads
    otherwise, and a confidence within rounding of its threshold could change sides.
    """
    file = run.folder / "checkpoints" / "ptp" / "labels.safetensors"
    selection_name, split, rows = run.selection
    if not dist.on_main(file.exists):
        answers = teacher_cache.answers_of(run, log.say)
        logits = _teacher_logits(run, answers, "train", run.train, run.train_rows)
        labels = run.train.labels[run.train_rows]
        published = run.task.ptp_thresholds or ("median", "median")
        wanted = [
            published[i] if given is None else given
            for i, given in enumerate((run.config.t_correct, run.config.t_wrong))
        ]
        t_correct, t_wrong = ptp.resolve_thresholds(logits, labels, *wanted)
        of_train = torch.full((len(run.train),), -1, dtype=torch.int64)
        of_train[torch.from_numpy(run.train_rows)] = ptp.ptp_labels(logits, labels, t_correct, t_wrong)
        of_selection = ptp.ptp_labels(
            _teacher_logits(run, answers, selection_name, split, rows), split.labels[rows], t_correct, t_wrong
        )
        thresholds = {"t_correct": str(t_correct), "t_wrong": str(t_wrong)}

        def write() -> None:
            run_lock.check()
            with whole_file(file) as temporary:
                save_file({"train": of_train, "selection": of_selection}, temporary, metadata=thresholds)

        dist.on_main(write)

    def read() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118

    stored, thresholds = dist.on_main(read)
    counts = ptp.summarize(stored["train"][stored["train"] >= 0])
    log.say(
        f"ptp labels with t_correct {float(thresholds['t_correct']):.4f}, t_wrong "
        f"{float(thresholds['t_wrong']):.4f}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items())
    )
    return {"train": stored["train"], selection_name: stored["selection"]}


def _teacher_logits(
    run: Run, answers: dict[str, teacher_cache.Answers] | None, name: str, split: Split, rows: np.ndarray
) -> torch.Tensor:
    """float32 [N, C] over rows of the split of that name, on the CPU: from the cache or (collective) the teacher."""
    if answers is None:
        return run.teacher_logits(split, rows)
    return answers[name].logits(torch.from_numpy(rows))


def _hard_loss(
    run: Run, engine: Any, logits: torch.Tensor, labels: torch.Tensor, batch: GlobalBatch
) -> DistillationLoss:
    return distillation_loss(
        logits,
        None,
        labels,
        [],
        [],
        temperature=1.0,
        alpha=0.0,
        beta=0.0,
        num_items=batch.num_items,
        grad_scale=engines.expected_upstream(engine),
        backend=run.config.loss_backend,
    )


def _predict_selection(run: Run, forward: evaluation.Forward, num_columns: int) -> torch.Tensor:
    _, split, rows = run.selection
    return evaluation.predict(forward, split, rows, run.eval_batch_size, num_columns)[0]


def _task_metrics(run: Run, logits: torch.Tensor) -> dict[str, float]:
    _, split, rows = run.selection
    return compute_metrics(run.task, logits, split.labels[rows])
