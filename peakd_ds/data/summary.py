"""What a look at the rows shows before hours are spent: counts of classes, lengths, and rows that stand there twice.

N rows, C classes.
"""

from collections.abc import Iterator, Mapping

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from peakd_ds.data import metrics
from peakd_ds.data.label_arrays import is_labeled
from peakd_ds.data.tasks import Task
from peakd_ds.data.tokens import Split

MAX_CLASSES_SHOWN = 12


def majority_share(task: Task, labels: np.ndarray) -> float | None:
    """The accuracy of always predicting the largest class; None where a row has not one class."""
    largest = metrics.majority_class(task, labels) if task.has_right_and_wrong else None
    return None if largest is None else largest[1]


def of_labels(task: Task, name: str, labels: np.ndarray) -> str:
    """One line on the labels of a split."""
    has_label = is_labeled(labels)
    missing = f", {int((~has_label).sum()):,} rows without a label" if not has_label.all() else ""
    found = labels[has_label]
    if not len(found):
        return f"labels of {name}: none"
    if task.is_regression:
        low, high, mean = found.min(), found.max(), found.mean(dtype=np.float64)
        return f"labels of {name}: scores from {low:g} to {high:g}, mean {mean:.4g}{missing}"
    counts = found.sum(axis=0).astype(int) if task.is_multi_label else np.bincount(found, minlength=task.num_labels)
    order = np.argsort(-counts, kind="stable")
    parts = [f"{task.label_names[number]} {counts[number]:,}" for number in order[:MAX_CLASSES_SHOWN]]
    if task.num_labels > MAX_CLASSES_SHOWN:
        parts.append(f"and {task.num_labels - MAX_CLASSES_SHOWN} more, the smallest with {counts.min():,}")
    share = majority_share(task, labels)
    majority = "" if share is None else f" (majority {share:.1%})"
    return f"labels of {name}: {', '.join(parts)}{majority}{missing}"


def of_lengths(split: Split, max_seq_length: int, tokenizer: PreTrainedTokenizerBase, reader: str = "") -> str:
    """One line on the tokens of the rows that this node holds.

    Args:
        reader: Whose tokens they are, student or teacher; "" for both.
    """
    median, most = np.quantile(split.lengths, [0.5, 0.95], method="higher")
    at_limit = float((split.lengths >= max_seq_length).mean())
    num_tokens = num_unknown = 0
    for ids in split.rows.all_ids():
        num_tokens += len(ids)
        num_unknown += int((ids == tokenizer.unk_token_id).sum()) if tokenizer.unk_token_id is not None else 0
    whose = f" for the {reader}" if reader else ""
    return (
        f"tokens of a row{whose}: median {median}, 95 % up to {most}, longest {split.lengths.max()}; {at_limit:.1%} of "
        f"rows reach --max_seq_length {max_seq_length}, where they are cut; {num_unknown / max(num_tokens, 1):.2%} of "
        "tokens unknown"
    )


def of_repeats(task: Task, splits: Mapping[str, datasets.Dataset]) -> list[str]:
    """A line for rows of train whose texts stand there before, and for those that stand in another split."""
    if "train" not in splits:  # of sharded rows, rank 0 alone reads them
        return []
    train = list(_texts(task, splits["train"]))
    distinct = set(train)
    lines = []
    if len(distinct) < len(train):
        lines.append(f"{len(train) - len(distinct):,} rows of train repeat the text of another")
    for name in task.read_splits:
        num_shared = sum(text in distinct for text in _texts(task, splits[name]))
        if num_shared:
            lines.append(f"warning: {num_shared:,} of {len(splits[name]):,} rows of {name} stand in train too")
    return lines


def _texts(task: Task, rows: datasets.Dataset) -> Iterator[tuple[str, ...]]:
    """The texts of each row."""
    return zip(*(rows.data.column(name).to_pylist() for name in task.text_columns), strict=True)
