"""The tasks: columns, kind of label, splits, names of metrics and PTP thresholds of each.

Columns, label names and label order are those of the `nyu-mll/glue` dataset on the Hugging Face Hub. A teacher that was
trained with another label order, which is common for MNLI, looks like a broken teacher.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from peakd_ds.errors import UserError, shown

OWN_METRICS = {
    "classes": ("accuracy", "macro_f1", "weighted_f1"),
    "multi_label": ("micro_f1", "macro_f1", "exact_match"),
    "scores": ("pearson", "spearmanr", "rmse"),
}
"""The metrics of own data for each kind of label."""
KINDS = tuple(OWN_METRICS)
AGREEMENT = "agreement"
"""The score of own data without labels: how alike student and teacher predict."""
_OWN_PRIMARY = {"classes": "accuracy", "multi_label": "micro_f1", "scores": "spearmanr"}


@dataclass(frozen=True)
class Task:
    """One sentence or sentence-pair task."""

    name: str
    """Name as the user wrote it, also the name of its data folder: "qnli", "qnli_10k"."""
    base: str
    """The task that the fields below are of: "qnli" for "qnli_10k"."""
    text_columns: tuple[str, ...]
    """One or two text columns, in the order that the tokenizer gets them."""
    label_names: tuple[str, ...]
    """Name of class i at position i; empty for scores."""
    metrics: tuple[str, ...]
    """Keys of what `metrics.compute_metrics` returns."""
    primary_metric: str
    """The one of `metrics` that picks the best epoch; `metrics.higher_is_better` says which end is best."""
    eval_splits: tuple[str, ...] = ("validation",)
    ptp_thresholds: tuple[float, float] | None = None
    """(t_correct, t_wrong) of Pea-KD's published code; None if it has none for the task."""
    submission_files: Mapping[str, str] = field(default_factory=dict, hash=False)
    """File name that the GLUE server expects for each test split; empty outside GLUE."""
    kind: str = ""
    """classes (one for each row), multi_label (any number of them) or scores; by default what the label names say."""
    is_own: bool = False
    """Whether the task is the user's own data, described by `own_task`, with metrics as in OWN_METRICS."""
    selection_split: str = ""
    """The split that picks the best epoch, if it is neither of train nor reported."""
    has_labels: bool = True
    """Whether any row has a label."""
    official_ids: tuple[int, ...] = ()
    """The benchmark's number of each class, where the teacher orders them otherwise; empty: they are the same."""

    def __post_init__(self) -> None:
        if not self.kind:
            object.__setattr__(self, "kind", "classes" if self.label_names else "scores")
        assert self.kind in KINDS and (self.kind == "scores") == (not self.label_names)

    @property
    def is_regression(self) -> bool:
        return self.kind == "scores"

    @property
    def is_multi_label(self) -> bool:
        return self.kind == "multi_label"

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
        """Columns of the logits: the number of classes, 1 for scores."""
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
    are never reported as those of the whole task, and the plain name never falls back to it. The published PTP
    thresholds are for the whole task too: with a suffix there are none.

    Raises:
        ValueError: no task has that name, and none is the part of it before an underscore.
    """
    base = next((base for base in TASKS if re.fullmatch(rf"{base}(_[A-Za-z0-9-]+)*", name)), None)
    if base is not None:
        task = TASKS[base]
        return task if name == base else replace(task, name=name, ptp_thresholds=None)
    spelling = name.lower().replace("-", "")
    closest = difflib.get_close_matches(spelling, TASKS, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"unknown task {name!r}; use one of {', '.join(TASKS)}, or one of these with a suffix that names its "
        f"data folder, such as qnli_10k (closest: {closest})"
    )


def own_task(
    name: str,
    kind: str,
    text_columns: tuple[str, ...],
    label_names: tuple[str, ...],
    metric: str = "",
    eval_splits: tuple[str, ...] = ("validation",),
    selection_split: str = "",
    has_labels: bool = True,
) -> Task:
    """The task that a user's own data is of; it has no published PTP thresholds and no submission files.

    Args:
        name: Name of the data, for reports.
        kind: One of KINDS.
        text_columns: One or two text columns, in the order that the tokenizer gets them.
        label_names: Name of class i at position i; none for scores.
        metric: The one of the kind's OWN_METRICS that picks the best epoch; "" for accuracy, micro_f1 or spearmanr.
        eval_splits: Splits that are evaluated, the reported one first.
        selection_split: The split that picks epochs, if it is neither of train nor evaluated.
        has_labels: Whether any row has a label; without, agreement with the teacher picks the epoch.

    Raises:
        UserError: an unknown kind or metric, no text column or more than two, or label names that do not fit the kind.
    """
    if kind not in KINDS:
        raise UserError(f"kind {shown(kind)} of task {name} is unknown; set one of {', '.join(KINDS)}")
    metrics = OWN_METRICS[kind] if has_labels else ()
    if metric and metric not in metrics:
        choice = f"set one of {', '.join(metrics)}" if metrics else "without labels there is none: leave it out"
        raise UserError(f"--metric {shown(metric)} is no score of task {name}, whose labels are {kind}; {choice}")
    if len(text_columns) not in (1, 2) or len(set(text_columns)) < len(text_columns):
        raise UserError(f"task {name} has text columns {shown(list(text_columns))}; give one, or two different ones")
    if kind == "scores" and label_names:
        raise UserError(f"task {name} has scores, but label names {shown(list(label_names))} too; leave them out")
    if kind != "scores" and len(set(label_names)) < max(2, len(label_names)):
        raise UserError(f"task {name} has label names {shown(list(label_names))}; give two or more different ones")
    return Task(
        name=name,
        base=name,
        text_columns=tuple(text_columns),
        label_names=tuple(label_names),
        metrics=metrics,
        primary_metric=metric or (_OWN_PRIMARY[kind] if has_labels else AGREEMENT),
        eval_splits=tuple(eval_splits),
        kind=kind,
        is_own=True,
        selection_split=selection_split,
        has_labels=has_labels,
    )
