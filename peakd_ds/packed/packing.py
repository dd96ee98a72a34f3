"""Packed micro-batches: the tokens of B rows one after another in a single row of T, without padding between them.

Everything in an encoder except attention works on single tokens, so packing saves all computation of padding there.
Attention pads (attention.py), which costs little: a few percent of a layer's arithmetic at GLUE lengths.

All indices are made on the host, which knows the lengths: finding tokens by a mask would make the host wait for a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peakd_ds.ranks.device import to_device

WIDTH_MULTIPLE = 32
"""Attention pads to a multiple of this. A CPU's vectors hold 32 bf16 numbers: its softmax takes twice the time for 77
columns that it takes for 96."""


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the B rows of a packed micro-batch of T tokens lie."""

    lengths: np.ndarray
    """int64 [B], tokens of each row, on the host."""
    starts: Tensor
    """int64 [B], the first token of each row, its [CLS]."""
    places: Tensor
    """int64 [T], row * width + position: where each token lies when rows are padded to `width`."""
    mask: Tensor
    """bool [B, 1, 1, width], where a padded row has a token."""

    @staticmethod
    def of(lengths: np.ndarray) -> "Packing":
        """The packing of rows of these lengths, on this rank's device."""
        width = -(-int(lengths.max()) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        mask = np.arange(width) < lengths[:, None]
        return Packing(
            lengths,
            starts=_on_device(np.cumsum(lengths) - lengths),
            places=_on_device(np.flatnonzero(mask)),
            mask=_on_device(mask[:, None, None]),
        )

    @property
    def num_rows(self) -> int:
        return self.mask.shape[0]

    @property
    def width(self) -> int:
        return self.mask.shape[-1]

    def pad(self, tokens: Tensor) -> Tensor:
        """[T, ...] -> [B, width, ...], zero for padding."""
        padded = tokens.new_zeros(self.num_rows * self.width, *tokens.shape[1:])
        return padded.index_copy(0, self.places, tokens).unflatten(0, (self.num_rows, self.width))

    def unpad(self, padded: Tensor) -> Tensor:
        """[B, width, ...] -> [T, ...]."""
        return padded.flatten(0, 1).index_select(0, self.places)


def pack(input_ids: Sequence[np.ndarray], token_type_ids: Sequence[np.ndarray]) -> dict[str, Any]:
    """Inputs of a packed forward pass, on this rank's device.

    Args:
        input_ids: Token ids of each row, from [CLS] on.
        token_type_ids: Their types.

    Returns:
        input_ids, token_type_ids and position_ids, int64 [1, T], and `packing`, a Packing.
    """
    packing = Packing.of(np.array([len(ids) for ids in input_ids]))
    return {
        "input_ids": _on_device(np.concatenate(input_ids).astype(np.int64)[None]),
        "token_type_ids": _on_device(np.concatenate(token_type_ids).astype(np.int64)[None]),
        "position_ids": packing.places[None] % packing.width,
        "packing": packing,
    }


def padded(inputs: dict[str, Any], pad_token_id: int = 0) -> dict[str, Tensor]:
    """The same rows as any transformers model takes them: input_ids, token_type_ids, attention_mask, int64 [B, S].

    Padding is on the right and hidden by the mask. Some models find positions, or the last token, by its token id.
    """
    packing = inputs["packing"]
    longest = int(packing.lengths.max())
    is_token = packing.mask[:, 0, 0, :longest]
    return {
        "input_ids": packing.pad(inputs["input_ids"][0])[:, :longest].masked_fill(~is_token, pad_token_id),
        "token_type_ids": packing.pad(inputs["token_type_ids"][0])[:, :longest],
        "attention_mask": is_token.long(),
    }


@dataclass
class Take:
    """The hidden states that a packed forward pass keeps: of some layers, a vector for each row or all tokens."""

    layers: tuple[int, ...] = ()
    """Effective layers, from 1."""
    all_tokens: bool = False
    pooling: str = "cls"
    """What a row's vector is: its first token (`cls`), its last one (`last`) or the mean of all (`mean`)."""
    logits: bool = True
    """Whether the output is read; if not, the pass ends after the last of `layers`, and its logits mean nothing."""
    states: dict[int, torch.Tensor] = field(default_factory=dict)
    """The states by layer: [B, H], or [1, T, H] with `all_tokens`."""

    def needs_all_tokens(self, number: int) -> bool:
        """Whether what is kept of a layer depends on more than first tokens."""
        return number in self.layers and (self.all_tokens or self.pooling != "cls")

    def from_layer(self, number: int, hidden_states: torch.Tensor, packing: Packing | None) -> torch.Tensor:
        """Keep states of a layer's output: [1, T, hidden], or without `packing` [1, B, hidden] of first tokens.

        Returns:
            The states for the next layer.
        """
        if self.all_tokens:
            self.states[number] = hidden_states
        elif self.pooling != "cls":
            assert packing is not None
            self.states[number] = pool(hidden_states[0], packing, self.pooling)
        elif packing is None:
            self.states[number] = hidden_states[0]
        else:
            hidden_states, self.states[number] = _TakeFirst.apply(hidden_states, packing.starts)
        return hidden_states


def pool(states_TH: torch.Tensor, packing: Packing, pooling: str) -> torch.Tensor:
    """A vector for each row, [B, H]: its first token (`cls`), its last one (`last`) or the mean of all (`mean`)."""
    if pooling == "cls":
        return states_TH.index_select(0, packing.starts)
    if pooling == "last":
        return states_TH.index_select(0, packing.starts + packing.mask.sum(-1).flatten() - 1)
    return packing.pad(states_TH).sum(1) / packing.mask.sum(-1).flatten()[:, None].to(states_TH.dtype)


class _TakeFirst(torch.autograd.Function):
    """The states [1, T, hidden] unchanged, and a copy [B, hidden] of their first tokens, at starts [B].

    The gradient of indexing would be a tensor of the full shape, zero except for these tokens, which autograd fills and
    adds to the states' gradient. Here the tokens' gradient is added in place. That is safe because autograd has summed
    the states' gradient for this node: every layer reads its input more than once (attention, residual).
    """

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.shape = states.shape
        ctx.save_for_backward(starts)
        return states.view_as(states), states[0].index_select(0, starts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_states: torch.Tensor | None, grad_first: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, None]:
        if grad_first is not None:
            if grad_states is None:  # no layer above reads the states
                grad_states = grad_first.new_zeros(ctx.shape)
            grad_states[0].index_add_(0, ctx.saved_tensors[0], grad_first)
        return grad_states, None


def _on_device(values: np.ndarray) -> Tensor:
    return to_device(torch.from_numpy(values))
