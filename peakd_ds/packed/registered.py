"""Packed rows through transformers' own models: a registered attention function, and hooks on the layers.

The families of families.py that are `is_packed` hand keyword arguments on to their layers and from there to the
attention function, which so learns where rows lie. A call without `packing` is transformers' SDPA. rows.py calls this.

T tokens of packed rows, B rows, H hidden size = heads * head size D.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from peakd_ds import families
from peakd_ds.packed.attention import Dropout, attend
from peakd_ds.packed.packing import Packing, Take

NAME = "peakd_packed"
"""The value of `attn_implementation` with which a model takes packed rows."""

KeyValue = Callable[[nn.Module], tuple[Tensor, Tensor]]
"""An attention module -> keys and values [T, H] of all tokens, where only first tokens are queries."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    key_value: KeyValue | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention within each packed row, [1, heads, T or B, D] -> [1, T or B, heads, D]; no weights are returned.

    Args:
        packing: Where rows lie; None for padded rows, whose mask hides padding.
        key_value: Keys and values of all tokens, if `query` is of first tokens only.
        sliding_window: A token attends to those that are fewer positions away; None: to all.
    """
    if packing is None:
        kwargs.pop("take", None)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    num_heads = query.shape[1]
    keys, values = (_join(key), _join(value)) if key_value is None else key_value(module)
    attended = attend(
        _join(query),
        keys,
        values,
        packing,
        num_heads,
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        dropout,
        sliding_window,
    )
    return attended.unflatten(1, (num_heads, -1))[None], None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without one, padding would be attended to


def enable(model: nn.Module, layers: Sequence[nn.Module], family: families.Family) -> None:
    """Let a model, built with `attn_implementation=NAME`, compute packed rows without padding.

    Args:
        layers: Its layers, in the order in which they run.
    """
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is nn.Dropout:
            model.set_submodule(name, Dropout(module.p).train(module.training))
    model.register_forward_pre_hook(_own_inputs, with_kwargs=True)
    layers[-1].register_forward_pre_hook(partial(_first_tokens, len(layers), family), with_kwargs=True)
    base: Any = model.base_model
    norm = base.get_submodule(family.final_norm) if family.final_norm else None
    for number, layer in enumerate(layers, start=1):
        layer.register_forward_hook(partial(_after_layer, number, number == len(layers), norm), with_kwargs=True)


def _own_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before the model: packed inputs as a model of its config reads them."""
    if "packing" not in kwargs:
        return None
    config: Any = model.config
    kwargs = kwargs | {"position_ids": kwargs["position_ids"] + families.first_position(config)}
    if not families.has_token_types(config):
        kwargs.pop("token_type_ids")
    if hasattr(config, "layer_types"):  # else a mask of T x T would be made for its sliding windows
        kwargs["attention_mask"] = dict.fromkeys(set(config.layer_types))
    return args, kwargs


def _first_tokens(
    number: int, family: families.Family, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before the last layer: let first tokens alone go through it, unless all of its tokens are kept."""
    packing, take = kwargs.get("packing"), kwargs.get("take")
    if packing is None or (take is not None and take.needs_all_tokens(number)):
        return None
    states = args[0]
    kwargs = dict(kwargs)
    if family.fused_qkv:
        cos, sin = kwargs["position_embeddings"]
        states_of_keys = layer.get_submodule("attn_norm")(states)
        kwargs["key_value"] = partial(_rotated_key_value, states_of_keys, cos, sin)
        kwargs["position_embeddings"] = tuple(table.index_select(1, packing.starts) for table in (cos, sin))
    else:
        kwargs["key_value"] = partial(_key_value, states, family.key_value)
    return (states.index_select(1, packing.starts), *args[1:]), kwargs


def _key_value(states: Tensor, names: tuple[str, str], module: nn.Module) -> tuple[Tensor, Tensor]:
    key, value = (module.get_submodule(name)(states).squeeze(0) for name in names)
    return key, value


def _rotated_key_value(states: Tensor, cos: Tensor, sin: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    _, key, value = module.get_submodule("Wqkv")(states).chunk(3, dim=-1)
    heads = key.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
    return _join(apply_rotary_pos_emb(heads, heads, cos, sin)[1]), value.squeeze(0)


def _join(states: Tensor) -> Tensor:
    """[1, heads, T, D] -> [T, H]."""
    return states.squeeze(0).transpose(0, 1).flatten(1)


def _after_layer(
    number: int,
    is_last: bool,
    norm: nn.Module | None,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> Any:
    """Keep what `take` asks for; after the last layer, give the head first tokens as [B, 1, H].

    Args:
        norm: What transformers applies to the last layer's states before it returns them, and the head, too.
    """
    packing: Packing | None = kwargs.get("packing")
    take: Take | None = kwargs.get("take")
    if packing is None:
        return None
    states = output[0] if isinstance(output, tuple) else output
    is_short = "key_value" in kwargs
    if take is not None and number in take.layers:
        if is_last and norm is not None:
            take.from_layer(number, norm(states), None if is_short else packing)
        else:
            states = take.from_layer(number, states, None if is_short else packing)
    if is_last:
        states = (states if is_short else states.index_select(1, packing.starts)).transpose(0, 1)
    return (states, *output[1:]) if isinstance(output, tuple) else states
