"""A task's training rows as 64 tokenised shards: their files, the copy on each node's scratch disk, and reading them.

    train.py --data_placement sharded --shard_dir shards/mnli --scratch_dir /scratch ...

programs/shard.py makes them. The shards are those of data/batches.py, so the rows of a file depend on the data alone,
and its bytes do not depend on the number of workers. With n nodes, node i holds shards i * 64 / n up to
(i + 1) * 64 / n, and its ranks take their slots of every global batch from these.

    SHARD_DIR/
      shard-00.safetensors .. shard-63.safetensors   rows, labels, lengths [n], input_ids, token_type_ids [tokens]
      holdout.safetensors    the same, of rows that only pick epochs; no rows with --select_on dev
      index.safetensors      lengths and labels of all training rows, which every rank needs
        where the teacher has a tokenizer of its own, these files have teacher_lengths, teacher_input_ids and
        teacher_token_type_ids too
      manifest.json          what the files were made from, and the checksum of each; written last
      manifest.sha256        its own checksum (files.py)
    until manifest.json is there, so that a later start can continue:
      made_from.json         what the files are made from
      shard-00.sha256 ..     checksums of finished files
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peakd_ds.config import RunConfig
from peakd_ds.config.data import DataSettings
from peakd_ds.data.division import NUM_SHARDS, divide_rows, holds_out
from peakd_ds.data.tasks import Task
from peakd_ds.data.tokens import ON_ALL_NODES, Split, TokenRows, earlier_tokenizer_digest, tokenizer_digest
from peakd_ds.errors import UserError
from peakd_ds.files import damage_of_file, damage_of_written, damaged, parse_json, whole_file
from peakd_ds.ranks import dist, launch

FORMAT = 1
HOLDOUT = "holdout.safetensors"
INDEX = "index.safetensors"
TEACHER = "teacher_"
"""Prefix of the columns of the teacher's tokens, where its tokenizer is not the student's."""
TEACHER_TOKENIZER = "teacher_tokenizer"
"""The manifest's entry for that tokenizer."""
MIB = 2**20


@dataclass(frozen=True)
class FileRecord:
    """The manifest's entry for one file."""

    sha256: str
    num_bytes: int
    num_rows: int
    num_tokens: int


@dataclass(frozen=True)
class Manifest:
    """A complete folder of shards."""

    folder: Path
    made_from: dict[str, Any]
    num_rows: int
    """Training rows, including those held out."""
    files: dict[str, FileRecord]

    @property
    def data_fingerprint(self) -> str:
        return self.made_from["data"]

    def to_json(self) -> str:
        files = {name: asdict(record) for name, record in self.files.items()}
        return json.dumps({"made_from": self.made_from, "num_rows": self.num_rows, "files": files}, indent=1)


def describe(
    task: Task,
    data_fingerprint: str,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    select_on: str,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, Any]:
    """Everything that the bytes of the shards depend on.

    Args:
        teacher_tokenizer: None: the same one as the student's.
    """
    described = {
        "format": FORMAT,
        "num_shards": NUM_SHARDS,
        "task": task.name,
        "data": data_fingerprint,
        "tokenizer": tokenizer_digest(tokenizer),
        "max_seq_length": max_seq_length,
        "select_on": select_on,
    }
    if teacher_tokenizer is not None and teacher_tokenizer is not tokenizer:
        described[TEACHER_TOKENIZER] = tokenizer_digest(teacher_tokenizer)
    return described


def select_on_of(settings: DataSettings, task: Task) -> str:
    """`--select_on` as it changes the shards: rows are held out, or not."""
    return "holdout" if holds_out(settings, task) else "dev"


def rows_of_files(task: Task, labels: np.ndarray, select_on: str) -> dict[str, np.ndarray]:
    """Numbers of the rows in each file, int64. Shards hold the trained rows.

    Args:
        labels: [N] or [N, C] of all training rows.
    """
    trained, held_out = divide_rows(task, labels, select_on == "holdout")
    bounds = trained.bounds
    shards = {_shard_name(number): trained.rows[bounds[number] : bounds[number + 1]] for number in range(NUM_SHARDS)}
    return {**shards, HOLDOUT: held_out}


def shards_of_node(node: int, num_nodes: int) -> list[str]:
    """File names of a node's block of shards.

    Raises:
        UserError: the nodes do not divide the shards.
    """
    if NUM_SHARDS % num_nodes:
        fitting = [str(n) for n in range(1, NUM_SHARDS + 1) if NUM_SHARDS % n == 0]
        raise UserError(
            f"{num_nodes} nodes do not divide the {NUM_SHARDS} shards; take {', '.join(fitting[:-1])} or {fitting[-1]} "
            "nodes (--data_placement replicated trains on any number)"
        )
    size = NUM_SHARDS // num_nodes
    return [_shard_name(number) for number in range(node * size, (node + 1) * size)]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of shards. Raises UserError if there is none or it cannot be read."""
    file = folder / "manifest.json"
    if not file.exists():
        raise UserError(
            f"--shard_dir {folder} is not a complete set of shards (no manifest.json); make it with peakd-shard"
        )
    remedy = "run peakd-shard again, which makes it again"
    damage = damage_of_written(file)
    if damage is not None:
        raise damaged(folder, damage, remedy)
    try:
        content = parse_json(file.read_text())
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
        return Manifest(folder, dict(content["made_from"]), int(content["num_rows"]), files)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(file, str(error), remedy) from error


def _shard_name(number: int) -> str:
    return f"shard-{number:02d}.safetensors"


def check_made_from(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise UserError, naming each difference, if a folder's shards were made from other data or settings."""
    differing = [
        f"{name}: {found.get(name)} there, {wanted.get(name)} here"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        raise UserError(
            f"--shard_dir {folder} holds shards of other data or settings ({'; '.join(differing)}); give another "
            "--shard_dir, made by peakd-shard with these settings"
        )


# -- Reading -----------------------------------------------------------------------------------------------------------


def find(
    config: RunConfig,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    data_fingerprint: str | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Manifest:
    """The shards of `--shard_dir`, checked against the settings and the nodes of this run; nothing is copied yet.

    Args:
        data_fingerprint: Fingerprint of the train split; None on ranks that have not read it, which skip this check.
        teacher_tokenizer: None: the same one as the student's.

    Raises:
        UserError: the shards are incomplete, were made from other data or settings, or do not fit the number of nodes.
    """
    manifest = read_manifest(Path(config.shard_dir))
    wanted = describe(
        task,
        data_fingerprint or manifest.data_fingerprint,
        tokenizer,
        config.max_seq_length,
        select_on_of(config, task),
        teacher_tokenizer,
    )
    if manifest.made_from.get("tokenizer") == earlier_tokenizer_digest(tokenizer):
        wanted["tokenizer"] = manifest.made_from["tokenizer"]
    check_made_from(manifest.folder, manifest.made_from, wanted)
    shards_of_node(dist.node_rank(), dist.num_nodes())
    num_trained = manifest.num_rows - manifest.files[HOLDOUT].num_rows
    if num_trained < dist.num_nodes():
        raise UserError(
            f"task {task.name} has {num_trained} rows to train on, fewer than the {dist.num_nodes()} nodes; "
            "set --data_placement replicated"
        )
    return manifest


def load(config: RunConfig, task: Task, manifest: Manifest) -> Split:
    """The train split (collective), with the tokens of this node's shards and of the held out rows.

    One rank of each node copies its files to scratch and verifies the copies. A dry run verifies the originals.

    Raises:
        UserError: a file is damaged, or a scratch disk is full or cannot be written; the message names it.
    """
    node, num_nodes = dist.node_rank(), dist.num_nodes()
    names = [*shards_of_node(node, num_nodes), HOLDOUT]
    scratch = None if config.dry_run else scratch_of(config.scratch_dir)
    dist.agree(lambda: stage(manifest, [*names, INDEX], scratch) if launch.local_rank() == 0 else None)

    def open_files() -> Split:
        folder = _staged_folder(manifest, scratch)
        index = load_file(folder / INDEX)
        lengths = index["lengths"].numpy().astype(np.int64)
        node_of = np.full(manifest.num_rows, ON_ALL_NODES)
        rows = rows_of_files(task, index["labels"].numpy(), manifest.made_from["select_on"])
        for other in range(num_nodes):
            for name in shards_of_node(other, num_nodes):
                node_of[rows[name]] = other
        files = [load_file(folder / name) for name in names]
        split = Split(_rows_of(files, lengths), lengths, index["labels"], node_of)
        if TEACHER_TOKENIZER in manifest.made_from:
            teacher_lengths = index[f"{TEACHER}lengths"].numpy().astype(np.int64)
            split.teacher_rows = _rows_of(files, teacher_lengths, TEACHER)
        return split

    return dist.agree(open_files)


def _rows_of(files: Sequence[dict[str, Tensor]], lengths: np.ndarray, prefix: str = "") -> TokenRows:
    """The tokens in mapped files: the student's, or with the prefix TEACHER the teacher's.

    Args:
        lengths: Token counts of all rows, int64 [N].
    """
    columns = [{name: tensors[prefix + name].numpy() for name in TokenRows.COLUMNS} for tensors in files]
    return TokenRows(((tensors["rows"].numpy(), of) for tensors, of in zip(files, columns, strict=True)), lengths)


# -- Staging -----------------------------------------------------------------------------------------------------------


def stage(manifest: Manifest, names: Sequence[str], scratch: Path | None) -> None:
    """Copy files to this node's scratch disk and verify each copy; intact copies are kept.

    Without a scratch disk the originals are verified.

    Raises:
        UserError: a file is damaged, or the scratch disk is full or cannot be written; names file and host.
    """
    if scratch is None:
        for name in names:
            _check_intact(manifest, name)
        return
    folder, host = _staged_folder(manifest, scratch), socket.gethostname()
    try:
        missing = [name for name in names if damage_of_file(folder / name, manifest.files[name].sha256) is not None]
        folder.mkdir(parents=True, exist_ok=True)
        needed, free = sum(manifest.files[name].num_bytes for name in missing), shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"scratch {scratch} on {host} has {free / MIB:,.1f} MiB free, and this node's shards need "
                f"{needed / MIB:,.1f}; free space there or give another --scratch_dir"
            )
        for name in missing:
            if not (manifest.folder / name).exists():
                _check_intact(manifest, name)
            with whole_file(folder / name) as copy:
                shutil.copyfile(manifest.folder / name, copy)
                if damage_of_file(copy, manifest.files[name].sha256) is not None:
                    _check_intact(manifest, name)
                    raise UserError(
                        f"{name} changed while it was copied to {scratch} on {host}; the disk or the network is "
                        "failing: give another --scratch_dir or leave this host out"
                    )
    except OSError as error:
        raise UserError(
            f"shards cannot be copied to scratch {scratch} on {host} ({error}); free space there or give another "
            "--scratch_dir"
        ) from error


def scratch_of(scratch_dir: str) -> Path | None:
    """The scratch folder that the user, the site or Slurm chose; None if there is none."""
    chosen = scratch_dir or os.environ.get("PEAKD_SCRATCH") or os.environ.get("SLURM_TMPDIR")
    return Path(chosen) if chosen else None


def _staged_folder(manifest: Manifest, scratch: Path | None) -> Path:
    """Folder of the staged files. Its name follows from the content, so runs on the same shards share it."""
    if scratch is None:
        return manifest.folder
    return scratch / f"peakd-shards-{hashlib.sha256(manifest.to_json().encode()).hexdigest()[:16]}"


def _check_intact(manifest: Manifest, name: str) -> None:
    damage = damage_of_file(manifest.folder / name, manifest.files[name].sha256)
    if damage is not None:
        raise damaged(manifest.folder, damage, "run peakd-shard again, which makes the file again")
