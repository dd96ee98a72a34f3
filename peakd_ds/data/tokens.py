"""Tokenised rows: a split, the packed micro-batches made of it, and its Arrow files, one set for each node."""

import contextlib
import hashlib
import json
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peakd_ds.data.label_arrays import label_array, without_missing
from peakd_ds.data.tasks import Task
from peakd_ds.files import checked_folder, damage_of
from peakd_ds.packed.packing import pack
from peakd_ds.ranks import dist, launch
from peakd_ds.ranks.device import device, to_device

ON_ALL_NODES = -1
"""In `Split.node_of`: every node holds the row's tokens."""

Encode = Callable[[dict[str, list]], dict[str, list]]
"""A batch of text columns -> input_ids, token_type_ids and length."""

TeacherOutputs = tuple[Tensor | None, list[Tensor]]
"""The teacher's logits [B, C], None where the loss does not read them, and hidden states of the matched layers, [B, H]
for each pair (`--hidden_loss cls`) or [1, T, H] (`tokens`), without filler rows."""


@dataclass(frozen=True)
class MicroBatch:
    """What one rank feeds to one forward pass.

    A rank without rows gets one row as filler, `num_real` = 0, because engines communicate in every forward pass.
    """

    inputs: dict[str, Any]
    """Packed rows: input_ids, token_type_ids, position_ids, int64 [1, T], and their `Packing` (packed/packing.py)."""
    labels: torch.Tensor
    """int64 [B], or float32 [B] for regression, float32 [B, C] of 0 and 1 for several labels."""
    rows: torch.Tensor
    """int64 [B], positions in the split."""
    num_real: int
    """Rows that are not filler. They come first; filler must not touch loss or metrics."""
    label_weights: torch.Tensor | None = None
    """Weight of each row's hard loss, float32 [B], 0 without a label; None: all rows have a label and count alike."""
    teacher_outputs: TeacherOutputs | None = None
    """Added by `teacher.online.with_teacher_outputs`."""

    @property
    def num_positions(self) -> int:
        """Token positions that the forward pass computes."""
        return self.inputs["input_ids"].numel()


class TokenRows:
    """Token ids by row number, held in arrays of many rows. Arrays mapped from files are shared by a node's ranks."""

    COLUMNS = ("input_ids", "token_type_ids")

    def __init__(self, parts: Iterable[tuple[np.ndarray, dict[str, np.ndarray]]], lengths: np.ndarray):
        """
        Args:
            parts: Pairs of row numbers and, for each of the COLUMNS, the concatenated tokens of these rows.
            lengths: Token counts of all rows, int64 [N].
        """
        self.lengths = lengths
        self._parts: list[dict[str, np.ndarray]] = []
        self._part_of = np.full(len(lengths), -1)
        self._start = np.zeros(len(lengths), np.int64)
        for number, (rows, columns) in enumerate(parts):
            self._part_of[rows] = number
            self._start[rows] = np.cumsum(lengths[rows]) - lengths[rows]
            self._parts.append(columns)

    def __getitem__(self, rows: np.ndarray, /) -> dict[str, list[np.ndarray]]:
        """For each of the COLUMNS, an array of tokens for each given row."""
        assert (self._part_of[rows] >= 0).all(), "these rows are on another node"
        found: dict[str, list[np.ndarray]] = {name: [] for name in self.COLUMNS}
        for row in rows:
            tokens = slice(self._start[row], self._start[row] + self.lengths[row])
            for name, arrays in found.items():
                arrays.append(self._parts[self._part_of[row]][name][tokens])
        return found

    def all_ids(self) -> Iterator[np.ndarray]:
        """Token ids of all rows that this node holds, array by array."""
        return (columns["input_ids"] for columns in self._parts)


@dataclass
class Split:
    """A tokenised split. Every node has the lengths and labels of all N rows; a sharded split's tokens are spread.

    The tokens are the student's. `for_teacher` gives the same rows as the teacher's tokenizer has them.
    """

    rows: TokenRows
    lengths: np.ndarray
    """Token counts, int64 [N]."""
    labels: torch.Tensor
    """int64 [N], or float32 [N] for regression, float32 [N, C] for several labels. labels.py says what is no label."""
    node_of: np.ndarray
    """The node that holds each row's tokens, int64 [N], or ON_ALL_NODES."""
    label_weights: torch.Tensor | None = None
    """Weight of each row's hard loss, float32 [N], 0 without a label; None: all rows have a label and count alike."""
    teacher_rows: TokenRows | None = None
    """Tokens by the teacher's tokenizer, on the same nodes; None: teacher and student share one tokenizer."""

    def __len__(self) -> int:
        return len(self.lengths)

    def for_teacher(self) -> "Split":
        """The split with the teacher's tokens: the same row numbers, labels and weights."""
        if self.teacher_rows is None:
            return self
        return replace(self, rows=self.teacher_rows, lengths=self.teacher_rows.lengths, teacher_rows=None)

    def micro_batch_for_teacher(self, micro: MicroBatch) -> MicroBatch:
        """A micro-batch of this split, filler included, with the teacher's tokens."""
        if self.teacher_rows is None:
            return micro
        return replace(micro, inputs=self.for_teacher()._inputs(micro.rows.numpy()))

    def micro_batch(self, rows: np.ndarray) -> MicroBatch:
        """The given rows, packed and on this rank's device. For no rows: this node's first row as filler."""
        num_real = len(rows)
        if not num_real:
            rows = np.flatnonzero(np.isin(self.node_of, (ON_ALL_NODES, dist.node_rank())))[:1]
        labels, weights = self.labels[rows], self.label_weights
        return MicroBatch(
            inputs=self._inputs(rows),
            labels=to_device(labels if weights is None else without_missing(labels)),
            rows=torch.from_numpy(rows),
            num_real=num_real,
            label_weights=None if weights is None else to_device(weights[rows]),
        )

    def _inputs(self, rows: np.ndarray) -> dict[str, Any]:
        """The given rows, packed and on this rank's device."""
        columns = self.rows[rows]
        return pack(columns["input_ids"], columns["token_type_ids"])


def tokenize_for_both(
    task: Task,
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    cache: Path | None = None,
) -> Split:
    """Tokenise a split for the student and, if its tokenizer is another one, for the teacher; see `tokenize`."""
    split = tokenize(task, rows, tokenizer, max_seq_length, cache)
    if teacher_tokenizer is not tokenizer:
        split.teacher_rows = tokenize(task, rows, teacher_tokenizer, max_seq_length, cache).rows
    return split


def tokenize(
    task: Task,
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    cache: Path | None = None,
) -> Split:
    """Tokenise a split (collective), once per node, into an Arrow folder with checksums that later starts read.

    A damaged folder, or one of a version without checksums, is made again.

    Args:
        cache: Holds a folder for each node. None: each rank tokenises in memory.
    """

    def encode_all() -> datasets.Dataset:
        return rows.map(
            encoder_of(task, tokenizer, max_seq_length),
            batched=True,
            remove_columns=[name for name in rows.column_names if name != "label"],
            keep_in_memory=True,
        )

    def encode_on_disk(folder: Path) -> None:
        if launch.local_rank() == 0 and damage_of(folder) is not None:
            with checked_folder(folder) as new:
                encode_all().save_to_disk(str(new))

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


def encoder_of(task: Task, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Encode:
    """A function that maps a batch of text columns to input_ids, token_type_ids and length."""

    def encode(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(
            *(batch[name] for name in task.text_columns),
            truncation=True,
            max_length=max_seq_length,
            return_token_type_ids=True,
        )
        ids, types = encoded["input_ids"], encoded["token_type_ids"]
        if not all(ids):  # a tokenizer without special tokens gives none for an empty text
            types = [row or [0] for row in types]
            ids = [row or [tokenizer.pad_token_id] for row in ids]
        return {"input_ids": ids, "token_type_ids": types, "length": [len(row) for row in ids]}

    return encode


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of everything that decides the token ids of a text: vocabulary, normalisation, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    steps = {} if backend is None else json.loads(backend.to_str())
    steps.pop("truncation", None), steps.pop("padding", None)  # set anew by each call
    state = [steps, tokenizer.get_vocab(), tokenizer.special_tokens_map, tokenizer.truncation_side]
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()[:16]


def earlier_tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """The hash that shards and teacher caches of earlier versions have: vocabulary and lower case alone."""
    state = json.dumps([tokenizer.get_vocab(), tokenizer.init_kwargs.get("do_lower_case")], sort_keys=True)
    return hashlib.sha256(state.encode()).hexdigest()[:16]


def label_dtype(task: Task) -> type[np.generic]:
    """Storage type of labels: float32 scores or switches, or int64 class ids."""
    return np.float32 if task.is_regression or task.is_multi_label else np.int64


def _whole_split(task: Task, rows: datasets.Dataset) -> Split:
    def parts() -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        first = 0
        for batch in rows.data.to_batches():
            columns = {name: batch.column(name).flatten().to_numpy() for name in TokenRows.COLUMNS}
            yield np.arange(first, first + len(batch)), columns
            first += len(batch)

    lengths = rows.data.column("length").to_numpy()
    return Split(
        TokenRows(parts(), lengths),
        lengths,
        torch.from_numpy(label_array(rows.data.column("label")).astype(label_dtype(task))),
        np.full(len(rows), ON_ALL_NODES),
    )


@contextlib.contextmanager
def _quiet_progress_bars() -> Iterator[None]:
    """Hide the progress bars of `datasets`, of which each rank would print one."""
    were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_on:
            datasets.enable_progress_bars()


def used_tokens(splits: Iterable[Split], vocab_size: int) -> Tensor:
    """Ids of the tokens that occur in a row on any node, int64 [K], ascending (collective)."""
    is_used = torch.zeros(vocab_size, dtype=torch.int32)
    for split in splits:
        for ids in split.rows.all_ids():
            is_used.numpy()[ids] = 1
    return dist.all_reduce(is_used.to(device()), torch.distributed.ReduceOp.MAX).cpu().nonzero().flatten()
