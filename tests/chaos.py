"""Disturb real runs at random moments, and prove that they end with the losses of a run that nothing disturbed.

    make chaos MINUTES=5        # or: python tests/chaos.py --minutes 5 --seed 7

Each run trains all three stages on two ranks, on tiny data. At a random moment something happens to it: a rank or the
launcher is killed, a rank is stopped for some seconds, the disk is full, or, between two starts, a file of the run
folder is cut short or has a byte flipped. Then the same command is started again, until the run is finished. The
program prints how each start ended, and compares metrics.jsonl to the last bit. Its exit code is 1 if a curve differs,
a start prints a traceback or hangs, or a run does not finish. A start that refuses a damaged file must name it; the
file is then removed or, if it is none of those that may be missing, put back, as a user would do from a copy.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import conftest
import psutil

SETTINGS = (
    "--task rte --num_hidden_layers 2 --epochs 3 --global_batch_size 16 --log_steps 1 --save_steps 3 --lr 1e-3 "
    "--dtype fp32 --rank_timeout 8"
).split()
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port={port}"],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "{port}"],
}
TIMES = {"samples_per_s", "tokens_per_s"}
START_LIMIT_S = 240.0
MAX_STARTS = 12
DISK_MIB = 3

Record = dict[str, Any]


class Chaos:
    """Runs, their disturbances, and what came of them."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.random = place, random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.rows: list[tuple[str, str, str, str]] = []
        self.faults: list[str] = []
        self.encoder = conftest.save_encoder(place / "encoder")
        for split, num_rows in (("train", conftest.NUM_TRAIN_ROWS), ("validation", conftest.NUM_DEV_ROWS)):
            conftest.write_split(place / "data", "rte", split, conftest.made_up_rows("rte", num_rows, f"rte {split}"))

    # -- One start ---------------------------------------------------------------------------------------------------

    def start(self, run_dir: Path, launcher: str) -> subprocess.Popen[str]:
        words = [word.format(port=free_port()) for word in LAUNCHERS[launcher]]
        paths = ["--teacher", str(self.encoder), "--data_dir", str(self.place / "data"), "--run_dir", str(run_dir)]
        command = [sys.executable, *words, str(conftest.ROOT / "peakd_ds" / "train.py"), *SETTINGS, *paths]
        env = {**conftest.ENVIRONMENT, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(conftest.ROOT)}
        log = (self.place / "start.log").open("w")
        return subprocess.Popen(
            command, env=env, cwd=self.place, stdout=log, stderr=log, text=True, start_new_session=True
        )

    def end(self, process: subprocess.Popen[str], run_dir: Path, what: str) -> tuple[int | None, str]:
        """Wait until the launcher and its ranks have ended: exit code, None if it hung, and what was printed."""
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and (process.poll() is None or ranks_of(run_dir)):
            time.sleep(0.2)
        is_hung = bool(process.poll() is None or ranks_of(run_dir))
        for one in [process, *ranks_of(run_dir)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        output = (self.place / "start.log").read_text(errors="replace")
        code = None if is_hung else process.returncode
        lines = [
            line for line in output.splitlines() if re.search(r"leaves:|error:|Error:|stopped|results\.json", line)
        ]
        lines = [line for line in lines if "launch.py" not in line and "torch/distributed/" not in line]
        self.rows.append(
            (what, "hung" if code is None else str(code), has_traceback(output), lines[-1] if lines else "-")
        )
        print(f"  {what}: exit {code}, {lines[-1][:160] if lines else '-'}", flush=True)
        if is_hung or has_traceback(output) == "traceback":
            self.faults.append(f"{what}: {'hung' if is_hung else 'a traceback'}\n{output[-6000:]}")
        return code, output

    # -- Disturbances ------------------------------------------------------------------------------------------------

    def disturb(self, process: subprocess.Popen[str], run_dir: Path, num_steps: int) -> str:
        """Do one thing to a start that is running, at a random step; return its name."""
        what = self.random.choice(("kill a rank", "kill the launcher", "stop a rank", "nothing"))
        if what == "nothing":
            return what
        now = len(records_of(run_dir))
        wanted = self.random.randint(now + 1, max(now + 1, min(num_steps, now + num_steps // 3)))
        deadline = time.monotonic() + START_LIMIT_S
        while process.poll() is None and time.monotonic() < deadline and len(records_of(run_dir)) < wanted:
            time.sleep(0.01)
        time.sleep(self.random.uniform(0, 0.3))
        ranks = ranks_of(run_dir)
        if process.poll() is not None or not ranks:
            return "nothing"
        victim = self.random.choice(ranks)
        with contextlib.suppress(psutil.NoSuchProcess):
            if what == "kill a rank":
                victim.kill()
            elif what == "kill the launcher":
                process.kill()
            else:
                seconds = self.random.choice((1.0, 4.0, 14.0))
                what = f"stop a rank for {seconds:g} s"
                victim.send_signal(signal.SIGSTOP)
                time.sleep(seconds)
                victim.send_signal(signal.SIGCONT)
        return what

    def damage(self, run_dir: Path) -> tuple[str, Path, bytes] | None:
        """Cut a random file of the run folder short or flip one of its bytes: what was done, the file, its content.

        Not metrics.jsonl, which holds the curve that is compared; tests/fuzz damages it.
        """
        files = [file for file in sorted(run_dir.rglob("*")) if file.is_file() and file.stat().st_size]
        files = [file for file in files if file.name != "metrics.jsonl"]
        if not files or self.random.random() < 0.5:
            return None
        file = self.random.choice(files)
        content = file.read_bytes()
        position = self.random.randrange(len(content))
        if self.random.random() < 0.5:
            what, damaged = "cut a file short", content[:position]
        else:
            what, damaged = "flip a byte", bytearray(content)
            damaged[position] ^= 1 << self.random.randrange(8)
        file.write_bytes(damaged)
        return what, file, content

    # -- One run -----------------------------------------------------------------------------------------------------

    def undisturbed(self) -> Path:
        run_dir = self.place / "undisturbed"
        code, output = self.end(self.start(run_dir, "torchrun"), run_dir, "undisturbed")
        if code != 0:
            raise SystemExit(f"the undisturbed run failed:\n{output[-4000:]}")
        return run_dir

    def disturbed(self, number: int, num_steps: int) -> Path | None:
        """One run, started again until it is finished; None if it does not finish."""
        run_dir = self.place / f"run-{number}"
        launcher = self.random.choice(sorted(LAUNCHERS))
        with small_disk(run_dir, self.random.random() < 0.3) as disk:
            if disk:
                self.counts["full disk"] += 1
            for _ in range(MAX_STARTS):
                harm = self.damage(run_dir)
                process = self.start(run_dir, launcher)
                what = self.disturb(process, run_dir, num_steps)
                self.counts[what] += what != "nothing"
                if harm:
                    name = harm[1].relative_to(run_dir)
                    self.counts[harm[0]] += 1
                    what = f"{harm[0]} ({name}), then {what}"
                code, output = self.end(process, run_dir, f"{launcher}, {'full disk, ' if disk else ''}{what}")
                is_refused = "train.py: error:" in output  # torchrun's exit code is 1 whatever its ranks' are
                if harm and is_refused and "No space left" not in output:
                    if str(harm[1].name) not in output and "damaged" not in output:
                        self.faults.append(f"{what}: refused without a word about the damaged file\n{output[-3000:]}")
                    harm[1].parent.mkdir(parents=True, exist_ok=True)
                    harm[1].write_bytes(harm[2])
                if disk and code != 0 and "No space left" in output:
                    grow(run_dir)
                if code == 0 and (run_dir / "results.json").exists():
                    target = self.place / f"finished-{number}.jsonl"
                    shutil.copy(run_dir / "metrics.jsonl", target)
                    return target
        self.faults.append(f"run {number} did not finish in {MAX_STARTS} starts")
        return None


# -- Tools -------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ranks_of(run_dir: Path) -> list[psutil.Process]:
    """The ranks of a run that live, by their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        is_rank = str(run_dir) in words and any(word.endswith("peakd_ds/train.py") for word in words[:4])
        if is_rank and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def records_of(file_or_folder: Path) -> list[Record]:
    """The whole lines of a metrics.jsonl, without what depends on the clock."""
    file = file_or_folder / "metrics.jsonl" if file_or_folder.is_dir() else file_or_folder
    if not file.exists():
        return []
    records = []
    for line in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            records.append({key: value for key, value in record.items() if key not in TIMES})
    return records


def has_traceback(output: str) -> str:
    """Whether a rank has printed a traceback. torchrun's own, about its children's exit codes, does not count."""
    for part in output.split("Traceback (most recent call last):")[1:]:
        if "ChildFailedError" not in part and "SignalException" not in part and "torch/distributed/run" not in part:
            return "traceback"
    return "one line"


@contextlib.contextmanager
def small_disk(run_dir: Path, is_wanted: bool) -> Any:
    """A tmpfs with room for less than a run at the run folder; yields whether there is one."""
    run_dir.mkdir(parents=True, exist_ok=True)
    is_mounted = (
        is_wanted
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(run_dir)], capture_output=True
        ).returncode
        == 0
    )
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(run_dir)], check=False)


def grow(run_dir: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=200m", str(run_dir)], check=True)


def differences(ours: list[Record], theirs: list[Record]) -> list[str]:
    """A line for each value that is not the same to the last bit."""
    if len(ours) != len(theirs):
        return [f"{len(ours)} records, but {len(theirs)} undisturbed"]
    return [
        f"{one.get('stage')} step {one.get('step')}: {key} is {one.get(key)!r}, but {other.get(key)!r} undisturbed"
        for one, other in zip(ours, theirs, strict=True)
        for key in one.keys() | other.keys()
        if one.get(key) != other.get(key)
    ]


def main() -> int:
    """Run for the given time; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="peakd-chaos-") as place:
        chaos = Chaos(Path(place), args.seed)
        expected = records_of(chaos.undisturbed())
        deadline, num_runs, num_equal = time.monotonic() + 60 * args.minutes, 0, 0
        while time.monotonic() < deadline:
            num_runs += 1
            print(f"run {num_runs}", flush=True)
            finished = chaos.disturbed(num_runs, len(expected))
            differing = differences(records_of(finished), expected) if finished else ["not finished"]
            num_equal += not differing
            chaos.faults += [f"run {num_runs}: {line}" for line in differing[:5]]
        print_table(chaos, num_runs, num_equal)
    return 1 if chaos.faults else 0


def print_table(chaos: Chaos, num_runs: int, num_equal: int) -> None:
    print("\n| disturbance | times |\n|---|---|")
    for what, number in sorted(chaos.counts.items()):
        if number:
            print(f"| {what} | {number} |")
    print("\n| start | exit code | printed | last line |\n|---|---|---|---|")
    for what, code, kind, line in chaos.rows:
        print(f"| {what} | {code} | {kind} | {line[:150].replace('|', '/')} |")
    print(f"\n{num_equal} of {num_runs} runs have the undisturbed curve to the last bit; {len(chaos.faults)} faults")
    for fault in chaos.faults:
        print(f"\nFAULT {fault}")


if __name__ == "__main__":
    os.chdir(tempfile.gettempdir())
    sys.exit(main())
