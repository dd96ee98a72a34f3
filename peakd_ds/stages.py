"""The three stages of a run: which model is trained, on which loss, and what picks its best epoch.

`train.py` drives them all with one loop; here stands only what differs between them.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from peakd_ds import checkpoint, data, dist, ds_engine, figures, glue_eval, modeling, ptp
from peakd_ds.config import STAGES, RunConfig, UserError, differences, to_yaml
from peakd_ds.data import GlobalBatch, MicroBatch, Split
from peakd_ds.export import export_model
from peakd_ds.kernels import DistillationLoss, distillation_loss
from peakd_ds.modeling import Encoder, MatchedStudent
from peakd_ds.run_log import RunLog, TeacherClock
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
        logits, _ = glue_eval.predict(lambda inputs: teacher(**inputs).logits, split, rows, self.micro_and_accum[0],
                                      self.task.num_labels)
        return logits


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
    finish: Callable[[nn.Module], None]
    """Takes the module with the best weights and writes what later stages and the user read (collective)."""


# -- Opening a run: every mistake of the user's is met here, before any engine starts ----------------------------------


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
        return task, resolved, student_ds_config, teacher_ds_config, teacher, student_init, tokenizer, pairs, \
            data.load_splits(task, config.data_dir)

    task, config, student_ds_config, teacher_ds_config, teacher, student_init, tokenizer, pairs, splits = \
        dist.agree(look)
    cache = None if config.dry_run else Path(config.run_dir) / "cache"
    if not config.dry_run:
        dist.on_main(lambda: _create_run_folder(config))
    tokenized = {name: data.tokenize(task, rows, tokenizer, config.max_seq_length, cache)
                 for name, rows in splits.items() if name == "train" or name in task.eval_splits}
    dev = {name: tokenized[name] for name in task.eval_splits}
    train, train_rows = tokenized["train"], np.arange(len(tokenized["train"]))
    if config.select_on == "holdout":
        train_rows, holdout_rows = data.split_holdout(len(train))
        selection = ("holdout", train, holdout_rows)
        if not len(holdout_rows):
            raise UserError(f"task {task.name} has {len(train)} training rows, too few to hold out a tenth; "
                            "set --select_on dev")
    else:
        selection = ("dev", dev[task.eval_splits[0]], np.arange(len(dev[task.eval_splits[0]])))
    return Run(config, task, teacher, student_init, tokenizer, train, train_rows, selection, dev, student_ds_config,
               teacher_ds_config, pairs if config.beta > 0 else ())


def _check_run_folder(config: RunConfig) -> None:
    folder = Path(config.run_dir)
    saved = folder / "config.yaml"
    if saved.exists():
        changed = differences(config, saved.read_text())
        if changed:
            raise UserError(f"--run_dir {folder} holds a run with other settings ({'; '.join(changed)}); nothing was "
                            "changed there: take another --run_dir, or the settings it was started with")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--run_dir {folder} cannot be written ({nearest} is no folder you may write to); "
                        "take another --run_dir")


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
        raise UserError(f"--stages {','.join(config.stages)} needs a trained teacher, but --teacher {teacher.path} is "
                        "an encoder without a head for the task; add the teacher stage, or give a classifier")
    if "distill" in config.stages and "ptp" not in config.stages and config.ptp and not task.is_regression \
            and checkpoint.finished(folder / "checkpoints" / "ptp") is None:
        raise UserError(f"--stages {','.join(config.stages)} distils a PTP student, but the ptp stage has not run in "
                        f"{folder}; add it, or set --no_ptp")


def skipped_because(name: str, run: Run) -> str | None:
    """Why a stage has nothing to do in this run; None if it has."""
    if checkpoint.finished(run.folder / "checkpoints" / name) is not None:
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
        return _hard_loss(logits, micro.labels[: micro.num_real], batch), None

    def evaluate(module: nn.Module) -> dict[str, float]:
        return _task_metrics(run, _predict_selection(run, lambda inputs: module(**inputs).logits, run.task.num_labels))

    def finish(module: nn.Module) -> None:
        dist.on_main(lambda: export_model(module, run.tokenizer, run.folder / "teacher", ""))

    return Stage("teacher", lambda: modeling.build_teacher(run.config, run.task, run.teacher_source), loss, evaluate,
                 run.task.primary_metric, True, finish)


def _ptp_stage(run: Run, log: RunLog) -> Stage:
    """Train the student with a 4-class head to tell whether the teacher was right and whether it was sure."""
    ptp_labels = _ptp_labels_of(run, log)
    selection_name, selection_split, selection_rows = run.selection

    def loss(engine: Any, micro: MicroBatch, batch: GlobalBatch, closely: bool) -> tuple[DistillationLoss, None]:
        logits = engine(**micro.inputs).logits[: micro.num_real]
        labels = ptp_labels["train"][micro.rows[: micro.num_real]].to(logits.device)
        return _hard_loss(logits, labels, batch), None

    def evaluate(module: nn.Module) -> dict[str, float]:
        logits = _predict_selection(run, lambda inputs: module(**inputs).logits, ptp.NUM_PTP_LABELS)
        labels = ptp_labels[selection_name]
        return {"loss": nn.functional.cross_entropy(logits, labels).item(),
                "accuracy": (logits.argmax(-1) == labels).float().mean().item()}

    def finish(module: nn.Module) -> None:
        logits = _predict_selection(run, lambda inputs: module(**inputs).logits, ptp.NUM_PTP_LABELS)
        log.figure("ptp/confusion_matrix", figures.confusion_matrix(ptp.PTP_LABEL_NAMES, ptp_labels[selection_name],
                                                                    logits.argmax(-1)))
        dist.on_main(lambda: export_model(
            module, run.tokenizer, run.folder / "checkpoints" / "ptp" / "student", ""))

    return Stage("ptp", lambda: modeling.build_student(run.config, run.student_init, modeling.ptp_head()), loss,
                 evaluate, "loss", False, finish)


def _distill_stage(run: Run, log: RunLog) -> Stage:
    """Train the student, its PTP head dropped for a new one, on labels, teacher logits and teacher hidden states."""
    config = run.config
    asks_teacher = config.alpha > 0 or config.beta > 0
    teacher = run.teacher() if asks_teacher else None
    teacher_logits = run.teacher_logits(*run.selection[1:]) if run.has_teacher() else None
    if config.beta > 0 and not run.pairs:
        log.say(f"--layer_map {config.layer_map} matches no layer pair at these depths: the hidden-state loss is 0")

    def build() -> nn.Module:
        student = modeling.build_student(config, run.student_init, modeling.task_head(run.task))
        if config.ptp and not run.task.is_regression:
            modeling.load_student_body(student, run.folder / "checkpoints" / "ptp" / "student")
        return MatchedStudent(student, run.pairs, run.teacher_source.config.hidden_size, config.hidden_loss)

    def loss(engine: Any, micro: MicroBatch, batch: GlobalBatch,
             closely: bool) -> tuple[DistillationLoss, torch.Tensor | None]:
        n = micro.num_real
        teacher_scores, teacher_hidden = None, []
        if teacher is not None:
            with torch.no_grad(), run.teacher_clock:
                answer = teacher(**micro.inputs, output_hidden_states=bool(run.pairs))
            teacher_scores = answer.logits[:n]
            teacher_hidden = [states[:n] for states in modeling.select_hidden(
                answer.hidden_states, [j for _, j in run.pairs], config.hidden_loss)]
        logits, hidden = engine(**micro.inputs)
        hidden = [states[:n] for states in hidden]

        def compare(student_hidden: list[torch.Tensor], teacher_hidden: list[torch.Tensor]) -> DistillationLoss:
            return distillation_loss(
                logits[:n], teacher_scores, micro.labels[:n], student_hidden, teacher_hidden,
                temperature=config.temperature, alpha=config.alpha, beta=config.beta,
                attention_mask=micro.inputs["attention_mask"][:n], normalize=config.hidden_loss == "cls",
                num_items=batch.num_items, num_tokens=batch.num_tokens)

        distances = None
        if closely and run.pairs:
            with torch.no_grad():
                distances = torch.stack([compare([s], [t]).hidden for s, t in zip(hidden, teacher_hidden, strict=True)])
        return compare(hidden, teacher_hidden), distances

    def evaluate(module: nn.Module) -> dict[str, float]:
        logits = _predict_selection(run, lambda inputs: module(**inputs)[0], run.task.num_labels)
        metrics = _task_metrics(run, logits)
        if teacher_logits is not None:
            metrics["agreement"] = glue_eval.agreement(run.task, logits, teacher_logits)
        return metrics

    def finish(module: nn.Module) -> None:
        dist.on_main(lambda: export_model(module.student, run.tokenizer, run.folder / "student", ""))

    return Stage("distill", build, loss, evaluate, run.task.primary_metric, True, finish)


def _ptp_labels_of(run: Run, log: RunLog) -> dict[str, torch.Tensor]:
    """PTP labels of all rows of train, and of the selection rows under its name (collective).

    They are made once and kept, so that a resumed stage trains on the same ones: another number of ranks pads
    otherwise, and a confidence within rounding of its threshold could change sides.
    """
    file = run.folder / "checkpoints" / "ptp" / "labels.safetensors"
    selection_name, split, rows = run.selection
    if not dist.broadcast(file.exists()):
        logits = run.teacher_logits(run.train, run.train_rows)
        labels = run.train.labels[run.train_rows]
        published = run.task.ptp_thresholds or ("median", "median")
        wanted = [published[i] if given is None else given
                  for i, given in enumerate((run.config.t_correct, run.config.t_wrong))]
        t_correct, t_wrong = ptp.resolve_thresholds(logits, labels, *wanted)
        of_train = torch.full((len(run.train),), -1, dtype=torch.int64)
        of_train[torch.from_numpy(run.train_rows)] = ptp.ptp_labels(logits, labels, t_correct, t_wrong)
        of_selection = ptp.ptp_labels(run.teacher_logits(split, rows), split.labels[rows], t_correct, t_wrong)
        thresholds = {"t_correct": str(t_correct), "t_wrong": str(t_wrong)}

        def write() -> None:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"train": of_train, "selection": of_selection}, file.with_suffix(".tmp"), metadata=thresholds)
            file.with_suffix(".tmp").replace(file)
            counts = ptp.summarize(of_train[of_train >= 0])
            (file.parent / "labels.json").write_text(json.dumps({**thresholds, **counts}, indent=2) + "\n")

        dist.on_main(write)
    stored = load_file(file)
    counts = ptp.summarize(stored["train"][stored["train"] >= 0])
    thresholds = json.loads((file.parent / "labels.json").read_text())
    log.say(f"ptp labels with t_correct {float(thresholds['t_correct']):.4f}, t_wrong "
            f"{float(thresholds['t_wrong']):.4f}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    return {"train": stored["train"], selection_name: stored["selection"]}


def _hard_loss(logits: torch.Tensor, labels: torch.Tensor, batch: GlobalBatch) -> DistillationLoss:
    return distillation_loss(logits, None, labels, [], [], temperature=1.0, alpha=0.0, beta=0.0,
                             num_items=batch.num_items)


def _predict_selection(run: Run, forward: glue_eval.Forward, num_columns: int) -> torch.Tensor:
    _, split, rows = run.selection
    return glue_eval.predict(forward, split, rows, run.micro_and_accum[0], num_columns)[0]


def _task_metrics(run: Run, logits: torch.Tensor) -> dict[str, float]:
    _, split, rows = run.selection
    return glue_eval.compute_metrics(run.task, logits, split.labels[rows])
