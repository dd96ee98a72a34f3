"""Attention and dropout for CPUs. Nothing here needs to be read to understand the program.

PyTorch's dropout on a CPU draws a random number for each element, one after another, and takes three times as long as
the matrix product beside it; its attention with dropout computes in float32. CHANGELOG.md has the measurements, under
Tried. Here attention is batched matrix products in the inputs' dtype, over parts of the micro-batch whose rows have
similar lengths, and dropout draws one random word for four elements.

T tokens, B rows, H hidden size = heads * head size D, S the width that attention pads to.
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peakd_ds.packed.packing import WIDTH_MULTIPLE, Packing

PART_ROWS = 8
"""Every part but the last has a multiple of 8 rows: oneDNN prepares a product anew for each shape it has not seen."""
PART_COST = 16384
"""Cost of one more part, in attention scores of a head: matrix products and some dozen small calls a layer."""
_LEVELS = 2**16
"""Levels of a random number: one draw of 64 bits serves four elements, 16 bits each."""


def uses_cpu_path(tensor: Tensor) -> bool:
    """Whether this file's functions compute on the tensor."""
    return tensor.device.type == "cpu"


# -- Attention ---------------------------------------------------------------------------------------------------------


def cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    num_heads: int,
    scaling: float,
    dropout_p: float,
    is_first_only: bool,
) -> Tensor:
    """`attention.attend`; `is_first_only` says that `query` is [B, H], the first token of each row."""
    return _Attention.apply(query, key, value, packing, num_heads, scaling, dropout_p, is_first_only)


class _Attention(torch.autograd.Function):
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
        ctx.slices = list(_slices(packing, is_first_only))
        output, saved = torch.empty_like(query), []
        for part, tokens, queries in ctx.slices:
            q = _split(query[queries] * scaling, part, num_heads, is_first_only)
            k, v = _split(key[tokens], part, num_heads), _split(value[tokens], part, num_heads)
            scores = torch.bmm(q, k.mT)
            bias = torch.zeros(part.mask.shape, dtype=scores.dtype).masked_fill_(~part.mask, -torch.inf)
            scores.view(part.num_rows, num_heads, -1, part.width).add_(bias)
            weights, kept, keep = torch.softmax(scores, -1), None, None
            if dropout_p > 0:
                keep, ctx.keep_scale = _draw(weights, dropout_p)
                kept = weights * keep
            _join(torch.bmm(weights if kept is None else kept, v), part, num_heads, output[queries], is_first_only)
            saved += [q, k, v, weights, keep]
        ctx.is_first_only = is_first_only
        ctx.save_for_backward(*saved)
        return output.mul_(ctx.keep_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        num_heads, is_first_only = ctx.num_heads, ctx.is_first_only
        grad_output = grad_output * ctx.keep_scale
        grad_query = torch.empty_like(grad_output)
        num_tokens = ctx.slices[-1][1].stop
        grad_key, grad_value = (grad_output.new_empty(num_tokens, grad_output.shape[1]) for _ in range(2))
        for number, (part, tokens, queries) in enumerate(ctx.slices):
            q, k, v, weights, keep = ctx.saved_tensors[5 * number : 5 * number + 5]
            grad_joined = _split(grad_output[queries], part, num_heads, is_first_only)
            kept = weights if keep is None else weights * keep
            _join(torch.bmm(kept.mT, grad_joined), part, num_heads, grad_value[tokens])
            grad_weights = torch.bmm(grad_joined, v.mT)
            if keep is not None:
                grad_weights.mul_(keep)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            _join(torch.bmm(grad_scores, k), part, num_heads, grad_query[queries], is_first_only)
            _join(torch.bmm(grad_scores.mT, q), part, num_heads, grad_key[tokens])  # q has the scaling already
        return grad_query.mul_(ctx.scaling), grad_key, grad_value, None, None, None, None, None


def _slices(packing: Packing, is_first_only: bool) -> Iterator[tuple[Packing, slice, slice]]:
    """Each part with the slice of its tokens and that of its queries, which are its rows if each has one query."""
    token = row = 0
    for part in parts_of(packing):
        tokens, rows = slice(token, token + len(part.places)), slice(row, row + part.num_rows)
        yield part, tokens, rows if is_first_only else tokens
        token, row = tokens.stop, rows.stop


@functools.lru_cache(maxsize=4)  # all layers of teacher and student share a packing
def parts_of(packing: Packing) -> tuple[Packing, ...]:
    """Neighbouring rows that attention pads to a width of their own; all rows if they are not sorted by length."""
    if (np.diff(packing.lengths) > 0).any():
        return (packing,)
    return tuple(Packing.of(packing.lengths[start:stop]) for start, stop in cheapest_parts(packing.lengths))


def cheapest_parts(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Rows (start, stop) of the parts that cost attention least; lengths int64 [B], the longest first."""
    widths = -(-lengths // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    edges = [*range(0, len(lengths), PART_ROWS), len(lengths)]
    best: list[tuple[int, list[tuple[int, int]]]] = [(0, [])]  # cost and parts of the rows before each edge
    for stop in edges[1:]:
        ways = zip(edges, best, strict=False)
        best.append(
            min(
                (cost + PART_COST + (stop - start) * int(widths[start]) ** 2, [*parts, (start, stop)])
                for start, (cost, parts) in ways
            )
        )
    return best[-1][1]


def _split(states: Tensor, packing: Packing, num_heads: int, is_first_only: bool = False) -> Tensor:
    """[T, H] or [B, H] -> [B * heads, S or 1, D]; padding is 0."""
    padded = states[:, None] if is_first_only else packing.pad(states)
    return padded.unflatten(2, (num_heads, -1)).transpose(1, 2).flatten(0, 1)


def _join(states: Tensor, packing: Packing, num_heads: int, out: Tensor, is_first_only: bool = False) -> None:
    """The inverse of `_split`, written to `out`."""
    states = states.unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(2)
    if is_first_only:
        out.copy_(states[:, 0])
    else:
        torch.index_select(states.flatten(0, 1), 0, packing.places, out=out)


# -- Dropout -----------------------------------------------------------------------------------------------------------


def cpu_dropout(states: Tensor, p: float) -> Tensor:
    """The states with each element dropped with probability p, which is rounded to a multiple of 2^-16."""
    return _Dropout.apply(states, p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, p: float) -> Tensor:
        keep, ctx.keep_scale = _draw(states, p)
        ctx.save_for_backward(keep)
        return (states * keep).mul_(ctx.keep_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return (grad_output * keep).mul_(ctx.keep_scale), None


def _draw(like: Tensor, p: float) -> tuple[Tensor, float]:
    """A mask of ones and, with probability p, zeros, like `like`; and the scale that makes its mean 1."""
    num_dropped = round(p * _LEVELS)
    seed = int(torch.empty((), dtype=torch.int64).random_())  # torch's generator alone determines the mask
    words = np.random.SFC64(seed).random_raw(-(-like.numel() // 4))
    levels = torch.from_numpy(words.view(np.int16))[: like.numel()].view(like.shape)
    keep = torch.empty_like(like, memory_format=torch.contiguous_format)
    torch.ge(levels, num_dropped - _LEVELS // 2, out=keep)  # as numbers: a product with bools is slow
    return keep, _LEVELS / max(_LEVELS - num_dropped, 1)
