"""The model families that can teach or learn, in one table: how transformers names their parts, and what they can do.

A row says where a family keeps its layers, which projections of a layer make queries and keys, and whether the model
can run on packed rows. All other facts come from transformers' config and model classes.
"""

from dataclasses import dataclass
from typing import Any

from peakd_ds.errors import UserError

BERT = "bert"
SHARED = "sps_"
"""Prefix of the model type of a student that shares layers, such as sps_roberta."""


@dataclass(frozen=True)
class Family:
    """What the program knows of one model type of transformers."""

    model_type: str
    name: str
    """The name that people use."""
    layers: str
    """Name of the list of layers in the base model; "" if it has none."""
    exchange: tuple[tuple[str, str], ...] = ()
    """Names, in a layer, of the query and key projections that change places in its second run."""
    value: str = ""
    """Name, in a layer, of the value projection."""
    fused_qkv: str = ""
    """Name, in a layer, of one projection that makes query, key and value at once."""
    final_norm: str = ""
    """Name, in the base model, of a LayerNorm after the last layer; transformers counts it to that layer's states."""
    is_packed: bool = True
    """Whether its layers hand keyword arguments on to a registered attention function, so that rows need no padding."""
    starts_after_padding: bool = False
    """Whether positions count from pad_token_id + 1."""
    is_decoder: bool = False
    """Whether it is a causal model, which classifies by the last token."""
    why_no_student: str = ""
    """Why it cannot be a student; "" if it can."""
    has_relative_scores: bool = False
    """Whether attention adds terms of relative positions, which the exchange of query and key does not transpose."""

    @property
    def can_learn(self) -> bool:
        return not self.why_no_student

    @property
    def key_value(self) -> tuple[str, str]:
        """Names of the key and value projections in the attention module itself."""
        return self.exchange[0][1].rpartition(".")[2], self.value.rpartition(".")[2]


_SELF_ATTENTION = (("attention.self.query", "attention.self.key"),)
_NO_ENCODER = "it is a causal model, whose first token sees no other"


def _like_bert(model_type: str, name: str, **more: Any) -> Family:
    return Family(model_type, name, "encoder.layer", _SELF_ATTENTION, "attention.self.value", **more)


def _decoder(model_type: str, name: str) -> Family:
    return Family(model_type, name, "layers", is_packed=False, is_decoder=True, why_no_student=_NO_ENCODER)


FAMILIES = {
    family.model_type: family
    for family in (
        _like_bert(BERT, "BERT"),
        _like_bert("roberta", "RoBERTa", starts_after_padding=True),
        _like_bert("xlm-roberta", "XLM-RoBERTa", starts_after_padding=True),
        _like_bert("camembert", "CamemBERT", starts_after_padding=True),
        _like_bert("electra", "ELECTRA"),
        Family(
            "distilbert",
            "DistilBERT",
            "transformer.layer",
            (("attention.q_lin", "attention.k_lin"),),
            "attention.v_lin",
        ),
        Family("modernbert", "ModernBERT", "layers", fused_qkv="attn.Wqkv", final_norm="final_norm"),
        Family(
            "deberta-v2",
            "DeBERTa-v2 and v3",
            "encoder.layer",
            (
                ("attention.self.query_proj", "attention.self.key_proj"),
                ("attention.self.pos_query_proj", "attention.self.pos_key_proj"),  # not there with share_att_key
            ),
            is_packed=False,
            has_relative_scores=True,
        ),
        Family(
            "mpnet",
            "MPNet",
            "encoder.layer",
            (("attention.attn.q", "attention.attn.k"),),
            is_packed=False,
            starts_after_padding=True,
            has_relative_scores=True,
        ),
        Family("albert", "ALBERT", "", is_packed=False, why_no_student="its layers share their parameters already"),
        _decoder("qwen2", "Qwen2"),
        _decoder("qwen3", "Qwen3"),
        _decoder("llama", "Llama"),
        _decoder("mistral", "Mistral"),
        _decoder("gemma", "Gemma"),
    )
}
"""By transformers' model type."""

TEACHERS = tuple(FAMILIES)
STUDENTS = tuple(name for name, family in FAMILIES.items() if family.can_learn)


def plain_type(model_type: str) -> str:
    """The model type of transformers' own class: roberta for sps_roberta."""
    return model_type.removeprefix(SHARED)


def family_of(config: Any) -> Family:
    """The family of a model by its config, plain or shared. Raises UserError for one that is not in the table."""
    family = FAMILIES.get(plain_type(config.model_type))
    if family is None:
        raise UserError(f"model type {config.model_type} is not known here; take one of {', '.join(FAMILIES)}")
    return family


def is_packed(config: Any) -> bool:
    """Whether a model of this config takes rows without padding."""
    pools_all = getattr(config, "classifier_pooling", "cls") == "mean"  # its head reads every token of a padded row
    return family_of(config).is_packed and not pools_all


def first_position(config: Any) -> int:
    """The position of a row's first token."""
    return config.pad_token_id + 1 if family_of(config).starts_after_padding else 0


def num_positions(config: Any) -> int:
    """The most tokens that a row may have."""
    return config.max_position_embeddings - first_position(config)


def has_token_types(config: Any) -> bool:
    """Whether the model tells the two texts of a pair apart by token types."""
    return getattr(config, "type_vocab_size", 0) >= 2


def intermediate_size(config: Any) -> int:
    """Width of a feed-forward layer, the two halves of a gated one counted together."""
    if config.model_type.endswith("distilbert"):
        return config.hidden_dim
    is_gated = config.model_type.endswith("modernbert") or family_of(config).is_decoder
    return config.intermediate_size * (2 if is_gated else 1)
