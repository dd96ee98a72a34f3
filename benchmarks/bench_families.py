"""Measure what a student and a teacher of each family cost, against BERT at the same sizes.

    python benchmarks/bench_families.py [--families roberta,mpnet] [--dtypes bf16]

The student has 3 stored layers of 384, 12 heads, a feed-forward width of 1536 and a vocabulary of 30,522, and runs as 6
under SPS; a step is its forward pass, the distillation loss, the backward pass, clipping and AdamW, without an engine
(bench_step.BareLoop). The teacher has 6 such layers, and only its forward pass is timed. All have random weights and
read the same token ids: 32 rows whose lengths are those of sentence pairs of mrpc (LENGTHS). BERT and the other family
take turns, batch by batch, in one process; a row of families.csv is the median of the ratios. Families whose rows are
padded compute padding too.
"""

import argparse
import csv
import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_rows import Row
from bench_runs import HERE, machine_here
from bench_step import BareLoop
from cases import ALPHA, BETA, DROPOUT, TEMPERATURE
from facts import commit, version_of
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from peakd_ds import families
from peakd_ds.config import RunConfig
from peakd_ds.data.tasks import get_task
from peakd_ds.engine.ds_config import DTYPES
from peakd_ds.kernels import distillation_loss
from peakd_ds.model.build import (
    MatchedStudent,
    Teacher,
    build_classifier,
    layer_pairs,
    student_config,
    task_head,
    teacher_config,
)
from peakd_ds.model.sizes import count_parameters
from peakd_ds.packed.packing import pack
from peakd_ds.ranks import host
from peakd_ds.results.log import quiet_libraries

LENGTHS = (
    *(81, 75, 72, 69, 68, 66, 64, 63, 62, 61, 60, 59, 58, 56, 55, 54),
    *(53, 52, 50, 49, 48, 46, 45, 44, 43, 41, 40, 38, 37, 35, 32, 28),
)
"""Tokens of the 32 rows, the longest first, as batches of a run have them: quantiles of mrpc's training rows by BERT's
tokenizer, whose mean is theirs, 53."""
VOCABULARY = 30522
TASK = "mrpc"
KINDS = ("student", "teacher")
COLUMNS = ("kind", "family", "dtype", "times_bert", "ms", "bert_ms", "layer_parameters", "padded")


def config_of(model_type: str, num_layers: int, hidden: int = 384, vocab_size: int = VOCABULARY) -> Any:
    """A config of a family at the sizes of the comparison; what is not a size is as the family has it.

    deberta-v2 attends as deberta-v3 checkpoints do.
    """
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 12,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 514,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "cls_token_id": 0,
        "sep_token_id": 2,
    }
    special: dict[str, dict[str, Any]] = {
        "electra": {"embedding_size": hidden},
        "albert": {"embedding_size": hidden},
        "deberta-v2": {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "position_buckets": 256,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    }
    if families.FAMILIES[model_type].is_decoder:
        special[model_type] = {"num_key_value_heads": 12, "head_dim": hidden // 12}
    kind = CONFIG_MAPPING[model_type]
    names = {kind.attribute_map.get(name, name): value for name, value in (sizes | special.get(model_type, {})).items()}
    return kind(**names)


def inputs_of(lengths: Sequence[int], vocab_size: int = VOCABULARY) -> dict[str, Any]:
    """Packed rows of these lengths, of token ids that no family takes for padding."""
    generator = np.random.default_rng(0)
    rows = [generator.integers(5, vocab_size, length) for length in lengths]
    return pack(rows, [row * 0 for row in rows])


def student_step(model_type: str, dtype: str, inputs: dict[str, Any], **sizes: int) -> tuple[Callable[[], None], int]:
    """(a training step of a family's student, the parameters of its stored layers)."""
    settings = RunConfig(task=TASK, teacher="t", run_dir="r", num_hidden_layers=3, dropout=DROPOUT)
    student = build_classifier(student_config(settings, config_of(model_type, 6, **sizes), task_head(get_task(TASK))))
    module = MatchedStudent(student, layer_pairs("skip", 6, 6), student.config.hidden_size, "cls")
    loop, size = BareLoop(module, DTYPES[dtype], num_steps=1000), inputs["packing"].num_rows
    teacher_logits, labels = torch.randn(size, 2), torch.arange(size) % 2
    teacher_hidden = [torch.randn(size, student.config.hidden_size).to(DTYPES[dtype]) for _ in module.pairs]
    weights: dict[str, Any] = {"temperature": TEMPERATURE, "alpha": ALPHA, "beta": BETA}

    def loss(module: nn.Module) -> Tensor:
        logits, hidden = module(**inputs)
        return distillation_loss(logits, teacher_logits, labels, hidden, teacher_hidden, **weights).total

    def step() -> None:
        loop.step(loss)

    return step, layer_parameters(student)


def teacher_forward(
    model_type: str, dtype: str, inputs: dict[str, Any], **sizes: int
) -> tuple[Callable[[], None], int]:
    """(a forward pass of a family's teacher, the parameters of its layers)."""
    settings = RunConfig(task=TASK, teacher="t", run_dir="r")
    model = build_classifier(teacher_config(settings, get_task(TASK), config_of(model_type, 6, **sizes)))
    pooling = "last" if families.FAMILIES[model_type].is_decoder else "cls"
    module = Teacher(model, pooling).to(DTYPES[dtype]).eval()

    def forward() -> None:
        with torch.no_grad():
            module(range(1, 6), **inputs)

    return forward, layer_parameters(model)


def layer_parameters(model: PreTrainedModel) -> int:
    """The parameters of a model's layers; one that is shared counts once."""
    return count_parameters(model).layers


def take_turns(ours: Callable[[], None], theirs: Callable[[], None], repeats: int, warm_up: int = 2) -> Row:
    """Median seconds of both, and the median of their ratios; they take turns, and each goes first in half of them."""
    pairs = []
    for number in range(warm_up + repeats):
        order = (ours, theirs) if number % 2 else (theirs, ours)
        seconds = {run: _seconds(run) for run in order}
        pairs.append((seconds[ours], seconds[theirs]))
    pairs = pairs[warm_up:]
    return {
        "times_bert": round(statistics.median(one / other for one, other in pairs), 3),
        "ms": round(1e3 * statistics.median(one for one, _ in pairs), 1),
        "bert_ms": round(1e3 * statistics.median(other for _, other in pairs), 1),
    }


def _seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(kind: str, model_type: str, dtype: str, repeats: int, **sizes: int) -> Row:
    """A family against BERT, as a row of families.csv without where it was measured."""
    inputs = inputs_of(LENGTHS, sizes.get("vocab_size", VOCABULARY))
    make = student_step if kind == "student" else teacher_forward
    ours, num_parameters = make(model_type, dtype, inputs, **sizes)
    theirs, _ = make(families.BERT, dtype, inputs, **sizes)
    row = {"kind": kind, "family": model_type, "dtype": dtype, **take_turns(ours, theirs, repeats)}
    is_padded = not families.is_packed(config_of(model_type, 6))
    return row | {"layer_parameters": num_parameters, "padded": is_padded}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Checked options; argparse exits with code 2 if one is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    choices = {"families": families.TEACHERS, "dtypes": ("bf16", "fp32"), "kinds": KINDS}
    for name, values in choices.items():
        parser.add_argument(f"--{name}", default=",".join(values), help="comma-separated; default %(default)s")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each comparison; default 15")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "families.csv", help="default %(default)s")
    parser.add_argument("--note", default="", help="what to know of the machine, for a column of the file")
    arguments = parser.parse_args(argv)
    for name, values in choices.items():
        chosen = [word.strip() for word in getattr(arguments, name).split(",") if word.strip()]
        unknown = [word for word in chosen if word not in values]
        if unknown or not chosen:
            parser.error(f"--{name} {', '.join(unknown) or 'nothing'}: choose from {', '.join(values)}")
        setattr(arguments, name, chosen)
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats}: each comparison takes at least one turn; set 1 or more")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all comparisons and write families.csv."""
    arguments = parse(argv)
    host.keep_freed_memory()
    quiet_libraries()
    where = {
        "date": datetime.date.today().isoformat(),
        "machine": machine_here(),
        "torch": version_of("torch"),
        "transformers": version_of("transformers"),
        "commit": commit(),
        "note": arguments.note,
    }
    rows = []
    for kind in arguments.kinds:
        for model_type in arguments.families:
            for dtype in arguments.dtypes if kind == "teacher" or model_type in families.STUDENTS else ():
                rows.append(measure(kind, model_type, dtype, arguments.repeats) | where)
                print("{kind} {family} {dtype}: {ms} ms, {times_bert} x bert".format(**rows[-1]), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", newline="") as file:
        table = csv.DictWriter(file, [*COLUMNS, *where])
        table.writeheader()
        table.writerows(rows)
    print(f"{arguments.output} is written")


if __name__ == "__main__":
    main()
