"""Attention over packed rows, and dropout. On a GPU they are PyTorch's; cpu.py has faster ones for CPUs.

T tokens, B rows, H hidden size = heads * head size D, S the width that attention pads to.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peakd_ds.packed.cpu import cpu_attention, cpu_dropout, uses_cpu_path
from peakd_ds.packed.packing import Packing


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    num_heads: int,
    scaling: float,
    dropout_p: float,
    window: int | None = None,
) -> Tensor:
    """Attention within each row.

    Args:
        query: [T, H], or [B, H] for the first token of each row alone.
        key, value: [T, H].
        dropout_p: Dropout probability of the attention weights; 0 outside training.
        window: A token attends to those of its row that are fewer positions away; None: to all.

    Returns:
        [T, H] or [B, H], as `query`.
    """
    is_first_only = query.shape[0] == packing.num_rows
    is_windowed = window is not None and int(packing.lengths.max()) > window
    if uses_cpu_path(query) and not is_windowed:
        return cpu_attention(query, key, value, packing, num_heads, scaling, dropout_p, is_first_only)
    padded_query = query[:, None] if is_first_only else packing.pad(query)
    output = F.scaled_dot_product_attention(
        _split_heads(padded_query, num_heads),
        _split_heads(packing.pad(key), num_heads),
        _split_heads(packing.pad(value), num_heads),
        _window_mask(packing, window, is_first_only) if is_windowed and window is not None else packing.mask,
        dropout_p,
        scale=scaling,
    )
    output = output.transpose(1, 2).flatten(2)
    return output[:, 0] if is_first_only else packing.unpad(output)


def _window_mask(packing: Packing, window: int, is_first_only: bool) -> Tensor:
    """bool [B, 1, S, S], or [B, 1, 1, S] for first tokens: which tokens a query attends to.

    A query that is padding sees what a token there would, so that no row of the mask is empty.
    """
    positions = torch.arange(packing.width, device=packing.mask.device)
    distance = (positions[None, :] - positions[: 1 if is_first_only else None, None]).abs()
    is_padding = torch.logical_not(packing.mask).mT  # [B, 1, S, 1]
    near = (distance < window) & packing.mask
    return near if is_first_only else near | is_padding


def _split_heads(states: Tensor, num_heads: int) -> Tensor:
    """[B, S, H] -> [B, heads, S, D]."""
    return states.unflatten(2, (num_heads, -1)).transpose(1, 2)


class Dropout(nn.Dropout):
    """torch.nn.Dropout. On a CPU, p is rounded to a multiple of 2^-16."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and 0 < self.p < 1 and not self.inplace and uses_cpu_path(input):
            return cpu_dropout(input, self.p)
        return super().forward(input)
