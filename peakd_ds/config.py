"""Settings of a run: one typed field each, with its unit, range and default, read from YAML and the command line.

The YAML file is turned into command-line words that stand before the user's own, so there is one parser, one set of
checks, and the command line wins. This module imports nothing heavy.
"""

import argparse
import difflib
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

STAGES = ("teacher", "ptp", "distill")
RANK_TIMEOUT_S = 100.0
EVAL_ROWS = 4  # of a forward pass without gradients, to one of a training micro-batch

# Settings that may differ between two starts in one run folder: they change the result by rounding, and by the dropout
# masks that are drawn, at most.
RESULT_NEUTRAL = frozenset(
    [
        "run_dir",
        "data_dir",
        "data_placement",
        "shard_dir",
        "scratch_dir",
        "stages",
        "micro_batch_size",
        "student_ds_config",
        "teacher_ds_config",
        "teacher_mode",
        "loss_backend",
        "teacher_cache",
        "save_steps",
        "eval_steps",
        "log_steps",
        "rank_timeout",
        "dry_run",
        "export_unrolled",
        "export_onnx",
    ]
)


class UserError(ValueError):
    """Something the user can mend: the message gives the value, the rule and the remedy. Printed without traceback."""


def _setting(
    default: Any,
    help: str,
    *,
    unit: str = "",
    range: str = "",
    check: Callable[[Any], bool] | None = None,
    choices: tuple[str, ...] = (),
    parse: Callable[[str], Any] | None = None,
    shown_default: str = "",
) -> Any:
    """A dataclass field that carries its command-line help, its range, and the check that enforces the range."""
    metadata = dict(
        help=help,
        unit=unit,
        range=range,
        check=check,
        choices=choices,
        parse=parse,
        shown_default=shown_default,
    )
    return field(default=default, metadata=metadata)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _parse_layers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.replace(" ", "").split(","))


def _parse_stages(text: str) -> tuple[str, ...]:
    chosen = text.replace(" ", "").split(",")
    unknown = [name for name in chosen if name not in STAGES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown stage {unknown[0]!r}; choose from {','.join(STAGES)}")
    return tuple(name for name in STAGES if name in chosen)


def _parse_layer_map(text: str) -> str | tuple[tuple[int, int], ...]:
    if text in ("skip", "last"):
        return text
    try:
        pairs = tuple(tuple(int(layer) for layer in pair.split(":")) for pair in text.replace(" ", "").split(","))
    except ValueError:
        pairs = ()
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither skip, last, nor pairs STUDENT:TEACHER of 1-based layers; "
            "write for example 1:2,2:4, in quotes in a YAML file"
        )
    return pairs  # type: ignore[return-value]


def _parse_threshold(text: str) -> float | str:
    return text if text == "median" else float(text)


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run. Field metadata holds what `--help` prints and what `validate` enforces."""

    # What to run
    task: str = _setting(
        "",
        "GLUE task (cola sst2 mrpc stsb qqp mnli qnli rte wnli) or movie_reviews; NAME_SUFFIX "
        "reads the folder of that name, e.g. qnli_10k",
        shown_default="required",
    )
    teacher: str = _setting(
        "",
        "folder or hub id of a BERT encoder (it is fine-tuned first) or of a BERT classifier "
        "for the task (it is used as it is)",
        shown_default="required",
    )
    run_dir: str = _setting(
        "",
        "folder that receives everything the run writes; started again in it, a run goes on",
        shown_default="$RUN_DIR, else required",
    )
    data_dir: str = _setting(
        "",
        "folder with TASK/train-*.parquet and TASK/validation*-*.parquet",
        shown_default="$PEAKD_DATA_DIR, else the hub's nyu-mll/glue",
    )
    data_placement: str = _setting(
        "replicated",
        "replicated: each node tokenises and reads all training rows; sharded: it reads its own block of the shards",
        choices=("replicated", "sharded"),
    )
    shard_dir: str = _setting(
        "", "folder of tokenised shards that peakd-shard made, for --data_placement sharded", shown_default="none"
    )
    scratch_dir: str = _setting(
        "",
        "folder on each node's own disk, to which its shards are copied at the start",
        shown_default="$PEAKD_SCRATCH, else $SLURM_TMPDIR, else shards are read where they are",
    )
    stages: tuple[str, ...] = _setting(
        STAGES, "stages to run, comma-separated", parse=_parse_stages, range="teacher,ptp,distill"
    )
    # The student
    student_init: str = _setting(
        "",
        "folder or hub id of the pretrained BERT encoder whose embeddings, pooler and "
        "layers start the student; another hidden size than the teacher's is allowed",
        shown_default="the --teacher weights as given",
    )
    num_hidden_layers: int = _setting(
        3,
        "stored layers n of the student; sps runs them twice (of 6 only the upper three)",
        unit="layers",
        range=">= 1",
        check=lambda v: v >= 1,
    )
    init_layers: tuple[int, ...] | None = _setting(
        None,
        "1-based layers of --student_init that start the student, e.g. 1,3,5",
        unit="layer numbers",
        parse=_parse_layers,
        range="n numbers >= 1",
        check=lambda v: min(v) >= 1,
        shown_default="1..n",
    )
    sharing: str = _setting(
        "sps",
        "order in which the n stored layers run: none 1..n; sps, cycle 1..n, 1..n; cycle_rev 1..n, n..1; sequence 1, "
        "1, 2, 2, ..; of 6 only 4..6 run again",
        choices=("none", "sps", "cycle", "cycle_rev", "sequence"),
    )
    shuffle_qk: bool | None = _setting(
        None, "exchange query and key in a layer's second run", shown_default="on for sps, off for the others"
    )
    # Pretraining with the teacher's predictions
    ptp: bool = _setting(True, "pretrain the student with the teacher's predictions before distilling")
    t_correct: float | str | None = _setting(
        None,
        "a right teacher prediction is confident above this probability",
        parse=_parse_threshold,
        range="[0, 1] or median",
        check=lambda v: v == "median" or 0 <= v <= 1,
        shown_default="Pea-KD's for its five tasks, else median",
    )
    t_wrong: float | str | None = _setting(
        None,
        "a wrong teacher prediction is confident above this probability",
        parse=_parse_threshold,
        range="[0, 1] or median",
        check=lambda v: v == "median" or 0 <= v <= 1,
        shown_default="Pea-KD's for its five tasks, else median",
    )
    # The objective: (1 - alpha) * hard + alpha * soft + beta * hidden
    temperature: float = _setting(
        10.0,
        "softmax temperature T of the soft loss, which is scaled by T^2",
        range="> 0",
        check=lambda v: v > 0,
    )
    alpha: float = _setting(
        0.7,
        "weight of the soft loss; 1 - alpha weighs the hard loss",
        range="[0, 1]",
        check=lambda v: 0 <= v <= 1,
    )
    beta: float = _setting(100.0, "weight of the hidden-state loss", range=">= 0", check=lambda v: v >= 0)
    layer_map: str | tuple[tuple[int, int], ...] = _setting(
        "skip",
        "student:teacher layer pairs of the hidden-state loss, 1-based over effective layers",
        parse=_parse_layer_map,
        range="skip, last or pairs like 1:2,2:4",
    )
    hidden_loss: str = _setting(
        "cls",
        "compare L2-normalised [CLS] vectors, or all non-padded tokens as they are",
        choices=("cls", "tokens"),
    )
    # Optimisation
    teacher_epochs: int = _setting(
        3,
        "passes over the training rows in the teacher stage",
        unit="epochs",
        range=">= 1",
        check=lambda v: v >= 1,
    )
    ptp_epochs: int = _setting(
        4,
        "passes over the training rows in the ptp stage",
        unit="epochs",
        range=">= 1",
        check=lambda v: v >= 1,
    )
    distill_epochs: int = _setting(
        6,
        "passes over the training rows in the distill stage",
        unit="epochs",
        range=">= 1",
        check=lambda v: v >= 1,
    )
    epochs: int | None = _setting(
        None,
        "sets --teacher_epochs, --ptp_epochs and --distill_epochs together",
        unit="epochs",
        range=">= 1",
        check=lambda v: v >= 1,
        shown_default="each its own",
    )
    lr: float = _setting(2e-5, "peak learning rate of AdamW", range="> 0", check=lambda v: v > 0)
    warmup_ratio: float = _setting(
        0.1,
        "share of a stage's steps in which the learning rate rises linearly; it then falls linearly to 0",
        range="[0, 1]",
        check=lambda v: 0 <= v <= 1,
    )
    weight_decay: float = _setting(
        0.01, "AdamW weight decay; biases and LayerNorms have none", range=">= 0", check=lambda v: v >= 0
    )
    max_grad_norm: float = _setting(
        1.0, "clip the global gradient norm to this; 0 does not clip", range=">= 0", check=lambda v: v >= 0
    )
    dropout: float | None = _setting(
        None,
        "dropout probability of hidden states, attention and head",
        range="[0, 1)",
        check=lambda v: 0 <= v < 1,
        shown_default="the encoder's own",
    )
    max_seq_length: int = _setting(128, "longer inputs are cut", unit="tokens", range=">= 8", check=lambda v: v >= 8)
    global_batch_size: int = _setting(
        32, "samples per optimiser step over all ranks", unit="samples", range=">= 1", check=lambda v: v >= 1
    )
    micro_batch_size: int = _setting(
        32,
        f"most samples per rank and training pass (without gradients {EVAL_ROWS} times as many, but once with "
        "--hidden_loss tokens); accumulation follows",
        unit="samples",
        range=">= 1",
        check=lambda v: v >= 1,
    )
    seed: int = _setting(
        42,
        "seeds data order, new weights and dropout; dropout masks also depend on the number of ranks",
        range="[0, 2^32)",
        check=lambda v: 0 <= v < 2**32,
    )
    # The engines
    dtype: str = _setting(
        "auto",
        "compute precision; auto: the DeepSpeed config's, else bf16 if GPU or CPU (AVX512_BF16, AMX) has it, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    student_ds_config: str = _setting(
        "", "DeepSpeed config of the trained model: file, or name in ds_configs/", shown_default="zero1_DTYPE"
    )
    teacher_ds_config: str = _setting(
        "teacher_zero0", "DeepSpeed config of the frozen teacher (stage 0 or 3): file, or name in ds_configs/"
    )
    teacher_mode: str = _setting(
        "online",
        "online: the teacher runs beside the student; cached: it is asked once and its answers are kept; auto: cached "
        "where they fit the disk, the loss needs [CLS] only and data is replicated",
        choices=("online", "cached", "auto"),
    )
    teacher_cache: str = _setting(
        "",
        "folder of the teacher's answers, which runs with the same task, teacher, dtype and length may share",
        shown_default="RUN_DIR/teacher_cache",
    )
    loss_backend: str = _setting(
        "auto",
        "what computes the losses: triton (GPUs), torch (fused, for CPUs), reference (plain autograd); auto: triton on "
        "a GPU, else torch",
        choices=("auto", "triton", "torch", "reference"),
    )
    # Watching, saving, choosing
    save_steps: int = _setting(
        500,
        "checkpoint every so many steps, besides each epoch's end; 0: epochs only",
        unit="steps",
        range=">= 0",
        check=lambda v: v >= 0,
    )
    eval_steps: int = _setting(
        0,
        "evaluate every so many steps, besides each epoch's end; 0: epochs only",
        unit="steps",
        range=">= 0",
        check=lambda v: v >= 0,
    )
    log_steps: int = _setting(
        10, "write metrics every so many steps", unit="steps", range=">= 1", check=lambda v: v >= 1
    )
    early_stopping_patience: int = _setting(
        0,
        "stop a stage after so many epochs without a better score; 0: never",
        unit="epochs",
        range=">= 0",
        check=lambda v: v >= 0,
    )
    select_on: str = _setting(
        "holdout",
        "what picks the best epoch: a fixed 10% of train that no stage trains on, or "
        "dev (optimistic; the results say so)",
        choices=("holdout", "dev"),
    )
    export_unrolled: bool = _setting(True, "also write the student as a plain BERT of the effective depth")
    export_onnx: bool = _setting(
        False, "also write student_unrolled/model.onnx, checked against onnxruntime (needs the onnx extra)"
    )
    rank_timeout: float = _setting(
        RANK_TIMEOUT_S,
        "a rank that does not come, or falls silent, for so long is given up, and all ranks end",
        unit="s",
        range=">= 5",
        check=lambda v: v >= 5,
    )
    dry_run: bool = _setting(False, "check everything, print the plan, and stop before any engine starts")

    def epochs_of(self, stage: str) -> int:
        """Passes over the training rows in `stage`."""
        return (
            self.epochs
            or {"teacher": self.teacher_epochs, "ptp": self.ptp_epochs, "distill": self.distill_epochs}[stage]
        )

    @property
    def swaps_qk(self) -> bool:
        """Whether a layer's second run has query and key exchanged."""
        return self.sharing == "sps" if self.shuffle_qk is None else self.shuffle_qk

    @property
    def method(self) -> str:
        """Name of the method that the switches add up to, for tables."""
        objective = "pkd" if self.beta > 0 else "kd" if self.alpha > 0 else "finetune"
        sharing = "" if self.sharing == "none" else self.sharing
        if sharing and self.swaps_qk != (self.sharing == "sps"):
            sharing += "+shuffle_qk" if self.swaps_qk else "-shuffle_qk"
        parts = [part for part in (sharing, "ptp" if self.ptp else "", objective) if part]
        return "pea-kd" if parts == ["sps", "ptp", "pkd"] else "+".join(parts)


def validate(config: RunConfig) -> None:
    """Raise UserError for the first setting outside its range, with value, rule and remedy."""
    for name in ("task", "teacher", "run_dir"):
        if not getattr(config, name):
            raise UserError(f"--{name} is missing: {_field(name).metadata['help']}")
    for spec in fields(config):
        value, rule = getattr(config, spec.name), spec.metadata["range"]
        check = spec.metadata["check"]
        if value is not None and check is not None and not check(value):
            raise UserError(f"--{spec.name} {value} is outside its range {rule}; the default is {_shown_default(spec)}")
    if config.init_layers is not None and len(config.init_layers) != config.num_hidden_layers:
        raise UserError(
            f"--init_layers {','.join(map(str, config.init_layers))} names {len(config.init_layers)} "
            f"layers, but --num_hidden_layers is {config.num_hidden_layers}; give one source layer for each"
        )
    if config.teacher_mode == "cached" and config.hidden_loss == "tokens" and config.beta > 0:
        raise UserError(
            "--teacher_mode cached keeps [CLS] vectors only, but --hidden_loss tokens compares every token; set "
            "--teacher_mode online, or --hidden_loss cls"
        )
    if config.teacher_mode == "cached" and config.data_placement == "sharded":
        raise UserError(
            "--teacher_mode cached reads any row on any node, but --data_placement sharded leaves a node its own; "
            "set --teacher_mode online, or --data_placement replicated"
        )
    if config.data_placement == "sharded" and not config.shard_dir:
        raise UserError("--data_placement sharded reads shards; make them with peakd-shard and give their --shard_dir")
    if config.export_onnx and not config.export_unrolled:
        raise UserError("--export_onnx writes the unrolled student, which --no_export_unrolled leaves out; drop one")
    if config.sharing == "none" and config.shuffle_qk:
        raise UserError(
            "--shuffle_qk exchanges query and key in a layer's second run, but --sharing none has no "
            "second run; choose --sharing sps, cycle, cycle_rev or sequence"
        )


def parse(argv: Sequence[str]) -> RunConfig:
    """Settings from `--config FILE.yaml` and the command line, the latter winning; checked.

    Raises:
        UserError: a word that does not fit, a value out of range, an unknown key in the YAML file, or a file that
            cannot be read.
        SystemExit: code 0, after `--help`.
    """
    parser = build_parser()
    config_file = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0].config
    source = f"--config {config_file}"
    words = [*to_words(source, read_yaml(source, config_file)), *argv] if config_file else argv
    values, unknown = parser.parse_known_args(words)
    if unknown:
        names = [word for action in parser._actions for word in action.option_strings]
        parser.error(f"unknown option {unknown[0]}{suggest(unknown[0].split('=')[0], names)}")
    settings = {name: value for name, value in vars(values).items() if name not in ("config", "local_rank")}
    config = RunConfig(**settings)
    config = replace(
        config,
        data_dir=config.data_dir or os.environ.get("PEAKD_DATA_DIR", ""),
        run_dir=config.run_dir or os.environ.get("RUN_DIR", ""),
    )
    validate(config)
    return config


class Parser(argparse.ArgumentParser):
    """Tells wrong options as UserError, in one line on all ranks together, where argparse would leave at once."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def build_parser() -> argparse.ArgumentParser:
    """The command line, made from RunConfig's fields."""
    parser = Parser(
        prog="train.py",
        allow_abbrev=False,
        description="Distil a BERT classifier into a small student with shuffled parameter sharing (SPS) and "
        "pretraining with the teacher's predictions (PTP).",
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="YAML file of the settings below, by the same names; the command line wins",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    for spec in fields(RunConfig):
        add_setting(parser, spec)
    return parser


def add_setting(parser: argparse.ArgumentParser, spec: Any, shown_default: str = "") -> None:
    """One field of RunConfig as an option, with its unit, default (or `shown_default`) and range in the help."""
    meta = spec.metadata
    default = f"default {shown_default or _shown_default(spec)}"
    facts = [meta["unit"], default, meta["range"] and f"range {meta['range']}"]
    text = f"{meta['help']} [{'; '.join(fact for fact in facts if fact)}]".replace("%", "%%")
    if spec.type in (bool, bool | None):
        parser.add_argument(f"--{spec.name}", action="store_true", default=spec.default, help=text)
        parser.add_argument(
            f"--no_{spec.name}",
            dest=spec.name,
            action="store_false",
            default=spec.default,
            help=f"the opposite of --{spec.name}",
        )
    else:
        parser.add_argument(
            f"--{spec.name}",
            type=_value_type(spec),
            default=spec.default,
            choices=meta["choices"] or None,
            help=text,
            metavar=spec.name.upper() if not meta["choices"] else None,
        )


def to_yaml(config: RunConfig) -> str:
    """Every setting as YAML that `--config` reads back; unset ones are left out."""
    values = {name: _plain(value) for name, value in asdict(config).items() if value is not None and value != ""}
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None)


def differences(config: RunConfig, saved_yaml: str) -> list[str]:
    """Lines `name: saved -> now` for each setting that changes the result and differs from a saved config.yaml."""
    try:
        saved = yaml.safe_load(saved_yaml)
    except yaml.YAMLError:
        saved = None
    if not isinstance(saved, dict):
        raise UserError("the config.yaml in --run_dir is damaged: it holds no settings; take another --run_dir")
    now = yaml.safe_load(to_yaml(config))
    names = [spec.name for spec in fields(RunConfig) if spec.name not in RESULT_NEUTRAL]
    return [f"{name}: {saved.get(name)} -> {now.get(name)}" for name in names if saved.get(name) != now.get(name)]


def read_yaml(source: str, file: str) -> dict[Any, Any]:
    """Settings of a YAML file; `source` ("--config FILE") begins the message of what is wrong with it."""
    try:
        settings = yaml.safe_load(Path(file).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source} cannot be read ({error}); give a YAML file of settings") from error
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not YAML: {' '.join(str(error).split())}; mend the file") from error
    if not isinstance(settings, dict):
        raise UserError(f"{source} holds no settings; write lines like 'task: rte'")
    return settings


def to_words(source: str, settings: Mapping[Any, Any]) -> list[str]:
    """Settings as YAML has them, as words of the command line; `source` begins the message of what is wrong."""
    names = [spec.name for spec in fields(RunConfig)]
    words = []
    for name, value in settings.items():
        if name not in names:
            raise UserError(f"{source}: unknown setting {name!r}{suggest(str(name), names)}")
        if value is None:
            continue  # unset, as in a file where the value was deleted and the name left
        if isinstance(value, bool) or _field(name).type in (bool, bool | None):
            if not isinstance(value, bool) or _field(name).type not in (bool, bool | None):
                raise UserError(
                    f"{source}: {name}: {value!r} does not fit; "
                    f"write {'true or false' if not isinstance(value, bool) else 'a value'}"
                )
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words.append(f"--{name}={to_word(value)}")
    return words


def to_word(value: Any) -> str:
    """A YAML value as one command-line word: [1, 3] as 1,3 and [[1, 2], [2, 4]] as 1:2,2:4."""
    if isinstance(value, list):
        return ",".join(":".join(map(str, item)) if isinstance(item, list) else str(item) for item in value)
    return str(value)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _field(name: str) -> Any:
    return next(spec for spec in fields(RunConfig) if spec.name == name)


def _value_type(spec: Any) -> Callable[[str], Any]:
    """What argparse calls on the word; it would name a failing function in its message, so failures are told here."""
    kind = next((kind for kind in (int, float, str) if spec.type in (kind, kind | None)), str)
    wanted = {int: "a whole number", float: "a finite number"}.get(kind, "a value that fits")
    read = spec.metadata["parse"] or (_finite if kind is float else kind)

    def convert(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            rule = f"; its range is {spec.metadata['range']}" if spec.metadata["range"] else ""
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {wanted}{rule}; the default is {_shown_default(spec)}"
            ) from error

    return convert


def _shown_default(spec: Any) -> str:
    if spec.metadata["shown_default"]:
        return spec.metadata["shown_default"]
    assert spec.default is not MISSING
    if isinstance(spec.default, bool):
        return "on" if spec.default else "off"
    return ",".join(spec.default) if isinstance(spec.default, tuple) else str(spec.default)


def suggest(word: str, names: Sequence[str]) -> str:
    """The end of a message about an unknown word: the name that it resembles."""
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else "; --help lists all"


_RANK_NAMES = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


def exit_with(error: UserError | OSError, program: str = "train.py") -> NoReturn:
    """Print an error in one line and leave with code 2.

    All ranks have the same UserError, so only rank 0 prints it. The others leave a little later: launchers kill the
    rest of a job when its first process fails, and the line should be out by then. An OSError may be one rank's alone.
    """
    is_main = next((int(os.environ[name]) for name in _RANK_NAMES if name in os.environ), 0) == 0
    if is_main or not isinstance(error, UserError):
        print(f"{program}: error: {' '.join(str(error).splitlines())}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)
    raise SystemExit(2)
