"""Global batches that do not depend on the number of ranks, and each rank's share of them.

The training rows form 64 canonical shards, contiguous blocks of the row order. In each epoch each shard is shuffled
from (seed, epoch, shard), and a global batch takes the same number of rows from equally spaced shards. So the seed
and k alone say which rows form global batch k, and a node's rows come from its own block of shards if the number of
nodes divides 64. Among the ranks that hold a row, its length decides which one computes it,
so that each rank gets about the same number of rows and of tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import numpy as np

from peakd_ds.data.tasks import Task
from peakd_ds.data.tokens import ON_ALL_NODES, MicroBatch, Split
from peakd_ds.errors import UserError
from peakd_ds.ranks import dist, launch

NUM_SHARDS = 64
HOLDOUT_SHARE = 10
"""One row in ten picks the epoch and is not trained on."""


@dataclass(frozen=True)
class GlobalBatch:
    """One rank's part of a global batch, with the counts of the whole batch."""

    micro_batches: Iterator[MicroBatch]
    num_items: int
    """Rows in the global batch, over all ranks."""
    num_tokens: int
    """Non-padded tokens in the global batch, over all ranks."""


def split_holdout(num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on, and the fixed tenth that only picks epochs; both sorted, the same for every seed."""
    shuffled = np.random.default_rng(0).permutation(num_rows)
    num_holdout = num_rows // HOLDOUT_SHARE
    return np.sort(shuffled[num_holdout:]), np.sort(shuffled[:num_holdout])


def check_holdout(task: Task, num_rows: int) -> None:
    """Raise UserError if a tenth of the training rows is no row."""
    if num_rows < HOLDOUT_SHARE:
        raise UserError(
            f"task {task.name} has {num_rows} training rows, too few to hold out a tenth; set --select_on dev"
        )


def shard_bounds(num_rows: int) -> np.ndarray:
    """First row of each canonical shard, and the number of rows at the end: int64 [NUM_SHARDS + 1]."""
    return np.arange(NUM_SHARDS + 1) * num_rows // NUM_SHARDS


def epoch_slots(num_rows: int, global_batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """The training row in each slot of each global batch of an epoch: int64 [steps, global_batch_size], -1 for none.

    The slots of a batch are ordered by shard. The last batches of an epoch have empty slots; every row is used once.
    """
    bounds = shard_bounds(num_rows)
    shards = [
        np.random.default_rng([seed, epoch, shard]).permutation(np.arange(bounds[shard], bounds[shard + 1]))
        for shard in range(NUM_SHARDS)
    ]
    num_taken = gcd(global_batch_size, NUM_SHARDS)  # shards that one batch takes from
    stride, per_shard = NUM_SHARDS // num_taken, global_batch_size // num_taken
    rounds = -(-max(len(shard) for shard in shards) // per_shard)
    table = np.full((NUM_SHARDS, rounds * per_shard), -1, dtype=np.int64)
    for row_of_table, shard in zip(table, shards, strict=True):
        row_of_table[: len(shard)] = shard
    # [taken, stride, rounds, per_shard] -> one batch for each (round, offset), its slots by shard
    slots = table.reshape(num_taken, stride, rounds, per_shard).transpose(2, 1, 0, 3).reshape(-1, global_batch_size)
    return slots[(slots >= 0).any(axis=1)]


def steps_per_epoch(num_rows: int, global_batch_size: int) -> int:
    """Global batches in an epoch; the same in every epoch."""
    return len(epoch_slots(num_rows, global_batch_size, seed=0, epoch=0))


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
