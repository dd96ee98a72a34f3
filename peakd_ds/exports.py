"""What a run ships: the student in its forms, with their sizes, speed and model cards (rank 0)."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from peakd_ds.data.tasks import AGREEMENT
from peakd_ds.data.tokens import Split, tokenize
from peakd_ds.errors import first_line
from peakd_ds.files import damage_named, write_atomically
from peakd_ds.model.build import load_saved
from peakd_ds.results import comparison, finished, int8, readme, speed
from peakd_ds.results.card import class_table, model_card
from peakd_ds.results.export import export_model, export_onnx, holds, unroll
from peakd_ds.results.log import RunLog
from peakd_ds.run import Run
from peakd_ds.teacher.online import OnlineTeacher


def load_student(run: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The saved student and its tokenizer, which is the run's own unless its vocabulary is trimmed."""
    folder = run.folder / "student"
    with damage_named(folder, remedy(run)):
        student, tokenizer = load_saved(folder), run.tokenizer
        if student.config.vocab_size != run.student_init.config.vocab_size:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return student, tokenizer


def remedy(run: Run) -> str:
    """What to do about a damaged student."""
    finished = run.checkpoint_folder("distill") / "FINISHED.json"
    return f"delete it and {finished}, and the same command writes it again from its checkpoint"


# -- Export ------------------------------------------------------------------------------------------------------------


def export(run: Run, results: dict[str, Any], log: RunLog, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """Write model cards and, if they are not there yet, the unrolled student and ONNX files (rank 0).

    Returns:
        The exports for results.json: sizes, speed and, of ONNX files, scores.
    """
    student, tokenizer = load_student(run)
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


def measured_teacher(run: Run, teacher: OnlineTeacher, num_parameters: int, log: RunLog) -> dict[str, float]:
    """The same of the teacher, unless it is too large to be loaded once more."""
    folder = Path(teacher.source.path) if teacher.source.is_classifier else teacher.folder
    if teacher.zero_stage == 3 or num_parameters > speed.MAX_PARAMETERS:
        return {"disk_mb": speed.disk_mb(folder)} if folder.is_dir() else {}
    split = run.dev[run.task.eval_splits[0]].for_teacher()
    return _measured(log, "the teacher", folder, split, run.teacher_tokenizer)


# -- Cards -------------------------------------------------------------------------------------------------------------


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
