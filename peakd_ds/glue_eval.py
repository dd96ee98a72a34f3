"""Evaluation that counts every sample exactly once on any number of ranks, and `peakd-eval` for a saved model.

peakd-eval --model RUN/student --task rte --data_dir DATA [--submission FOLDER]
"""

import argparse
import csv
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from peakd_ds import data, dist, modeling, slurm_job
from peakd_ds.config import UserError, exit_with
from peakd_ds.data import Split
from peakd_ds.packing import padded
from peakd_ds.tasks import Task, compute_metrics, get_task

Forward = Callable[[dict[str, Any]], torch.Tensor]
"""Packed inputs of a micro-batch -> logits [B, C]."""


@torch.no_grad()
def predict(
    forward: Forward, split: Split, rows: np.ndarray, micro_batch_size: int, num_columns: int
) -> tuple[torch.Tensor, float]:
    """Logits of the given rows (collective), in their order, and the seconds it took.

    Every rank makes the same number of forward passes, as sharded engines need, and gets the whole answer.

    Returns:
        float32 [N, num_columns] on the CPU; wall-clock seconds.
    """
    start = time.perf_counter()
    place = torch.full((len(split),), -1, dtype=torch.int64)
    place[torch.from_numpy(rows)] = torch.arange(len(rows))
    logits = torch.zeros(len(rows), num_columns, device=dist.device())
    for batch in data.eval_batches(split, rows, micro_batch_size):
        answer = forward(batch.inputs)[: batch.num_real].float()
        logits[place[batch.rows[: batch.num_real]].to(logits.device)] = answer
    logits = dist.all_reduce(logits).cpu()  # each row is zero on all ranks but one
    return logits, time.perf_counter() - start


def evaluate(
    forward: Forward, task: Task, dev: dict[str, Split], micro_batch_size: int
) -> tuple[dict[str, float], dict[str, torch.Tensor], float]:
    """Official metrics on every eval split of the task (collective).

    Returns:
        Metrics, those of a second split with its suffix (mnli: accuracy and accuracy_mismatched); logits [N, C] by
        split; samples per second over all ranks.
    """
    metrics: dict[str, float] = {}
    logits: dict[str, torch.Tensor] = {}
    num_samples, seconds = 0, 0.0
    for name, split in dev.items():
        rows = np.arange(len(split))
        logits[name], spent = predict(forward, split, rows, micro_batch_size, task.num_labels)
        suffix = "" if name == task.eval_splits[0] else "_" + name.removeprefix("validation_")
        metrics |= {key + suffix: value for key, value in compute_metrics(task, logits[name], split.labels).items()}
        num_samples, seconds = num_samples + len(split), seconds + spent
    return metrics, logits, num_samples / seconds


def agreement(task: Task, logits: torch.Tensor, teacher_logits: torch.Tensor) -> float:
    """Share of samples with the teacher's class; for regression, Pearson correlation with the teacher's scores."""
    if task.is_regression:
        if len(logits) < 2:
            return 0.0
        return float(np.nan_to_num(torch.corrcoef(torch.stack([logits[:, 0], teacher_logits[:, 0]]))[0, 1].item()))
    return (logits.argmax(-1) == teacher_logits.argmax(-1)).float().mean().item()


def write_submission(task: Task, split_name: str, logits: torch.Tensor, ids: Sequence[int], folder: Path) -> Path:
    """A test file as the GLUE server wants it: tab-separated index and prediction (class name, or score 0 to 5)."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / task.submission_files[split_name]
    with file.open("w", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "prediction"])
        for number, row in zip(ids, logits, strict=True):
            writer.writerow([number, _submitted(task, row)])
    return file


def _submitted(task: Task, row: torch.Tensor) -> str:
    if task.is_regression:
        return f"{min(max(row.item(), 0.0), data.MAX_SCORE):.3f}"
    number = int(row.argmax())
    names_wanted = task.base in ("mnli", "qnli", "rte")  # the server takes class names here, 0 and 1 elsewhere
    return task.label_names[number] if names_wanted else str(number)


def main(argv: Sequence[str]) -> None:
    """Evaluate one saved model, alone or under any launcher."""
    parser = argparse.ArgumentParser(prog="peakd-eval", description="GLUE metrics of a saved classifier.")
    parser.add_argument("--model", required=True, help="folder of a student (either form) or teacher")
    parser.add_argument("--task", required=True, help="task name as for train.py")
    parser.add_argument("--data_dir", default="", help="as for train.py [default $PEAKD_DATA_DIR, else the hub]")
    parser.add_argument("--max_seq_length", type=int, default=128, help="[tokens; default 128]")
    parser.add_argument("--micro_batch_size", type=int, default=32, help="[samples per rank; default 32]")
    parser.add_argument("--submission", metavar="FOLDER", help="also write GLUE test files here, where test splits are")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    dist.init()
    import peakd_ds.sps  # noqa: F401 - registers the student's form with transformers

    def load() -> tuple:
        task = get_task(args.task)
        if not (Path(args.model) / "config.json").exists():
            raise UserError(f"--model {args.model} is not a folder with config.json; give a saved classifier")
        model = modeling.load_pretrained(AutoModelForSequenceClassification, args.model, "model")
        source = modeling.Pretrained(args.model, "model", model.config, is_classifier=True)
        modeling.check_labels(task, source)
        most = model.config.max_position_embeddings
        if not 8 <= args.max_seq_length <= most or args.micro_batch_size < 1:
            raise UserError(
                f"--max_seq_length {args.max_seq_length} or --micro_batch_size {args.micro_batch_size} does not fit: "
                f"set 8 to {most} (the model's positions), and at least 1"
            )
        splits = data.load_splits(task, args.data_dir or os.environ.get("PEAKD_DATA_DIR", ""), train=False)
        if args.submission and not any(name in splits for name in task.submission_files):
            files = " and ".join(f"{task.name}/{name}-*.parquet" for name in task.submission_files)
            raise UserError(
                f"task {task.name} has no test split in the data, so there is nothing to submit; "
                + (f"add {files}" if files else "GLUE takes no files of this task: leave --submission out")
            )
        return task, model.to(dist.device()).eval(), modeling.load_tokenizer(source), splits

    task, model, tokenizer, splits = dist.agree(load)

    def split_of(name: str) -> Split:
        return data.tokenize(task, splits[name], tokenizer, args.max_seq_length, None)

    def forward(inputs: dict[str, Any]) -> torch.Tensor:
        return model(**padded(inputs)).logits  # as any user of the saved model runs it

    dev = {name: split_of(name) for name in task.eval_splits}
    metrics, _, speed = evaluate(forward, task, dev, args.micro_batch_size)
    if dist.is_main():
        print(
            json.dumps({"task": task.name, "model": args.model, "metrics": metrics, "samples_per_s": speed}, indent=2)
        )
    if args.submission:
        for name in (name for name in task.submission_files if name in splits):
            split = split_of(name)
            logits, _ = predict(forward, split, np.arange(len(split)), args.micro_batch_size, task.num_labels)
            ids = splits[name]["idx"] if "idx" in splits[name].column_names else range(len(split))
            if dist.is_main():
                print(f"wrote {write_submission(task, name, logits, ids, Path(args.submission))}")


def cli() -> None:
    """Console script."""
    try:
        with slurm_job.noted(tells_end=False):
            main(sys.argv[1:])
    except (UserError, OSError) as error:
        exit_with(error, "peakd-eval")


if __name__ == "__main__":
    cli()
