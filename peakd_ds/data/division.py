"""Which rows are trained on, which pick epochs, and in what order: it depends on the data and the seed alone.

The training rows form 64 canonical shards, contiguous blocks of the row order. In each epoch each shard is shuffled
from (seed, epoch, shard), and a global batch takes the same number of rows from equally spaced shards. So the seed
and k alone say which rows form global batch k, and a node's rows come from its own block of shards if the number of
nodes divides 64.

N rows of the train split, C classes.
"""

from dataclasses import dataclass
from math import gcd

import numpy as np

from peakd_ds.config.data import DataSettings
from peakd_ds.data.label_arrays import is_labeled
from peakd_ds.data.tasks import Task
from peakd_ds.errors import UserError

NUM_SHARDS = 64
HOLDOUT_SHARE = 10
"""One row in ten picks the epoch and is not trained on."""


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
    _, first, groups, counts = np.unique(
        labels[rows], axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    groups = groups.reshape(-1)
    is_scores = labels.ndim == 1 and np.issubdtype(labels.dtype, np.floating)
    if not is_scores:
        rows, groups = rows[counts[groups] > 1], groups[counts[groups] > 1]  # a class of one row is trained on
        groups = np.argsort(np.argsort(first))[groups]  # not by number: teachers number the classes differently
    by_label = rows[np.argsort(groups, kind="stable")]
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
