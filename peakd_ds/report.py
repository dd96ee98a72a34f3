"""The end of a run: dev metrics of teacher and student, once; results.json, README.md, loss curves and exports."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peakd_ds import exports
from peakd_ds.config.outputs import STAGES
from peakd_ds.data import metrics
from peakd_ds.data.label_arrays import is_labeled
from peakd_ds.data.tasks import AGREEMENT
from peakd_ds.data.tokens import Split, tokenize
from peakd_ds.engine import checkpoint
from peakd_ds.engine.ds_config import DTYPES
from peakd_ds.files import damaged, needs_space, write_atomically
from peakd_ds.model import sizes
from peakd_ds.model.build import check_saved_teacher
from peakd_ds.ranks import dist
from peakd_ds.ranks.device import device
from peakd_ds.results import comparison, evaluation, figures, finished, readme, speed, trim, verdict
from peakd_ds.results.export import export_model
from peakd_ds.results.log import RunLog, read_metrics
from peakd_ds.run import Run
from peakd_ds.teacher.online import OnlineTeacher
from peakd_ds.teacher.stored import StoredTeacher


def write(run: Run, log: RunLog) -> None:
    """Evaluate teacher and student on dev (collective), export the student, write files and print the table.

    What an earlier start has made and is still whole is kept; if that is everything, the log says where it is.
    """
    if isinstance(run.teacher, OnlineTeacher) and not run.teacher.is_trained():
        dist.on_main(lambda: _check_never_trained(run))
    if dist.on_main(lambda: finished.lacks(run.config)) is None:
        dist.on_main(lambda: finished.forget_failure(run.folder))
        log.say(f"everything is there, and nothing is done again\n{finished.where(run.folder)}")
        return
    earlier, matrices = dist.on_main(lambda: _earlier(run)), dict[str, Figure]()
    if earlier is None:
        teacher, teacher_logits = _judge_teacher(run)
        student, matrices = _judge_student(run, teacher_logits)
        judged = {"teacher": teacher, "student": student, "world_size": dist.world_size()}
        run.teacher.stop()
    else:
        judged = {name: earlier[name] for name in ("teacher", "student", "world_size")}
    results = {
        "task": run.task.name,
        "method": run.method,
        "seed": run.config.seed,
        "selected_on": run.selection.name,
        "finished_stages": [name for name in STAGES if checkpoint.finished(run.checkpoint_folder(name)) is not None],
        "settings": {**asdict(run.config), "layer_pairs": run.pairs},
        **judged,
        **_primary_metric(run),
        **_majority(run),
    }

    def write_files() -> None:
        with needs_space(run.folder):
            _write_files(run, results, matrices, log, earlier)

    dist.on_main(write_files)


def _earlier(run: Run) -> dict[str, Any] | None:
    """The results of an earlier start, if they are of the student that is there, as it is to be exported."""
    results = finished.read(run.folder)
    if results is None or not finished.has_student(run.folder, results):
        return None
    return None if run.trimmed is not None and "vocabulary" not in results["student"] else results


def _judge_teacher(run: Run) -> tuple[dict[str, Any] | None, dict[str, torch.Tensor]]:
    if isinstance(run.teacher, StoredTeacher):
        return _judge_outputs(run, run.teacher)
    teacher = run.teacher
    if not teacher.is_trained():
        return None, {}
    engine, rows = teacher.engine(), {name: split.for_teacher() for name, split in run.dev.items()}
    scores, logits, speed = evaluation.evaluate(lambda inputs: engine(**inputs)[0], run.task, rows, run.eval_batch_size)
    num_params = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())
    return {
        "metrics": scores,
        "params": num_params,
        "effective_layers": engine.module.model.config.num_hidden_layers,
        "samples_per_s": round(speed, 1),
        **_per_class(run, logits),
    }, logits


def _judge_outputs(run: Run, teacher: StoredTeacher) -> tuple[dict[str, Any] | None, dict[str, torch.Tensor]]:
    """The scores of a teacher's stored outputs, if its files have the reported rows."""
    logits = {name: teacher.logits_NC[name] for name in run.dev if name in teacher.logits_NC}
    if logits.keys() != run.dev.keys():
        return None, {}
    scores = evaluation.metrics_of(run.task, run.dev, logits)
    sizes = {"params": None, "effective_layers": None, "samples_per_s": None}
    return {"metrics": scores, **sizes, **_per_class(run, logits)}, logits


def _check_never_trained(run: Run) -> None:
    """Raise UserError if the teacher stage is finished, so that a teacher was there."""
    if checkpoint.finished(run.checkpoint_folder("teacher")) is not None:
        check_saved_teacher(run.folder / "teacher")


def _judge_student(
    run: Run, teacher_logits: dict[str, torch.Tensor]
) -> tuple[dict[str, Any] | None, dict[str, Figure]]:
    """The student as exported, in the run's precision, and figures of it by their tags."""
    folder = run.folder / "student"

    def exists() -> bool:
        is_there = (folder / "config.json").exists()
        if not is_there and checkpoint.finished(run.checkpoint_folder("distill")) is not None:
            raise damaged(folder, "config.json is missing" if folder.exists() else "it is missing", exports.remedy(run))
        return is_there

    if not dist.on_main(exists):
        return None, {}
    dist.on_main(lambda: _trim(run))
    student, tokenizer = dist.agree(lambda: exports.load_student(run))
    dev = run.dev if tokenizer is run.tokenizer else _tokenized(run, tokenizer)
    nn.Module.to(student, device(), DTYPES[run.config.dtype]).eval()  # transformers' own `to` has no types
    scores, logits, speed = evaluation.evaluate(
        lambda inputs: student(**inputs).logits, run.task, dev, run.eval_batch_size
    )
    agreement = None
    if teacher_logits:
        agreement = evaluation.agreement(
            run.task, torch.cat(list(logits.values())), torch.cat(list(teacher_logits.values()))
        )
    return {
        "metrics": scores,
        "params": sum(parameter.numel() for parameter in student.parameters()),
        "stored_layers": student.config.num_hidden_layers,
        "effective_layers": student.config.num_effective_layers,
        "samples_per_s": round(speed, 1),
        "agreement": agreement,
        **_vocabulary(run, student, tokenizer, dev),
        **_per_class(run, logits),
    }, _confusion(run, logits)


def _trim(run: Run) -> None:
    """Replace the saved student by one with a trimmed vocabulary, if that is set and not done yet."""
    if run.trimmed is None:
        return
    student, tokenizer = exports.load_student(run)
    if tokenizer is run.tokenizer and len(run.trimmed.kept_ids) < student.config.vocab_size:
        small = trim.trimmed_model(student, run.trimmed.kept_ids)
        export_model(small, run.trimmed.tokenizer, run.folder / "student", "", keeps_others=True)


def _tokenized(run: Run, tokenizer: PreTrainedTokenizerBase) -> dict[str, Split]:
    """The dev rows with the tokens of a trimmed tokenizer (collective)."""
    cache, length = run.folder / "cache", run.config.max_seq_length
    return {name: tokenize(run.task, rows, tokenizer, length, cache) for name, rows in run.dev_texts.items()}


def _vocabulary(
    run: Run, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dev: dict[str, Split]
) -> dict[str, Any]:
    """For results.json: what a trimmed vocabulary saves, and how many rows of each split have words outside it."""
    if tokenizer is run.tokenizer:
        return {}
    kept_ids, whole = trim.kept_ids(run.tokenizer, tokenizer), run.student_init.config.vocab_size
    width = sizes.count_parameters(student).embeddings // len(kept_ids)
    return {
        "vocabulary": {
            "tokens": len(kept_ids),
            "of": whole,
            "saved_parameters": (whole - len(kept_ids)) * width,
            "rows_with_words_outside": {
                name: trim.num_changed(run.dev[name], split, kept_ids) for name, split in dev.items()
            },
        }
    }


def _primary_metric(run: Run) -> dict[str, str]:
    """For results.json, of own data: the score that picks epochs; of GLUE's tasks, their names say it."""
    return {"primary_metric": run.task.primary_metric} if run.task.is_own else {}


def _majority(run: Run) -> dict[str, Any]:
    """For results.json: the largest class of the reported split, its share of the labelled rows, and what always
    predicting it scores."""
    labels = run.dev[run.task.eval_splits[0]].labels
    largest = metrics.majority_class(run.task, labels)
    if largest is None:
        return {}
    scores = metrics.of_majority(run.task, labels)
    return {"majority_class": {"name": largest[0], "share": largest[1], "metrics": scores}}


def _per_class(run: Run, logits: dict[str, torch.Tensor]) -> dict[str, Any]:
    """For results.json, of own data without too many classes: a model's scores for each class of the reported split."""
    if not run.task.is_own or run.task.num_labels > metrics.MAX_CLASSES_IN_TABLE:
        return {}
    split = run.task.eval_splits[0]
    scores = metrics.per_class(run.task, logits[split], run.dev[split].labels)
    return {"per_class": scores} if scores else {}


def _write_files(
    run: Run, results: dict[str, Any], matrices: dict[str, Figure], log: RunLog, earlier: dict[str, Any] | None
) -> None:
    """Measure sizes and speed, export the student, and write everything that speaks of it."""
    results |= {"speed": speed.conditions(), "exports": {}}
    if earlier is not None:
        results["speed"] = earlier["speed"]
    elif results["teacher"] is not None and isinstance(run.teacher, OnlineTeacher):
        results["teacher"] |= exports.measured_teacher(run, run.teacher, results["teacher"]["params"], log)
    if results["student"] is not None:
        results["exports"] = exports.export(run, results, log, earlier)
    if (run.folder / "metrics.jsonl").exists():
        curves = [(name, run.loss_weights(name), run.score_of(name)) for name in STAGES]
        figures.loss_curves(read_metrics(run.folder / "metrics.jsonl"), curves, run.folder / "loss_curves.png")
    has_curves = (run.folder / "loss_curves.png").exists()
    num_rows = {name: len(split) for name, split in run.dev.items()}
    results["verdict"] = _verdict(run, results)
    write_atomically(run.folder / "README.md", readme.of_run(results, run.task, num_rows, has_curves))
    results["at"] = time.time()  # failed starts before this time no longer count
    results["files"] = finished.checksums(run.folder)
    results = finished.with_checksum(json.loads(json.dumps(results)))
    write_atomically(run.folder / finished.RESULTS, json.dumps(results, indent=2) + "\n")
    finished.forget_failure(run.folder)
    text, use = markdown_table(results), verdict.how_to_use(run.folder)
    _log_results(run, results, text, matrices, log)
    title = f"== {run.task.name}: {results['verdict'] or 'no student yet'} =="
    log.say("\n".join([f"\n{title}\n\n{text}\n", finished.where(run.folder), *([f"use: {use}"] if use else [])]))


def markdown_table(results: dict[str, Any]) -> str:
    """The teacher, and every form of the student that was exported, with sizes, speed and scores."""
    return comparison.table_of(comparison.rows_of(results))


def _metrics(results: dict[str, Any], name: str) -> dict[str, float]:
    return results[name]["metrics"] if results[name] is not None else {}


def _verdict(run: Run, results: dict[str, Any]) -> str:
    """The student beside its teacher in one line, which results.json and README.md keep."""
    teacher_mb = student_mb = None
    if results["teacher"] is not None and isinstance(run.teacher, OnlineTeacher):
        source = run.teacher.source
        folder = Path(source.path) if source.is_classifier else run.teacher.folder
        teacher_mb = verdict.weights_mb(folder, results["teacher"]["params"])
    if results["student"] is not None:
        student_mb = verdict.weights_mb(run.folder / "student", results["student"]["params"])
    return verdict.verdict(results, run.task.primary_metric, teacher_mb, student_mb)


def _log_results(run: Run, results: dict[str, Any], text: str, matrices: dict[str, Figure], log: RunLog) -> None:
    """Put the results into TensorBoard. Its HPARAMS page sorts columns by name, so main scores among the settings, in
    brackets, are the first columns."""
    final: dict[str, float] = {}
    columns: dict[str, Any] = {}
    for stage, model in (("distill", "student"), ("teacher", "teacher")):
        scores = {**_metrics(results, model), AGREEMENT: (results[model] or {}).get("agreement")}
        known = {name: score for name, score in scores.items() if score is not None}
        final |= {f"{stage}/results/{name}": score for name, score in known.items()}
        main = {run.task.primary_metric, AGREEMENT} & known.keys()
        columns |= {f"({model} {name})": known[name] for name in sorted(main)}
    settings = {name: value for name, value in results["settings"].items() if value not in (None, "")}
    log.final(columns | settings, final, f"{results['verdict']}\n\n{text}", matrices)


def _confusion(run: Run, logits: dict[str, torch.Tensor]) -> dict[str, Figure]:
    """The student's confusion matrix on the reported split by its tag, for tasks of a class a row with few classes."""
    task, split = run.task, run.task.eval_splits[0]
    labels = run.dev[split].labels
    if task.kind != "classes" or task.num_labels > figures.MAX_CLASSES or not is_labeled(labels.numpy()).any():
        return {}
    rows = torch.from_numpy(is_labeled(labels.numpy()))
    names = [str(name) for name in task.label_names]
    matrix = figures.confusion_matrix(names, labels[rows].long(), logits[split][rows].argmax(-1))
    return {"distill/confusion_matrix": matrix}
