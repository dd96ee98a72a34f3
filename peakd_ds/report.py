"""The end of a run: dev metrics of teacher and student, once; results.json, README.md, loss curves and exports."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peakd_ds.data import metrics
from peakd_ds.data.tasks import AGREEMENT
from peakd_ds.data.tokens import Split, tokenize
from peakd_ds.engine import checkpoint
from peakd_ds.engine.ds_config import DTYPES
from peakd_ds.errors import first_line
from peakd_ds.files import damage_named, damaged, needs_space, write_atomically
from peakd_ds.model import sizes
from peakd_ds.model.build import check_saved_teacher, load_saved
from peakd_ds.ranks import dist
from peakd_ds.ranks.device import device
from peakd_ds.results import comparison, evaluation, figures, finished, int8, readme, speed, trim
from peakd_ds.results.card import class_table, model_card
from peakd_ds.results.export import export_model, export_onnx, holds, unroll
from peakd_ds.results.log import RunLog, read_metrics
from peakd_ds.run import Run
from peakd_ds.teacher.online import OnlineTeacher
from peakd_ds.teacher.stored import StoredTeacher


def write(run: Run, log: RunLog) -> None:
    """Evaluate teacher and student on dev (collective), export the student, write files and print the table.

    What an earlier start has made and is still whole is kept; if that is everything, the log says where it is.
    """
    if dist.on_main(lambda: finished.lacks(run.config)) is None:
        dist.on_main(lambda: finished.forget_failure(run.folder))
        log.say(f"everything is there, and nothing is done again\n{finished.where(run.folder)}")
        return
    earlier = dist.on_main(lambda: _earlier(run))
    if earlier is None:
        teacher, teacher_logits = _judge_teacher(run)
        judged = {"teacher": teacher, "student": _judge_student(run, teacher_logits), "world_size": dist.world_size()}
        run.teacher.stop()
    else:
        judged = {name: earlier[name] for name in ("teacher", "student", "world_size")}
    results = {
        "task": run.task.name,
        "method": run.method,
        "seed": run.config.seed,
        "selected_on": run.selection.name,
        "settings": {**asdict(run.config), "layer_pairs": run.pairs},
        **judged,
        **_primary_metric(run),
        **_majority(run),
    }

    def write_files() -> None:
        with needs_space(run.folder):
            _write_files(run, results, log, earlier)

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


def _judge_student(run: Run, teacher_logits: dict[str, torch.Tensor]) -> dict[str, Any] | None:
    """The student as exported, in the run's precision."""
    folder = run.folder / "student"

    def exists() -> bool:
        is_there = (folder / "config.json").exists()
        if not is_there and checkpoint.finished(run.checkpoint_folder("distill")) is not None:
            raise damaged(folder, "config.json is missing" if folder.exists() else "it is missing", _remedy(run))
        return is_there

    if not dist.on_main(exists):
        return None
    dist.on_main(lambda: _trim(run))
    student, tokenizer = dist.agree(lambda: _load_student(run))
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
    }


def _load_student(run: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The saved student and its tokenizer, which is the run's own unless its vocabulary is trimmed."""
    folder = run.folder / "student"
    with damage_named(folder, _remedy(run)):
        student, tokenizer = load_saved(folder), run.tokenizer
        if student.config.vocab_size != run.student_init.config.vocab_size:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return student, tokenizer


def _trim(run: Run) -> None:
    """Replace the saved student by one with a trimmed vocabulary, if that is set and not done yet."""
    if run.trimmed is None:
        return
    student, tokenizer = _load_student(run)
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


def _remedy(run: Run) -> str:
    """What to do about a damaged student."""
    finished = run.checkpoint_folder("distill") / "FINISHED.json"
    return f"delete it and {finished}, and the same command writes it again from its checkpoint"


def _write_files(run: Run, results: dict[str, Any], log: RunLog, earlier: dict[str, Any] | None) -> None:
    """Measure sizes and speed, export the student, and write everything that speaks of it."""
    results |= {"speed": speed.conditions(), "exports": {}}
    if earlier is not None:
        results["speed"] = earlier["speed"]
    elif results["teacher"] is not None and isinstance(run.teacher, OnlineTeacher):
        results["teacher"] |= _measured_teacher(run, run.teacher, results["teacher"]["params"], log)
    if results["student"] is not None:
        results["exports"] = _export(run, results, log, earlier)
    if (run.folder / "metrics.jsonl").exists():
        figures.loss_curves(read_metrics(run.folder / "metrics.jsonl"), run.folder / "loss_curves.png")
    has_curves = (run.folder / "loss_curves.png").exists()
    num_rows = {name: len(split) for name, split in run.dev.items()}
    write_atomically(run.folder / "README.md", readme.of_run(results, run.task, num_rows, has_curves))
    results["at"] = time.time()  # failed starts before this time no longer count
    results["files"] = finished.checksums(run.folder)
    results = finished.with_checksum(json.loads(json.dumps(results)))
    write_atomically(run.folder / finished.RESULTS, json.dumps(results, indent=2) + "\n")
    finished.forget_failure(run.folder)
    final = {
        f"{name}/{key}": value for name in ("teacher", "student") for key, value in _metrics(results, name).items()
    }
    log.final(results["settings"], final)
    log.say(f"\n{markdown_table(results)}\n\n{finished.where(run.folder)}")


# -- Export ------------------------------------------------------------------------------------------------------------


def _export(run: Run, results: dict[str, Any], log: RunLog, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """Write model cards and, if they are not there yet, the unrolled student and ONNX files (rank 0).

    Returns:
        The exports for results.json: sizes, speed and, of ONNX files, scores.
    """
    student, tokenizer = _load_student(run)
    model_type, split = student.config.model_type, _reported(run, tokenizer)
    plain = unroll(student) if run.config.export_unrolled else None
    kept = {} if earlier is None else earlier["exports"]
    exports: dict[str, Any] = {} if plain is not None else kept
    if earlier is None:
        results["student"] |= _measured(log, "student", run.folder / "student", split, tokenizer)
    if plain is not None:
        folder = run.folder / "student_unrolled"
        is_new = not holds(plain, folder)
        if is_new:
            export_model(plain, tokenizer, folder, "", keeps_others=True)
        if is_new or "student_unrolled" not in kept:
            kept = {}
            measured = _measured(log, "student_unrolled", folder, split, tokenizer)
            num_parameters = sum(parameter.numel() for parameter in plain.parameters())
            kept["student_unrolled"] = {"params": num_parameters, **measured}
        exports["student_unrolled"] = kept["student_unrolled"]
        has_file = (folder / finished.ONNX_FILES[0]).exists()
        if run.config.export_onnx or (is_new and has_file):  # an old file is not of the new weights
            exports |= _export_onnx(run, plain, tokenizer, split, earlier if not is_new else None, log)
        elif has_file:
            exports |= {name: entry for name, entry in kept.items() if "onnx" in name or "int8" in name}
    results["exports"] = exports
    card = _card(run, results)
    card |= {"sizes": _sizes(results, results["student"]), "model_type": model_type}
    write_atomically(run.folder / "student" / "README.md", model_card(**card))
    if plain is not None:
        write_atomically(run.folder / "student_unrolled" / "README.md", _card_of_unrolled(run, results, card, plain))
    return exports


def _export_onnx(
    run: Run,
    plain: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    earlier: dict[str, Any] | None,
    log: RunLog,
) -> dict[str, Any]:
    """Write model.onnx and model_int8.onnx, unless an earlier start has; say what quantising costs."""
    files = [run.folder / "student_unrolled" / name for name in finished.ONNX_FILES]
    names = [f"student_unrolled/{name}" for name in finished.ONNX_FILES]
    is_whole = [earlier is not None and finished.is_whole(run.folder, earlier, name) for name in names]
    if earlier is not None and is_whole[0]:
        exports = {name: entry for name, entry in earlier["exports"].items() if "onnx" in name or "int8" in name}
        if "int8_failed" in exports or ("onnx_int8" in exports and is_whole[1]):
            _say_int8(run, exports, log)
            return exports
    else:
        difference = export_onnx(plain, tokenizer, files[0])
        log.say(f"model.onnx gives the same logits in onnxruntime to {difference:.1e}")
    try:
        int8.quantise(*files)
        exports = dict(zip(("onnx", "onnx_int8"), int8.score(files, run.task, split, tokenizer), strict=True))
    except int8.NotQuantised as error:
        files[1].unlink(missing_ok=True)  # of other weights
        exports = {"onnx": int8.score(files[:1], run.task, split, tokenizer)[0], "int8_failed": str(error)}
    _say_int8(run, exports, log)
    return exports


def _say_int8(run: Run, exports: dict[str, Any], log: RunLog) -> None:
    """Say what model_int8.onnx costs: a warning if that is too much."""
    if "int8_failed" in exports:
        log.say(f"warning: model_int8.onnx is not written: the model cannot be quantised ({exports['int8_failed']})")
        return
    is_fine, sentence = int8.verdict(exports["onnx_int8"], run.config.max_int8_drop, run.task.primary_metric)
    log.say(sentence if is_fine else f"warning: {sentence}")


def _reported(run: Run, tokenizer: PreTrainedTokenizerBase) -> Split:
    """The reported split by the tokens of the exported student."""
    name = run.task.eval_splits[0]
    if tokenizer is run.tokenizer:
        return run.dev[name]
    return tokenize(run.task, run.dev_texts[name], tokenizer, run.config.max_seq_length)


# -- Speed -------------------------------------------------------------------------------------------------------------


def _measured(
    log: RunLog, name: str, folder: Path, split: Split, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Size on disk and speed of a saved model, as a user would load it; no speed where that fails."""
    size = {"disk_mb": speed.disk_mb(folder)} if folder.is_dir() else {}
    try:
        model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False)
        size = size or {"disk_mb": speed.memory_mb(model)}  # of a model on the hub
        model.config.pad_token_id = tokenizer.pad_token_id
        return size | speed.measure_model(model, split, tokenizer)
    except Exception as error:  # a finished run must not fail for want of two numbers
        log.say(f"the speed of {name} is not measured ({first_line(error)})")
        return size


def _measured_teacher(run: Run, teacher: OnlineTeacher, num_parameters: int, log: RunLog) -> dict[str, float]:
    """The same of the teacher, unless it is too large to be loaded once more."""
    folder = Path(teacher.source.path) if teacher.source.is_classifier else teacher.folder
    if teacher.zero_stage == 3 or num_parameters > speed.MAX_PARAMETERS:
        return {"disk_mb": speed.disk_mb(folder)} if folder.is_dir() else {}
    split = run.dev[run.task.eval_splits[0]].for_teacher()
    return _measured(log, "the teacher", folder, split, run.teacher_tokenizer)


# -- Words -------------------------------------------------------------------------------------------------------------


def markdown_table(results: dict[str, Any]) -> str:
    """The teacher, and every form of the student that was exported, with sizes, speed and scores."""
    return comparison.table_of(comparison.rows_of(results))


def _metrics(results: dict[str, Any], name: str) -> dict[str, float]:
    return results[name]["metrics"] if results[name] is not None else {}


def _card(run: Run, results: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `model_card` that both forms of the student share."""
    student, teacher = results["student"], results["teacher"]
    scores, teacher_scores = student["metrics"], (teacher or {}).get("metrics")
    if not run.task.has_labels:
        agreement = student["agreement"]
        scores, teacher_scores = {} if agreement is None else {AGREEMENT: agreement}, None
    return dict(
        task=run.task.name,
        method=run.method,
        metrics=scores,
        teacher_metrics=teacher_scores,
        majority=results.get("majority_class"),
        per_class=class_table({"this model": student["per_class"]}) if "per_class" in student else "",
        num_parameters=student["params"],
        num_stored_layers=student["stored_layers"],
        num_effective_layers=student["effective_layers"],
        settings=results["settings"],
        base_model=run.student_init.path,
        own_task=run.task if run.task.is_own else None,
        vocabulary=readme.about_vocabulary(results),
    )


def _card_of_unrolled(run: Run, results: dict[str, Any], card: dict[str, Any], plain: PreTrainedModel) -> str:
    unrolled, exports = results["exports"]["student_unrolled"], results["exports"]
    recommended = "model.onnx" if "onnx" in exports else ""
    entry = exports.get("onnx_int8")
    if entry is not None and int8.verdict(entry, run.config.max_int8_drop, run.task.primary_metric)[0]:
        recommended = "model_int8.onnx"
    changed = dict(
        num_parameters=unrolled["params"],
        num_stored_layers=card["num_effective_layers"],
        model_type=plain.config.model_type,
        sizes=_sizes(results, unrolled),
        files=comparison.files_table(results, readme.about_onnx(results, run.task)),
        onnx_file=recommended,
    )
    return model_card(**{**card, **changed})


def _sizes(results: dict[str, Any], model: dict[str, Any]) -> dict[str, str]:
    """Rows of a card's table of sizes: MB, latency and throughput, where known."""
    rows = {"MB on disk": f"{model['disk_mb']:.1f}"}
    if "latency_ms" in model:
        conditions = results["speed"]
        threads = f", {conditions['threads']} thread(s)" if conditions["device"] == "cpu" else ""
        rows |= {
            "latency, batch 1": f"{model['latency_ms']:.1f} ms",
            f"throughput, batch {conditions['batch']}": f"{model['batch_samples_per_s']:.0f} samples/s",
            "measured in": f"fp32, {conditions['device'].upper()}{threads}",
        }
    return rows
