"""Figures of a run, drawn without a display."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from peakd_ds.run_log import TERMS


def label_histogram(names: Sequence[str], counts: Sequence[int]) -> Figure:
    """A bar for each PTP class."""
    figure, axes = _new_figure()
    axes.bar(range(len(names)), counts)
    axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
    axes.set_ylabel("training rows")
    return figure


def confusion_matrix(names: Sequence[str], labels: torch.Tensor, predictions: torch.Tensor) -> Figure:
    """Rows: true class; columns: predicted class; counts."""
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


def loss_curves(metrics_file: Path, target: Path) -> None:
    """Training losses of every stage, each term and their sum, as a PNG."""
    records = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    stages = list(dict.fromkeys(record["stage"] for record in records))
    figure = Figure(figsize=(5 * len(stages), 4), layout="constrained")
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        steps = [record for record in records if record["stage"] == stage and "loss" in record]
        shown = [name for name in TERMS[1:] if any(record[name] for record in steps)]
        for name in shown if len(shown) == 1 else ["loss", *shown]:  # a lone term is the sum
            values = [record[name] for record in steps]
            axes.plot([record["step"] for record in steps], values, label=name.replace("_", " "), linewidth=1)
        axes.set(title=stage, xlabel="step", ylabel="loss", yscale="log" if _spans_decades(steps) else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(target, dpi=120)


def _spans_decades(steps: Sequence[Mapping[str, float]]) -> bool:
    values = [record[name] for record in steps for name in TERMS if record[name] > 0]
    return bool(values) and math.log10(max(values) / min(values)) > 2


def _new_figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=(5, 4), layout="constrained")
    return figure, figure.subplots()
