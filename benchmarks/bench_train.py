"""Train the same student with our program and with the alternatives, in turn, and compare the times.

    python benchmarks/bench_train.py --encoder demo/encoder                      every case, three times each
    python benchmarks/bench_train.py --encoder demo/encoder --cases mrpc_n1 --minutes 15

Each run has its own process; one runs at a time, on all cores that this process may use, without a GPU. The systems
take turns in rounds, so that other load on the machine affects them equally; the seed is the number of the round.
Writes bench.json, a table (bench.md) and a plot (bench.png); a new row replaces the old one of the same case and
system. cases.py has the recipe, bench_runs.py runs one system once, baselines.py has the other systems.
"""

import argparse
import contextlib
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from arithmetic import run_flops
from bench_rows import Row, save
from bench_runs import (
    HERE,
    NO_GPU,
    Prepared,
    RunFailed,
    check_inputs,
    machine_here,
    prepare,
    run_baseline,
    run_ours,
    watch,
    words_of,
)
from cases import BASELINES, CASES, EPOCHS, STEP_CASE, SYSTEMS, Case
from facts import commit, version_of

RESULTS = HERE / "results"
BUDGET_RECIPE_STEPS = 16
VERSIONS = ("torch", "transformers", "deepspeed", "accelerate", "textbrewer", "numpy", "datasets")


# -- Turns -------------------------------------------------------------------------------------------------------------


def take_turns(
    systems: Sequence[str],
    repeats: int,
    run: Callable[[str, int], Row],
    most_repeats: Callable[[str], int],
    seconds_left: Callable[[], float],
) -> dict[str, list[Row] | str]:
    """Run the systems in rounds.

    All systems run in the first round. Later a system runs again only if its last run would fit into the time left.

    Args:
        run: Runs a system with a seed; raises RunFailed.
        most_repeats: Most runs of a system.
        seconds_left: Time left [s].

    Returns:
        The runs of each system, or the message of the one that failed.
    """
    rows: dict[str, list[Row]] = {system: [] for system in systems}
    errors: dict[str, str] = {}
    taken: dict[str, float] = {}
    for seed in range(repeats):
        for system in systems:
            if system in errors:
                continue
            if seed >= most_repeats(system):
                if seed == most_repeats(system):
                    print(f"  {system}: slow, so it runs only {seed} of {repeats} times", flush=True)
                continue
            if seed and taken[system] > seconds_left():
                print(
                    f"  {system}, run {seed + 1} of {repeats}: skipped, because it takes {taken[system]:.0f} s and "
                    f"--minutes leaves {max(0, seconds_left()):.0f} s",
                    flush=True,
                )
                continue
            began = time.perf_counter()
            try:
                rows[system].append(run(system, seed))
            except RunFailed as error:
                errors[system] = str(error)
                print(f"  {system}: failed: {error}", flush=True)
                continue
            taken[system] = time.perf_counter() - began
            row = rows[system][-1]
            scaled = (
                f" (scaled up from {row['extrapolated_from_steps']} steps)" if row["extrapolated_from_steps"] else ""
            )
            print(f"  {system}, run {seed + 1} of {repeats}: {row['seconds']:.1f} s{scaled}", flush=True)
    return {system: errors.get(system) or rows[system] for system in systems}


def summarize(prepared: Prepared, system: str, runs: list[Row] | str, where: Row) -> Row:
    """The row of bench.json for a system's runs, or for the message of the one that failed."""
    key = {"case": prepared.case.name, "system": system}
    if isinstance(runs, str):
        return {**key, "error": runs, **where}
    seconds = [run["seconds"] for run in runs]
    median = statistics.median(seconds)
    scores = [run["dev_score"] for run in runs]
    scaled = runs[0]["extrapolated_from_steps"]
    return {
        **key,
        "seconds": {"median": median, "min": min(seconds), "max": max(seconds)},
        "dev_score": [] if prepared.case.is_wide else [score for score in scores if score is not None],
        "peak_memory_mib": statistics.median(run["peak_memory_mib"] for run in runs),
        "padding_share": (padding_share := statistics.mean(run["padding_share"] for run in runs)),
        "samples_per_s": EPOCHS * len(prepared.lengths) / median,
        "tokens_per_s": EPOCHS * sum(prepared.lengths) / median,
        "tflop": tflop(prepared, system, padding_share),
        "runs": len(runs),
        **({} if scaled is None else {"extrapolated_from_steps": scaled}),
        **where,
    }


def tflop(prepared: Prepared, system: str, padding_share: float) -> float:
    """Multiplications and additions in the matrix products of a run of the system [10^12]."""
    from transformers import AutoConfig

    from peakd_ds.sps import execution_order

    teacher, student = (AutoConfig.from_pretrained(folder) for folder in (prepared.teacher, prepared.encoder))
    depth = len(execution_order(prepared.case.num_stored_layers, "sps"))
    return run_flops(system, teacher, student, depth, prepared.lengths, padding_share) / 1e12


# -- The command line --------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Checked options; argparse exits with code 2 if one is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cases", default=",".join(CASES), help=f"comma-separated, of {', '.join(CASES)}; default all")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help=f"of {', '.join(SYSTEMS)}; default all")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each system, with seeds 0, 1, ...; default 3")
    parser.add_argument(
        "--minutes",
        type=float,
        default=0,
        help="for each case: after the first round, no run starts that would end later; default 0, no limit",
    )
    parser.add_argument(
        "--recipe_steps",
        type=int,
        help="the published recipe stops after this many steps and is scaled up; 0: all steps, once; default 0, but "
        f"{CASES['wide_n3'].recipe_steps} in wide_n3, and {BUDGET_RECIPE_STEPS} with --minutes",
    )
    parser.add_argument("--encoder", type=Path, default=Path("demo/encoder"), help="6 x 384; default demo/encoder")
    parser.add_argument("--data_dir", default=os.environ.get("PEAKD_DATA_DIR", ""), help="as for train.py")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results; default benchmarks/results")
    parser.add_argument("--work_dir", type=Path, default=Path("build/bench"), help="default build/bench")
    parser.add_argument("--no_step", action="store_true", help="leave out the measurement of a single step")
    arguments = parser.parse_args(argv)
    for option, known in (("cases", CASES), ("systems", SYSTEMS)):
        chosen = getattr(arguments, option).replace(",", " ").split()
        unknown = [name for name in chosen if name not in known]
        if unknown or not chosen:
            parser.error(f"--{option} {' '.join(unknown) or 'nothing'}: choose from {', '.join(known)}")
        setattr(arguments, option, [name for name in known if name in chosen])
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats}: each system must run at least once; set 1 or more")
    if not 0 <= arguments.minutes < float("inf"):
        parser.error(f"--minutes {arguments.minutes}: must be 0 (no limit) or more; leave it out for no limit")
    if arguments.recipe_steps is not None and arguments.recipe_steps < 0:
        parser.error(f"--recipe_steps {arguments.recipe_steps}: must be 0 (all) or more; leave it out for the default")
    check_inputs(parser, arguments.encoder, arguments.data_dir, [CASES[case].task for case in arguments.cases])
    problem = _problem_with(arguments.out)
    if problem is not None:
        parser.error(problem)
    return arguments


def _problem_with(out: Path) -> str | None:
    """Why results cannot go into the folder, if its rows are of another machine or cannot be read; else None."""
    file = out / "bench.json"
    if not file.exists():
        return None
    try:
        old = json.loads(file.read_text())
        there = old["machine"]
        for row in old["cases"]:
            row["case"], row["system"], "error" in row or row["tflop"]
    except (ValueError, KeyError, TypeError) as error:
        return f"--out {out}: bench.json there is damaged ({error!r}); delete it, or take another folder"
    if there != machine_here():
        return f"--out {out}: its rows are of another machine ({there}), this is {machine_here()}; take another folder"
    return None


def measure_case(arguments: argparse.Namespace, case: Case, where: Row, began: float) -> list[Row]:
    """Run a case and return its rows. The --minutes count from `began`, a time by perf_counter [s]."""
    limit_s = arguments.minutes * 60 or float("inf")
    work = arguments.work_dir.absolute()
    print(f"{case.name}:", flush=True)
    prepared = prepare(case, arguments.encoder.absolute(), arguments.data_dir, work)
    max_steps = case.recipe_steps if not arguments.minutes else case.recipe_steps or BUDGET_RECIPE_STEPS
    if arguments.recipe_steps is not None:
        max_steps = arguments.recipe_steps or None

    def run(system: str, seed: int) -> Row:
        if system in BASELINES:
            return run_baseline(system, prepared, seed, work, max_steps)
        return run_ours(prepared, system.removeprefix("ours_"), seed, work)

    def most_repeats(
        system: str,
    ) -> int:  # all its steps take too long to repeat
        return 1 if system == "published_recipe" and max_steps is None else arguments.repeats

    runs = take_turns(
        arguments.systems, arguments.repeats, run, most_repeats, lambda: limit_s - (time.perf_counter() - began)
    )
    return [summarize(prepared, system, runs[system], where) for system in arguments.systems]


def measure_step(arguments: argparse.Namespace) -> Row:
    """Run bench_step.py in its own process and return its result. Raises RunFailed as `watch`."""
    work = arguments.work_dir.absolute()
    prepared = prepare(CASES[STEP_CASE], arguments.encoder.absolute(), arguments.data_dir, work)
    file = work / "step.json"
    options = {
        "task": prepared.case.data_name,
        "data_dir": prepared.data_dir,
        "teacher": prepared.teacher,
        "encoder": prepared.encoder,
        "num_stored_layers": prepared.case.num_stored_layers,
        "output": file,
    }
    watch([sys.executable, str(HERE / "bench_step.py"), *words_of(options)], work / "logs" / "step.log")
    return json.loads(file.read_text())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases and write the results. Returns the exit code: 1 if a system failed."""
    arguments = parse(argv)
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ |= NO_GPU  # so that this process sees the same machine as the runs
    facts: Row = {
        "machine": machine_here(),
        "versions": {name: version_of(name) for name in VERSIONS},
        "commit": commit(),
    }
    where = {"date": datetime.date.today().isoformat(), "commit": facts["commit"]}
    has_failed, began = False, time.perf_counter()
    if not arguments.no_step:
        try:
            facts |= measure_step(arguments)
            print(f"step: {', '.join(f'{name} {value}' for name, value in facts.items() if isinstance(value, float))}")
        except RunFailed as error:
            has_failed = True
            print(f"step: failed: {error}")
    for name in arguments.cases:
        rows = measure_case(arguments, CASES[name], where, began)
        has_failed |= any("error" in row for row in rows)
        save(arguments.out, rows, facts)  # after each case, so that a stop loses at most one
        began = time.perf_counter()
    print((arguments.out / "bench.md").read_text())
    return 1 if has_failed else 0


if __name__ == "__main__":
    sys.exit(main())
