"""Evaluation that counts every sample exactly once on any number of ranks, and `peakd-eval` for a saved model.

peakd-eval --model RUN/student --task rte --data_dir DATA [--submission FOLDER]
"""

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from peakd_ds.data import reading
from peakd_ds.data.tasks import Task, get_task
from peakd_ds.data.tokens import Split, tokenize
from peakd_ds.errors import UserError
from peakd_ds.model import contract
from peakd_ds.model.build import load_pretrained
from peakd_ds.packed.packing import padded
from peakd_ds.programs import scripts
from peakd_ds.ranks import dist
from peakd_ds.ranks.device import device
from peakd_ds.ranks.outcome import noted
from peakd_ds.results import evaluation


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
        return f"{min(max(row.item(), 0.0), reading.MAX_SCORE):.3f}"
    number = int(row.argmax())
    names_wanted = task.base in ("mnli", "qnli", "rte")  # the server takes class names here, 0 and 1 elsewhere
    return task.label_names[number] if names_wanted else str(number)


@noted(marks_finished=False)
def run_rank(args: argparse.Namespace) -> None:
    """One rank of the program, from joining the others to leaving them."""
    main(args)


def main(args: argparse.Namespace) -> None:
    """Evaluate one saved model, alone or under any launcher."""
    dist.init()
    import peakd_ds.sps  # noqa: F401 - registers the student's form with transformers

    def load() -> tuple:
        task = get_task(args.task)
        if not (Path(args.model) / "config.json").exists():
            raise UserError(f"--model {args.model} is not a folder with config.json; give a saved classifier")
        model = load_pretrained(AutoModelForSequenceClassification, args.model, "model")
        source = contract.Pretrained(args.model, "model", model.config, is_classifier=True)
        contract.check_labels(task, source)
        most = model.config.max_position_embeddings
        if not 8 <= args.max_seq_length <= most or args.micro_batch_size < 1:
            raise UserError(
                f"--max_seq_length {args.max_seq_length} or --micro_batch_size {args.micro_batch_size} does not fit: "
                f"set 8 to {most} (the model's positions), and at least 1"
            )
        splits = reading.load_splits(task, args.data_dir, train=False)
        if args.submission and not any(name in splits for name in task.submission_files):
            files = " and ".join(f"{task.name}/{name}-*.parquet" for name in task.submission_files)
            raise UserError(
                f"task {task.name} has no test split in the data, so there is nothing to submit; "
                + (f"add {files}" if files else "GLUE takes no files of this task: leave --submission out")
            )
        return task, model.to(device()).eval(), contract.load_tokenizer(source), splits

    task, model, tokenizer, splits = dist.agree(load)

    def split_of(name: str) -> Split:
        return tokenize(task, splits[name], tokenizer, args.max_seq_length, None)

    def forward(inputs: dict[str, Any]) -> torch.Tensor:
        return model(**padded(inputs)).logits  # as any user of the saved model runs it

    dev = {name: split_of(name) for name in task.eval_splits}
    metrics, _, speed = evaluation.evaluate(forward, task, dev, args.micro_batch_size)
    if dist.is_main():
        print(
            json.dumps({"task": task.name, "model": args.model, "metrics": metrics, "samples_per_s": speed}, indent=2)
        )
    if args.submission:
        for name in (name for name in task.submission_files if name in splits):
            split = split_of(name)
            logits, _ = evaluation.predict(
                forward, split, np.arange(len(split)), args.micro_batch_size, task.num_labels
            )
            ids = splits[name]["idx"] if "idx" in splits[name].column_names else range(len(split))
            if dist.is_main():
                print(f"wrote {write_submission(task, name, logits, ids, Path(args.submission))}")


if __name__ == "__main__":
    scripts.evaluate()
