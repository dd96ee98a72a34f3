"""README.md of a run folder: the table of models, on which rows it was measured, and the command."""

from collections.abc import Mapping
from typing import Any

from peakd_ds.data.tasks import Task
from peakd_ds.results import comparison, int8, speed
from peakd_ds.results.card import class_table, command

_PICKED_ON = {
    "holdout": "a fixed tenth of train, which no stage trained on",
    "validation": "the validation rows, which no stage trained on",
    "dev": "the dev set itself, so the figures below are optimistic",
}


def of_run(results: Mapping[str, Any], task: Task, num_rows: Mapping[str, int], has_curves: bool) -> str:
    """The text of README.md.

    Args:
        results: The content of results.json.
        num_rows: Rows of each reported split.
        has_curves: Whether loss_curves.png is there.
    """
    settings = results["settings"]
    splits = ", ".join(f"{name} {count:,} rows" for name, count in num_rows.items())
    verdict = results["verdict"]
    paragraphs = [
        f"{verdict[:1].upper()}{verdict[1:]}." if verdict else "",
        comparison.table_of(comparison.rows_of(results)),
        f"Metrics are over the whole dev set ({splits}), computed in {settings['dtype']}.\n"
        f"Epochs were picked on {_PICKED_ON[results['selected_on']]}.\n{speed.in_words(results['speed'])}",
        about_onnx(results, task),
        _about_majority(results, task),
        *_classes(results, task),
        about_vocabulary(results),
        "![loss curves](loss_curves.png)" if has_curves else "",
        f"Made with this command; words in capitals stand for paths:\n\n```\n{command(settings)}\n```",
        "`config.yaml` holds every setting. Started again with this folder, the same command continues where it "
        "stopped, and does nothing that is done.",
    ]
    title = f"# {results['task']}: {results['method']}, seed {results['seed']}"
    return "\n\n".join([title, *(paragraph for paragraph in paragraphs if paragraph)]) + "\n"


def about_onnx(results: Mapping[str, Any], task: Task) -> str:
    """A paragraph on the ONNX files and which of them to ship; "" if there is none."""
    exports = results["exports"]
    if "onnx_int8" in exports:
        _, sentence = int8.verdict(exports["onnx_int8"], results["settings"]["max_int8_drop"], task.primary_metric)
        return f"{sentence}."
    if "int8_failed" in exports:
        return f"There is no model_int8.onnx: the model cannot be quantised ({exports['int8_failed']})."
    return ""


def about_vocabulary(results: Mapping[str, Any]) -> str:
    """A sentence on the trimmed vocabulary; "" if it is whole."""
    vocabulary = (results["student"] or {}).get("vocabulary")
    if vocabulary is None:
        return ""
    outside = ", ".join(f"{count:,} of {name}" for name, count in vocabulary["rows_with_words_outside"].items())
    return (
        f"The student's vocabulary holds {vocabulary['tokens']:,} of {vocabulary['of']:,} tokens, those that occur in "
        f"its training and selection rows, which saves {vocabulary['saved_parameters']:,} parameters. Words outside it "
        f"become pieces or unknown; rows with such words: {outside}."
    )


def _about_majority(results: Mapping[str, Any], task: Task) -> str:
    """Sentences on rows without a label, and on the score of always predicting the largest class."""
    majority, sentences = results.get("majority_class"), ["Rows without a label do not count."] if task.is_own else []
    if majority is not None:
        what = "rows" if task.is_multi_label else "rows, the accuracy of always predicting it"
        sentences.append(
            f"The largest class of {task.eval_splits[0]} is {majority['name']}, with {majority['share']:.4f} of the "
            f"{what}."
        )
    return " ".join(sentences)


def _classes(results: Mapping[str, Any], task: Task) -> list[str]:
    """A table with a row for each class, of own data."""
    judged = {name: results[name] for name in ("teacher", "student") if results[name] is not None}
    scores = {name: model["per_class"] for name, model in judged.items() if "per_class" in model}
    return [f"Each class of {task.eval_splits[0]}:", class_table(scores)] if scores else []
