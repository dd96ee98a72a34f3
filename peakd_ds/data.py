"""Rows of a task: read, tokenised once per node, and dealt into global batches that do not depend on the ranks.

The rule for batches (world-size invariance): the training rows form 64 canonical shards, contiguous blocks of the row
order. Each epoch each shard is shuffled from (seed, epoch, shard). A global batch takes the same number of rows from
equally spaced shards. So which rows form global batch k depends on the seed and k alone, and a node's rows come from
its own block of shards wherever the number of nodes divides 64. Which of the ranks that hold a row computes it depends
on its length: they get like numbers of rows and of tokens.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from transformers import PreTrainedTokenizerBase

from peakd_ds import dist
from peakd_ds.config import UserError
from peakd_ds.packing import pack
from peakd_ds.tasks import Task

NUM_SHARDS = 64
HOLDOUT_SHARE = 10  # one row in so many picks the epoch and trains nothing
MAX_SCORE = 5.0  # of stsb, the one regression task
HUB_DATASET = "nyu-mll/glue"
ON_ALL_NODES = -1


@dataclass(frozen=True)
class MicroBatch:
    """What one rank feeds to one forward pass.

    A rank that has no row left still gets one, `num_real` = 0, because engines talk to each other in every pass.
    """

    inputs: dict[str, Any]
    """Packed rows: input_ids, token_type_ids, position_ids, int64 [1, T], and where rows lie (packing.py)."""
    labels: torch.Tensor
    """int64 [B], or float32 [B] for regression."""
    rows: torch.Tensor
    """int64 [B], positions in the split."""
    num_real: int
    """The first so many rows count; the others must not touch loss or metrics."""
    answer: Any = None
    """The teacher's logits and matched states of the rows that count, once it was asked (teacher_ahead.py)."""


@dataclass(frozen=True)
class GlobalBatch:
    """One rank's part of a global batch, with the counts of the whole."""

    micro_batches: Iterator[MicroBatch]
    num_items: int
    """Rows in the global batch, over all ranks."""
    num_tokens: int
    """Non-padded tokens in the global batch, over all ranks."""


class TokenRows:
    """Token ids by row number, in arrays of many rows each. Mapped from files, the ranks of a node share one copy."""

    COLUMNS = ("input_ids", "token_type_ids")

    def __init__(self, parts: Iterable[tuple[np.ndarray, dict[str, np.ndarray]]], lengths: np.ndarray):
        """
        Args:
            parts: Numbers of some rows, and the tokens of these rows one after another, in each of the COLUMNS.
            lengths: Token counts of all rows, int64 [N].
        """
        self._lengths = lengths
        self._parts: list[dict[str, np.ndarray]] = []
        self._part_of = np.full(len(lengths), -1)
        self._start = np.zeros(len(lengths), np.int64)
        for number, (rows, columns) in enumerate(parts):
            self._part_of[rows] = number
            self._start[rows] = np.cumsum(lengths[rows]) - lengths[rows]
            self._parts.append(columns)

    def __getitem__(self, rows: np.ndarray, /) -> dict[str, list[np.ndarray]]:
        """The COLUMNS of the given rows: for each row an array of its tokens."""
        assert (self._part_of[rows] >= 0).all(), "these rows are on another node"
        found: dict[str, list[np.ndarray]] = {name: [] for name in self.COLUMNS}
        for row in rows:
            tokens = slice(self._start[row], self._start[row] + self._lengths[row])
            for name, arrays in found.items():
                arrays.append(self._parts[self._part_of[row]][name][tokens])
        return found

    def all_ids(self) -> Iterator[np.ndarray]:
        """Ids of all tokens of the rows that are here, array by array."""
        return (columns["input_ids"] for columns in self._parts)


@dataclass
class Split:
    """A tokenised split. Lengths and labels of all N rows are known on every node; a sharded split's tokens are not."""

    rows: TokenRows
    lengths: np.ndarray
    """Token counts, int64 [N]."""
    labels: torch.Tensor
    """int64 [N], or float32 [N] for regression."""
    node_of: np.ndarray
    """The node that holds a row's tokens, int64 [N]; ON_ALL_NODES where each does."""

    def __len__(self) -> int:
        return len(self.lengths)

    def micro_batch(self, rows: np.ndarray) -> MicroBatch:
        """The given rows, packed and on this rank's device; for no rows, the first row here with num_real = 0."""
        num_real = len(rows)
        if not num_real:
            rows = np.flatnonzero(np.isin(self.node_of, (ON_ALL_NODES, dist.node_rank())))[:1]
        columns = self.rows[rows]
        return MicroBatch(
            inputs=pack(columns["input_ids"], columns["token_type_ids"]),
            labels=dist.to_device(self.labels[rows]),
            rows=torch.from_numpy(rows),
            num_real=num_real,
        )


def load_splits(task: Task, data_dir: str, train: bool = True) -> dict[str, datasets.Dataset]:
    """The splits of `task` as they are on disk or on the hub: train, its eval splits, and test splits where there.

    Args:
        train: Without it the train split is left out, for those who only evaluate.

    Raises:
        UserError: no data found, an empty or damaged file, missing columns, or labels out of range; with the file.
    """
    splits: dict[str, datasets.Dataset] = {}
    wanted = (*(("train",) if train else ()), *task.eval_splits)
    for name in (*wanted, *task.submission_files):
        rows = _read_parquet(task, data_dir, name) if data_dir else _read_hub(task, name, name in wanted)
        if rows is not None:
            _check_columns(task, name, rows)
            splits[name] = rows
        elif name in wanted:
            raise UserError(
                f"no {task.name}/{name}-*.parquet in data folder {data_dir}; give --data_dir (or "
                f"PEAKD_DATA_DIR) a folder with it, or leave both unset to read {HUB_DATASET} from the hub"
            )
    return splits


def fingerprints(splits: dict[str, datasets.Dataset]) -> dict[str, str]:
    """A short hash of each split's rows."""
    return {name: rows._fingerprint for name, rows in splits.items()}


def tokenize(
    task: Task,
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    cache: Path | None = None,
) -> Split:
    """Tokenise once per node (collective), into an Arrow folder of this node's that later starts read again.

    Without a `cache` folder each rank tokenises for itself, in memory.
    """

    def encode_all() -> datasets.Dataset:
        return rows.map(
            encoder_of(task, tokenizer, max_seq_length),
            batched=True,
            remove_columns=[name for name in rows.column_names if name != "label"],
            keep_in_memory=True,
        )

    def encode_on_disk(folder: Path) -> None:
        if dist.local_rank() == 0 and not (folder / "state.json").exists():
            temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
            encode_all().save_to_disk(str(temporary))
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)

    with _quiet_progress_bars():
        if cache is None:
            return _whole_split(task, encode_all())
        state = json.dumps(
            [
                tokenizer_digest(tokenizer),
                max_seq_length,
                task.text_columns,
                rows.num_rows,
                rows._fingerprint,
            ],
            sort_keys=True,
        )
        folder = cache / socket.gethostname() / hashlib.sha256(state.encode()).hexdigest()[:16]
        dist.agree(lambda: encode_on_disk(folder))
        return _whole_split(task, datasets.load_from_disk(str(folder)))


def encoder_of(
    task: Task, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> Callable[[dict[str, list]], dict[str, list]]:
    """The function from text columns of some rows to their columns input_ids, token_type_ids and length."""

    def encode(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(
            *(batch[name] for name in task.text_columns),
            truncation=True,
            max_length=max_seq_length,
            return_token_type_ids=True,
        )
        return {
            "input_ids": encoded["input_ids"],
            "token_type_ids": encoded["token_type_ids"],
            "length": [len(ids) for ids in encoded["input_ids"]],
        }

    return encode


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of the vocabulary and of whether it is for lower-cased text."""
    state = json.dumps([tokenizer.get_vocab(), tokenizer.init_kwargs.get("do_lower_case")], sort_keys=True)
    return hashlib.sha256(state.encode()).hexdigest()[:16]


def label_dtype(task: Task) -> type[np.generic]:
    """What labels are stored as: scores or class numbers."""
    return np.float32 if task.is_regression else np.int64


def split_holdout(num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and the fixed tenth that only picks epochs; both sorted, the same for every seed."""
    shuffled = np.random.default_rng(0).permutation(num_rows)
    num_holdout = num_rows // HOLDOUT_SHARE
    return np.sort(shuffled[num_holdout:]), np.sort(shuffled[:num_holdout])


def check_holdout(task: Task, num_rows: int) -> None:
    """Raise UserError where a tenth of so many training rows is none."""
    if num_rows < HOLDOUT_SHARE:
        raise UserError(
            f"task {task.name} has {num_rows} training rows, too few to hold out a tenth; set --select_on dev"
        )


def shard_bounds(num_rows: int) -> np.ndarray:
    """Where each canonical shard of so many training rows starts, and the last one ends: int64 [NUM_SHARDS + 1]."""
    return np.arange(NUM_SHARDS + 1) * num_rows // NUM_SHARDS


def epoch_slots(num_rows: int, global_batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Which training row fills which slot of which global batch: int64 [steps, global_batch_size], -1 for none.

    Slots of a batch are ordered by shard. The last batches of an epoch have empty slots; no row is left out, none is
    used twice.
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
        pools, num_ranks = [rows[nodes == node] for node in range(dist.num_nodes())], dist.local_world_size()
    pool, number = divmod(dist.rank(), num_ranks)
    mine = pools[pool]
    by_length = mine[np.argsort(-split.lengths[mine], kind="stable")]  # like lengths together: little padding
    num_passes = -(-max(map(len, pools)) // (micro_batch_size * num_ranks))
    for part in np.array_split(by_length, num_passes * num_ranks)[number::num_ranks]:
        yield split.micro_batch(part)


def _whole_split(task: Task, rows: datasets.Dataset) -> Split:
    def parts() -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        first = 0
        for batch in rows.data.to_batches():
            columns = {name: batch.column(name).flatten().to_numpy() for name in TokenRows.COLUMNS}
            yield np.arange(first, first + len(batch)), columns
            first += len(batch)

    lengths = _column(rows, "length")
    return Split(
        TokenRows(parts(), lengths),
        lengths,
        torch.from_numpy(_column(rows, "label").astype(label_dtype(task))),
        np.full(len(rows), ON_ALL_NODES),
    )


def _read_parquet(task: Task, data_dir: str, split: str) -> datasets.Dataset | None:
    files = sorted((Path(data_dir) / task.name).glob(f"{split}-*.parquet"))
    tables = []
    for file in files:
        try:
            tables.append(pyarrow.parquet.read_table(file))
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{file} is not a whole parquet file ({str(error).splitlines()[0]}); get it again"
            ) from error
    if not tables:
        return None
    try:
        table = pyarrow.concat_tables(tables)
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{files[0]} and the files beside it have different columns; get the {split} split of {task.name} again"
        ) from error
    if table.num_rows == 0:
        raise UserError(f"{files[0]} has no rows; get the {split} split of {task.name} again")
    digest = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
    return datasets.Dataset(table, fingerprint=digest[:16])


def _read_hub(task: Task, split: str, wanted: bool) -> datasets.Dataset | None:
    if task.name != task.base or task.base == "movie_reviews":
        raise UserError(
            f"task {task.name} is not on the hub; give --data_dir (or PEAKD_DATA_DIR) the folder that "
            f"holds {task.name}/train-*.parquet"
        )
    try:
        return datasets.load_dataset(HUB_DATASET, task.base, split=split)
    except Exception as error:
        if not wanted:
            return None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"no data for task {task.name}: the hub's {HUB_DATASET} cannot be read ({reason}); go online, "
            f"or give --data_dir (or PEAKD_DATA_DIR) a folder with {task.name}/train-*.parquet"
        ) from error


def _check_columns(task: Task, split: str, rows: datasets.Dataset) -> None:
    missing = [name for name in (*task.text_columns, "label") if name not in rows.column_names]
    if missing:
        raise UserError(
            f"{task.name}/{split} has no column {missing[0]!r} but {rows.column_names}; "
            f"the task needs {[*task.text_columns, 'label']}; mend the data"
        )
    for name in task.text_columns:
        column = rows.data.column(name)
        is_text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
        if not is_text or column.null_count:
            raise UserError(
                f"{task.name}/{split} column {name!r} holds {column.type}, {column.null_count} of them null; it must "
                "be a string in every row; mend the data"
            )
    if split in task.submission_files:
        return  # GLUE hides test labels behind -1
    rule = f"a whole number from 0 to {task.num_labels - 1} ({', '.join(task.label_names)})"
    if task.is_regression:
        rule = f"a number from 0 to {MAX_SCORE:g}"
    try:
        labels = _column(rows, "label").astype(np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{task.name}/{split} has labels of another kind ({error}); each must be {rule}; mend the data"
        ) from error
    if task.is_regression:
        bad = ~((labels >= 0) & (labels <= MAX_SCORE))
    else:
        bad = ~np.isin(labels, np.arange(task.num_labels))
    if bad.any():
        where = int(np.argmax(bad))
        raise UserError(
            f"{task.name}/{split} row {where} has label {labels[where]:g}; it must be {rule}; mend the data"
        )
    names = getattr(rows.features["label"], "names", None)
    if names and tuple(names) != task.label_names:
        raise UserError(
            f"{task.name}/{split} orders its labels {list(names)}, the task {list(task.label_names)}; "
            f"write the file with the task's order"
        )


def _column(rows: datasets.Dataset, name: str) -> np.ndarray:
    return rows.data.column(name).to_numpy()


@contextlib.contextmanager
def _quiet_progress_bars() -> Iterator[None]:
    """Hides datasets' own progress bars, one for each rank."""
    were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_on:
            datasets.enable_progress_bars()
