"""Global batches that do not depend on the number of ranks, and each rank's share of them.

division.py says which rows form global batch k. Among the ranks that hold a row, its length decides which one computes
it, so that each rank gets about the same number of rows and of tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from peakd_ds.data.tokens import ON_ALL_NODES, MicroBatch, Split
from peakd_ds.ranks import dist, launch


@dataclass(frozen=True)
class GlobalBatch:
    """One rank's part of a global batch, with the counts of the whole batch."""

    micro_batches: Iterator[MicroBatch]
    num_items: int
    """Rows in the global batch, over all ranks."""
    num_tokens: int
    """Non-padded tokens in the global batch, over all ranks."""
    label_divisor: float | None = None
    """Sum of the label weights in the global batch, over all ranks; None: rows have no weights."""


def global_batches(
    split: Split, rows: np.ndarray, slots: np.ndarray, num_accum_steps: int, first: int = 0
) -> Iterator[GlobalBatch]:
    """This rank's part of each global batch of an epoch, from batch `first` on.

    Args:
        rows: int64 [N], the rows of `split` that are trained on.
        slots: `epoch_slots` over them.
    """
    is_everywhere = (split.node_of[rows] == ON_ALL_NODES).all()
    num_pools = 1 if is_everywhere else dist.num_nodes()  # ranks of a pool hold the same rows
    pool, number = divmod(dist.rank(), dist.world_size() // num_pools)
    for batch in slots[first:]:
        present = rows[batch[batch >= 0]]
        of_pool = batch.reshape(num_pools, -1)[pool]
        of_pool = rows[of_pool[of_pool >= 0]]
        by_length = of_pool[np.argsort(-split.lengths[of_pool], kind="stable")]  # so attention pads less
        parts = np.array_split(_deal(by_length, dist.world_size() // num_pools)[number], num_accum_steps)
        yield GlobalBatch(
            micro_batches=(split.micro_batch(part) for part in parts),
            num_items=len(present),
            num_tokens=int(split.lengths[present].sum()),
            label_divisor=None if split.label_weights is None else split.label_weights[present].double().sum().item(),
        )


def _deal(by_length: np.ndarray, num_ranks: int) -> list[np.ndarray]:
    """Rows dealt to and fro (0, 1, 2, 2, 1, 0, 0, ...), the longest first.

    The ranks' numbers of tokens then differ by no more than the longest row.
    """
    order = np.arange(len(by_length))
    turn, place = np.divmod(order, num_ranks)
    rank_of = np.where(turn % 2 == 0, place, num_ranks - 1 - place)
    return [by_length[rank_of == rank] for rank in range(num_ranks)]


def eval_batches(split: Split, rows: np.ndarray, micro_batch_size: int) -> Iterator[MicroBatch]:
    """This rank's share of `rows`, each row on exactly one rank; every rank gets the same number of micro-batches.

    Rows that all nodes hold are dealt to all ranks, sharded ones to the ranks of the node that holds them.
    """
    nodes = split.node_of[rows]
    if (nodes == ON_ALL_NODES).all():
        pools, num_ranks = [rows], dist.world_size()
    else:
        pools, num_ranks = [rows[nodes == node] for node in range(dist.num_nodes())], launch.local_world_size()
    pool, number = divmod(dist.rank(), num_ranks)
    mine = pools[pool]
    by_length = mine[np.argsort(-split.lengths[mine], kind="stable")]  # like lengths together: little padding
    num_passes = -(-max(map(len, pools)) // (micro_batch_size * num_ranks))
    for part in np.array_split(by_length, num_passes * num_ranks)[number::num_ranks]:
        yield split.micro_batch(part)
