"""Attention over packed rows, and dropout, each with a CPU path of its own.

Why not PyTorch's: on a CPU its dropout draws one random number after another, for one element each, and takes three
times as long as the matrix product beside it; its attention, when asked for dropout, computes in float32.
CHANGELOG.md has the measurements, under Tried. On a GPU PyTorch's are used.

T tokens, B rows, H hidden size = heads * head size D; S the width that attention pads to.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from peakd_ds.packed.cpu import _CpuAttention, _CpuDropout, _heads, _uses_cpu_path
from peakd_ds.packed.packing import Packing


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


class Dropout(nn.Dropout):
    """torch.nn.Dropout; on a CPU four elements share a random number, and p is rounded to a multiple of 2^-16."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and 0 < self.p < 1 and not self.inplace and _uses_cpu_path(input):
            return _CpuDropout.apply(input, self.p)
        return super().forward(input)
