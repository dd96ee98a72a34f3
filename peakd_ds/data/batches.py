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

from peakd_ds.config.data import DataSettings
from peakd_ds.data.labels import is_labeled
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
    label_divisor: float | None = None
    """Sum of the label weights in the global batch, over all ranks; None: rows have no weights."""


@dataclass(frozen=True)
class TrainRows:
    """Rows that a stage trains on."""

    rows: np.ndarray
    """int64 [N], positions in the split, shard after shard."""
    bounds: np.ndarray
    """The first row of each canonical shard, and N: int64 [NUM_SHARDS + 1]."""

    def __len__(self) -> int:
        return len(self.rows)

    def only(self, is_wanted: np.ndarray) -> "TrainRows":
        """Those of the rows that are wanted, in the same shards.

        Args:
            is_wanted: bool, for every row of the split.
        """
        kept = is_wanted[self.rows]
        return TrainRows(self.rows[kept], np.concatenate([[0], np.cumsum(kept)])[self.bounds])

    def slots(self, global_batch_size: int, seed: int, epoch: int) -> np.ndarray:
        """The rows of each global batch of an epoch, as positions in `rows`; see `epoch_slots`."""
        return epoch_slots(len(self), global_batch_size, seed, epoch, self.bounds)


def holds_out(settings: DataSettings, task: Task) -> bool:
    """Whether a tenth of train is held out to pick epochs."""
    return settings.select_on == "holdout" and not task.selection_split


def divide_rows(task: Task, labels: np.ndarray, holds_out: bool) -> tuple[TrainRows, np.ndarray]:
    """Rows to train on, and the rows that only pick epochs; the same for every seed.

    Args:
        labels: [N] or [N, C] of the train split.
        holds_out: Whether a tenth of the rows is held out.
    """
    if not task.is_own:
        trained, held_out = split_holdout(len(labels)) if holds_out else (np.arange(len(labels)), np.arange(0))
        return TrainRows(trained, shard_bounds(len(trained))), held_out
    held_out = stratified_tenth(labels, seed=0) if holds_out else np.arange(0)
    trained = _mixed(np.setdiff1d(np.arange(len(labels)), held_out), is_labeled(labels))
    return TrainRows(trained, shard_bounds(len(trained))), held_out


def stratified_tenth(labels: np.ndarray, seed: int) -> np.ndarray:
    """A tenth of the rows that have a label (of all rows if none has), sorted; all labels are in it alike."""
    rows = np.flatnonzero(is_labeled(labels))
    rows = np.random.default_rng(seed).permutation(rows if len(rows) else np.arange(len(labels)))
    _, groups = np.unique(labels[rows], axis=0, return_inverse=True)
    by_label = rows[np.argsort(groups.reshape(-1), kind="stable")]
    return np.sort(by_label[HOLDOUT_SHARE // 2 :: HOLDOUT_SHARE])


def _mixed(rows: np.ndarray, is_labeled: np.ndarray) -> np.ndarray:
    """The rows in an order in which those with and without a label are spread evenly, so that shards are alike."""
    place = np.empty(len(rows))
    for kind in (True, False):
        places = np.flatnonzero(is_labeled[rows] == kind)
        place[places] = (np.arange(len(places)) + 0.5) / max(len(places), 1)
    return rows[np.argsort(place, kind="stable")] if not is_labeled[rows].all() else rows


def split_holdout(num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on, and the fixed tenth that only picks epochs; both sorted, the same for every seed."""
    shuffled = np.random.default_rng(0).permutation(num_rows)
    num_holdout = num_rows // HOLDOUT_SHARE
    return np.sort(shuffled[num_holdout:]), np.sort(shuffled[:num_holdout])


def check_holdout(task: Task, labels: np.ndarray) -> None:
    """Raise UserError if a tenth of the training rows with a label (of all rows if none has one) is no row."""
    num_labeled = int(is_labeled(labels).sum()) if task.has_labels else len(labels)
    if num_labeled < HOLDOUT_SHARE:
        raise UserError(
            f"task {task.name} has {num_labeled} training rows, too few to hold out a tenth; set --select_on dev"
        )


def shard_bounds(num_rows: int) -> np.ndarray:
    """First row of each canonical shard, and the number of rows at the end: int64 [NUM_SHARDS + 1]."""
    return np.arange(NUM_SHARDS + 1) * num_rows // NUM_SHARDS


def epoch_slots(
    num_rows: int, global_batch_size: int, seed: int, epoch: int, bounds: np.ndarray | None = None
) -> np.ndarray:
    """The training row in each slot of each global batch of an epoch: int64 [steps, global_batch_size], -1 for none.

    The slots of a batch are ordered by shard. The last batches of an epoch have empty slots; every row is used once.

    Args:
        bounds: As `shard_bounds`; None: the shards are equal.
    """
    bounds = shard_bounds(num_rows) if bounds is None else bounds
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


def steps_per_epoch(rows: TrainRows, global_batch_size: int) -> int:
    """Global batches in an epoch; the same in every epoch."""
    return len(rows.slots(global_batch_size, seed=0, epoch=0))


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
