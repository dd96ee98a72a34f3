"""Metrics of a task over the rows of a split, and what its labels are like. N rows, C classes.

A row without a label is one of -1 (classes), -1 in every column (multi_label) or NaN (scores). Own data may have such
rows, and its metrics are over the others; in GLUE's tasks they are an error.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    matthews_corrcoef,
    precision_recall_fscore_support,
    root_mean_squared_error,
)

from peakd_ds.data.tasks import AGREEMENT, Task

MAX_CLASSES_IN_TABLE = 50
"""Most classes that a table with a row for each of them has."""
_LOWER_IS_BETTER = frozenset(["rmse", "loss"])

Floats = NDArray[np.float64]


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of a metric is the better one."""
    return metric not in _LOWER_IS_BETTER


def in_words(metric: str) -> str:
    """What a metric of own data is, in plain words."""
    return _IN_WORDS[metric] + ("" if higher_is_better(metric) else "; lower is better")


def compute_metrics(task: Task, logits: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """The metrics of `task` over the labelled rows of a split, as fractions (accuracy 0.5, not 50).

    The class with the largest logit is predicted; of multi_label tasks, each class whose logit is above 0. A
    correlation that does not exist (constant predictions or labels, one sample) is 0.0, without a warning.

    Args:
        task: says how many columns the logits have and which metrics apply.
        logits: [N, C] scores of the N samples; C is 1 for scores. A NumPy array or a tensor of any dtype.
        labels: [N] class ids or scores, or [N, C] of 0 and 1 for multi_label.

    Returns:
        One value per name in `task.metrics`, in that order; empty if no row of own data has a label.

    Raises:
        ValueError: N is 0, the shapes do not fit, a score or prediction is NaN, or a label is out of range.
    """
    labels_, predictions = _labelled(task, logits, labels)
    if not len(labels_):
        return {}
    if task.official_ids:  # F1 is of the benchmark's class 1
        official = np.array(task.official_ids)
        labels_, predictions = official[labels_.astype(int)], official[predictions]
    return {metric: _METRICS[metric](labels_, predictions) for metric in task.metrics}


def per_class(task: Task, logits: ArrayLike, labels: ArrayLike) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 (0.0 where they do not exist) and support of each class, by its name.

    Support is the number of labelled rows of the class.

    Args:
        logits: As for `compute_metrics`; the same rows count, and the same errors are raised.

    Returns:
        Every class in the task's order; empty for scores, or if no row has a label.
    """
    labels_, predictions = _labelled(task, logits, labels)
    if task.is_regression or not len(labels_):
        return {}
    columns = precision_recall_fscore_support(
        labels_, predictions, labels=np.arange(task.num_labels), average=None, zero_division=0
    )
    names = ("precision", "recall", "f1")
    return {
        label: {**dict(zip(names, map(float, row[:3]), strict=True)), "support": int(row[3])}
        for label, row in zip(task.label_names, zip(*columns, strict=True), strict=True)
    }


def majority_class(task: Task, labels: ArrayLike) -> tuple[str, float] | None:
    """The class that most labelled rows have, the first of several, and the share of these rows that have it.

    Always predicting it gives that accuracy. None for scores, or if no row has a label.
    """
    labels_ = _as_float64(labels)
    labels_ = labels_[_has_label(task, labels_)]
    if task.is_regression or not len(labels_):
        return None
    classes = np.arange(task.num_labels)
    counts_C = labels_.sum(axis=0) if task.is_multi_label else (labels_[:, None] == classes).sum(axis=0)
    largest = int(counts_C.argmax())
    return task.label_names[largest], float(counts_C[largest] / len(labels_))


def of_majority(task: Task, labels: ArrayLike) -> dict[str, float]:
    """The metrics of always predicting the largest class; empty for scores, or if no row has a label."""
    largest = majority_class(task, labels)
    if largest is None:
        return {}
    row = np.where(np.array(task.label_names) == largest[0], 1.0, -1.0)
    return compute_metrics(task, np.tile(row, (len(_as_float64(labels)), 1)), labels)


def class_weights(labels: ArrayLike, num_classes: int) -> torch.Tensor:
    """Weights that make each class count alike in a loss: n / (C * n_c) for n_c of the n labelled rows.

    Args:
        labels: [N] class ids, -1 for rows without a label.

    Returns:
        float32 [C], on the CPU; 0 for a class without rows.

    Raises:
        ValueError: the labels are not [N] of class ids below `num_classes`.
    """
    labels_N = _as_float64(labels)
    if labels_N.ndim != 1 or not np.isin(labels_N, np.arange(-1, num_classes)).all():
        raise ValueError(f"labels {list(labels_N.shape)} are not [N] of class ids from 0 to {num_classes - 1}, or -1")
    labelled_N = labels_N[labels_N >= 0].astype(np.int64)
    counts_C = np.bincount(labelled_N, minlength=num_classes)
    weights_C = np.divide(len(labelled_N), num_classes * counts_C, out=np.zeros(num_classes), where=counts_C > 0)
    return torch.from_numpy(weights_C).float()


# -- Rows that count ---------------------------------------------------------------------------------------------------


def _labelled(task: Task, logits: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[Any]]:
    """(labels, predictions) of the rows that have a label, [N] or for multi_label [N, C] of 0 and 1."""
    logits_NC, labels_ = _as_float64(logits), _as_float64(labels)
    _check_shapes(task, logits_NC, labels_)
    rows = _has_label(task, labels_) if task.is_own else np.ones(len(labels_), bool)
    logits_NC, labels_ = logits_NC[rows], labels_[rows]
    _check_labels(task, labels_)
    if task.is_regression:
        return labels_, logits_NC[:, 0]
    if task.is_multi_label:
        return labels_.astype(np.int64), (logits_NC > 0).astype(np.int64)
    return labels_, logits_NC.argmax(axis=1)


def _has_label(task: Task, labels: Floats) -> NDArray[np.bool_]:
    """bool [N]."""
    if task.is_regression:
        return ~np.isnan(labels)
    return (labels != -1).any(axis=1) if task.is_multi_label else labels != -1


def _as_float64(values: ArrayLike) -> Floats:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()  # NumPy has no bfloat16
    return np.asarray(values, dtype=np.float64)


def _check_shapes(task: Task, logits_NC: Floats, labels: Floats) -> None:
    """Raise ValueError for no row, shapes that do not fit the task, or logits of a model that has diverged."""
    shapes = f"logits {list(logits_NC.shape)}, labels {list(labels.shape)}"
    wanted = logits_NC.shape[: 2 if task.is_multi_label else 1]
    if logits_NC.ndim != 2 or logits_NC.shape[1] != task.num_labels or labels.shape != wanted:
        expected = f"[N, {task.num_labels}]" if task.is_multi_label else "[N]"
        raise ValueError(
            f"{shapes} do not fit task {task.name}: pass logits [N, {task.num_labels}] and labels {expected}"
        )
    if len(labels) == 0:
        raise ValueError(f"{shapes}: a metric of {task.name} needs a sample; check the evaluation split")
    if np.isnan(logits_NC).any() or (task.is_regression and not np.isfinite(logits_NC).all()):
        raise ValueError(
            f"logits of {task.name} hold NaN or infinite predictions: the model has diverged; "
            f"lower the learning rate or use bf16 or fp32"
        )


def _check_labels(task: Task, labels: Floats) -> None:
    """Raise ValueError for a label that the task does not have."""
    if not np.isfinite(labels).all():
        raise ValueError(f"labels of {task.name} hold NaN or infinity; check the data files")
    if task.is_regression:
        return
    wrong = labels[~np.isin(labels, np.arange(2 if task.is_multi_label else task.num_labels))]
    if len(wrong) and task.is_multi_label:
        raise ValueError(
            f"label {wrong[0]:g} of {task.name} is neither 0 nor 1, and its row has others; check the data files"
        )
    if len(wrong) and task.is_own:
        raise ValueError(
            f"label {wrong[0]:g} of {task.name} is neither a class id from 0 to {task.num_labels - 1} nor -1; check "
            "the data files"
        )
    if len(wrong):
        raise ValueError(
            f"label {wrong[0]:g} of {task.name} is not a class id from 0 to {task.num_labels - 1}; "
            f"GLUE test splits are unlabelled (-1 in every row): evaluate on {task.eval_splits[0]}"
        )


# -- Metrics -----------------------------------------------------------------------------------------------------------


def _correlation(statistic: Callable[..., Any]) -> Callable[..., float]:
    """`statistic(labels, predictions)`, with 0.0 and no warning where it does not exist."""

    def correlation(labels_N: Floats, predictions_N: Floats) -> float:
        if len(labels_N) < 2:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant input warns, then gives NaN or 0
            result = statistic(labels_N, predictions_N)
        value = float(getattr(result, "statistic", result))  # SciPy wraps its value, scikit-learn does not
        return value if np.isfinite(value) else 0.0

    return correlation


def _f1(average: str) -> Callable[..., float]:
    """scikit-learn's F1. macro and weighted average over the classes that occur in labels or predictions, if one row
    has one class, else over all."""

    def f1(labels: Floats, predictions: NDArray[Any]) -> float:
        return float(f1_score(labels, predictions, average=average, zero_division=0))

    return f1


_METRICS: dict[str, Callable[..., float]] = {
    "accuracy": lambda labels_N, predictions_N: float(accuracy_score(labels_N, predictions_N)),
    "exact_match": lambda labels_NC, predictions_NC: float(accuracy_score(labels_NC, predictions_NC)),
    "f1": _f1("binary"),
    "micro_f1": _f1("micro"),
    "macro_f1": _f1("macro"),
    "weighted_f1": _f1("weighted"),
    "matthews_correlation": _correlation(matthews_corrcoef),
    "pearson": _correlation(pearsonr),
    "spearmanr": _correlation(spearmanr),
    "rmse": lambda labels_N, predictions_N: float(root_mean_squared_error(labels_N, predictions_N)),
}
_IN_WORDS = {
    "accuracy": "the share of rows with the right class",
    "exact_match": "the share of rows with all classes right",
    "micro_f1": "F1 over the decisions on all rows and classes together",
    "macro_f1": "the mean of the classes' F1",
    "weighted_f1": "the mean of the classes' F1, weighted by their rows",
    "pearson": "Pearson's correlation of predicted and true scores",
    "spearmanr": "Spearman's rank correlation of predicted and true scores",
    "rmse": "the root mean square error of the predicted scores",
    AGREEMENT: "the share of predictions that are the teacher's, or the scores' correlation; no row has a label",
}
