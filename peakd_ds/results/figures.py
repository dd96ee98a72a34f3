"""Figures, drawn without a display."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peakd_ds.results.meter import TERMS


def label_histogram(names: Sequence[str], counts: Sequence[int]) -> Figure:
    """A bar chart of the training rows in each PTP class."""
    figure, axes = _new_figure()
    axes.bar(range(len(names)), counts)
    axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
    axes.set_ylabel("training rows")
    return figure


def confusion_matrix(names: Sequence[str], labels: torch.Tensor, predictions: torch.Tensor) -> Figure:
    """Counts by true class (rows) and predicted class (columns).

    Args:
        labels: int64 [N], true classes.
        predictions: int64 [N].
    """
    counts = torch.zeros(len(names), len(names), dtype=torch.int64)
    counts.index_put_((labels, predictions), torch.ones_like(labels), accumulate=True)
    figure, axes = _new_figure()
    axes.imshow(counts.numpy(), cmap="Blues")
    for i, row in enumerate(counts.tolist()):
        for j, count in enumerate(row):
            axes.text(j, i, str(count), ha="center", va="center")
    axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
    axes.set_yticks(range(len(names)), [name.replace("_", "\n") for name in names])
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    return figure


def loss_curves(records: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Write a PNG of every stage's training losses from the records of metrics.jsonl: each term and their sum."""
    stages = list(dict.fromkeys(record["stage"] for record in records))
    figure = Figure(figsize=(5 * len(stages), 4), layout="constrained")
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        steps = [record for record in records if record["stage"] == stage and "loss" in record]
        shown = [name for name in TERMS[1:] if any(record[name] for record in steps)]
        for name in shown if len(shown) == 1 else ["loss", *shown]:  # a single term equals the sum
            values = [record[name] for record in steps]
            axes.plot([record["step"] for record in steps], values, label=name.replace("_", " "), linewidth=1)
        axes.set(title=stage, xlabel="step", ylabel="loss", yscale="log" if _spans_decades(steps) else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(target, dpi=120)


@dataclass(frozen=True)
class ScorePanel:
    """One task in `score_panels`; scores, means and deviations are by label."""

    title: str
    metric: str
    labels: Sequence[str]
    scores: Sequence[Sequence[float]]
    """The scores of a label's seeds."""
    means: Sequence[float]
    deviations: Sequence[float | None]
    """None for a single seed."""
    teacher: float | None
    """Drawn as a line."""


def score_panels(panels: Sequence[ScorePanel], target: Path) -> None:
    """Write a PNG with a panel for each task: means, standard deviations and a dot for each seed."""
    num_columns = min(2, len(panels))
    num_rows = -(-len(panels) // num_columns)
    most_lines = max(sum(label.count("\n") + 2 for label in panel.labels) for panel in panels)
    figure = Figure(figsize=(6 * num_columns, num_rows * (1.4 + 0.22 * most_lines)), layout="constrained")
    all_axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axes, panel in zip(all_axes, panels, strict=False):
        for y, (scores, mean, deviation) in enumerate(zip(panel.scores, panel.means, panel.deviations, strict=True)):
            axes.plot(scores, [y] * len(scores), "o", color="tab:blue", alpha=0.35, markersize=5, markeredgewidth=0)
            axes.errorbar(mean, y, xerr=deviation, fmt="|", color="black", capsize=4, markersize=12)
            text = f"{mean:.3f} ± {'-' if deviation is None else f'{deviation:.3f}'}"
            axes.annotate(text, (mean, y), (0, 8), textcoords="offset points", ha="center", fontsize="small")
        if panel.teacher is not None:
            axes.axvline(panel.teacher, color="tab:orange", linestyle="--", linewidth=1)
            above = dict(xycoords=("data", "axes fraction"), textcoords="offset points", ha="center", va="bottom")
            text = f"teacher {panel.teacher:.3f}"
            axes.annotate(text, (panel.teacher, 1), (0, 2), color="tab:orange", fontsize="small", **above)
        axes.set_yticks(range(len(panel.labels)), panel.labels)
        axes.set_ylim(len(panel.labels) - 0.5, -0.7)  # the first label is on top
        axes.margins(x=0.15)
        axes.set_title(panel.title, pad=18)  # leaves room for the teacher's score
        axes.set(xlabel=panel.metric.replace("_", " "))
        axes.grid(axis="x", alpha=0.3)
    for axes in all_axes[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(target, dpi=120)


def _spans_decades(steps: Sequence[Mapping[str, float]]) -> bool:
    """Whether the losses spread over more than two decades."""
    values = [record[name] for record in steps for name in TERMS if record[name] > 0]
    return bool(values) and math.log10(max(values) / min(values)) > 2


def _new_figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5, 4), layout="constrained")
    return figure, figure.subplots()
