"""The config of a family other than BERT: transformers' own class, made of settings that it reads and that can work.

As for BERT, keys that no forward pass reads are dropped, so they cannot change what is built.
"""

import inspect
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peakd_ds.errors import UserError, as_user_error
from peakd_ds.families import FAMILIES, SHARED, family_of, num_positions, plain_type
from peakd_ds.model.config_rules import (
    DROPOUT,
    FLAG,
    MAX_LAYERS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    ONLY_VALUES,
    SPS_SETTINGS,
    Rule,
    check_encoder,
    check_sizes,
    check_values,
    is_classifier_of,
    labels_of,
    one_of,
    real,
    whole,
)

MAX_POSITIONS = 100_000_000
_SIZE, _FEED_FORWARD = whole(1, MAX_WIDTH), whole(1, MAX_WIDTH * 4)
_ACTIVATION = one_of(*ACT2FN)
_SMALL = real(1e-30, 1, "a number above 0 and at most 1")
_OBJECT = Rule("an object, or null", lambda value: value is None or isinstance(value, dict))
_WINDOW = whole(1, MAX_POSITIONS).or_null()
_KINDS_OF_LAYER = ("full_attention", "sliding_attention")
_KINDS_OF_SCORE = ("c2p", "p2c")

RULES = {
    "vocab_size": whole(1, MAX_VOCABULARY),
    **dict.fromkeys("hidden_size dim embedding_size num_attention_heads n_heads pooler_hidden_size".split(), _SIZE),
    **dict.fromkeys("head_dim num_key_value_heads attention_head_size".split(), _SIZE.or_null()),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "inner_group_num", "num_hidden_groups"), whole(1, MAX_LAYERS)),
    **dict.fromkeys(("intermediate_size", "hidden_dim"), _FEED_FORWARD),
    **dict.fromkeys(
        "hidden_act activation hidden_activation classifier_activation pooler_hidden_act summary_activation "
        "conv_act".split(),
        _ACTIVATION,
    ),
    **dict.fromkeys(
        "hidden_dropout_prob attention_probs_dropout_prob dropout attention_dropout seq_classif_dropout "
        "embedding_dropout mlp_dropout pooler_dropout qa_dropout summary_last_dropout".split(),
        DROPOUT,
    ),
    **dict.fromkeys(("classifier_dropout", "classifier_dropout_prob", "cls_dropout"), DROPOUT.or_null()),
    **dict.fromkeys(("layer_norm_eps", "norm_eps", "rms_norm_eps"), _SMALL),
    "initializer_range": real(0, 1, "a number from 0 to 1"),
    "max_position_embeddings": whole(1, MAX_POSITIONS),
    "type_vocab_size": whole(0, MAX_WIDTH),
    "pad_token_id": whole(0, MAX_VOCABULARY).or_null(),
    **dict.fromkeys(
        "attention_bias classifier_bias mlp_bias norm_bias position_biased_input relative_attention share_att_key "
        "sinusoidal_pos_embds tie_word_embeddings use_cache use_sliding_window".split(),
        FLAG,
    ),
    "use_bidirectional_attention": FLAG.or_null(),
    "classifier_pooling": one_of("cls", "mean"),
    "norm_rel_ebd": Rule("none, layer_norm or both", lambda value: value in ("none", "layer_norm", "none|layer_norm")),
    "pos_att_type": Rule(
        "null, or one or both of c2p and p2c",
        lambda value: (
            value is None
            or (isinstance(value, str) and set(value.lower().replace(" ", "").split("|")) <= {*_KINDS_OF_SCORE, ""})
            or (isinstance(value, list) and all(kind in _KINDS_OF_SCORE for kind in value))
        ),
    ),
    **dict.fromkeys(("position_buckets", "max_relative_positions"), whole(-1, MAX_POSITIONS)),
    "relative_attention_num_buckets": whole(4, MAX_WIDTH),
    "conv_kernel_size": whole(0, 1001),
    "conv_groups": _SIZE,
    **dict.fromkeys(("local_attention", "global_attn_every_n_layers"), whole(1, MAX_POSITIONS)),
    "sliding_window": _WINDOW,
    "max_window_layers": whole(0, MAX_POSITIONS),
    "layer_types": Rule(
        f"a list of {' and '.join(_KINDS_OF_LAYER)}",
        lambda value: isinstance(value, list) and all(kind in _KINDS_OF_LAYER for kind in value),
    ).or_null(),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _OBJECT),
    **dict.fromkeys(
        ("rope_theta", "global_rope_theta", "local_rope_theta"), real(1e-3, 1e12, "a number above 0 and at most 1e12")
    ),
}
"""What settings must be, in the families that have them."""
_ROPE = ("rope_theta", "rope_scaling", "head_dim")
MORE_NAMES = {
    "modernbert": ("global_attn_every_n_layers", "rope_scaling", "global_rope_theta", "local_rope_theta"),
    "deberta-v2": tuple(
        "attention_head_size cls_dropout conv_act conv_groups conv_kernel_size max_relative_positions norm_rel_ebd "
        "pooler_hidden_size position_buckets share_att_key".split()
    ),
    **{name: _ROPE for name, family in FAMILIES.items() if family.is_decoder},
}
"""Settings that a family reads though its config class does not declare them."""


def build_other(document: dict[str, Any], model_type: str, source: str) -> tuple[PreTrainedConfig, bool]:
    """The config that a config.json of this model type describes, and whether it is a classifier's.

    Raises:
        UserError: a setting cannot work, or changes what our forward pass computes.
    """
    if model_type not in CONFIG_MAPPING:
        raise UserError(f"{source} is a {model_type} model, which cannot be opened here; take a plain model")
    config_class = CONFIG_MAPPING[model_type]
    family = FAMILIES[plain_type(model_type)]
    names = _names(config_class)
    if not family.is_decoder:
        check_encoder(document, source)
    rules = {name: rule for name, rule in RULES.items() if name in names}
    rules |= SPS_SETTINGS if model_type.startswith(SHARED) else {}
    only_values = {name: values for name, values in ONLY_VALUES.items() if name not in names}
    check_values(document, rules, only_values, source)
    is_classifier = is_classifier_of(document)
    labels = labels_of(document, is_classifier, source)
    kept = {name: document[name] for name in (*names, *rules) if name in document}
    with as_user_error(f"{source} has a config.json that transformers does not take", "fix its config.json"):
        try:
            config = config_class(**kept, **labels)
        except StrictDataclassError as error:  # its first line names the check, its cause says what is wrong
            raise error.__cause__ or error from error
    config.architectures = document.get("architectures")
    check_sizes(config, source)
    _check_fit(config, source)
    return config, is_classifier


def _names(config_class: type[PreTrainedConfig]) -> tuple[str, ...]:
    """Settings that a config class and its models read, except those that every class has."""
    kinds = config_class.__mro__[: config_class.__mro__.index(PreTrainedConfig)]
    declared = [*config_class.attribute_map, *(name for kind in kinds for name in inspect.get_annotations(kind))]
    more = MORE_NAMES.get(plain_type(config_class.model_type), ())
    return tuple(name for name in dict.fromkeys((*declared, *more)) if not name.startswith("_"))


def _check_fit(config: PreTrainedConfig, source: str) -> None:
    """Raise UserError if settings of a family that are right by themselves do not fit each other."""
    num_shared_heads = getattr(config, "num_key_value_heads", None)
    if num_shared_heads and config.num_attention_heads % num_shared_heads:
        raise UserError(
            f"{source} has {config.num_attention_heads} attention heads, which is not a multiple of its "
            f"num_key_value_heads {num_shared_heads}; fix its config.json"
        )
    if family_of(config).starts_after_padding and config.pad_token_id is None:
        raise UserError(
            f"{source} has pad_token_id null, but its positions count from it; set the id of the padding token in its "
            "config.json"
        )
    if num_positions(config) < 1:
        raise UserError(
            f"{source} has max_position_embeddings {config.max_position_embeddings}, which are used up by pad_token_id "
            f"{config.pad_token_id}; fix its config.json"
        )
