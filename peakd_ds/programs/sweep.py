"""peakd-sweep: run the elements of a grid one after another on this machine, or submit them as an array job of Slurm.

    peakd-sweep --grid GRID.yaml [options of train.py for every element]
    peakd-sweep --grid GRID.yaml --submit --nodes=2

Started again, a sweep runs the elements that are not finished. An element that fails does not stop the others; the
summary at the end names it and the reason. peakd-report makes a table of the results.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import peakd_ds
from peakd_ds.command_line import differences, saved_settings
from peakd_ds.errors import UserError
from peakd_ds.files import write_atomically
from peakd_ds.programs import scripts
from peakd_ds.programs.grid import Element, Grid, read_grid

TRAIN = Path(peakd_ds.__file__).with_name("train.py")
ARRAY_SCRIPT = Path("slurm/sweep.sh")
KILL_AFTER_S = 60
"""Time for a run to save and end after SIGTERM, before it is killed."""


def main(args: argparse.Namespace) -> int:
    """List, run or submit the elements. Returns the exit code: 1 if an element failed, with --submit sbatch's own."""
    overrides = args.overrides
    grid = read_grid(args.grid, overrides)
    if args.options is not None:
        element = _element_at(grid, args.options)
        record_grid(args.grid, grid)
        print(*element.words, sep="\0", end="\0")
        return 0
    print(f"{args.grid}: {grid}", flush=True)
    if args.list:
        print("\n".join(f"{n}\t{element.name}\t{state(element)}" for n, element in enumerate(grid.elements)))
        return 0
    chosen = list(range(len(grid.elements))) if args.index is None else [args.index]
    unfinished = [number for number in chosen if state(_element_at(grid, number)) != "finished"]
    if len(unfinished) < len(chosen):
        print(f"finished already: {len(chosen) - len(unfinished)}", flush=True)
    if not unfinished:
        return 0
    if args.submit is not None:
        return submit(args.grid, grid, unfinished, args.at_once, args.submit, overrides)
    record_grid(args.grid, grid)
    return run_all([grid.elements[number] for number in unfinished], args.ranks)


def run_all(elements: Sequence[Element], num_ranks: int | None) -> int:
    """Run the elements one after another and print a summary. Returns the exit code: 1 if one failed."""
    failed: list[str] = []
    with _exit_on_sigterm():
        for number, element in enumerate(elements, start=1):
            print(f"[{number}/{len(elements)}] {element.name}: output in {_beside(element, 'log')}", flush=True)
            start = time.monotonic()
            reason = run(element, num_ranks)
            print(f"    {'finished' if reason is None else reason} after {time.monotonic() - start:.0f} s", flush=True)
            if reason is not None:
                failed.append(f"{element.name}: {reason}")
    if failed:
        print(f"failed: {len(failed)} of {len(elements)}", *failed, sep="\n  ", flush=True)
        return 1
    print(f"all {len(elements)} finished", flush=True)
    return 0


def run(element: Element, num_ranks: int | None) -> str | None:
    """Run one element with the deepspeed launcher. Returns why it failed, or None.

    Its output goes to RUN.log, the reason of a failure to RUN.failed. A run counts as finished by its results, not by
    its exit code: the launcher's is 0 even after a signal has killed it.
    """
    log, failed = _beside(element, "log"), _beside(element, "failed")
    log.parent.mkdir(parents=True, exist_ok=True)
    failed.unlink(missing_ok=True)
    with log.open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            _command(element, num_ranks), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait()
        except BaseException:
            _stop(process)
            raise
    if state(element) == "finished":
        return None
    printed = log.read_bytes()[start:].decode(errors="replace")
    reason = f"exit code {code}: {_cause_in(printed)}"
    failed.write_text(reason + "\n")
    return reason


def state(element: Element) -> str:
    """`finished`, `unfinished` or `not started`.

    A run with other settings in the element's folder counts as unfinished: train.py then refuses to start there and
    names the difference.
    """
    folder, config = Path(element.config.run_dir), element.config
    if not (folder / "config.yaml").exists():
        return "not started"
    try:
        saved = (folder / "config.yaml").read_text()
        results = json.loads((folder / "results.json").read_text())
        is_complete = results["student"] is not None or {*config.stages} <= {*results["settings"]["stages"]}
        if config.dtype == "auto":  # config.yaml has the dtype that auto stood for
            config = replace(config, dtype=saved_settings(saved)["dtype"])
        return "finished" if is_complete and not differences(config, saved) else "unfinished"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "unfinished"


def record_grid(grid_file: str, grid: Grid) -> None:
    """Write the names of the elements to RUNS/grids/, so that peakd-report can list those that are missing."""
    target = Path(grid.folder) / "grids" / f"{Path(grid_file).stem}.json"
    if Path(grid_file).resolve().parent == target.parent.resolve():
        return  # the copy that `submit` made after it recorded the grid
    names = [element.name for element in grid.elements]
    write_atomically(target, json.dumps(names, indent=0) + "\n")


def submit(
    grid_file: str,
    grid: Grid,
    numbers: Sequence[int],
    at_once: int | None,
    options: Sequence[str],
    words: Sequence[str],
) -> int:
    """Submit elements as one array job. Returns sbatch's exit code.

    The jobs read a copy of the grid file, so editing it does not change the numbers of elements that still wait.

    Args:
        numbers: The elements to submit.
        at_once: Most elements that run at a time; None for no limit.
        options: Options of sbatch.
        words: Options of train.py for every element.

    Raises:
        UserError: no sbatch on PATH, not in the repository's root, or `options` have an --array.
    """
    if any(re.match(r"(-a|--array)", option) for option in options):
        raise UserError(
            "--array follows from the grid; leave it out, and limit how many elements run at a time with --at_once"
        )
    if not ARRAY_SCRIPT.exists():
        raise UserError(f"there is no {ARRAY_SCRIPT} here; go to the repository's root, where the jobs run")
    record_grid(grid_file, grid)
    content = Path(grid_file).read_bytes()
    stem = f"{Path(grid_file).stem}-{hashlib.sha256(content).hexdigest()[:8]}"
    copy = Path(grid.folder) / "grids" / f"{stem}.yaml"
    if copy.resolve() != Path(grid_file).resolve():
        write_atomically(copy, content.decode())
    array = _ranges(numbers) + (f"%{at_once}" if at_once else "")
    command = ["sbatch", f"--array={array}", *options, str(ARRAY_SCRIPT), str(copy), *words]
    print(shlex.join(command), flush=True)
    try:
        return subprocess.run(command).returncode
    except FileNotFoundError as error:
        raise UserError("sbatch is not on PATH; use --submit on a cluster, or leave it out to run here") from error


def _element_at(grid: Grid, number: int) -> Element:
    if not 0 <= number < len(grid.elements):
        raise UserError(f"the grid has no element {number}; choose from 0 to {len(grid.elements) - 1}")
    return grid.elements[number]


def _command(element: Element, num_ranks: int | None) -> list[str]:
    with socket.socket() as probe:  # a free port: ranks of two programs on one port would join one process group
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(port)]
    ranks = [] if num_ranks is None else ["--num_gpus", str(num_ranks)]
    return [*launcher, *ranks, str(TRAIN), *element.words]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the launcher and its ranks, which share a process group, and wait until they are gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + KILL_AFTER_S
        try:
            os.killpg(process.pid, number)
            while time.monotonic() < deadline:
                process.poll()
                os.killpg(process.pid, 0)  # raises ProcessLookupError once all are gone
                time.sleep(0.1)
        except ProcessLookupError:
            return


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit, so that it ends the current run as Ctrl-C does."""

    def exit_program(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, exit_program)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _cause_in(printed: str) -> str:
    """The output's line that says why a run failed: train.py's error, else the first exception, else the last line."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    for pattern in (r"train\.py: error: ", r"(\[rank\d+\]: )?([\w.]+\.)?\w*(Error|Exception)\b.*: "):
        for line in lines:
            if re.match(pattern, line):
                return line
    return lines[-1] if lines else "it printed nothing"


def _beside(element: Element, suffix: str) -> Path:
    """RUN.suffix: a file beside the run folder, which train.py creates only after its checks."""
    return Path(f"{element.config.run_dir}.{suffix}")


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as sbatch's --array takes them: [0, 1, 2, 5] as 0-2,5."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ",".join(f"{group[0]}-{group[-1]}" if len(group) > 1 else str(group[0]) for group in groups)


if __name__ == "__main__":
    scripts.sweep()
