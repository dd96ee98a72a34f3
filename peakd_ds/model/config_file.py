"""A model's config.json: read, and checked setting by setting before anything is built from it.

Only settings that BERT's forward pass reads are kept, so other keys cannot change what is built.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig
from transformers.activations import ACT2FN
from transformers.utils import cached_file

from peakd_ds.errors import UserError, as_user_error
from peakd_ds.sps import COMPUTED_VALUES, SHARINGS, SPSBertConfig

MAX_LAYERS = 1_000
MAX_WIDTH = 65_536
"""Largest hidden size, feed-forward size and number of positions."""
MAX_VOCABULARY = 10_000_000
MAX_CLASSES = 10_000
MAX_JSON_BYTES = 64 * 2**20
MAX_SHOWN = 60
"""Characters of a wrong value that a message shows."""
CLASSIFIERS = ("BertForSequenceClassification", "SPSBertForSequenceClassification")
CONFIG_CLASSES: dict[str, type[BertConfig]] = {"bert": BertConfig, "sps_bert": SPSBertConfig}
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True)
class Pretrained:
    """A BERT checkpoint that the user has named; its weights are not loaded yet."""

    path: str
    option: str
    """The option that names it, for messages."""
    config: BertConfig
    is_classifier: bool
    weight_names: frozenset[str] = field(default=frozenset(), repr=False)
    """Names of the stored weights, without prefix; empty if they were not read."""

    @property
    def name(self) -> str:
        return f"--{self.option} {self.path}"


# -- Rules -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """What a value must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]

    def or_null(self) -> "Rule":
        return Rule(f"{self.words}, or null", lambda value: value is None or self.holds(value))


def _whole(low: int, high: int) -> Rule:
    return Rule(f"a whole number from {low} to {high:,}", lambda value: type(value) is int and low <= value <= high)


def _number(low: float, high: float, words: str) -> Rule:
    return Rule(words, lambda value: type(value) in (int, float) and math.isfinite(value) and low <= value <= high)


def _one_of(*names: str) -> Rule:
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


_FLAG = Rule("true or false", lambda value: isinstance(value, bool))
_DROPOUT = _number(0, math.nextafter(1, 0), "a number from 0 to below 1")
_FLOAT_DTYPE = Rule("the name of a floating-point dtype, such as float32", _is_float_dtype).or_null()

SETTINGS = {
    "vocab_size": _whole(1, MAX_VOCABULARY),
    "hidden_size": _whole(1, MAX_WIDTH),
    "num_hidden_layers": _whole(1, MAX_LAYERS),
    "num_attention_heads": _whole(1, MAX_WIDTH),
    "intermediate_size": _whole(1, MAX_WIDTH * 4),
    "hidden_act": _one_of(*ACT2FN),
    "hidden_dropout_prob": _DROPOUT,
    "attention_probs_dropout_prob": _DROPOUT,
    "classifier_dropout": _DROPOUT.or_null(),
    "max_position_embeddings": _whole(1, MAX_WIDTH),
    "type_vocab_size": _whole(1, MAX_WIDTH),
    "initializer_range": _number(0, 1, "a number from 0 to 1"),
    "layer_norm_eps": _number(1e-30, 1, "a number above 0 and at most 1"),
    "pad_token_id": _whole(0, MAX_VOCABULARY).or_null(),
    "use_cache": _FLAG,
    "tie_word_embeddings": _FLAG,
}
"""Settings that are kept, with the values that can work."""
SPS_SETTINGS = {"sharing": _one_of(*SHARINGS), "shuffle_qk": _FLAG.or_null()}
"""More of them, of a student."""
FACTS = {
    "architectures": Rule(
        "a list of class names, or null",
        lambda value: value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)),
    ),
    "id2label": Rule("an object with a name of its own for each class number from 0", _is_id2label).or_null(),
    "label2id": Rule("an object that gives the number of each class name", _is_label2id).or_null(),
    "num_labels": _whole(1, MAX_CLASSES).or_null(),
    "problem_type": _one_of(*PROBLEM_TYPES).or_null(),
    "dtype": _FLOAT_DTYPE,
    "torch_dtype": _FLOAT_DTYPE,
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


# -- Reading -----------------------------------------------------------------------------------------------------------


def read_config(path: str, option: str, model_types: tuple[str, ...] = ("bert",)) -> tuple[BertConfig, bool]:
    """The config of a folder or hub id, and whether it is a classifier's.

    Raises:
        UserError: there is none, it is not a BERT encoder's, or a setting cannot work.
    """
    source = f"--{option} {path}"
    document = _read_json(path, source)
    _check_model_type(document, model_types, source)
    model_type = document.get("model_type") or "bert"
    rules = SETTINGS | (SPS_SETTINGS if model_type == "sps_bert" else {})
    _check_values(document, rules, source)
    is_classifier = any(name in CLASSIFIERS for name in document.get("architectures") or [])
    kept = {name: document[name] for name in rules if name in document}
    with as_user_error(f"{source} has a config.json that transformers does not take", "fix its config.json"):
        config = CONFIG_CLASSES[model_type](**kept, **_labels(document, is_classifier, source))
    config.architectures = document.get("architectures")
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"{source} has hidden_size {config.hidden_size}, which is not a multiple of its "
            f"{config.num_attention_heads} attention heads; fix its config.json"
        )
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        raise UserError(
            f"{source} has pad_token_id {config.pad_token_id}, but vocab_size {config.vocab_size}; fix its config.json"
        )
    if document.get("embedding_size") not in (None, config.hidden_size):
        raise UserError(f"{source} has an embedding_size other than its hidden_size, as BERT has not; take a BERT")
    return config, is_classifier


def _read_json(path: str, source: str) -> dict[str, Any]:
    """The object in config.json. Raises UserError if there is none."""
    problem = f"{source} is neither a folder with config.json nor a model that the hub gives"
    with as_user_error(problem, "give a folder that save_pretrained wrote, or go online for a hub id"):
        if Path(path).is_dir():
            file = Path(path) / "config.json"
            if not file.is_file():
                raise FileNotFoundError("there is no config.json")
        else:
            file = Path(str(cached_file(path, "config.json")))
    with as_user_error(f"{source} has a config.json that is not JSON", "get the model again"):
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES:,} bytes")
        document = json.loads(file.read_bytes().decode(), object_pairs_hook=_without_duplicates)
    if not isinstance(document, dict):
        raise UserError(f"{source} has a config.json that is JSON, but not an object; get the model again")
    return document


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _check_model_type(document: dict[str, Any], model_types: tuple[str, ...], source: str) -> None:
    """Raise UserError for another kind of model. Old files name none, and are then taken for BERT's."""
    found, architectures = document.get("model_type"), document.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    if found is None and any(not str(name).startswith("Bert") for name in names):
        raise UserError(f"{source} names no model_type in its config.json; set it to bert if it is one")
    if found is not None and found not in model_types:
        kind = found if isinstance(found, str) and found.isprintable() and found else f"{as_json(found)}"
        raise UserError(
            f"{source} is a {kind[:MAX_SHOWN]} model; it must be a {' or '.join(model_types)}, since the student "
            "takes its layers and vocabulary from it: take a BERT"
        )


def _check_values(document: dict[str, Any], rules: dict[str, Rule], source: str) -> None:
    """Raise UserError for the first setting whose value cannot work or is not computed."""
    for name in ("is_decoder", "add_cross_attention"):
        if document.get(name) is True:
            raise UserError(f"{source} is a decoder by its config.json ({name} is true); take an encoder")
    for name, values in ONLY_VALUES.items():
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


def _is_same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def _labels(document: dict[str, Any], is_classifier: bool, source: str) -> dict[str, Any]:
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
