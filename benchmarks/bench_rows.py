"""What bench_train.py writes from its rows: bench.json, a table and a plot."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cases import CASES, EPOCHS, STEP_CASE, SYSTEMS

from peakd_ds.files import write_atomically

COLUMNS = (
    *("case", "system", "seconds: median (min to max)", "x ours", "samples/s", "tokens/s", "peak MiB", "padding"),
    *("TFLOP (x ours)", "dev", "runs", "commit"),
)

Row = dict[str, Any]


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Rows by case and system, the new ones in place of old ones; in the order of cases.py."""
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
    """The rows with `ratio_to_ours`, the median over that of ours_cached in the same case, and `tflop_ratio_to_ours`,
    where both ran."""
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


def table(result: Row) -> str:
    """bench.md."""
    lines = [
        f"{result['machine']}; "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
        + ".",
        "",
        "Seconds from tokenised rows in memory to the best weights saved, the teacher's answers included.",
        "TFLOP: of the matrix products that the system computes; its ratio is what the seconds' would be at one rate.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in result["cases"]:
        if "error" in row:
            lines.append(
                f"| {row['case']} | {row['system']} | failed: {row['error'].replace('|', '/')} |"
                + " |" * (len(COLUMNS) - 3)
            )
            continue
        seconds, scaled = row["seconds"], row.get("extrapolated_from_steps")
        spread = f"scaled up from {scaled} steps" if scaled else f"{seconds['min']:.1f} to {seconds['max']:.1f}"
        score = f"{statistics.mean(row['dev_score']):.3f}" if row["dev_score"] else ""
        ratio, arithmetic = "", f"{row['tflop']:.1f}"
        if "ratio_to_ours" in row:
            ratio, arithmetic = f"{row['ratio_to_ours']:.2f}", f"{arithmetic} ({row['tflop_ratio_to_ours']:.2f})"
        lines.append(
            f"| {row['case']} | {row['system']} | {seconds['median']:.1f} ({spread}) | {ratio} | "
            f"{row['samples_per_s']:.0f} | {row['tokens_per_s']:.0f} | {row['peak_memory_mib']:.0f} | "
            f"{row['padding_share']:.0%} | {arithmetic} | {score} | {row['runs']} | "
            f"{row['commit']} |"
        )
    if result.get("engine_overhead") is not None:
        lines += [
            "",
            f"A step of {STEP_CASE} takes {result['engine_overhead']:+.1%} on DeepSpeed's engine against a bare "
            f"PyTorch loop. It does {result['student_gflops']:.0f} GFLOP/s of needed arithmetic; a large bf16 matrix "
            f"product does {result['bf16_matmul_gflops']:.0f}.",
        ]
    return "\n".join(lines) + "\n"


def plot(result: Row, file: Path) -> None:
    """Bars of seconds, a panel for each case."""
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
    """Merge the rows into OUT/bench.json, and write table and plot anew from all that is there."""
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
    (out / "bench.md").write_text(table(result))
    plot(result, out / "bench.png")
