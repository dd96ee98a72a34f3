"""Model cards: README.md of an exported model, with scores, sizes, speed, use, and the settings and command behind it.

A card may be published with the model, so it tells no path of the user's.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from peakd_ds.command_line import to_word, to_words
from peakd_ds.config import RESULT_NEUTRAL, SPECS
from peakd_ds.data.metrics import MAX_CLASSES_IN_TABLE, in_words
from peakd_ds.data.tasks import Task
from peakd_ds.families import FAMILIES, SHARED, plain_type
from peakd_ds.results import markdown

PATHS = frozenset(
    "run_dir data_dir train_file validation_file test_file unlabeled_file shard_dir scratch_dir teacher_outputs "
    "teacher_cache".split()
)
"""Settings that are paths of the user's."""
SOURCES = frozenset("teacher student_init dataset_name student_ds_config teacher_ds_config".split())
"""Settings that are paths of the user's, or names that everybody knows."""
METHOD = tuple(
    "num_hidden_layers sharing alpha beta temperature layer_map ptp teacher_epochs ptp_epochs distill_epochs epochs lr "
    "global_batch_size max_seq_length seed".split()
)
"""Settings that a card lists even if they have their defaults."""
_PTP_ONLY = frozenset(["ptp_epochs", "t_correct", "t_wrong"])
_EPOCHS = frozenset(["teacher_epochs", "ptp_epochs", "distill_epochs"])
LONGEST = 128
"""Tokens of the longest text, in the example of a card that knows no --max_seq_length."""


def model_card(
    *,
    task: str,
    method: str,
    metrics: Mapping[str, float],
    teacher_metrics: Mapping[str, float] | None,
    num_parameters: int,
    num_stored_layers: int,
    num_effective_layers: int,
    settings: Mapping[str, object],
    base_model: str | None = None,
    model_type: str = "bert",
    own_task: Task | None = None,
    vocabulary: str = "",
    majority: Mapping[str, Any] | None = None,
    per_class: str = "",
    sizes: Mapping[str, str] | None = None,
    files: str = "",
    onnx_file: str = "",
) -> str:
    """A Hugging Face model card: YAML front matter and Markdown.

    Args:
        task: Name of the task, such as rte.
        method: Name of the method, such as pea-kd.
        metrics: Metrics of the model on the dev set, by name.
        teacher_metrics: Metrics of the teacher; None if there is no teacher to compare with.
        num_parameters: Parameters of the saved model.
        num_stored_layers: Encoder layers that the saved model stores.
        num_effective_layers: Encoder layers that run.
        settings: Training settings by name; `worth_telling` says which are listed.
        base_model: What the model was initialised from; the front matter names it if it is a hub id.
        model_type: Of the saved config; `sps_bert` and the like need peakd_ds.sps to load.
        own_task: The task if it is the user's own data: the card says what labels and metrics are.
        vocabulary: A paragraph on its vocabulary, if that is trimmed.
        majority: The largest class and the metrics of always predicting it, as in results.json.
        per_class: A table of its scores for each class, or "".
        sizes: More rows of the table of sizes, such as MB on disk.
        files: A paragraph and a table of the model's files, if it has others than its weights.
        onnx_file: Name of the ONNX file that is recommended, or "".
    """
    is_shared = num_stored_layers != num_effective_layers
    layers = f"{num_stored_layers} stored, {num_effective_layers} run" if is_shared else f"{num_stored_layers}"
    rows = {"parameters": f"{num_parameters:,}", "encoder layers": layers, "architecture": model_type, **(sizes or {})}
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(settings, base_model, model_type), sort_keys=False)}---",
        f"# {task}: {method}",
        f"A text classifier ({FAMILIES[plain_type(model_type)].name}) for the task `{task}`, made with the method "
        f"`{method}` of peakd_ds.",
        *(_labels(own_task) if own_task else []),
        "## Evaluation",
        _metric_table(metrics, teacher_metrics, majority),
        *(["\n".join(f"- {name}: {in_words(name)}" for name in metrics)] if own_task else []),
        *([per_class] if per_class else []),
        "## Size and speed" if sizes else "## Size",
        markdown.table(("size", "value"), rows.items()),
        *([vocabulary] if vocabulary else []),
        *([files] if files else []),
        "## Intended use",
        _intended_use(task, settings),
        _usage(model_type, own_task is not None and own_task.is_multi_label, settings),
        *([_onnx_usage(onnx_file, settings)] if onnx_file else []),
        "## Training settings",
        markdown.table(("setting", "value"), worth_telling(settings).items()),
        "Made with this command; words in capitals stand for the author's paths:",
        f"```\n{command(settings)}\n```",
        "## Method",
        "Pea-KD (Cho and Kang): [arXiv:2009.14822](https://arxiv.org/abs/2009.14822).",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(settings: Mapping[str, object], base_model: str | None, model_type: str) -> dict[str, object]:
    """The fields that the hub reads; licence and language only if they are given."""
    fields: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-classification"}
    if settings.get("model_license"):
        fields["license"] = settings["model_license"]
    if settings.get("language"):
        fields["language"] = str(settings["language"]).split(",")
    if base_model is not None and is_hub_id(base_model):
        fields["base_model"] = base_model
    return fields | {"tags": [plain_type(model_type), "knowledge-distillation", "pea-kd"]}


# -- Settings ----------------------------------------------------------------------------------------------------------


def publishable(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings that are set and tell no path of the user's: a hub id stays, a folder does not."""
    return {
        name: value
        for name, value in settings.items()
        if value not in (None, "") and name not in PATHS and (name not in SOURCES or is_hub_id(str(value)))
    }


def worth_telling(settings: Mapping[str, object]) -> dict[str, object]:
    """The publishable settings that matter: those of METHOD, and others that change the result and were set."""
    left_out = {"model_license", "language"}
    left_out |= _EPOCHS if settings.get("epochs") else set()
    left_out |= _PTP_ONLY if settings.get("ptp") is False else set()
    return {
        name: to_word(value) if isinstance(value, list | tuple) else value
        for name, value in publishable(settings).items()
        if name not in left_out and (name in METHOD or _was_set(name, value))
    }


def _was_set(name: str, value: object) -> bool:
    """Whether a setting changes the result and differs from its default; derived ones, and those of data, do."""
    if name not in SPECS:
        return name == "layer_pairs" and bool(value)
    is_of_data = name in ("dataset_name", "dataset_config_name")
    return (name not in RESULT_NEUTRAL or is_of_data) and _plain(value) != _plain(SPECS[name].default)


def command(settings: Mapping[str, object]) -> str:
    """The command of a run, quoted for a shell: settings that differ from their defaults, and names for paths."""
    public, words = publishable(settings), []
    for name, spec in SPECS.items():
        value = settings.get(name)
        if name == "dry_run" or value in (None, "") or _plain(value) == _plain(spec.default):
            continue
        if name in public:
            words += to_words("", {name: _plain(value)})
        else:
            words.append(f"--{name}={name.upper()}")
    return shlex.join(["peakd-train", *words])


def _plain(value: Any) -> Any:
    """A value with lists for tuples, as YAML and JSON have it."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def is_hub_id(name: str) -> bool:
    """Whether a name is one of the hub's, and no folder's."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()  # transformers prefers an existing folder to the hub, too


# -- Sections ----------------------------------------------------------------------------------------------------------


def _labels(task: Task) -> list[str]:
    """Paragraphs of a card: what the outputs of a model of own data mean."""
    texts = "a text" if len(task.text_columns) == 1 else "two texts"
    if task.is_regression:
        return [f"The data is the maker's own. The model reads {texts} and gives a score, its one output."]
    given = f"one of {task.num_labels} classes"
    if task.is_multi_label:
        given = f"those of {task.num_labels} classes that apply, which are those with a logit above 0"
    shown = list(enumerate(task.label_names))[:MAX_CLASSES_IN_TABLE]
    left_out = task.num_labels - len(shown)
    return [
        f"The data is the maker's own. The model reads {texts} and gives {given}.",
        markdown.table(("output", "class"), shown),
        *([f"and {left_out:,} more, which config.json has."] if left_out else []),
    ]


def _metric_table(
    metrics: Mapping[str, float], teacher_metrics: Mapping[str, float] | None, majority: Mapping[str, Any] | None
) -> str:
    """Scores of the model, beside those of its teacher and of always predicting the largest class, where known."""
    if not metrics:
        return "No row has a label, so there is no score."
    columns: list[tuple[str, Mapping[str, float]]] = [("this model", metrics)]
    if teacher_metrics is not None:
        columns.append(("teacher", teacher_metrics))
    if majority is not None and majority.get("metrics"):
        columns.append((f"always {majority['name']}", majority["metrics"]))
    header = ["metric", *(title for title, _ in columns)]
    rows: list[Sequence[object]] = [
        [name, *(f"{scores[name]:.4f}" if name in scores else "" for _, scores in columns)] for name in metrics
    ]
    return markdown.table(header, rows)


def class_table(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A Markdown table with a row for each class.

    Args:
        scores: Precision, recall, F1 and support by class, by the name of the model.
    """
    columns = [(name, score) for name in scores for score in ("precision", "recall", "f1")]
    rows = [
        [label, str(first["support"]), *(f"{scores[name][label][score]:.4f}" for name, score in columns)]
        for label, first in next(iter(scores.values())).items()
    ]
    header = ["class", "rows", *(f"{name} {score}" for name, score in columns)]
    return markdown.table(header, rows, is_padded=True)


def _longest(settings: Mapping[str, object]) -> object:
    return settings.get("max_seq_length", LONGEST)


def _intended_use(task: str, settings: Mapping[str, object]) -> str:
    return (
        f"For texts like those of `{task}`. It was trained on the first {_longest(settings)} tokens of a text, and "
        "`truncation=True` cuts longer ones in the same way. Measure it on your texts before you rely on it: scores on "
        "texts of another kind or language may be much lower."
    )


def _usage(model_type: str, gives_several: bool, settings: Mapping[str, object]) -> str:
    is_shared = model_type.startswith(SHARED)
    imports = f"import peakd_ds.sps  # registers {model_type} with transformers\n" if is_shared else ""
    options = ", top_k=None" if gives_several else ""  # the probability of every class, not of the largest
    cut = f"truncation=True, max_length={_longest(settings)}"
    return (
        f"```python\n{imports}from transformers import pipeline\n\n"
        f'classifier = pipeline("text-classification", model="path/to/this/folder"{options})\n'
        f'print(classifier("A sentence.", {cut}))\n'
        f'print(classifier({{"text": "The first sentence", "text_pair": "and the second."}}, {cut}))\n```'
    )


def _onnx_usage(file: str, settings: Mapping[str, object]) -> str:
    return (
        "Without PyTorch:\n\n```python\nimport onnxruntime\nfrom transformers import AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n'
        f'session = onnxruntime.InferenceSession("path/to/this/folder/{file}")\n'
        f'tokens = tokenizer("A sentence.", truncation=True, max_length={_longest(settings)}, return_tensors="np")\n'
        'logits = session.run(["logits"], {given.name: tokens[given.name] for given in session.get_inputs()})[0]\n```'
    )
