"""Evaluation that counts every row exactly once, on any number of ranks. N rows, B of a batch, C classes."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from peakd_ds.data.batches import eval_batches
from peakd_ds.data.metrics import compute_metrics
from peakd_ds.data.tasks import Task
from peakd_ds.data.tokens import Split
from peakd_ds.ranks import dist
from peakd_ds.ranks.device import device

Forward = Callable[[dict[str, Any]], torch.Tensor]
"""Packed inputs of a micro-batch -> logits [B, C]."""


@torch.no_grad()
def predict(
    forward: Forward, split: Split, rows: np.ndarray, micro_batch_size: int, num_columns: int
) -> tuple[torch.Tensor, float]:
    """Logits of the given rows (collective), in their order, and the seconds it took.

    Every rank makes the same number of forward passes, as sharded engines need, and gets the logits of all rows.

    Returns:
        float32 [N, num_columns] on the CPU; wall-clock seconds.
    """
    start = time.perf_counter()
    place = torch.full((len(split),), -1, dtype=torch.int64)
    place[torch.from_numpy(rows)] = torch.arange(len(rows))
    logits = torch.zeros(len(rows), num_columns, device=device())
    for batch in eval_batches(split, rows, micro_batch_size):
        logits_BC = forward(batch.inputs)[: batch.num_real].float()
        logits[place[batch.rows[: batch.num_real]].to(logits.device)] = logits_BC
    logits = dist.all_reduce(logits).cpu()  # each row is zero on all ranks but one
    return logits, time.perf_counter() - start


def evaluate(
    forward: Forward, task: Task, dev: dict[str, Split], micro_batch_size: int
) -> tuple[dict[str, float], dict[str, torch.Tensor], float]:
    """The task's metrics on every eval split (collective).

    Returns:
        Metrics, with a suffix for a second split (mnli: accuracy and accuracy_mismatched); logits [N, C] by split;
        samples per second over all ranks.
    """
    logits: dict[str, torch.Tensor] = {}
    num_samples, seconds = 0, 0.0
    for split in dev.values():  # first passes are slow; they would make the speed of a small split say little
        predict(forward, split, np.arange(min(len(split), micro_batch_size)), micro_batch_size, task.num_labels)
    for name, split in dev.items():
        rows = np.arange(len(split))
        logits[name], spent = predict(forward, split, rows, micro_batch_size, task.num_labels)
        num_samples, seconds = num_samples + len(split), seconds + spent
    return metrics_of(task, dev, logits), logits, num_samples / seconds


def metrics_of(task: Task, dev: dict[str, Split], logits: dict[str, torch.Tensor]) -> dict[str, float]:
    """Metrics of logits [N, C] on every eval split, with a suffix for a second split (accuracy_mismatched)."""
    metrics: dict[str, float] = {}
    for name, split in dev.items():
        suffix = "" if name == task.eval_splits[0] else "_" + name.removeprefix("validation_")
        metrics |= {key + suffix: value for key, value in compute_metrics(task, logits[name], split.labels).items()}
    return metrics


def agreement(task: Task, logits: torch.Tensor, teacher_logits: torch.Tensor) -> float:
    """Share of rows with the teacher's class; of multi_label tasks, of equal decisions over rows and classes.

    For scores, Pearson correlation with the teacher's.

    Args:
        logits: [N, C] of the student.
        teacher_logits: [N, C].
    """
    if task.is_regression:
        if len(logits) < 2:
            return 0.0
        return float(np.nan_to_num(torch.corrcoef(torch.stack([logits[:, 0], teacher_logits[:, 0]]))[0, 1].item()))
    if task.is_multi_label:
        return ((logits > 0) == (teacher_logits > 0)).float().mean().item()
    return (logits.argmax(-1) == teacher_logits.argmax(-1)).float().mean().item()
