"""Attention over packed rows, and dropout, each with a CPU path of its own.

Why not PyTorch's: on a CPU its dropout draws one random number after another, for one element each, and takes three
times as long as the matrix product beside it; its attention, when asked for dropout, computes in float32.
CHANGELOG.md has the measurements, under Tried. On a GPU PyTorch's are used.

T tokens, B rows, H hidden size = heads * head size D; S the width that attention pads to.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from peakd_ds.packing import Packing

_LEVELS = 2**16  # one draw of 64 bits serves four elements, 16 bits each


def attend(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, num_heads: int, scaling: float, dropout_p: float
) -> Tensor:
    """Attention within each row.

    Args:
        query: [T, H], or [B, H] for the first token of each row alone.
        key, value: [T, H].
        dropout_p: Dropout probability of the attention weights; 0 outside training.

    Returns:
        As many rows as `query` has, [T, H] or [B, H].
    """
    is_first_only = query.shape[0] == packing.num_rows
    if _uses_cpu_path(query):
        return _CpuAttention.apply(query, key, value, packing, num_heads, scaling, dropout_p, is_first_only)
    queries = query[:, None] if is_first_only else packing.pad(query)
    output = F.scaled_dot_product_attention(
        _heads(queries, num_heads),
        _heads(packing.pad(key), num_heads),
        _heads(packing.pad(value), num_heads),
        packing.mask,
        dropout_p,
        scale=scaling,
    )
    output = output.transpose(1, 2).flatten(2)
    return output[:, 0] if is_first_only else packing.unpad(output)


def _heads(states: Tensor, num_heads: int) -> Tensor:
    """[B, S, H] -> [B, heads, S, D]."""
    return states.unflatten(2, (num_heads, -1)).transpose(1, 2)


class _CpuAttention(torch.autograd.Function):
    """`attend` by batched matrix products in the inputs' own dtype, as autocast and BERT's own code compute it."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packing: Packing,
        num_heads: int,
        scaling: float,
        dropout_p: float,
        is_first_only: bool,
    ) -> Tensor:
        def split(states: Tensor, is_first: bool = False) -> Tensor:
            """[T, H] or [B, H] -> [B * heads, S or 1, D]."""
            return _heads(states[:, None] if is_first else packing.pad(states), num_heads).flatten(0, 1)

        def join(states: Tensor, is_first: bool = False) -> Tensor:
            """The way back."""
            states = states.unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(2)
            return states[:, 0] if is_first else packing.unpad(states)

        ctx.split, ctx.join = split, join
        ctx.scaling, ctx.is_first_only, ctx.keep_scale = scaling, is_first_only, 1.0
        query, key, value = split(query * scaling, is_first_only), split(key), split(value)
        scores = torch.bmm(query, key.mT)
        bias = torch.zeros(packing.mask.shape, dtype=scores.dtype).masked_fill_(~packing.mask, -torch.inf)
        scores.view(packing.num_rows, num_heads, -1, packing.width).add_(bias)
        weights, kept, keep = torch.softmax(scores, -1), None, None
        if dropout_p > 0:
            keep, ctx.keep_scale = _draw(weights, dropout_p)
            kept = weights * keep
        ctx.save_for_backward(query, key, value, weights, keep)
        return join(torch.bmm(weights if kept is None else kept, value), is_first_only).mul_(ctx.keep_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights, keep = ctx.saved_tensors
        of_output = ctx.split(gradient * ctx.keep_scale, ctx.is_first_only)
        of_value = torch.bmm((weights if keep is None else weights * keep).mT, of_output)
        of_weights = torch.bmm(of_output, value.mT)
        if keep is not None:
            of_weights.mul_(keep)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_query = ctx.join(torch.bmm(of_scores, key), ctx.is_first_only).mul_(ctx.scaling)
        of_key = torch.bmm(of_scores.mT, query)  # the query already has the scaling
        return of_query, ctx.join(of_key), ctx.join(of_value), None, None, None, None, None


class Dropout(nn.Dropout):
    """torch.nn.Dropout; on a CPU four elements share a random number, and p is rounded to a multiple of 2^-16."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and 0 < self.p < 1 and not self.inplace and _uses_cpu_path(input):
            return _CpuDropout.apply(input, self.p)
        return super().forward(input)


class _CpuDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, p: float) -> Tensor:
        keep, ctx.keep_scale = _draw(states, p)
        ctx.save_for_backward(keep)
        return (states * keep).mul_(ctx.keep_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return (gradient * keep).mul_(ctx.keep_scale), None


def _draw(like: Tensor, p: float) -> tuple[Tensor, float]:
    """Zeros with probability p and ones, in the shape and dtype of `like`, and what makes their mean 1."""
    num_dropped = round(p * _LEVELS)  # of so many levels
    seed = int(torch.empty((), dtype=torch.int64).random_())  # so torch's generator alone says which mask is drawn
    words = np.random.SFC64(seed).random_raw(-(-like.numel() // 4))
    levels = torch.from_numpy(words.view(np.int16))[: like.numel()].view(like.shape)
    keep = torch.empty_like(like, memory_format=torch.contiguous_format)
    torch.ge(levels, num_dropped - _LEVELS // 2, out=keep)  # straight into numbers: a product with bools is slow
    return keep, _LEVELS / max(_LEVELS - num_dropped, 1)


def _uses_cpu_path(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
