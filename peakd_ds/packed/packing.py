"""Packed micro-batches: the tokens of B rows one after another in one row of T, with no padding between them.

Everything in an encoder but attention works on single tokens, so nothing is computed for padding there; attention pads
(attention.py), which costs little: its arithmetic is a few percent of a layer's at GLUE lengths.

All indices are made on the host, where lengths are known: finding tokens by a mask would make a GPU wait.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peakd_ds.ranks.device import device, to_device

WIDTH_MULTIPLE = 32
"""Attention pads to a multiple of this. A CPU's vectors hold 32 bf16: its softmax of 77 columns takes twice the time of
one of 96."""
PART_ROWS = 8
"""Parts have multiples of so many rows, but for the last: oneDNN makes each product anew whose shape it has not met."""
PART_COST = 16384
"""What one part more costs attention, in scores of a head: matrix products and some dozen small calls a layer."""


@dataclass(frozen=True)
class Packing:
    """Where the rows of a packed micro-batch lie; B rows, T tokens."""

    starts: Tensor
    """int64 [B]: where each row starts, which is where its [CLS] is."""
    places: Tensor
    """int64 [T]: row * width + position, where a token lies when rows are padded to `width`."""
    mask: Tensor
    """bool [B, 1, 1, width]: where a padded row has a token."""
    longest: int
    """Tokens of the longest row."""
    parts: tuple["Packing", ...] = ()
    """On a CPU, neighbouring rows of like length, which attention pads to widths of their own."""

    @property
    def num_rows(self) -> int:
        return self.mask.shape[0]

    @property
    def width(self) -> int:
        return self.mask.shape[-1]

    def pad(self, tokens: Tensor) -> Tensor:
        """[T, ...] -> [B, width, ...], zero where a row has no token."""
        padded = tokens.new_zeros(self.num_rows * self.width, *tokens.shape[1:])
        return padded.index_copy(0, self.places, tokens).unflatten(0, (self.num_rows, self.width))

    def unpad(self, padded: Tensor) -> Tensor:
        """[B, width, ...] -> [T, ...]."""
        return padded.flatten(0, 1).index_select(0, self.places)


def pack(input_ids: Sequence[np.ndarray], token_type_ids: Sequence[np.ndarray]) -> dict[str, Any]:
    """Inputs of a packed forward pass, on this rank's device: input_ids, token_type_ids, position_ids, int64 [1, T],
    and `packing`.

    Args:
        input_ids: Token ids of each row, from [CLS] on.
        token_type_ids: Their types.
    """
    lengths = np.array([len(ids) for ids in input_ids])
    packing = _packing_of(lengths)
    if device().type == "cpu" and (np.diff(lengths) <= 0).all():
        parts = tuple(_packing_of(lengths[start:stop]) for start, stop in parts_of(lengths))
        packing = replace(packing, parts=parts)

    def on_device(values: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(values))

    return {
        "input_ids": on_device(np.concatenate(input_ids).astype(np.int64)[None]),
        "token_type_ids": on_device(np.concatenate(token_type_ids).astype(np.int64)[None]),
        "position_ids": packing.places[None] % packing.width,
        "packing": packing,
    }


def parts_of(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Rows (from, to) of the parts that cost attention least; lengths int64 [B], the longest first."""
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


def _packing_of(lengths: np.ndarray) -> Packing:
    width = -(-int(lengths.max()) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    mask = np.arange(width) < lengths[:, None]

    def on_device(values: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(values))

    return Packing(
        starts=on_device(np.cumsum(lengths) - lengths),
        places=on_device(np.flatnonzero(mask)),
        mask=on_device(mask[:, None, None]),
        longest=int(lengths.max()),
    )


def padded(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The same rows as any transformers model reads them: input_ids, token_type_ids, attention_mask, int64 [B, S].

    Padding has the token id 0, which the mask hides.
    """
    packing = inputs["packing"]
    return {
        "input_ids": packing.pad(inputs["input_ids"][0])[:, : packing.longest],
        "token_type_ids": packing.pad(inputs["token_type_ids"][0])[:, : packing.longest],
        "attention_mask": packing.mask[:, 0, 0, : packing.longest].long(),
    }
