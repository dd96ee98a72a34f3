"""TODO packed.cpu."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peakd_ds.packed.packing import Packing

_LEVELS = 2**16  # one draw of 64 bits serves four elements, 16 bits each


def _heads(states: Tensor, num_heads: int) -> Tensor:
    """[B, S, H] -> [B, heads, S, D]."""
    return states.unflatten(2, (num_heads, -1)).transpose(1, 2)


class _CpuAttention(torch.autograd.Function):
    """`attend` by batched matrix products in the inputs' own dtype, as autocast and BERT's own code compute it.

    Rows of like length are computed together (`Packing.parts`), so that few of the products are of padding.
    """

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
        ctx.num_heads, ctx.scaling, ctx.keep_scale = num_heads, scaling, 1.0
        ctx.places = list(_places(packing, is_first_only))
        output, saved = torch.empty_like(query), []
        for part, tokens, of_queries in ctx.places:
            q = _split(query[of_queries] * scaling, part, num_heads, is_first_only)
            k, v = _split(key[tokens], part, num_heads), _split(value[tokens], part, num_heads)
            scores = torch.bmm(q, k.mT)
            bias = torch.zeros(part.mask.shape, dtype=scores.dtype).masked_fill_(~part.mask, -torch.inf)
            scores.view(part.num_rows, num_heads, -1, part.width).add_(bias)
            weights, kept, keep = torch.softmax(scores, -1), None, None
            if dropout_p > 0:
                keep, ctx.keep_scale = _draw(weights, dropout_p)
                kept = weights * keep
            _join(torch.bmm(weights if kept is None else kept, v), part, num_heads, output[of_queries], is_first_only)
            saved += [q, k, v, weights, keep]
        ctx.is_first_only = is_first_only
        ctx.save_for_backward(*saved)
        return output.mul_(ctx.keep_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        num_heads, is_first_only = ctx.num_heads, ctx.is_first_only
        gradient = gradient * ctx.keep_scale
        of_query = torch.empty_like(gradient)
        num_tokens = ctx.places[-1][1].stop
        of_key, of_value = (gradient.new_empty(num_tokens, gradient.shape[1]) for _ in range(2))
        for number, (part, tokens, of_queries) in enumerate(ctx.places):
            q, k, v, weights, keep = ctx.saved_tensors[5 * number : 5 * number + 5]
            of_output = _split(gradient[of_queries], part, num_heads, is_first_only)
            _join(
                torch.bmm((weights if keep is None else weights * keep).mT, of_output),
                part,
                num_heads,
                of_value[tokens],
            )
            of_weights = torch.bmm(of_output, v.mT)
            if keep is not None:
                of_weights.mul_(keep)
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            _join(torch.bmm(of_scores, k), part, num_heads, of_query[of_queries], is_first_only)
            _join(torch.bmm(of_scores.mT, q), part, num_heads, of_key[tokens])  # q already has the scaling
        return of_query.mul_(ctx.scaling), of_key, of_value, None, None, None, None, None


def _places(packing: Packing, is_first_only: bool) -> Iterator[tuple[Packing, slice, slice]]:
    """Each part, where its tokens lie, and where its queries: the same, or its rows if each has one query."""
    token = row = 0
    for part in packing.parts or (packing,):
        tokens, rows = slice(token, token + len(part.places)), slice(row, row + part.num_rows)
        yield part, tokens, rows if is_first_only else tokens
        token, row = tokens.stop, rows.stop


def _split(states: Tensor, packing: Packing, num_heads: int, is_first: bool = False) -> Tensor:
    """[T, H] or [B, H] -> [B * heads, S or 1, D]; padding is 0."""
    return _heads(states[:, None] if is_first else packing.pad(states), num_heads).flatten(0, 1)


def _join(states: Tensor, packing: Packing, num_heads: int, out: Tensor, is_first: bool = False) -> None:
    """The way back, into `out`."""
    states = states.unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(2)
    if is_first:
        out.copy_(states[:, 0])
    else:
        torch.index_select(states.flatten(0, 1), 0, packing.places, out=out)


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
