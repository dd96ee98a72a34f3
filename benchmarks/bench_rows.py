"""The results of bench_train.py: rows, and the files bench.json, bench.md and bench.png made from them."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cases import CASES, EPOCHS, STEP_CASE, SYSTEMS

from peakd_ds.files import write_atomically
from peakd_ds.results import markdown

COLUMNS = (
    *("case", "system", "seconds: median (min to max)", "x ours", "samples/s", "tokens/s", "peak MiB", "padding"),
    *("TFLOP (x ours)", "dev", "runs", "commit"),
)

Row = dict[str, Any]


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """All rows in the order of cases.py; a new row replaces the old one of the same case and system."""
    rows = {(row["case"], row["system"]): row for row in (*old, *new)}
    names, systems = list(CASES), list(SYSTEMS)

    def place(row: Row) -> tuple[int, int]:
        case, system = row["case"], row["system"]
        return (
            names.index(case) if case in names else len(names),
            systems.index(system) if system in systems else len(systems),
        )

    return sorted(rows.values(), key=place)


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows with `ratio_to_ours` and `tflop_ratio_to_ours`: seconds and TFLOP over those of ours_cached in the case.

    A case in which one of the two did not run gets no ratios.
    """
    ours = {row["case"]: row for row in rows if row["system"] == SYSTEMS[0] and "seconds" in row}

    def ratios(row: Row) -> Row:
        if "seconds" not in row or row["case"] not in ours:
            return {}
        other = ours[row["case"]]
        return {
            "ratio_to_ours": row["seconds"]["median"] / other["seconds"]["median"],
            "tflop_ratio_to_ours": row["tflop"] / other["tflop"],
        }

    kept = [{name: value for name, value in row.items() if not name.endswith("ratio_to_ours")} for row in rows]
    return [row | ratios(row) for row in kept]


def to_markdown(result: Row) -> str:
    """The content of bench.md, from that of bench.json."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    lines = [
        f"{result['machine']}; {versions}.",
        "",
        "Seconds from tokenised rows in memory to the saved best weights, including the teacher's outputs.",
        "TFLOP: the matrix products of the system, and their ratio to ours: the ratio of the seconds if all systems",
        "computed at the same rate.",
        "",
        markdown.table(COLUMNS, map(_cells, result["cases"])),
    ]
    if result.get("engine_overhead") is not None:
        lines += [
            "",
            f"A step of {STEP_CASE} takes {result['engine_overhead']:+.1%} on DeepSpeed's engine compared with a plain "
            f"PyTorch loop. It computes {result['student_gflops']:.0f} GFLOP/s without padding; a large bf16 matrix "
            f"product reaches {result['bf16_matmul_gflops']:.0f} GFLOP/s.",
        ]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[object]:
    """The table's cells for one row."""
    key = [row["case"], row["system"]]
    if "error" in row:
        return [*key, f"failed: {row['error']}", *[""] * (len(COLUMNS) - 3)]
    seconds, scaled = row["seconds"], row.get("extrapolated_from_steps")
    spread = f"scaled up from {scaled} steps" if scaled else f"{seconds['min']:.1f} to {seconds['max']:.1f}"
    ratio, tflop = "", f"{row['tflop']:.1f}"
    if "ratio_to_ours" in row:
        ratio, tflop = f"{row['ratio_to_ours']:.2f}", f"{tflop} ({row['tflop_ratio_to_ours']:.2f})"
    return [
        *key,
        f"{seconds['median']:.1f} ({spread})",
        ratio,
        f"{row['samples_per_s']:.0f}",
        f"{row['tokens_per_s']:.0f}",
        f"{row['peak_memory_mib']:.0f}",
        f"{row['padding_share']:.0%}",
        tflop,
        f"{statistics.mean(row['dev_score']):.3f}" if row["dev_score"] else "",
        row["runs"],
        row["commit"],
    ]


def plot(result: Row, file: Path) -> None:
    """Write a bar chart of the seconds, with a panel for each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result["cases"] if "seconds" in row]
    names = list(dict.fromkeys(row["case"] for row in rows))
    if not names:
        return
    figure, panels = plt.subplots(len(names), 1, figsize=(8, 0.6 + 1.5 * len(names)), squeeze=False)
    for panel, name in zip(panels[:, 0], names, strict=True):
        chosen = [row for row in rows if row["case"] == name][::-1]
        medians = [row["seconds"]["median"] for row in chosen]
        spread = [
            [row["seconds"]["median"] - row["seconds"]["min"] for row in chosen],
            [row["seconds"]["max"] - row["seconds"]["median"] for row in chosen],
        ]
        colors = ["tab:blue" if row["system"].startswith("ours") else "lightgray" for row in chosen]
        panel.barh([row["system"] for row in chosen], medians, xerr=spread, color=colors)
        for position, row in enumerate(chosen):
            ratio = f" ({row['ratio_to_ours']:.1f}x)" if "ratio_to_ours" in row else ""
            scaled = ", scaled up" if row.get("extrapolated_from_steps") else ""
            text = f"  {row['seconds']['median']:,.0f} s{ratio}{scaled}"
            panel.text(row["seconds"]["max"], position, text, va="center")
        panel.set_xlim(0, max(row["seconds"]["max"] for row in chosen) * 1.35)
        panel.set_title(name, fontsize=10, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel(f"seconds for {EPOCHS} epochs")
    figure.suptitle(f"Distillation on {result['machine']}", fontsize=11)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def save(out: Path, rows: Sequence[Row], facts: Row) -> None:
    """Merge the rows into OUT/bench.json, and write bench.md and bench.png from all its rows.

    Args:
        facts: Entries of bench.json beside its rows: machine, versions, commit, and the results of bench_step.py.
    """
    file = out / "bench.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    result = {
        "machine": "",
        "versions": {},
        "commit": "",
        "bf16_matmul_gflops": None,
        "engine_overhead": None,
        "student_gflops": None,
        **old,
        **facts,
    }
    result["cases"] = with_ratios(merge(old.get("cases", []), rows))
    write_atomically(file, json.dumps(result, indent=2) + "\n")
    (out / "bench.md").write_text(to_markdown(result))
    plot(result, out / "bench.png")
