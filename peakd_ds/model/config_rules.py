"""Rules of config.json that hold for every family: what a value must be, and how its classes fit each other."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from peakd_ds.errors import UserError
from peakd_ds.sps import COMPUTED_VALUES, SHARINGS

MAX_LAYERS = 1_000
MAX_WIDTH = 65_536
"""Largest hidden size, quarter of a feed-forward size, and number of BERT's positions."""
MAX_VOCABULARY = 10_000_000
MAX_CLASSES = 10_000
MAX_SHOWN = 60
"""Characters of a wrong value that a message shows."""
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True)
class Rule:
    """What a value must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]

    def or_null(self) -> "Rule":
        return Rule(f"{self.words}, or null", lambda value: value is None or self.holds(value))


def whole(low: int, high: int) -> Rule:
    return Rule(f"a whole number from {low} to {high:,}", lambda value: type(value) is int and low <= value <= high)


def real(low: float, high: float, words: str) -> Rule:
    return Rule(words, lambda value: type(value) in (int, float) and math.isfinite(value) and low <= value <= high)


def one_of(*names: str) -> Rule:
    return Rule(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def _is_float_dtype(value: Any) -> bool:
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _is_id2label(value: Any) -> bool:
    """Whether a JSON object names each of the classes 0, 1, ... once."""
    if not isinstance(value, dict) or not 1 <= len(value) <= MAX_CLASSES:
        return False
    names = list(value.values())
    has_names = all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    return has_names and set(value) == {str(number) for number in range(len(value))}


def _is_label2id(value: Any) -> bool:
    return isinstance(value, dict) and all(type(number) is int for number in value.values())


FLAG = Rule("true or false", lambda value: isinstance(value, bool))
DROPOUT = real(0, math.nextafter(1, 0), "a number from 0 to below 1")
FLOAT_DTYPE = Rule("the name of a floating-point dtype, such as float32", _is_float_dtype).or_null()

SPS_SETTINGS = {"sharing": one_of(*SHARINGS), "shuffle_qk": FLAG.or_null()}
"""Settings of a student that shares layers."""
FACTS = {
    "architectures": Rule(
        "a list of class names, or null",
        lambda value: value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)),
    ),
    "id2label": Rule("an object with a name of its own for each class number from 0", _is_id2label).or_null(),
    "label2id": Rule("an object that gives the number of each class name", _is_label2id).or_null(),
    "num_labels": whole(1, MAX_CLASSES).or_null(),
    "problem_type": one_of(*PROBLEM_TYPES).or_null(),
    "dtype": FLOAT_DTYPE,
    "torch_dtype": FLOAT_DTYPE,
}
"""What else is read from the file."""
ONLY_VALUES: dict[str, tuple[Any, ...]] = {name: (value, None) for name, value in COMPUTED_VALUES.items()} | {
    "return_dict": (True, None),
    "pruned_heads": ({}, None),
    **dict.fromkeys(
        "auto_map quantization_config configuration_files per_layer_config layer_types head_dim adapters "
        "cross_attention_hidden_size rope_parameters rope_scaling rope_theta".split(),
        (None,),
    ),
}
"""Settings that our forward pass does not compute, with the values at which they change nothing."""


def check_values(
    document: dict[str, Any], rules: dict[str, Rule], only_values: dict[str, tuple[Any, ...]], source: str
) -> None:
    """Raise UserError for the first setting whose value cannot work or is not computed."""
    for name, values in only_values.items():
        if name in document and not any(_is_same(document[name], value) for value in values):
            limit = "has no such setting" if values[0] is None else f"computes only {as_json(values[0])}"
            raise UserError(
                f"{source} has {name} {as_json(document[name])} in config.json, but our forward pass {limit}; take "
                "another model, or delete the line if the weights do not need it"
            )
    for name, rule in (rules | FACTS).items():
        if name in document and not rule.holds(document[name]):
            raise UserError(
                f"{source} has {name} {as_json(document[name])}, but it must be {rule.words}; fix its config.json"
            )


def check_sizes(config: PreTrainedConfig, source: str) -> None:
    """Raise UserError if the sizes of a config do not fit each other."""
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"{source} has hidden_size {config.hidden_size}, which is not a multiple of its "
            f"{config.num_attention_heads} attention heads; fix its config.json"
        )
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        raise UserError(
            f"{source} has pad_token_id {config.pad_token_id}, but vocab_size {config.vocab_size}; fix its config.json"
        )


def check_encoder(document: dict[str, Any], source: str) -> None:
    """Raise UserError if a config.json makes an encoder's family a decoder."""
    for name in ("is_decoder", "add_cross_attention"):
        if document.get(name) is True:
            raise UserError(f"{source} is a decoder by its config.json ({name} is true); take an encoder")


def is_classifier_of(document: dict[str, Any]) -> bool:
    """Whether a config.json is a text classifier's."""
    return any(name.endswith("ForSequenceClassification") for name in document.get("architectures") or [])


def _is_same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def labels_of(document: dict[str, Any], is_classifier: bool, source: str) -> dict[str, Any]:
    """Config entries of the classes. Raises UserError if a classifier's contradict each other."""
    id2label, label2id, count = (document.get(name) for name in ("id2label", "label2id", "num_labels"))
    if id2label is None:
        labels: dict[str, Any] = {"num_labels": 2 if count is None else count}
    else:
        labels = {"id2label": {int(number): name for number, name in id2label.items()}}
        labels["label2id"] = {name: number for number, name in labels["id2label"].items()}
    if not is_classifier:
        return labels
    num_classes = labels.get("num_labels") or len(labels["id2label"])
    if count not in (None, num_classes):
        raise UserError(f"{source} has num_labels {count}, but {num_classes} names in id2label; fix its config.json")
    if label2id is not None and id2label is not None and label2id != labels["label2id"]:
        raise UserError(
            f"{source} has label2id {as_json(label2id)}, but id2label {as_json(id2label)}; they must name the same "
            "classes: fix its config.json"
        )
    problem = document.get("problem_type")
    wanted = ("regression",) if num_classes == 1 else ("single_label_classification", "multi_label_classification")
    if problem not in (None, *wanted):
        raise UserError(
            f"{source} has problem_type {problem} and {num_classes} classes; heads of that size here are "
            f"{' or '.join(wanted)}: take another model, or fix its config.json"
        )
    return labels | {"problem_type": problem}


def as_json(value: Any) -> str:
    """A JSON value for a message, in one line of limited length."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
