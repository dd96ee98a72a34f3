"""peakd-compare: one table of teachers and students, from finished runs: how much smaller and faster, at what loss.

    peakd-compare runs/sps runs/plain

Every run gives its student and the int8 ONNX of it, as --export_onnx writes it; a teacher that runs share comes once.
"""

import argparse
from pathlib import Path

from peakd_ds.errors import UserError
from peakd_ds.results import comparison, finished, speed


def main(args: argparse.Namespace) -> None:
    """Print the table. Raises UserError for a run that is not finished, or of another task."""
    runs = [_results_of(folder) for folder in args.runs]
    tasks = {results["task"]: folder for results, folder in zip(runs, args.runs, strict=True)}
    if len(tasks) > 1:
        (first, one), (second, other) = list(tasks.items())[:2]
        raise UserError(f"{one} is a run on {first}, but {other} one on {second}; compare runs on one task")
    print(comparison.joint_table(runs, [str(folder) for folder in args.runs]))
    for words in dict.fromkeys(speed.in_words(results["speed"]) for results in runs):
        print(f"\n{words}")


def _results_of(folder: Path) -> comparison.Results:
    results = finished.read(folder)
    if results is None:
        raise UserError(
            f"{folder} has no results.json of a finished run of this version; start the run again with the same "
            "--run_dir, which finishes it"
        )
    return results
