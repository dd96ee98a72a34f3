"""Which hidden states a packed forward pass keeps. B rows, T tokens of packed rows, H hidden size."""

from dataclasses import dataclass, field
from typing import Any

import torch

from peakd_ds.packed.packing import Packing


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
