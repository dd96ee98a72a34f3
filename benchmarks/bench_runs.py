"""One timed run, and its inputs (rows, teacher and encoder), for bench_train.py and bench_scaling.py."""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cases as recipe
from bench_rows import Row
from cases import EPOCHS, Case, Job
from facts import machine

from peakd_ds.files import sha256_of

HERE = Path(__file__).parent
STARTS, ENDS = "task ", "stage distill is over"
"""How the lines of our program begin at which the clock starts (rows tokenised, no model loaded yet) and stops."""
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


class RunFailed(Exception):
    """A run failed; the message is the last line that it printed."""


@dataclass(frozen=True)
class Prepared:
    """The inputs of all runs of a case."""

    case: Case
    data_dir: Path
    teacher: Path
    encoder: Path
    lengths: tuple[int, ...]
    """Tokens of each training row."""


# -- Preparation, which is not timed -----------------------------------------------------------------------------------


def check_inputs(parser: argparse.ArgumentParser, encoder: Path, data_dir: str, tasks: Sequence[str]) -> None:
    """Exit with code 2 if the encoder or the data are missing."""
    if not (encoder / "config.json").exists():
        parser.error(
            f"--encoder {encoder}: there is no config.json; fetch one with `peakd-demo --out demo`, or give the folder "
            "of another 6 x 384 BERT"
        )
    for name in tasks:
        if data_dir and not any((Path(data_dir) / name).glob("train-*.parquet")):
            parser.error(
                f"--data_dir {data_dir}: there is no {name}/train-*.parquet; give the folder that has it, or "
                "leave out --data_dir and unset PEAKD_DATA_DIR to read from the hub"
            )


def prepare(case: Case, encoder: Path, data_dir: str, work: Path, teacher_of: str | None = None) -> Prepared:
    """Rows, teacher and encoder of a case under `work`; what is missing there is made.

    Args:
        teacher_of: Name of the rows that the teacher is fine-tuned on; None for the case's own.
    """
    from datasets import disable_progress_bars
    from transformers import AutoTokenizer

    from peakd_ds.data.reading import load_splits
    from peakd_ds.data.tasks import get_task
    from peakd_ds.data.tokens import encoder_of

    disable_progress_bars()
    task = get_task(case.task)
    splits = load_splits(task, data_dir)
    for split, limit in (("train", case.num_train_rows), (task.eval_splits[0], case.num_dev_rows)):
        if limit is not None:
            splits[split] = splits[split].select(range(min(limit, len(splits[split]))))
        file = work / "data" / case.data_name / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        splits[split].to_parquet(file)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    lengths = encoder_of(task, tokenizer, recipe.MAX_SEQ_LENGTH)(splits["train"][:])["length"]
    if case.is_wide:
        teacher = student_init = _wide_model(case, encoder, work)
    else:
        teacher, student_init = _fine_tuned(teacher_of or case.data_name, encoder, work), encoder
    return Prepared(case, work / "data", teacher, student_init, tuple(lengths))


def _fine_tuned(data_name: str, encoder: Path, work: Path) -> Path:
    """The encoder fine-tuned by our teacher stage, which runs only once."""
    run_dir = _teacher_folder(data_name, encoder, work)
    if not (run_dir / "results.json").exists():
        shutil.rmtree(run_dir, ignore_errors=True)
        print(f"fine-tuning the teacher for {data_name}, once", flush=True)
        settings = {
            "task": data_name,
            "teacher": encoder,
            "data_dir": work / "data",
            "run_dir": run_dir,
            "stages": "teacher",
            "select_on": "dev",
            "teacher_epochs": recipe.TEACHER_EPOCHS,
            "lr": recipe.TEACHER_LR,
            "max_seq_length": recipe.MAX_SEQ_LENGTH,
            "seed": 0,
        }
        watch(train_command(settings), work / "logs" / f"teacher-{data_name}.log")
    return run_dir / "teacher"


def _teacher_folder(name: str, encoder: Path, work: Path) -> Path:
    """The folder of a teacher made from this encoder; its name has a digest of the encoder's files."""
    files = sorted(file for file in encoder.iterdir() if file.is_file())
    digest = hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()
    return work / "teachers" / f"{name}-{digest[:8]}"


def _wide_model(case: Case, encoder: Path, work: Path) -> Path:
    """A 12 x 768 classifier with random weights and the encoder's vocabulary: the teacher, and the student's source."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, BertConfig, BertForSequenceClassification, logging

    from peakd_ds.data.tasks import get_task
    from peakd_ds.model.build import task_head

    folder = _teacher_folder("wide", encoder, work)
    if not (folder / "tokenizer_config.json").exists():
        logging.disable_progress_bar()
        torch.manual_seed(0)
        vocabulary = AutoConfig.from_pretrained(encoder).vocab_size
        sizes = BertConfig(vocab_size=vocabulary, **task_head(get_task(case.task)))  # other sizes: bert-base
        BertForSequenceClassification(sizes).save_pretrained(folder)
        AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    return folder


# -- One run -----------------------------------------------------------------------------------------------------------


def watch(command: list[str], log: Path, threads: int | None = None) -> tuple[list[tuple[float, str]], float]:
    """Run a program to its end.

    Args:
        log: Receives its output.
        threads: For OMP_NUM_THREADS; None for one on each core.

    Returns:
        The lines that it printed, each with its time by perf_counter [s], and its peak memory [MiB].

    Raises:
        RunFailed: its exit code is not 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    lines, peak = [], log.with_suffix(".peak")
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(HERE / "peak.py"), str(peak), *command],
        env=_environment(threads or num_cores()),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    with log.open("w") as file, process.stdout:
        for line in process.stdout:
            lines.append((time.perf_counter(), line.rstrip("\n")))
            file.write(line)
            file.flush()
    if process.wait() != 0:
        printed = [line for _, line in lines if line.strip()]
        raise RunFailed(printed[-1] if printed else f"exit code {process.returncode}")
    return lines, int(peak.read_text()) / 2**20


def _environment(threads: int) -> dict[str, str]:
    """The environment of a run; the same for all systems."""
    fixed = {
        **NO_GPU,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**os.environ, **fixed}


def machine_here() -> str:
    """The CPU of this machine with the number of cores that runs may use."""
    return f"{machine('cpu').rsplit(',', 1)[0]}, {num_cores()} threads"


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train_command(settings: dict[str, Any], *flags: str, num_ranks: int = 1) -> list[str]:
    """The command of our program with these options and flags; torchrun starts several ranks."""
    program = ["-m", "peakd_ds.train"]
    if num_ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
        program = [*launcher, str(HERE.parent / "peakd_ds" / "train.py")]
    return [sys.executable, "-P", *program, *words_of(settings), *flags]


def words_of(options: dict[str, Any]) -> list[str]:
    """Options as command-line words."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def run_ours(prepared: Prepared, teacher_mode: str, seed: int, work: Path) -> Row:
    """Time one run of our program. Raises RunFailed as `watch` and `read_our_run`."""
    run_dir = work / "runs" / f"{prepared.case.name}-{teacher_mode}-{seed}"
    shutil.rmtree(run_dir, ignore_errors=True)
    settings = {
        "task": prepared.case.data_name,
        "teacher": prepared.teacher,
        "student_init": prepared.encoder,
        "data_dir": prepared.data_dir,
        "run_dir": run_dir,
        "stages": "distill",
        "teacher_mode": teacher_mode,
        "select_on": "dev",
        "seed": seed,
        "num_hidden_layers": prepared.case.num_stored_layers,
        "sharing": "sps",
        "layer_map": "skip",
        "distill_epochs": EPOCHS,
        "global_batch_size": recipe.BATCH_SIZE,
        "micro_batch_size": recipe.BATCH_SIZE,
        "max_seq_length": recipe.MAX_SEQ_LENGTH,
        "temperature": recipe.TEMPERATURE,
        "alpha": recipe.ALPHA,
        "beta": recipe.BETA,
        "lr": recipe.LR,
        "warmup_ratio": recipe.WARMUP_RATIO,
        "weight_decay": recipe.WEIGHT_DECAY,
        "max_grad_norm": recipe.MAX_GRAD_NORM,
        "dropout": recipe.DROPOUT,
        "save_steps": 0,
    }
    command = train_command(settings, "--no_ptp", "--no_export_unrolled")
    lines, peak_mib = watch(command, work / "logs" / f"{run_dir.name}.log")
    row = read_our_run(lines, run_dir / "metrics.jsonl", "eval_accuracy")
    shutil.rmtree(run_dir, ignore_errors=True)
    return row | {"peak_memory_mib": peak_mib}


def read_our_run(lines: Sequence[tuple[float, str]], metrics: Path, score: str) -> Row:
    """Seconds, best score and share of padding of a run of ours.

    Args:
        lines: As `watch` returns them.
        metrics: The run's metrics.jsonl.
        score: The metric to take from it.

    Raises:
        RunFailed: a line at which the clock starts or stops is missing.
    """
    marks = {mark: [at for at, line in lines if line.startswith(mark)] for mark in (STARTS, ENDS)}
    for mark, found in marks.items():
        if not found:
            raise RunFailed(f"no line of the output begins with {mark!r}, where the clock starts or stops")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    records = [record for record in records if record["stage"] == "distill"]
    return {
        "seconds": marks[ENDS][0] - marks[STARTS][0],
        "dev_score": max(record[score] for record in records if score in record),
        "padding_share": statistics.mean(record["padding_share"] for record in records if "padding_share" in record),
        "extrapolated_from_steps": None,
    }


def run_baseline(system: str, prepared: Prepared, seed: int, work: Path, max_steps: int | None) -> Row:
    """One run of baselines.py, which times itself. Raises RunFailed as `watch`."""
    from peakd_ds.engine.ds_config import has_fast_bf16

    folder = work / "runs" / f"{prepared.case.name}-{system}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    Job(
        task=prepared.case.data_name,
        data_dir=str(prepared.data_dir),
        teacher=str(prepared.teacher),
        encoder=str(prepared.encoder),
        num_stored_layers=prepared.case.num_stored_layers,
        pairs=recipe.pairs_of(prepared.case),
        seed=seed,
        bf16=has_fast_bf16(),
        folder=str(folder),
        max_steps=max_steps if system == "published_recipe" else None,
    ).write(folder / "job.json")
    command = [sys.executable, str(HERE / "baselines.py"), system, str(folder / "job.json"), str(folder / "row.json")]
    _, peak_mib = watch(command, work / "logs" / f"{folder.name}.log")
    row = json.loads((folder / "row.json").read_text())
    shutil.rmtree(folder, ignore_errors=True)
    return row | {"peak_memory_mib": peak_mib}
