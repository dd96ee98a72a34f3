"""Settings of the data."""

from dataclasses import dataclass

from peakd_ds.config.setting import Range, setting


@dataclass(frozen=True)
class DataSettings:
    """The task's rows, and which node reads which of them."""

    task: str = setting(
        "",
        "GLUE task (cola sst2 mrpc stsb qqp mnli qnli rte wnli) or movie_reviews; NAME_SUFFIX "
        "reads the folder of that name, e.g. qnli_10k",
        shown_default="required",
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
        "dev (optimistic; the results say so)",
        choices=("holdout", "dev"),
    )
