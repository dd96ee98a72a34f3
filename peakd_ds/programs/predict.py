"""peakd-predict: outputs of a saved classifier in a file, as `--teacher_outputs` reads it.

peakd-predict --model my-classifier --train_file rows.csv --out probs.parquet
"""

import argparse

import numpy as np
import torch

from peakd_ds.data.own_rows import ID, ROW
from peakd_ds.data.tokens import tokenize
from peakd_ds.packed.rows import padded_inputs
from peakd_ds.programs import glue_eval, scripts
from peakd_ds.ranks import dist
from peakd_ds.ranks.outcome import noted
from peakd_ds.results import evaluation
from peakd_ds.teacher import outputs_file


@noted(marks_finished=False)
def run_rank(args: argparse.Namespace) -> None:
    """Run `main` as one rank, and note how it ends."""
    main(args)


def main(args: argparse.Namespace) -> None:
    """Write the model's logits of all rows (collective): those of the train files, then unlabelled, then other rows.

    Raises:
        UserError: as peakd-eval, or a file that is there already.
    """
    dist.init()
    import peakd_ds.sps  # noqa: F401 - registers the student's form with transformers

    dist.on_main(lambda: glue_eval.check_new("out", args.out, (".parquet", ".jsonl")))
    task, model, tokenizer, splits, _ = dist.agree(lambda: glue_eval.load_inputs(args, with_train=True))
    logits: list[torch.Tensor] = []
    places: list[np.ndarray] = []
    ids: list[str] = []
    first = sum(len(rows) for name, rows in splits.items() if ROW in rows.column_names or name == "train")
    for name in dict.fromkeys(name for name in ("train", *task.read_splits) if name in splits):
        rows = splits[name]
        split = tokenize(task, rows, tokenizer, args.max_seq_length, None)
        found, _ = evaluation.predict(
            lambda inputs: model(**padded_inputs(model.config, inputs)).logits,
            split,
            np.arange(len(split)),
            args.micro_batch_size,
            task.num_labels,
        )
        if ROW in rows.column_names or name == "train":
            places.append(np.asarray(rows[ROW] if ROW in rows.column_names else range(len(rows))))
        else:
            places.append(np.arange(first, first + len(rows)))
            first += len(rows)
        logits.append(found)
        ids += list(rows[ID]) if ID in rows.column_names else [str(number) for number in places[-1]]
    order = np.argsort(np.concatenate(places), kind="stable")
    if dist.is_main():
        names = [ids[number] for number in order]
        outputs_file.write_outputs(args.out, names, torch.cat(logits)[torch.from_numpy(order)], task, args.id_column)
        print(f"wrote the outputs of {len(names):,} rows to {args.out}")


if __name__ == "__main__":
    scripts.predict()
