"""The tasks: columns, labels, splits, metrics and PTP thresholds of each. N rows, C classes.

Columns, label names and label order are those of the `nyu-mll/glue` dataset on the Hugging Face Hub. A teacher that was
trained with another label order, which is common for MNLI, looks like a broken teacher.
"""

import difflib
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from peakd_ds.errors import UserError


@dataclass(frozen=True)
class Task:
    """One sentence or sentence-pair task."""

    name: str
    """Name as the user wrote it, also the name of its data folder: "qnli", "qnli_10k"."""
    base: str
    """The task that the fields below are of: "qnli" for "qnli_10k"; "" for the user's own rows."""
    text_columns: tuple[str, ...]
    """One or two text columns, in the order that the tokenizer gets them."""
    label_names: tuple[str, ...]
    """Name of class i at position i; empty for regression."""
    metrics: tuple[str, ...]
    """Keys of what `compute_metrics` returns."""
    primary_metric: str
    """The one of `metrics` that picks the best epoch; higher is better."""
    eval_splits: tuple[str, ...] = ("validation",)
    ptp_thresholds: tuple[float, float] | None = None
    """(t_correct, t_wrong) of Pea-KD's published code; None if it has none for the task."""
    submission_files: Mapping[str, str] = field(default_factory=dict, hash=False)
    """File name that the GLUE server expects for each test split; empty outside GLUE."""
    is_multi_label: bool = False
    """Whether a row may have several of the classes, or none."""
    selection_split: str = ""
    """The split that picks the best epoch, if it is neither of train nor reported."""
    has_labels: bool = True
    """Whether any row has a label."""
    official_ids: tuple[int, ...] = ()
    """The benchmark's number of each class, where the teacher orders them otherwise; empty: they are the same."""

    @property
    def is_regression(self) -> bool:
        return not self.label_names

    @property
    def is_own(self) -> bool:
        """Whether the rows are the user's own."""
        return not self.base

    @property
    def read_splits(self) -> tuple[str, ...]:
        """Splits beside train that a run reads."""
        return (self.selection_split, *self.eval_splits) if self.selection_split else self.eval_splits

    @property
    def dev_split(self) -> str:
        """The split that picks epochs where no row of train is held out."""
        return self.selection_split or self.eval_splits[0]

    @property
    def has_right_and_wrong(self) -> bool:
        """Whether a prediction of a row is right or wrong, which PTP needs."""
        return self.has_labels and not self.is_regression and not self.is_multi_label

    @property
    def num_labels(self) -> int:
        """Columns of the logits: the number of classes, 1 for regression."""
        return len(self.label_names) or 1


def _task(
    name: str,
    text_columns: tuple[str, ...],
    label_names: tuple[str, ...],
    submission: str | None,
    metrics: tuple[str, ...] = ("accuracy",),
    primary_metric: str = "accuracy",
    ptp_thresholds: tuple[float, float] | None = None,
) -> Task:
    """A task with one validation and one test split; `submission` is its GLUE file name without ".tsv"."""
    return Task(
        name=name,
        base=name,
        text_columns=text_columns,
        label_names=label_names,
        metrics=metrics,
        primary_metric=primary_metric,
        ptp_thresholds=ptp_thresholds,
        submission_files={} if submission is None else {"test": f"{submission}.tsv"},
    )


_SENTENCE = ("sentence",)
_SENTENCE_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_ACCURACY_F1 = ("accuracy", "f1")

# Metrics: the GLUE benchmark's own (Wang et al. 2018, table 1). Thresholds: Pea-KD's published code.
_ALL_TASKS = (
    _task(
        "cola",
        _SENTENCE,
        ("unacceptable", "acceptable"),
        "CoLA",
        ("matthews_correlation",),
        "matthews_correlation",
        (0.95, 0.7),
    ),
    _task("sst2", _SENTENCE, ("negative", "positive"), "SST-2", ptp_thresholds=(0.98, 0.8)),
    _task(
        "mrpc",
        _SENTENCE_PAIR,
        ("not_equivalent", "equivalent"),
        "MRPC",
        _ACCURACY_F1,
        ptp_thresholds=(0.95, 0.75),
    ),
    _task("stsb", _SENTENCE_PAIR, (), "STS-B", ("pearson", "spearmanr"), "spearmanr"),
    _task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), "QQP", _ACCURACY_F1),
    Task(
        name="mnli",
        base="mnli",
        text_columns=("premise", "hypothesis"),
        label_names=("entailment", "neutral", "contradiction"),
        metrics=("accuracy",),
        primary_metric="accuracy",
        eval_splits=("validation_matched", "validation_mismatched"),
        submission_files={"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
    ),
    _task("qnli", ("question", "sentence"), _ENTAILMENT, "QNLI", ptp_thresholds=(0.98, 0.7)),
    _task("rte", _SENTENCE_PAIR, _ENTAILMENT, "RTE", ptp_thresholds=(0.8, 0.6)),
    _task("wnli", _SENTENCE_PAIR, ("not_entailment", "entailment"), "WNLI"),
    _task("movie_reviews", _SENTENCE, ("negative", "positive"), None),
)

TASKS: dict[str, Task] = {task.name: task for task in _ALL_TASKS}


def get_task(name: str) -> Task:
    """Task of that name; "<task>_<suffix>" ("qnli_10k") is the task read from a data folder of its own.

    A suffixed folder usually holds part of the official data, so the suffix stays in `Task.name`: its figures
    are never reported as those of the whole task, and the plain name never falls back to it.

    Raises:
        ValueError: no task has that name, and none is the part of it before an underscore.
    """
    base = next((base for base in TASKS if re.fullmatch(rf"{base}(_[A-Za-z0-9-]+)*", name)), None)
    if base is not None:
        return replace(TASKS[base], name=name)
    spelling = name.lower().replace("-", "")
    closest = difflib.get_close_matches(spelling, TASKS, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"unknown task {name!r}; use one of {', '.join(TASKS)}, or one of these with a suffix that names its "
        f"data folder, such as qnli_10k (closest: {closest})"
    )


METRICS = {
    "classes": ("accuracy", "macro_f1", "weighted_f1"),
    "multi_label": ("micro_f1", "macro_f1", "exact_match"),
    "scores": ("spearmanr", "pearson", "rmse"),
}
"""Scores of own rows by kind; the first picks the best epoch unless `--metric` names another."""


def own_task(
    name: str,
    kind: str,
    text_columns: tuple[str, ...],
    label_names: tuple[str, ...],
    metric: str,
    eval_splits: tuple[str, ...],
    selection_split: str,
    has_labels: bool,
) -> Task:
    """The task of the user's own rows.

    Raises:
        UserError: the metric is not one of this kind of task.
    """
    metrics = METRICS[kind] if has_labels else ()
    if metric and metric not in metrics:
        choices = f"take {', '.join(metrics)}" if metrics else "without labels there is none: leave it out"
        raise UserError(f"--metric {metric} is no score of rows whose labels are {kind.replace('_', ' ')}; {choices}")
    return Task(
        name=name,
        base="",
        text_columns=text_columns,
        label_names=label_names,
        metrics=metrics,
        primary_metric=metric or (metrics[0] if metrics else "agreement"),
        eval_splits=eval_splits,
        is_multi_label=kind == "multi_label",
        selection_split=selection_split,
        has_labels=has_labels,
    )


def compute_metrics(task: Task, logits: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """GLUE's metrics of `task` over a whole split, as fractions (accuracy 0.5, not 50).

    A class is predicted by the largest logit. A correlation that does not exist (constant predictions or
    labels, one sample) is 0.0, without a warning.

    Args:
        task: says how many columns the logits have and which metrics apply.
        logits: [N, C] scores of the N samples; C is 1 for regression. A NumPy array or a tensor of any dtype.
        labels: [N] class ids, or scores for regression.

    Returns:
        One value per name in `task.metrics`, in that order.

    Raises:
        ValueError: N is 0, the shapes do not fit, a score or prediction is NaN, or a label is out of range.
    """
    logits_NC, labels_N = _as_float64(logits), _as_float64(labels)
    _check_predictions(task, logits_NC, labels_N)
    predictions_N = logits_NC[:, 0] if task.is_regression else logits_NC.argmax(axis=1)
    if task.official_ids:  # F1 is of the benchmark's class 1
        official = np.array(task.official_ids)
        labels_N, predictions_N = official[labels_N.astype(int)], official[predictions_N]
    return {metric: _METRICS[metric](labels_N, predictions_N) for metric in task.metrics}


def _as_float64(values: ArrayLike) -> NDArray[np.float64]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()  # NumPy has no bfloat16
    return np.asarray(values, dtype=np.float64)


def _check_predictions(task: Task, logits_NC: NDArray[np.float64], labels_N: NDArray[np.float64]) -> None:
    shapes = f"logits {list(logits_NC.shape)}, labels {list(labels_N.shape)}"
    if logits_NC.ndim != 2 or logits_NC.shape[1] != task.num_labels or labels_N.shape != logits_NC.shape[:1]:
        raise ValueError(f"{shapes} do not fit task {task.name}: pass logits [N, {task.num_labels}] and labels [N]")
    if len(labels_N) == 0:
        raise ValueError(f"{shapes}: a metric of {task.name} needs a sample; check the evaluation split")
    if np.isnan(logits_NC).any() or (task.is_regression and not np.isfinite(logits_NC).all()):
        raise ValueError(
            f"logits of {task.name} hold NaN or infinite predictions: the model has diverged; "
            f"lower the learning rate or use bf16 or fp32"
        )
    if not np.isfinite(labels_N).all():
        raise ValueError(f"labels of {task.name} hold NaN or infinity; check the data files")
    if not task.is_regression:
        wrong = labels_N[~np.isin(labels_N, np.arange(task.num_labels))]
        if len(wrong):
            raise ValueError(
                f"label {wrong[0]:g} of {task.name} is not a class id from 0 to {task.num_labels - 1}; "
                f"GLUE test splits are unlabelled (-1 in every row): evaluate on {task.eval_splits[0]}"
            )


def _correlation(statistic: Callable[..., Any]) -> Callable[..., float]:
    """`statistic(labels, predictions)`, with 0.0 and no warning where it does not exist."""

    def correlation(labels_N: NDArray[np.float64], predictions_N: NDArray[np.float64]) -> float:
        if len(labels_N) < 2:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant input warns, then gives NaN or 0
            result = statistic(labels_N, predictions_N)
        value = float(getattr(result, "statistic", result))  # SciPy wraps its value, scikit-learn does not
        return value if np.isfinite(value) else 0.0

    return correlation


_METRICS: dict[str, Callable[..., float]] = {
    "accuracy": lambda labels_N, predictions_N: float(accuracy_score(labels_N, predictions_N)),
    "f1": lambda labels_N, predictions_N: float(f1_score(labels_N, predictions_N, zero_division=0)),
    "matthews_correlation": _correlation(matthews_corrcoef),
    "pearson": _correlation(pearsonr),
    "spearmanr": _correlation(spearmanr),
}
