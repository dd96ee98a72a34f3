"""SPS for every family: transformers' own model at its effective depth, whose later layers hold the same modules.

A layer that runs again holds the leaf modules of its first run, with query and key exchanged. It is a layer of its own
otherwise, so transformers' forward pass, gradient checkpointing, torch.compile and ZeRO treat the student like any
model, and its state dict is that of a model without sharing, in which some tensors are the same.

Where families differ from K Q^T = (Q K^T)^T:

- deberta-v2 and mpnet add terms of relative positions to the scores. The exchange is of the projections only: these
  terms stay as they are.
- modernbert makes query, key and value with one projection, whose output is exchanged. Its first layer has no LayerNorm
  before attention; where that layer runs again it has one of its own, which is stored.

A student is saved under a model type of its own, such as sps_roberta: the plain class would read its folder as a model
with new random layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from peakd_ds.families import BERT, FAMILIES, SHARED, STUDENTS, Family, family_of, plain_type
from peakd_ds.sps.order import execution_order, order_of, resolve_shuffle_qk


@dataclass(frozen=True)
class SharedClasses:
    """The classes of one family's students."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    classifier: type[PreTrainedModel]


class ExchangedQKV(nn.Module):
    """One projection to query, key and value, whose output has query and key exchanged."""

    def __init__(self, projection: nn.Module):
        super().__init__()
        self.projection = projection

    def forward(self, states: Tensor) -> Tensor:
        """[..., H] -> [..., 3 H]: key, query, value."""
        query, key, value = self.projection(states).chunk(3, dim=-1)
        return torch.cat((key, query, value), dim=-1)


def plain_config(config: Any) -> PreTrainedConfig:
    """The config of transformers' own class at the student's effective depth, without sharing."""
    order = order_of(config)
    settings = config.to_dict()
    for name in ("model_type", "sharing", "shuffle_qk", "architectures"):
        settings.pop(name, None)
    kind = CONFIG_MAPPING[plain_type(config.model_type)]
    settings[kind.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(order)
    if settings.get("layer_types"):
        settings["layer_types"] = [config.layer_types[stored] for stored, _ in order]
    return kind.from_dict(settings, attn_implementation=config._attn_implementation)


# -- Sharing -----------------------------------------------------------------------------------------------------------


def share_layers(base: nn.Module, family: Family, order: Sequence[tuple[int, bool]]) -> None:
    """Make each layer that runs again hold the leaf modules of its first run.

    Args:
        base: A base model with a layer for each entry of `order`.
    """
    layers = base.get_submodule(family.layers)
    first_run: dict[int, nn.Module] = {}
    for layer, (stored, is_exchanged) in zip(layers.children(), order, strict=True):
        if stored in first_run:
            _hold_modules_of(first_run[stored], layer, family, is_exchanged)
        else:
            first_run[stored] = layer


def _hold_modules_of(first: nn.Module, again: nn.Module, family: Family, is_exchanged: bool) -> None:
    leaves = {name: module for name, module in first.named_modules() if not any(module.children())}
    for name, module in leaves.items():
        if not (isinstance(module, nn.Identity) and not isinstance(again.get_submodule(name), nn.Identity)):
            again.set_submodule(name, module)
    if not is_exchanged:
        return
    if family.fused_qkv:
        again.set_submodule(family.fused_qkv, ExchangedQKV(first.get_submodule(family.fused_qkv)))
    for query, key in family.exchange:
        if query in leaves:
            again.set_submodule(query, leaves[key])
            again.set_submodule(key, leaves[query])


def tied_names(model: nn.Module) -> dict[str, str]:
    """For each further name of a parameter, its first name."""
    first: dict[int, str] = {}  # by identity, since on the meta device no tensor has an address
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return tied


# -- Classes -----------------------------------------------------------------------------------------------------------


def classes_of(model_type: str) -> SharedClasses:
    """The classes of students of a model type, plain or shared; not for BERT, whose own are in bert.py."""
    return _CLASSES[plain_type(model_type)]


def _config_class(family: Family) -> type[PreTrainedConfig]:
    base: Any = CONFIG_MAPPING[family.model_type]

    def post_init(self: Any, **kwargs: Any) -> None:
        kwargs.pop("num_effective_layers", None)  # derived: a value in a file must not shadow the property
        base.__post_init__(self, **kwargs)
        execution_order(self.num_hidden_layers, self.sharing, self.shuffle_qk)  # raises for what cannot run
        self.shuffle_qk = resolve_shuffle_qk(self.sharing, self.shuffle_qk)
        self.tie_word_embeddings = True  # else transformers ties nothing, shared layers either

    name = f"SPS{base.__name__}"
    body = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{base.__name__} of ``num_hidden_layers`` stored layers and the order in which they run.",
        "__annotations__": {"sharing": str, "shuffle_qk": bool | None},
        "model_type": SHARED + family.model_type,
        "sharing": "sps",
        "shuffle_qk": None,
        "__post_init__": post_init,
        "num_effective_layers": property(lambda self: len(order_of(self))),
    }
    made: Any = strict(type(name, (base,), body))
    return made


def _model_class(base: Any, config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    def init(self: Any, config: Any, **kwargs: Any) -> None:
        plain = plain_config(config)
        base.__init__(self, plain, **kwargs)
        share_layers(self.base_model, family_of(config), order_of(config))
        config._attn_implementation_internal = plain._attn_implementation_internal  # as the base class has chosen it
        self.config = config
        self._tied_weights_keys = tied_names(self)
        self.post_init()

    name = f"SPS{base.__name__}"
    body = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"``{base.__name__}`` that runs its stored layers in the order of SPS.",
        "__init__": init,
        "config_class": config_class,
    }
    made: type[PreTrainedModel] = type(name, (base,), body)
    return made


def _register(family: Family) -> SharedClasses:
    """Make the classes of a family's students and let transformers' Auto classes find them."""
    plain = CONFIG_MAPPING[family.model_type]
    config = _config_class(family)
    model = _model_class(MODEL_MAPPING[plain], config)
    classifier = _model_class(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[plain], config)
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, model)
    AutoModelForSequenceClassification.register(config, classifier)
    for made in (config, model, classifier):
        globals()[made.__name__] = made  # where pickle and deepcopy look for a class
    return SharedClasses(config, model, classifier)


_CLASSES = {name: _register(FAMILIES[name]) for name in STUDENTS if name != BERT}


# -- Weights -----------------------------------------------------------------------------------------------------------


def check_init_layers(family: Family, init_layers: Sequence[int]) -> None:
    """Raise ValueError if these layers of an encoder, from 1, cannot become stored layers in this order."""
    if family.fused_qkv and (init_layers[0] != 1 or 1 in init_layers[1:]):
        raise ValueError(
            f"layer 1 of a {family.model_type} has no LayerNorm before attention, and the others have one, so the "
            "first stored layer must be layer 1, and no other"
        )


def init_shared(student: PreTrainedModel, encoder: PreTrainedModel, init_layers: Sequence[int]) -> None:
    """Copy everything outside the layers, and chosen layers, of a plain encoder into a student; its head stays.

    Args:
        student: A classifier with n stored layers.
        encoder: A base model of the same family and sizes.
        init_layers: n layer numbers of `encoder`, from 1: the i-th becomes stored layer i.

    Raises:
        ValueError: as `check_init_layers`, or a weight has another shape.
    """
    config, family = student.config, family_of(student.config)
    check_init_layers(family, init_layers)
    body = student.base_model
    source, prefix = encoder.state_dict(), f"{family.layers}."
    layers = list(body.get_submodule(family.layers).children())
    outside = {name: tensor for name, tensor in body.state_dict().items() if not name.startswith(prefix)}
    body.load_state_dict({name: source[name] for name in outside}, strict=False)
    stored = [stored for stored, _ in order_of(config)]
    for index, number in enumerate(init_layers):
        layers[stored.index(index)].load_state_dict(
            {
                name.removeprefix(f"{prefix}{number - 1}."): tensor
                for name, tensor in source.items()
                if name.startswith(f"{prefix}{number - 1}.")
            }
        )


def unrolled_state(student: PreTrainedModel) -> Mapping[str, Tensor]:
    """The state of transformers' own classifier of the effective depth, which computes the same logits."""
    state = dict(student.state_dict())
    for name in [name for name in state if ".projection." in name]:
        query, key, value = state.pop(name).chunk(3)
        state[name.replace(".projection.", ".")] = torch.cat((key, query, value))
    return state
