"""The end of a run: dev metrics of teacher and student, once; results.json, README.md, loss curves and exports."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from transformers import PreTrainedModel

from peakd_ds.config.outputs import STAGES
from peakd_ds.data import metrics
from peakd_ds.data.label_arrays import is_labeled
from peakd_ds.data.tasks import AGREEMENT
from peakd_ds.engine import checkpoint
from peakd_ds.engine.ds_config import DTYPES
from peakd_ds.files import damage_named, damaged, needs_space, write_atomically
from peakd_ds.model.build import check_saved_teacher, load_saved
from peakd_ds.ranks import dist
from peakd_ds.ranks.device import device
from peakd_ds.results import evaluation, figures, verdict
from peakd_ds.results.export import export_model, export_onnx, model_card, unroll
from peakd_ds.results.log import RunLog, read_metrics
from peakd_ds.results.markdown import table
from peakd_ds.run import Run
from peakd_ds.teacher.online import OnlineTeacher
from peakd_ds.teacher.stored import StoredTeacher


def write(run: Run, log: RunLog) -> None:
    """Evaluate teacher and student on dev (collective), then export the student, write files and print the table."""
    teacher, teacher_logits = _judge_teacher(run)
    student, matrices = _judge_student(run, teacher_logits)
    results = {
        "task": run.task.name,
        "method": run.method,
        "seed": run.config.seed,
        "world_size": dist.world_size(),
        "selected_on": run.selection.name,
        "settings": {**asdict(run.config), "layer_pairs": run.pairs},
        "teacher": teacher,
        "student": student,
        **_primary_metric(run),
        **_majority(run),
    }

    def write_files() -> None:
        with needs_space(run.folder):
            _write_files(run, results, matrices, log)

    dist.on_main(write_files)


def _judge_teacher(run: Run) -> tuple[dict[str, Any] | None, dict[str, torch.Tensor]]:
    if isinstance(run.teacher, StoredTeacher):
        return _judge_outputs(run, run.teacher)
    teacher = run.teacher
    if not teacher.is_trained():
        dist.on_main(lambda: _check_never_trained(run, teacher.folder))
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


def _check_never_trained(run: Run, folder: Path) -> None:
    """Raise UserError if the teacher stage is finished, so that a teacher was there."""
    if checkpoint.finished(run.checkpoint_folder("teacher")) is not None:
        check_saved_teacher(folder)


def _judge_student(
    run: Run, teacher_logits: dict[str, torch.Tensor]
) -> tuple[dict[str, Any] | None, dict[str, Figure]]:
    """The student as exported, in the run's precision, and figures of it by their tags."""
    folder = run.folder / "student"

    def exists() -> bool:
        is_there = (folder / "config.json").exists()
        if not is_there and checkpoint.finished(run.checkpoint_folder("distill")) is not None:
            raise damaged(folder, "config.json is missing" if folder.exists() else "it is missing", _remedy(run))
        return is_there

    if not dist.on_main(exists):
        return None, {}
    student = dist.agree(lambda: _load_student(run))
    nn.Module.to(student, device(), DTYPES[run.config.dtype]).eval()  # transformers' own `to` has no types
    scores, logits, speed = evaluation.evaluate(
        lambda inputs: student(**inputs).logits, run.task, run.dev, run.eval_batch_size
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
        **_per_class(run, logits),
    }, _confusion(run, logits)


def _load_student(run: Run) -> PreTrainedModel:
    folder = run.folder / "student"
    with damage_named(folder, _remedy(run)):
        return load_saved(folder)


def _primary_metric(run: Run) -> dict[str, str]:
    """For results.json, of own data: the score that picks epochs; of GLUE's tasks, their names say it."""
    return {"primary_metric": run.task.primary_metric} if run.task.is_own else {}


def _majority(run: Run) -> dict[str, Any]:
    """For results.json, of own data: the largest class of the reported split, and its share of the labelled rows."""
    largest = metrics.majority_class(run.task, run.dev[run.task.eval_splits[0]].labels) if run.task.is_own else None
    return {} if largest is None else {"majority_class": {"name": largest[0], "share": largest[1]}}


def _per_class(run: Run, logits: dict[str, torch.Tensor]) -> dict[str, Any]:
    """For results.json, of own data without too many classes: a model's scores for each class of the reported split."""
    if not run.task.is_own or run.task.num_labels > metrics.MAX_CLASSES_IN_TABLE:
        return {}
    split = run.task.eval_splits[0]
    scores = metrics.per_class(run.task, logits[split], run.dev[split].labels)
    return {"per_class": scores} if scores else {}


def _remedy(run: Run) -> str:
    """What to do about a damaged student."""
    finished = run.checkpoint_folder("distill") / "FINISHED.json"
    return f"delete it and {finished}, and the same command writes it again from its checkpoint"


def _write_files(run: Run, results: dict[str, Any], matrices: dict[str, Figure], log: RunLog) -> None:
    if results["student"] is not None:
        _export(run, results, log)
    if (run.folder / "metrics.jsonl").exists():
        curves = [(name, run.loss_weights(name), run.score_of(name)) for name in STAGES]
        figures.loss_curves(read_metrics(run.folder / "metrics.jsonl"), curves, run.folder / "loss_curves.png")
    text, results["verdict"] = markdown_table(results), _verdict(run, results)
    write_atomically(run.folder / "README.md", _readme(run, results, text))
    results["at"] = time.time()  # failed starts before this time no longer count
    write_atomically(run.folder / "results.json", json.dumps(results, indent=2) + "\n")
    Path(f"{run.folder}.failed").unlink(missing_ok=True)  # peakd-sweep's, of an earlier start
    _log_results(run, results, text, matrices, log)
    use = verdict.how_to_use(run.folder)
    log.say(
        "\n".join(
            [
                f"\n== {run.task.name}: {results['verdict'] or 'no student yet'} ==\n\n{text}\n",
                f"files: {run.folder}/ has results.json, README.md and the exported models",
                *([f"use:   {use}"] if use else []),
            ]
        )
    )


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


def _export(run: Run, results: dict[str, Any], log: RunLog) -> None:
    student = _load_student(run)
    scores, teacher_scores = results["student"]["metrics"], (results["teacher"] or {}).get("metrics")
    if not run.task.has_labels:
        agreement = results["student"]["agreement"]
        scores, teacher_scores = {} if agreement is None else {AGREEMENT: agreement}, None
    card: dict[str, Any] = dict(
        task=run.task.name,
        method=run.method,
        metrics=scores,
        teacher_metrics=teacher_scores,
        num_parameters=results["student"]["params"],
        num_stored_layers=results["student"]["stored_layers"],
        num_effective_layers=results["student"]["effective_layers"],
        settings=results["settings"],
        base_model=run.student_init.path,
        own_task=run.task if run.task.is_own else None,
    )
    write_atomically(run.folder / "student" / "README.md", model_card(**card, model_type=student.config.model_type))
    if not run.config.export_unrolled:
        return
    plain = unroll(student)
    folder = run.folder / "student_unrolled"
    card["num_parameters"] = sum(parameter.numel() for parameter in plain.parameters())
    card["num_stored_layers"] = card["num_effective_layers"]
    export_model(plain, run.tokenizer, folder, model_card(**card, model_type=plain.config.model_type))
    if run.config.export_onnx:
        difference = export_onnx(plain, run.tokenizer, folder / "model.onnx")
        log.say(f"model.onnx gives the same logits in onnxruntime to {difference:.1e}")


def markdown_table(results: dict[str, Any]) -> str:
    """Teacher and student side by side."""
    names = list(_metrics(results, "student") or _metrics(results, "teacher"))
    header = ["", "params", "layers (stored)", *names, "agreement", "samples/s"]
    models = [(name, results[name]) for name in ("teacher", "student") if results[name] is not None]
    return table(header, [_table_row(name, model, names) for name, model in models], is_padded=True)


def _table_row(name: str, model: dict[str, Any], metrics: list[str]) -> list[str]:
    agreement = model.get("agreement")
    is_known = model["params"] is not None  # not of outputs that were read from a file
    layers = f"{model['effective_layers']} ({model.get('stored_layers', model['effective_layers'])})"
    return [
        name,
        f"{model['params'] / 1e6:.1f} M" if is_known else "",
        layers if is_known else "",
        *(f"{model['metrics'][metric]:.4f}" for metric in metrics),
        "" if agreement is None else f"{agreement:.4f}",
        f"{model['samples_per_s']:.0f}" if is_known else "",
    ]


def _metrics(results: dict[str, Any], name: str) -> dict[str, float]:
    return results[name]["metrics"] if results[name] is not None else {}


def _readme(run: Run, results: dict[str, Any], text: str) -> str:
    chosen = {
        "holdout": "a fixed tenth of train, which no stage trained on",
        "validation": "the validation rows, which no stage trained on",
        "dev": "the dev set itself, so the figures below are optimistic",
    }[results["selected_on"]]
    sizes = ", ".join(f"{name} {len(split):,} rows" for name, split in run.dev.items())
    curves = "\n![loss curves](loss_curves.png)\n" if (run.folder / "loss_curves.png").exists() else ""
    return f"""# {results["task"]}: {results["method"]}, seed {results["seed"]}

{_sentence(results["verdict"])}{text}

Metrics are over the whole dev set ({sizes}), computed in {run.config.dtype}.
Epochs were picked on {chosen}. Samples per second are those of inference on dev with {results["world_size"]} rank(s).
{_own_details(run, results)}{curves}
`config.yaml` holds every setting. Started again with this folder, the same command continues where it stopped.
"""


def _sentence(verdict: str) -> str:
    return f"{verdict[:1].upper()}{verdict[1:]}.\n\n" if verdict else ""


def _own_details(run: Run, results: dict[str, Any]) -> str:
    """Paragraphs of README.md about own data: the largest class, and a table with a row for each class."""
    if not run.task.is_own:
        return ""
    split, majority = run.task.eval_splits[0], results.get("majority_class")
    paragraphs = ["Rows without a label do not count."]
    if majority is not None:
        what = "rows" if run.task.is_multi_label else "rows, the accuracy of always predicting it"
        paragraphs.append(
            f"The largest class of {split} is {majority['name']}, with {majority['share']:.4f} of the {what}."
        )
    judged = {name: results[name] for name in ("teacher", "student") if results[name] is not None}
    scores = {name: model["per_class"] for name, model in judged.items() if "per_class" in model}
    if scores:
        columns = [(name, score) for name in scores for score in ("precision", "recall", "f1")]
        rows = [
            [label, str(first["support"]), *(f"{scores[name][label][score]:.4f}" for name, score in columns)]
            for label, first in next(iter(scores.values())).items()
        ]
        header = ["class", "rows", *(f"{name} {score}" for name, score in columns)]
        paragraphs += [f"Each class of {split}:", table(header, rows, is_padded=True)]
    return "".join(f"\n{paragraph}\n" for paragraph in paragraphs)
