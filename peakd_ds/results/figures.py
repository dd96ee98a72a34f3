"""Figures, drawn without a display."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

MAX_CLASSES = 30
"""Most classes that a confusion matrix can show in readable numbers."""
_COLORS = {"loss": "black", "hard_loss": "tab:blue", "soft_loss": "tab:orange", "hidden_loss": "tab:green"}
Curves = Sequence[tuple[str, Mapping[str, float], str]]
"""For each stage, its name, the weight of each term in its loss, and the metric that picks its best epoch."""


def label_histogram(names: Sequence[str], counts: Sequence[int]) -> Figure:
    """A bar chart of the training rows in each PTP class."""
    figure, axes = _new_figure()
    bars = axes.bar(range(len(names)), counts, color="tab:blue")
    axes.bar_label(bars, [f"{count:,}" for count in counts], padding=2)
    axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
    axes.set_ylabel("training rows")
    axes.margins(y=0.1)
    return figure


def confusion_matrix(names: Sequence[str], labels: torch.Tensor, predictions: torch.Tensor) -> Figure:
    """Counts by true class (rows) and predicted class (columns); colours show shares of the true class.

    Args:
        labels: int64 [N], true classes.
        predictions: int64 [N].
    """
    counts = torch.zeros(len(names), len(names), dtype=torch.int64)
    counts.index_put_((labels, predictions), torch.ones_like(labels), accumulate=True)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    shown = [_wrapped(name) for name in names]
    longest = max(len(line) for name in shown for line in name.split("\n"))
    size = max(4.0, 1.2 + 0.55 * len(names) + 0.08 * longest)
    figure = Figure(figsize=(size + 0.6, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(counts.tolist()):
        for j, count in enumerate(row):
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, f"{count:,}", ha="center", va="center", color=color, fontsize=8 if len(names) > 10 else 10)
    is_crowded = len(names) * longest > 30
    slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(names)), shown, **(slanted if is_crowded else {}))
    axes.set_yticks(range(len(names)), shown)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    return figure


def loss_curves(records: Sequence[Mapping[str, Any]], curves: Curves, target: Path) -> None:
    """Write a PNG with a column for each stage: its training loss with the terms as weighted in it, above the score
    of each evaluation with the teacher's as a line.

    Args:
        records: Of metrics.jsonl.
        curves: What to draw of each stage.
    """
    drawn = [curve for curve in curves if any(record["stage"] == curve[0] for record in records)]
    if not drawn:
        return
    figure = Figure(figsize=(max(5.0, 4.4 * len(drawn)), 6), layout=ConstrainedLayoutEngine(wspace=0.06))
    panels = figure.subplots(2, len(drawn), squeeze=False, sharex="col", height_ratios=[3, 2])
    for column, (stage, weights, score) in enumerate(drawn):
        mine = [record for record in records if record["stage"] == stage]
        _draw_losses(panels[0, column], [record for record in mine if "loss" in record], weights)
        _draw_scores(panels[1, column], [record for record in mine if "split" in record], score)
        panels[0, column].set_title(stage)
        panels[1, column].set_xlabel("step")
    panels[0, 0].set_ylabel("training loss")
    figure.savefig(target, dpi=120)


def _draw_losses(axes: Axes, steps: Sequence[Mapping[str, Any]], weights: Mapping[str, float]) -> None:
    """Draw the loss, and its terms times their weights if there are several."""
    numbers = [record["step"] for record in steps]
    values = {"loss": [record["loss"] for record in steps]}
    if len(weights) > 1:
        values |= {name: [weight * record[name] for record in steps] for name, weight in weights.items()}
    labels = {name: f"{weight:g} x {name.removesuffix('_loss')}" for name, weight in weights.items()}
    marker = "." if len(steps) < 3 else None  # a line needs two points
    for name, numbers_of_term in values.items():
        label = labels.get(name, "loss") if len(weights) > 1 else "loss"
        axes.plot(numbers, numbers_of_term, label=label, color=_COLORS[name], linewidth=1.2, marker=marker)
    axes.set_yscale("log" if _spans_decades(list(values.values())) else "linear")
    axes.grid(alpha=0.3)
    if steps:
        axes.legend(fontsize="small")


def _draw_scores(axes: Axes, evaluations: Sequence[Mapping[str, Any]], score: str) -> None:
    """Draw a point for each evaluation, and the teacher's score as a line if it is known."""
    known = [record for record in evaluations if f"eval_{score}" in record]
    stage = known[0]["stage"] if known else ""
    who = "teacher" if stage == "teacher" else "student"
    steps = [record["step"] for record in known]
    axes.plot(steps, [record[f"eval_{score}"] for record in known], "o-", color="black", markersize=4, label=who)
    theirs = next((record[f"teacher_{score}"] for record in reversed(known) if f"teacher_{score}" in record), None)
    if theirs is not None:
        axes.axhline(theirs, color="tab:red", linestyle="--", linewidth=1.2, label=f"teacher {theirs:.3f}")
    split = f" on {known[0]['split']}" if known else ""
    axes.set_ylabel(f"{score.replace('_', ' ')}{split}")
    axes.grid(alpha=0.3)
    axes.margins(y=0.15)
    if known:
        axes.legend(fontsize="small")


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


def _spans_decades(curves: Sequence[Sequence[float]]) -> bool:
    """Whether the losses spread over more than two decades."""
    values = [value for curve in curves for value in curve if value > 0]
    return bool(values) and math.log10(max(values) / min(values)) > 2


def _wrapped(name: str) -> str:
    """A class's name in lines that fit an axis; the middle of a long one is left out."""
    lines = textwrap.wrap(name.replace("_", " "), 16) or [name]
    return "\n".join([*lines[:2], "..."] if len(lines) > 3 else lines)


def _new_figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5, 4), layout="constrained")
    return figure, figure.subplots()
