"""Every model takes packed rows: BERT's own class does, others of transformers through hooks, made here.

    take_packed_rows(model)
    model(**inputs, take=take)    # inputs of packing.pack; output.logits [B, C], take.states

B rows, T tokens of packed rows, S of the longest row, H hidden size.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn

from peakd_ds import families
from peakd_ds.packed import registered
from peakd_ds.packed.packing import Packing, Take, padded, pool


def attention_of(config: Any) -> str | None:
    """The `attn_implementation` that a model of this config is built with; None for transformers' choice."""
    return registered.NAME if families.is_packed(config) else None


def take_packed_rows(model: Any) -> None:
    """Let a classifier of transformers, plain or sharing layers, take packed rows and a `Take`.

    Families that cannot compute packed rows pad them inside. Calls with padded rows stay as they are.
    """
    family = families.family_of(model.config)
    if families.is_packed(model.config):
        registered.enable(model, list(model.base_model.get_submodule(family.layers).children()), family)
        return
    calls: list[tuple[Packing, Take | None]] = []
    model.register_forward_pre_hook(partial(_pad, calls), with_kwargs=True)
    model.register_forward_hook(partial(_pack_states, calls))


def padded_inputs(config: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Packed rows padded on the right, as transformers' model of this config takes them."""
    found: dict[str, Any] = dict(padded(inputs, config.pad_token_id or 0))
    if not families.has_token_types(config):
        found.pop("token_type_ids")
    if families.family_of(config).is_decoder:
        found["use_cache"] = False
    return found


def _pad(
    calls: list[tuple[Packing, Take | None]], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before the model: packed inputs as padded ones."""
    packing: Packing | None = kwargs.get("packing")
    if packing is None:
        return None
    take: Take | None = kwargs.get("take")
    calls.append((packing, take))
    inputs = padded_inputs(model.config, kwargs)
    return args, inputs | {"output_hidden_states": take is not None and bool(take.layers)}


def _pack_states(
    calls: list[tuple[Packing, Take | None]], model: nn.Module, args: tuple[Any, ...], output: Any
) -> None:
    """After the model: the states that `take` asks for, without padding."""
    if not calls:
        return
    packing, take = calls.pop()
    if take is None:
        return
    for number in take.layers:
        states = _without_padding(output.hidden_states[number], packing)
        take.states[number] = states[None] if take.all_tokens else pool(states, packing, take.pooling)


def _without_padding(states_BSH: Tensor, packing: Packing) -> Tensor:
    """[B, S, H] -> [T, H]."""
    row, position = packing.places // packing.width, packing.places % packing.width
    return states_BSH.flatten(0, 1).index_select(0, row * states_BSH.shape[1] + position)
