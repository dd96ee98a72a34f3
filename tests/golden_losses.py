"""Record the losses of small runs, or compare them with a record: the proof that a change changes no result.

    python tests/golden_losses.py record before.json      # on the commit that you start from
    python tests/golden_losses.py compare before.json     # on the commit with your change, on the same machine

The runs cover all three stages on one and two ranks: ZeRO stages 1 to 3, fp32 and bf16, an online, a cached and a
sharded teacher, accumulation, replicated and sharded data, classes and scores. Losses, gradient norms, evaluation
metrics and the exported weights are compared to the last bit, so both records must come from one machine with the same
versions of torch and DeepSpeed. `--python` names another interpreter, such as that of an older checkout.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import conftest

COMMON = "--num_hidden_layers 2 --epochs 2 --global_batch_size 16 --lr 2e-3 --log_steps 1 --save_steps 4"
RUNS: dict[str, tuple[int, str]] = {
    "defaults": (2, "--task sst2 --dtype fp32 --layer_map 1:1,2:2"),
    "cached_bf16": (2, "--task rte --dtype bf16 --layer_map 1:1,2:3 --teacher_mode cached --micro_batch_size 4"),
    "zero3_tokens": (
        2,
        "--task mnli --student_ds_config zero3_fp32 --teacher_ds_config teacher_zero3 --layer_map 1:2 "
        "--hidden_loss tokens --beta 0.1",
    ),
    "one_rank_zero2": (1, "--task rte --student_ds_config zero2_fp32 --layer_map 2:2 --select_on dev"),
    "sharded": (2, "--task sst2 --dtype fp32 --layer_map 1:1 --data_placement sharded --shard_dir {shards}"),
    "scores": (2, "--task stsb --dtype bf16 --layer_map 1:1 --sharing cycle_rev --max_grad_norm 0.5"),
}
"""Number of ranks and options by name."""
TIMES = {"samples_per_s", "tokens_per_s"}


def main() -> int:
    """Run the command; return the exit code, 1 if a value differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path, help="JSON file to write, or to compare with")
    parser.add_argument("--only", choices=RUNS, nargs="+", default=list(RUNS), help="these runs alone")
    parser.add_argument("--python", default=sys.executable, help="interpreter that runs peakd_ds")
    args = parser.parse_args()
    found = {name: run(name, args.python) for name in args.only}
    if args.action == "record":
        args.file.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    recorded = json.loads(args.file.read_text())
    differing = [line for name in args.only for line in differences(name, recorded[name], found[name])]
    print("\n".join(differing[:20]) or f"equal to the last bit: {', '.join(args.only)}")
    return 1 if differing else 0


def run(name: str, python: str) -> dict[str, Any]:
    """The records of metrics.jsonl without their times, and checksums of the exported weights."""
    num_ranks, options = RUNS[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        encoder = conftest.save_encoder(folder / "encoder")
        for task in ("sst2", "rte", "stsb", "mnli"):
            for split in ("train", "validation", "validation_matched", "validation_mismatched"):
                num_rows = conftest.NUM_TRAIN_ROWS if split == "train" else conftest.NUM_DEV_ROWS
                conftest.write_split(
                    folder / "data", task, split, conftest.made_up_rows(task, num_rows, f"{task} {split}")
                )
        data = ["--teacher", str(encoder), "--data_dir", str(folder / "data")]
        if "{shards}" in options:
            script = Path(python).with_name("peakd-shard")
            call([str(script), "--task", "sst2", *data, "--shard_dir", str(folder / "shards")])
        words = [*COMMON.split(), *options.format(shards=folder / "shards").split(), *data]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}", "-m", "peakd_ds"]
        call([python, *launcher, *words, "--run_dir", str(folder / "run")])
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        records = [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]
        weights = {
            form: hashlib.sha256((folder / "run" / form / "model.safetensors").read_bytes()).hexdigest()
            for form in ("teacher", "student", "student_unrolled")
        }
        print(
            f"{name}: {len(records)} records, last loss {[r['loss'] for r in records if 'loss' in r][-1]}", flush=True
        )
        return {"records": records, "weights": weights}


def call(command: list[str]) -> None:
    """Run a program; its output is shown if it fails."""
    environment = {**conftest.ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=os.sep)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")


def differences(name: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each recorded value that is not equal now; fields that are new say nothing of a change."""
    if len(before["records"]) != len(now["records"]):
        return [f"{name}: {len(before['records'])} records before, {len(now['records'])} now"]
    lines = []
    for old, new in zip(before["records"], now["records"], strict=True):
        place = f"{name} {old['stage']} step {old['step']}"
        lines += [
            f"{place}: {key} was {old.get(key)!r}, is {new.get(key)!r}" for key in old if old.get(key) != new.get(key)
        ]
    return lines + [
        f"{name}: other weights in {form}/"
        for form, digest in before["weights"].items()
        if now["weights"][form] != digest
    ]


if __name__ == "__main__":
    sys.exit(main())
