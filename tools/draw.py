"""Draws the pictures of the documentation: `python tools/draw.py` writes docs/batch.svg and docs/folders.svg.

batch.svg: how rows become a student. folders.svg: the rooms of the code from the top down, as tests/test_layout.py has
them.
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
DATA, MODEL, LOSS, INK, PAPER = "#dbe9f6", "#e3f1df", "#fbe6cf", "#1f2933", "#ffffff"


def box(axes: Any, x: float, y: float, width: float, height: float, title: str, text: str, color: str) -> None:
    """A rounded box with its lower left corner at (x, y): a bold title and a line or more of text."""
    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=color, edgecolor=INK, lw=1
        )
    )
    num_lines = text.count("\n") + 1 if text else 0
    top = y + height / 2 + 0.1 * num_lines
    axes.text(x + width / 2, top, title, ha="center", va="center", fontsize=10, fontweight="bold", color=INK)
    if text:
        axes.text(x + width / 2, top - 0.16, text, ha="center", va="top", fontsize=8.5, color=INK, linespacing=1.35)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], text: str = "", above: float = 0.09) -> None:
    """An arrow with its text over the middle."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=INK, lw=1.2))
    if text:
        middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + above
        axes.text(*middle, text, ha="center", va="bottom", fontsize=8.5, color=INK, linespacing=1.3)


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches, whose axes count inches."""
    figure = plt.figure(figsize=(width, height), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def save(figure: Any, file: Path) -> None:
    """Write an SVG with real text, without dates, so that the same drawing gives the same bytes."""
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": file.stem}):
        figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def draw_batch(file: Path) -> None:
    """From rows to a student: three stages, and one batch of the third."""
    figure, axes = canvas(10, 4.5)
    box(axes, 0.2, 3.2, 1.9, 1.0, "your rows", "a tenth is held out\nto pick epochs", DATA)
    box(axes, 0.2, 1.75, 1.9, 1.0, "64 shards", "tokenised once,\nreplicated or spread", DATA)
    box(axes, 0.2, 0.3, 1.9, 1.0, "global batches", "fixed by the seed,\non any number of ranks", DATA)
    arrow(axes, (1.15, 3.2), (1.15, 2.75))
    arrow(axes, (1.15, 1.75), (1.15, 1.3))
    box(axes, 3.1, 3.2, 2.5, 1.0, "1  teacher", "fine-tuned, or your\nclassifier as it is", MODEL)
    box(axes, 3.1, 1.75, 2.5, 1.0, "2  PTP", "the student learns whether\nthe teacher is right and sure", MODEL)
    box(axes, 3.1, 0.3, 2.5, 1.0, "3  distillation", "labels, the teacher's logits,\nits hidden states", MODEL)
    arrow(axes, (4.35, 3.2), (4.35, 2.75))
    arrow(axes, (4.35, 1.75), (4.35, 1.3))
    arrow(axes, (2.1, 0.8), (3.1, 0.8), "rank by rank")
    box(
        axes,
        6.6,
        2.65,
        3.1,
        1.55,
        "SPS student",
        "n stored layers run twice;\nin the second pass query and key\nchange places",
        LOSS,
    )
    box(axes, 6.6, 1.55, 3.1, 0.75, "one fused loss", "hard + soft + hidden, with gradients", LOSS)
    box(axes, 6.6, 0.3, 3.1, 0.9, "what you ship", "student/   student_unrolled/\nmodel.onnx", LOSS)
    arrow(axes, (5.6, 2.25), (6.6, 3.1))
    arrow(axes, (5.6, 0.8), (6.6, 1.75), "", 0)
    arrow(axes, (8.15, 1.55), (8.15, 1.2))
    arrow(axes, (8.15, 2.3), (8.15, 2.65))
    save(figure, file)


def draw_folders(file: Path) -> None:
    """The rooms of peakd_ds/: each row may import those below it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from test_layout import ORDER

    rows = [tuple(name for name in row if not name.startswith("__")) for row in ORDER]
    figure, axes = canvas(10, 0.42 * len(rows) + 0.3)
    for number, names in enumerate(rows):
        y = 0.42 * (len(rows) - number - 1) + 0.15
        width = 7.2 / len(names)
        for place, name in enumerate(names):
            is_file = (ROOT / "peakd_ds" / f"{name}.py").is_file()
            color = LOSS if name in ("train", "sps", "ptp", "kernels") else MODEL if is_file else DATA
            axes.add_patch(
                FancyBboxPatch(
                    (1.4 + place * width + 0.04, y),
                    width - 0.08,
                    0.34,
                    boxstyle="round,pad=0,rounding_size=0.06",
                    facecolor=color,
                    edgecolor=INK,
                    lw=0.8,
                )
            )
            label = f"{name}.py" if is_file else f"{name}/"
            axes.text(1.4 + (place + 0.5) * width, y + 0.17, label, ha="center", va="center", fontsize=9, color=INK)
    arrow(axes, (0.9, 0.42 * len(rows)), (0.9, 0.2))
    axes.text(0.7, 0.21 * len(rows) + 0.1, "imports", rotation=90, ha="center", va="center", fontsize=9, color=INK)
    save(figure, file)


if __name__ == "__main__":
    draw_batch(ROOT / "docs" / "batch.svg")
    draw_folders(ROOT / "docs" / "folders.svg")
