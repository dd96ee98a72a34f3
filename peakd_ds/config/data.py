"""Settings of the data."""

import re
from dataclasses import dataclass
from pathlib import Path

from peakd_ds.config.setting import Range, setting
from peakd_ds.errors import UserError, shown


@dataclass(frozen=True)
class DataSettings:
    """The task's rows, and which node reads which of them."""

    task: str = setting(
        "",
        "GLUE task (cola sst2 mrpc stsb qqp mnli qnli rte wnli) or movie_reviews; NAME_SUFFIX "
        "reads the folder of that name, e.g. qnli_10k",
        shown_default="none: the rows are your own",
    )
    train_file: tuple[str, ...] | None = setting(
        None,
        "your own rows: csv, tsv, json, jsonl or parquet files, also compressed, or patterns such as 'rows-*.csv'",
        shown_default="none",
        is_neutral=True,
        takes_many=True,
    )
    validation_file: tuple[str, ...] | None = setting(
        None,
        "your own rows that are reported, or that pick epochs if test rows are given too",
        shown_default="none",
        is_neutral=True,
        takes_many=True,
    )
    test_file: tuple[str, ...] | None = setting(
        None, "your own rows that are reported once", shown_default="none", is_neutral=True, takes_many=True
    )
    unlabeled_file: tuple[str, ...] | None = setting(
        None,
        "rows whose labels are not read: they are distilled with the teacher's outputs alone",
        shown_default="none",
        is_neutral=True,
        takes_many=True,
    )
    dataset_name: str = setting(
        "",
        "in place of files: a dataset's hub id, or a folder that save_to_disk of datasets wrote",
        shown_default="none",
        is_neutral=True,
    )
    dataset_config_name: str = setting(
        "", "configuration of --dataset_name on the hub", shown_default="none", is_neutral=True
    )
    name: str = setting(
        "",
        "name of your own task, for folders and reports",
        shown_default="the first train file's, without its ending",
    )
    text_columns: tuple[str, ...] | None = setting(
        None,
        "one or two columns of text",
        shown_default="sentence1 sentence2, text, or another usual name that is there",
        takes_many=True,
    )
    label_column: str = setting("", "column of labels", shown_default="label, labels or target")
    label_columns: tuple[str, ...] | None = setting(
        None,
        "two or more columns of 0 and 1, one for each class of a multi-label task",
        shown_default="none",
        takes_many=True,
    )
    label_names: tuple[str, ...] | None = setting(
        None,
        "names of the classes, in the order of the student's logits",
        shown_default="the teacher's, else those in the data",
        takes_many=True,
    )
    id_column: str = setting(
        "id",
        "column that names a row where a teacher's outputs are files; rows without it are numbered",
    )
    data_dir: str = setting(
        "",
        "folder with TASK/train-*.parquet and TASK/validation*-*.parquet",
        shown_default="$PEAKD_DATA_DIR, else the hub's nyu-mll/glue",
        is_neutral=True,
    )
    data_placement: str = setting(
        "replicated",
        "replicated: each node tokenises and reads all training rows; sharded: it reads its own block of the shards",
        choices=("replicated", "sharded"),
        is_neutral=True,
    )
    shard_dir: str = setting(
        "",
        "folder of tokenised shards that peakd-shard made, for --data_placement sharded",
        shown_default="none",
        is_neutral=True,
    )
    scratch_dir: str = setting(
        "",
        "folder on each node's own disk, to which its shards are copied at the start",
        shown_default="$PEAKD_SCRATCH, else $SLURM_TMPDIR, else shards are read where they are",
        is_neutral=True,
    )
    max_seq_length: int = setting(128, "longer inputs are cut", unit="tokens", range=Range(8, 100_000))
    select_on: str = setting(
        "holdout",
        "what picks the best epoch: a fixed 10% of train that no stage trains on, or "
        "dev (optimistic; the results say so); with your own validation and test files, always the validation rows",
        choices=("holdout", "dev"),
    )

    @property
    def has_own_data(self) -> bool:
        """Whether the rows are the user's own, not those of a `task`."""
        return bool(self.train_file or self.unlabeled_file or self.dataset_name)

    @property
    def named_by(self) -> str:
        """The setting that the task has its name from; "" if there are no rows to train on."""
        return next((name for name in NAMED_BY if getattr(self, name)), "")

    @property
    def task_name(self) -> str:
        """Name of the task: `task`, `name`, or the first file's or the dataset's, without what paths do not take."""
        given = getattr(self, self.named_by) if self.named_by else "rows"
        if self.named_by in ("task", "name"):
            return given
        stem = Path(given if isinstance(given, str) else given[0]).name.split(".")[0]
        name = re.sub(r"[^A-Za-z0-9_-]", "_", stem).strip("_-")
        return name or "rows"


NAMED_BY = ("task", "name", "dataset_name", "train_file", "unlabeled_file", "test_file", "validation_file")
"""Settings that name the task; the first that is given does."""
SOURCES = ("task", "train_file", "unlabeled_file", "dataset_name")
"""Settings that say where rows come from; a run needs one of them."""
OWN_DATA = (
    *("train_file", "validation_file", "test_file", "unlabeled_file", "dataset_name", "dataset_config_name", "name"),
    *("text_columns", "label_column", "label_columns", "label_names"),
)
"""Settings that mean nothing beside a `task`."""


def check_data_source(settings: DataSettings, needs_train: bool = True) -> None:
    """Raise UserError unless the rows come from one place, and every setting given is read.

    Args:
        needs_train: Whether there must be rows to train on; otherwise a test or validation file is enough.
    """
    given = [f"--{name}" for name in OWN_DATA if getattr(settings, name)]
    if settings.task and given:
        raise UserError(
            f"--task {settings.task} brings its own rows, columns and labels, but {given[0]} is given too; leave one "
            "out"
        )
    is_scored = bool(settings.test_file or settings.validation_file) and not needs_train
    if not settings.task and not settings.has_own_data and not is_scored:
        raise UserError(
            "--task is missing: give a task of GLUE, or rows of your own with --train_file, --unlabeled_file or "
            "--dataset_name"
        )
    if settings.dataset_name and (files := [name for name in given if name.endswith("_file")]):
        raise UserError(f"--dataset_name {settings.dataset_name} and {files[0]} are both given; leave one out")
    if settings.dataset_config_name and not settings.dataset_name:
        raise UserError("--dataset_config_name is of a --dataset_name, which is not given; leave it out")
    if settings.name and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", settings.name, re.ASCII):
        raise UserError(
            f"--name {shown(settings.name)} becomes part of paths; write letters, digits, dots, dashes and underscores"
        )
    if settings.text_columns and len(settings.text_columns) > 2:
        raise UserError(
            f"--text_columns {' '.join(settings.text_columns)} are {len(settings.text_columns)} columns, but a row has "
            "one or two texts; give one or two"
        )
    if settings.label_columns is not None and len(settings.label_columns) < 2:
        raise UserError(
            f"--label_columns {settings.label_columns[0]} is one column; give one for each of two or more classes, or "
            "take --label_column"
        )
    if settings.label_columns and settings.label_column:
        raise UserError("--label_columns and --label_column are both given; leave one out")
    for option in ("label_names", "label_columns", "text_columns"):
        names = [name.casefold() for name in getattr(settings, option) or ()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"--{option} has {shown(twice)} twice; write each once")
