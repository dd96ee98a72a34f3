"""peakd-eval: GLUE metrics and test files of a saved classifier, on one rank or many.

peakd-eval --model RUN/student --task rte --data_dir DATA [--submission FOLDER]
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from peakd_ds.data import reading
from peakd_ds.data.own_rows import ID, ROW
from peakd_ds.data.tasks import Task, get_task
from peakd_ds.data.tokens import Split, tokenize
from peakd_ds.errors import UserError
from peakd_ds.model import contract
from peakd_ds.model.build import load_pretrained
from peakd_ds.packed.rows import padded_inputs
from peakd_ds.programs import scripts
from peakd_ds.ranks import dist
from peakd_ds.ranks.device import device
from peakd_ds.ranks.outcome import noted
from peakd_ds.results import evaluation
from peakd_ds.teacher import outputs_file


@noted(marks_finished=False)
def run_rank(args: argparse.Namespace) -> None:
    """Run `main` as one rank, and note how it ends."""
    main(args)


def main(args: argparse.Namespace) -> None:
    """Print a saved model's metrics as JSON, and write GLUE's test files with `--submission` (collective).

    Raises:
        UserError: a model, task or data that cannot be read or do not fit each other, or nothing to submit.
    """
    dist.init()
    import peakd_ds.sps  # noqa: F401 - registers the student's form with transformers

    if args.predictions:
        dist.on_main(lambda: check_new("predictions", args.predictions, (".csv", ".tsv", ".jsonl", ".parquet")))
    task, model, tokenizer, splits, notes = dist.agree(lambda: load_inputs(args))

    def tokenized(name: str) -> Split:
        return tokenize(task, splits[name], tokenizer, args.max_seq_length, None)

    def forward(inputs: dict[str, Any]) -> torch.Tensor:
        return model(**padded_inputs(model.config, inputs)).logits  # padded, as users of the saved model run it

    dev = {name: tokenized(name) for name in task.eval_splits}
    metrics, logits_of, speed = evaluation.evaluate(forward, task, dev, args.micro_batch_size)
    if args.predictions:
        name = task.eval_splits[0]
        row_names = ids_of(splits[name])
        dist.on_main(
            lambda: outputs_file.write_predictions(args.predictions, row_names, logits_of[name], task, args.id_column)
        )
    if dist.is_main():
        for note in notes:
            print(note, file=sys.stderr)
        result = {"task": task.name, "model": args.model, "metrics": metrics, "samples_per_s": speed}
        print(json.dumps(result, indent=2))
    if args.submission:
        for name in (name for name in task.submission_files if name in splits):
            split = tokenized(name)
            rows = np.arange(len(split))
            logits, _ = evaluation.predict(forward, split, rows, args.micro_batch_size, task.num_labels)
            ids = splits[name]["idx"] if "idx" in splits[name].column_names else range(len(split))
            if dist.is_main():
                print(f"wrote {write_submission(task, name, logits, ids, Path(args.submission))}")


def load_inputs(
    args: argparse.Namespace, with_train: bool = False
) -> tuple[Task, PreTrainedModel, PreTrainedTokenizerBase, dict[str, datasets.Dataset], tuple[str, ...]]:
    """The task, the model on this rank's device, its tokenizer, the splits, and notes on the rows.

    Raises:
        UserError: as `main`.
    """
    if not Path(args.model, "config.json").is_file():
        raise UserError(f"--model {args.model} is not a folder with config.json; give a saved classifier")
    source = contract.find_encoder(args.model, "model", takes_shared=True)
    if not source.is_classifier:
        raise UserError(f"{source.name} is an encoder without a head for a task; give a saved classifier")
    contract.check_length(args.max_seq_length, source)
    tokenizer = contract.load_tokenizer(source)
    task, splits, notes = reading.load(
        scripts.data_settings(args), contract.classes_of(source), train=with_train, needs_train=False
    )
    contract.check_labels(task, source)
    if args.submission and not any(name in splits for name in task.submission_files):
        files = " and ".join(f"{task.name}/{name}-*.parquet" for name in task.submission_files)
        raise UserError(
            f"task {task.name} has no test split in the data, so there is nothing to submit; "
            + (f"add {files}" if files else "GLUE takes no files of this task: leave --submission out")
        )
    model = load_pretrained(AutoModelForSequenceClassification, args.model, "model", config=source.config)
    return task, model.to(device()).eval(), tokenizer, splits, notes


def check_new(option: str, file: Path, endings: Sequence[str]) -> None:
    """Raise UserError unless a file with a known ending can be written there, and none is there."""
    if file.suffix not in endings:
        raise UserError(f"--{option} {file} must end with {' or '.join(endings)}; give such a name")
    if file.exists():
        raise UserError(f"--{option} {file} is there already; nothing was changed: give another name")
    if not file.absolute().parent.is_dir():
        raise UserError(f"--{option} {file} lies in no folder that exists; give one that does")


def ids_of(rows: datasets.Dataset) -> list[str]:
    """The name of each row: its id if the files have one, else its number."""
    numbers = rows[ROW] if ROW in rows.column_names else range(len(rows))
    return list(rows[ID]) if ID in rows.column_names else list(map(str, numbers))


# -- Files for the GLUE server -----------------------------------------------------------------------------------------


def write_submission(task: Task, split_name: str, logits: torch.Tensor, ids: Sequence[int], folder: Path) -> Path:
    """Write a test file for the GLUE server: index and prediction (class name or number, or score), tab-separated.

    Args:
        split_name: A test split of the task.
        logits: float [N, C].
        ids: Index of each row.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / task.submission_files[split_name]
    with file.open("w", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "prediction"])
        for number, row in zip(ids, logits, strict=True):
            writer.writerow([number, _prediction(task, row)])
    return file


def _prediction(task: Task, logits: torch.Tensor) -> str:
    """What the server takes for a row with these logits [C]: a class name, a class number, or a score from 0 to 5."""
    if task.is_regression:
        return f"{min(max(logits.item(), 0.0), reading.MAX_SCORE):.3f}"
    number = int(logits.argmax())
    number = task.official_ids[number] if task.official_ids else number
    takes_names = task.base in ("mnli", "qnli", "rte")  # for the other tasks the server takes numbers
    return get_task(task.base).label_names[number] if takes_names else str(number)


if __name__ == "__main__":
    scripts.evaluate()
