"""Labels as arrays and tensors: which rows have one, and what each weighs in the hard loss.

A row without a label has -1 (classes), NaN (scores) or -1 for every class (several labels). N rows, C classes.
"""

import numpy as np
import pyarrow
import torch

from peakd_ds.data import metrics
from peakd_ds.data.arrow_types import is_list

UNLABELED = -1
"""Class id of a row without a label."""


def label_array(column: pyarrow.ChunkedArray) -> np.ndarray:
    """A column of labels as a NumPy array: [N], or [N, C] of 0 and 1."""
    if is_list(column.type):
        values = column.combine_chunks()
        return values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), -1)
    return column.to_numpy()


def is_labeled(labels: np.ndarray) -> np.ndarray:
    """Which rows have a label, bool [N], for labels [N] or [N, C]."""
    if labels.ndim == 2:
        return labels[:, 0] >= 0
    return ~np.isnan(labels) if np.issubdtype(labels.dtype, np.floating) else labels >= 0


def label_weights(labels: np.ndarray, rows: np.ndarray, num_classes: int, class_weights: str) -> torch.Tensor | None:
    """Weight of each row's hard loss, float32 [N]; None if all `rows` have a label and all classes count alike.

    A row without a label weighs 0. "balanced" weighs classes as `metrics.class_weights` of `rows`.

    Args:
        labels: [N] or [N, C] of a split.
        rows: Those that are trained on.
    """
    has_label = is_labeled(labels)
    if class_weights == "balanced":
        weights = np.where(has_label, metrics.class_weights(labels[rows], num_classes)[np.maximum(labels, 0)], 0)
    elif has_label[rows].all():
        return None
    else:
        weights = has_label
    return torch.from_numpy(weights.astype(np.float32))


def without_missing(labels: torch.Tensor) -> torch.Tensor:
    """Labels with 0 where there is none, for a loss that gives these rows the weight 0."""
    if labels.ndim == 1 and labels.is_floating_point():
        return labels.nan_to_num(nan=0.0)
    return labels.clamp(min=0)
