"""Measure how the cost of our distillation grows with samples, sequence length, effective layers and ranks.

    python benchmarks/bench_scaling.py --encoder demo/encoder [--axes samples,ranks]

Our program runs on mrpc with a cached teacher, each run in its own process. The base is 2,048 rows, 3 stored layers run
as 6, and one rank on all cores; each axis varies one of these. Several ranks share the cores. For the sequence length,
rows are joined to be longer than the limit, so that no position is padding. Writes scaling.csv and scaling.png.
"""

import argparse
import csv
import datetime
import json
import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import bench_runs
import cases as recipe
from bench_rows import Row
from cases import Case
from facts import commit, version_of

AXES = {
    "samples": (512, 1024, 2048, 3668),
    "sequence length": (16, 32, 64, 128),
    "effective layers": (2, 4, 6, 9),
    "ranks": (1, 2, 4),
}
UNITS = {"samples": "rows", "sequence length": "tokens a row", "effective layers": "layers that run", "ranks": "ranks"}
STORED = {2: 1, 4: 2, 6: 3, 9: 6}
"""Stored layers of an SPS student, by the number of layers that it runs."""
NUM_ROWS, NUM_LONG_ROWS, NUM_DEV_ROWS = 2048, 512, 64


@dataclass(frozen=True)
class Point:
    """One value on an axis."""

    axis: str
    value: int

    @property
    def num_rows(self) -> int:
        if self.axis == "sequence length":
            return NUM_LONG_ROWS
        return self.value if self.axis == "samples" else NUM_ROWS

    @property
    def max_seq_length(self) -> int:
        return self.value if self.axis == "sequence length" else recipe.MAX_SEQ_LENGTH

    @property
    def num_stored_layers(self) -> int:
        return STORED[self.value] if self.axis == "effective layers" else 3

    @property
    def num_ranks(self) -> int:
        return self.value if self.axis == "ranks" else 1


def write_long_rows(data_dir: Path, source: str) -> None:
    """Write the task SOURCE_long, whose sentences are joined from eight rows and longer than every limit here."""
    name = f"{source}_long"
    from datasets import Dataset, disable_progress_bars

    from peakd_ds.data.reading import load_splits
    from peakd_ds.data.tasks import get_task

    disable_progress_bars()
    task = get_task(f"{source}_{NUM_ROWS}")
    for split, rows in load_splits(task, str(data_dir)).items():
        texts = {column: rows[column] for column in task.text_columns}
        joined = {
            column: [" ".join(values[(i + k) % len(values)] for k in range(8)) for i in range(len(values))]
            for column, values in texts.items()
        }
        long_rows = Dataset.from_dict({**joined, "label": list(rows["label"])})
        file = data_dir / name / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        limit = NUM_LONG_ROWS if split == "train" else NUM_DEV_ROWS
        long_rows.cast_column("label", rows.features["label"]).select(range(min(limit, len(rows)))).to_parquet(file)


def run(point: Point, prepared: dict[int, bench_runs.Prepared], work: Path, repeat: int) -> Row:
    """Time one epoch of our program at a point. Raises RunFailed as `watch`."""
    inputs = prepared.get(point.num_rows, prepared[NUM_ROWS])
    is_long = point.axis == "sequence length"
    run_dir = work / "runs" / f"scaling-{point.axis.replace(' ', '-')}-{point.value}"
    shutil.rmtree(run_dir, ignore_errors=True)
    settings = {
        "task": "mrpc_long" if is_long else inputs.case.data_name,
        "teacher": inputs.teacher,
        "student_init": inputs.encoder,
        "data_dir": inputs.data_dir,
        "run_dir": run_dir,
        "stages": "distill",
        "teacher_mode": "cached",
        "select_on": "dev",
        "seed": repeat,
        "num_hidden_layers": point.num_stored_layers,
        "max_seq_length": point.max_seq_length,
        "distill_epochs": 1,
        "layer_map": "last" if point.num_stored_layers < 6 else "1:1,3:2,5:4",  # the teacher has fewer than 9 layers
        "dropout": recipe.DROPOUT,
        "log_steps": 4,
        "save_steps": 0,
    }
    command = bench_runs.train_command(settings, "--no_ptp", "--no_export_unrolled", num_ranks=point.num_ranks)
    threads = max(1, bench_runs.num_cores() // point.num_ranks)
    lines, _ = bench_runs.watch(command, work / "logs" / f"{run_dir.name}.log", threads)
    outcome = bench_runs.read_our_run(lines, run_dir / "metrics.jsonl", "eval_accuracy")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    speeds = [record["samples_per_s"] for record in records if "samples_per_s" in record][1:]  # the first is a warm-up
    shutil.rmtree(run_dir, ignore_errors=True)
    return {"seconds": outcome["seconds"], "samples_per_s": statistics.median(speeds)}


def plot(rows: Sequence[Row], title: str, file: Path) -> None:
    """Write a plot with a panel for each axis: seconds of a run for samples, milliseconds per sample for the others."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure, panels = plt.subplots(1, len(axes), figsize=(3.6 * len(axes), 3.2), squeeze=False)
    for panel, axis in zip(panels[0], axes, strict=True):
        chosen = [row for row in rows if row["axis"] == axis]
        column = "seconds" if axis == "samples" else "ms_per_sample"
        panel.plot([row["value"] for row in chosen], [row[column] for row in chosen], marker="o", color="tab:blue")
        panel.set_xlabel(UNITS[axis])
        panel.set_ylabel("seconds of a run" if axis == "samples" else "milliseconds a sample")
        panel.set_xlim(left=0)
        panel.set_ylim(0, 1.1 * max(row[column] for row in chosen))
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Checked options; argparse exits with code 2 if one is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--axes", default=",".join(AXES), help=f"comma-separated, of {', '.join(AXES)}; default all")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each point; default 2")
    parser.add_argument("--encoder", type=Path, default=Path("demo/encoder"), help="6 x 384; default demo/encoder")
    parser.add_argument("--data_dir", default=os.environ.get("PEAKD_DATA_DIR", ""), help="as for train.py")
    parser.add_argument("--out", type=Path, default=bench_runs.HERE / "results", help="default benchmarks/results")
    parser.add_argument("--work_dir", type=Path, default=Path("build/bench"), help="default build/bench")
    arguments = parser.parse_args(argv)
    chosen = [name.strip() for name in arguments.axes.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in AXES]
    if unknown or not chosen:
        parser.error(f"--axes {', '.join(unknown) or 'nothing'}: choose from {', '.join(AXES)}")
    arguments.axes = [name for name in AXES if name in chosen]
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats}: each point must run at least once; set 1 or more")
    bench_runs.check_inputs(parser, arguments.encoder, arguments.data_dir, ["mrpc"])
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run all points in turn, and write scaling.csv and scaling.png."""
    arguments = parse(argv)
    work, encoder = arguments.work_dir.absolute(), arguments.encoder.absolute()
    points = [Point(axis, value) for axis in arguments.axes for value in AXES[axis]]
    numbers = {NUM_ROWS, *(point.num_rows for point in points if point.axis == "samples")}
    prepared = {}
    for number in sorted(numbers, key=lambda number: number != NUM_ROWS):  # the teacher's rows first
        case = Case(f"scaling_{number}", "mrpc", 3, number, NUM_DEV_ROWS)
        prepared[number] = bench_runs.prepare(case, encoder, arguments.data_dir, work, teacher_of=f"mrpc_{NUM_ROWS}")
    if "sequence length" in arguments.axes:
        write_long_rows(work / "data", "mrpc")
    runs: dict[Point, list[Row]] = {point: [] for point in points}
    for repeat in range(arguments.repeats):
        for point in points:
            runs[point].append(run(point, prepared, work, repeat))
            print(f"{point.axis} {point.value}: {runs[point][-1]['seconds']:.1f} s", flush=True)
    where = {
        "date": datetime.date.today().isoformat(),
        "machine": bench_runs.machine_here(),
        "torch": version_of("torch"),
        "commit": commit(),
    }
    rows = []
    for point, made in runs.items():
        rate = statistics.median(row["samples_per_s"] for row in made)
        seconds = statistics.median(row["seconds"] for row in made)
        rows.append(
            {
                "axis": point.axis,
                "value": point.value,
                "seconds": round(seconds, 2),
                "ms_per_sample": 1e3 / rate,
                **where,
            }
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "scaling.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows({**row, "ms_per_sample": f"{row['ms_per_sample']:.3f}"} for row in rows)
    plot(rows, f"Distillation on {where['machine']}", arguments.out / "scaling.png")
    print(f"{arguments.out / 'scaling.csv'} is written")


if __name__ == "__main__":
    main()
