"""A model's config.json: read, and checked setting by setting before anything is built from it.

Of BERT only settings that its forward pass reads are kept, so other keys cannot change what is built; other_config.py
reads the other families.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import BertConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import cached_file

from peakd_ds.errors import UserError, as_user_error
from peakd_ds.families import BERT, FAMILIES, SHARED, STUDENTS, Family, family_of, plain_type
from peakd_ds.model.config_rules import (
    DROPOUT,
    FLAG,
    MAX_LAYERS,
    MAX_SHOWN,
    MAX_VOCABULARY,
    MAX_WIDTH,
    ONLY_VALUES,
    SPS_SETTINGS,
    as_json,
    check_encoder,
    check_sizes,
    check_values,
    is_classifier_of,
    labels_of,
    one_of,
    real,
    whole,
)
from peakd_ds.model.other_config import build_other
from peakd_ds.sps import SPSBertConfig

MAX_JSON_BYTES = 64 * 2**20
CONFIG_CLASSES: dict[str, type[BertConfig]] = {BERT: BertConfig, "sps_bert": SPSBertConfig}

SETTINGS = {
    "vocab_size": whole(1, MAX_VOCABULARY),
    "hidden_size": whole(1, MAX_WIDTH),
    "num_hidden_layers": whole(1, MAX_LAYERS),
    "num_attention_heads": whole(1, MAX_WIDTH),
    "intermediate_size": whole(1, MAX_WIDTH * 4),
    "hidden_act": one_of(*ACT2FN),
    "hidden_dropout_prob": DROPOUT,
    "attention_probs_dropout_prob": DROPOUT,
    "classifier_dropout": DROPOUT.or_null(),
    "max_position_embeddings": whole(1, MAX_WIDTH),
    "type_vocab_size": whole(1, MAX_WIDTH),
    "initializer_range": real(0, 1, "a number from 0 to 1"),
    "layer_norm_eps": real(1e-30, 1, "a number above 0 and at most 1"),
    "pad_token_id": whole(0, MAX_VOCABULARY).or_null(),
    "use_cache": FLAG,
    "tie_word_embeddings": FLAG,
}
"""Settings of a BERT that are kept, with the values that can work."""


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint that the user has named; its weights are not loaded yet."""

    path: str
    option: str
    """The option that names it, for messages."""
    config: PreTrainedConfig
    is_classifier: bool
    weight_names: frozenset[str] = field(default=frozenset(), repr=False)
    """Names of the stored weights, without prefix; empty if they were not read."""
    pooling: str = "cls"
    """Which token's state stands for a row in the hidden-state loss: cls, last, or mean for the mean of all."""

    @property
    def name(self) -> str:
        return f"--{self.option} {self.path}"

    @property
    def family(self) -> Family:
        return family_of(self.config)


# -- Reading -----------------------------------------------------------------------------------------------------------


def read_config(path: str, option: str, takes_shared: bool = False) -> tuple[PreTrainedConfig, bool]:
    """The config of a folder or hub id, and whether it is a classifier's.

    Args:
        takes_shared: Whether a student that shares layers (sps_bert, ...) is taken too.

    Raises:
        UserError: there is none, its family is not known here, or a setting cannot work.
    """
    source = f"--{option} {path}"
    document = _read_json(path, source)
    model_type = _check_model_type(document, option, takes_shared, source)
    if plain_type(model_type) != BERT:
        return build_other(document, model_type, source)
    check_encoder(document, source)
    rules = SETTINGS | (SPS_SETTINGS if model_type == "sps_bert" else {})
    check_values(document, rules, ONLY_VALUES, source)
    is_classifier = is_classifier_of(document)
    kept = {name: document[name] for name in rules if name in document}
    with as_user_error(f"{source} has a config.json that transformers does not take", "fix its config.json"):
        config = CONFIG_CLASSES[model_type](**kept, **labels_of(document, is_classifier, source))
    config.architectures = document.get("architectures")
    check_sizes(config, source)
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


def _check_model_type(document: dict[str, Any], option: str, takes_shared: bool, source: str) -> str:
    """The model type. Raises UserError for one that is not known here; files that name none are taken for BERT's."""
    found, architectures = document.get("model_type"), document.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    if found is None:
        if any(not str(name).startswith("Bert") for name in names):
            raise UserError(f"{source} names no model_type in its config.json; set it to bert if it is one")
        return BERT
    is_known = isinstance(found, str) and plain_type(found) in FAMILIES
    if is_known and (takes_shared or not found.startswith(SHARED)):
        return found
    if is_known:
        raise UserError(
            f"{source} is a {found} model, a student that shares layers; take a plain model, such as the run's "
            "student_unrolled, or the encoder that the student started from"
        )
    kind = found if isinstance(found, str) and found.isprintable() and found else f"{as_json(found)}"
    known = ", ".join(STUDENTS if option == "student_init" else FAMILIES)
    other = ", or give the outputs of any other model with --teacher_outputs" if option == "teacher" else ""
    raise UserError(f"{source} is a {kind[:MAX_SHOWN]} model; take one of the model types {known}{other}")
