"""peakd-shard: tokenise a task's training rows into shards, with MPI workers; data/shards.py describes the files.

    srun --mpi=pmix peakd-shard --task mnli --teacher bert-base-uncased --shard_dir shards/mnli   # or mpirun, or alone

With a --student_init that has another tokenizer than the teacher, the files hold the tokens of both.
Started again, it keeps intact files and makes the others.
"""

import argparse
import contextlib
import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import datasets
import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from peakd_ds.data import reading
from peakd_ds.data.division import NUM_SHARDS, check_holdout, holds_out
from peakd_ds.data.label_arrays import label_array
from peakd_ds.data.shards import (
    HOLDOUT,
    INDEX,
    MIB,
    TEACHER,
    FileRecord,
    Manifest,
    check_made_from,
    describe,
    read_manifest,
    rows_of_files,
    scratch_of,
    select_on_of,
    shards_of_node,
    stage,
)
from peakd_ds.data.tasks import Task
from peakd_ds.data.tokens import Encode, earlier_tokenizer_digest, encoder_of, label_dtype
from peakd_ds.errors import UserError, first_line
from peakd_ds.files import (
    checksum_file,
    damage_of_file,
    damage_of_written,
    parse_json,
    write_atomically,
    write_checked,
    write_checksum,
    written_sha256,
)
from peakd_ds.model import contract
from peakd_ds.programs import scripts

T = TypeVar("T")

MADE_FROM = "made_from.json"


class Workers(Protocol):
    """What is used of an MPI communicator."""

    @property
    def rank(self) -> int:
        """Number of this worker."""

    @property
    def size(self) -> int:
        """Number of all workers."""

    def allgather(self, value: T, /) -> list[T]:
        """The values of all workers, by rank (collective)."""


# -- Making shards -----------------------------------------------------------------------------------------------------


def make(
    workers: Workers,
    task: Task,
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    select_on: str,
    folder: Path,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Manifest, list[str]]:
    """Tokenise the train split `rows` into `folder` (collective over the workers), keeping intact files there.

    Args:
        tokenizer: The student's.
        teacher_tokenizer: None: the same one.

    Returns:
        The manifest, and a line for each file that was made, with the reason.

    Raises:
        UserError: more workers than shards, a folder with shards of other data or settings, or a full disk.
    """
    if workers.size > NUM_SHARDS:
        raise UserError(
            f"{workers.size} workers are more than the {NUM_SHARDS} shards, so some would have nothing to do; "
            f"start at most {NUM_SHARDS}"
        )
    made_from = describe(task, rows._fingerprint, tokenizer, max_seq_length, select_on, teacher_tokenizer)
    labels = label_array(rows.data.column("label")).astype(label_dtype(task))
    files = rows_of_files(task, labels, select_on)
    earlier = earlier_tokenizer_digest(tokenizer)
    _agree(workers, lambda: _claim(folder, made_from, earlier) if workers.rank == 0 else None)
    digests = _agree(workers, lambda: _digests_in(folder, list(files)))
    encoders = {"": encoder_of(task, tokenizer, max_seq_length)}
    if teacher_tokenizer is not None and teacher_tokenizer is not tokenizer:
        encoders[TEACHER] = encoder_of(task, teacher_tokenizer, max_seq_length)

    def make_files() -> dict[str, tuple[str, FileRecord]]:
        """Why each of this worker's files was made, "" if it was kept, and its record."""
        made = {}
        for name in list(files)[workers.rank :: workers.size]:
            file, digest = folder / name, digests[name]
            reason = _why_made(file, digest)
            if reason:
                digest = _write(file, encode_file(rows, files[name], encoders, label_dtype(task)))
            made[name] = reason, _record(file, digest)
        return made

    done: dict[str, tuple[str, FileRecord]] = {}
    for part in workers.allgather(_agree(workers, make_files)):  # the folder itself may be stale on NFS
        done |= part

    def write_index_and_manifest() -> None:
        finished = {name: done[name][1] for name in files}
        finished[INDEX] = _record(folder / INDEX, _write_index(folder, files, labels))
        manifest = Manifest(folder, made_from, len(rows), finished)
        write_checked(folder / "manifest.json", f"{manifest.to_json()}\n".encode())
        for file in (folder / MADE_FROM, *(checksum_file(folder / name) for name in finished)):
            file.unlink(missing_ok=True)

    _agree(workers, lambda: write_index_and_manifest() if workers.rank == 0 else None)
    notes = sorted(f"{name}: {reason}" for name, (reason, _) in done.items() if reason)
    return _agree(workers, lambda: read_manifest(folder)), notes


def encode_file(
    rows: datasets.Dataset,
    numbers: np.ndarray,
    encoders: Mapping[str, Encode],
    label_dtype: npt.DTypeLike,
) -> dict[str, np.ndarray]:
    """The arrays of one shard.

    Args:
        numbers: Rows of the shard, int64 [n].
        encoders: A tokenizer's `encoder_of` by the prefix of its columns, "" or TEACHER.

    Returns:
        rows int64 [n], labels [n]; for each encoder lengths int32 [n], and input_ids int32 [T] and token_type_ids
        uint8 [T], row after row.
    """
    columns = rows[numbers]
    arrays = {"rows": numbers.astype(np.int64), "labels": np.asarray(columns["label"], label_dtype)}
    for prefix, encode in encoders.items():
        encoded = encode(columns) if len(numbers) else {"input_ids": [], "token_type_ids": [], "length": []}
        arrays[f"{prefix}lengths"] = np.asarray(encoded["length"], np.int32)
        for name, dtype in (("input_ids", np.int32), ("token_type_ids", np.uint8)):
            parts = (np.asarray(ids, dtype) for ids in encoded[name])
            arrays[prefix + name] = np.concatenate([np.zeros(0, dtype), *parts])
    return arrays


def _claim(folder: Path, made_from: dict[str, Any], earlier_digest: str) -> None:
    """Write what this folder's shards are made from, unless it holds shards of other data or settings.

    Args:
        earlier_digest: The tokenizer's, as earlier versions wrote it.

    Raises:
        UserError: it does; nothing is changed there.
    """
    for file in sorted(folder.glob("*.json")):
        if damage_of_written(file) is not None:  # the manifest, which is written again
            continue
        try:
            content = parse_json(file.read_text())
            found, record = dict(content["made_from"]), content.get("record", {})
        except (ValueError, TypeError, KeyError):  # the manifest of an earlier version, damaged
            continue
        if found.get("tokenizer") == earlier_digest:
            found["tokenizer"] = made_from["tokenizer"]
        check_made_from(folder, found, made_from)
        if "sha256" in record:
            _convert_earlier_checksum(file, record["sha256"])
    write_atomically(folder / MADE_FROM, json.dumps({"made_from": made_from}) + "\n")


def _convert_earlier_checksum(file: Path, digest: str) -> None:
    """Earlier versions noted the checksum of a finished shard-NN.safetensors in shard-NN.json."""
    write_checksum(file.with_suffix(".safetensors"), digest)
    file.unlink()


def _digests_in(folder: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of each finished file, from its own checksum or else the manifest; "" for files that are not finished."""
    records: dict[str, FileRecord] = {}
    with contextlib.suppress(UserError):  # no manifest, or a damaged one
        records = read_manifest(folder).files
    in_manifest = {name: record.sha256 for name, record in records.items()}
    return {name: written_sha256(folder / name) or in_manifest.get(name, "") for name in names}


def _why_made(file: Path, digest: str) -> str:
    """Why a file must be made; "" if it is intact."""
    if not digest:
        return "made"
    if damage_of_file(file, digest) is None:
        return ""
    return "damaged, made again" if file.exists() else "missing, made again"


def _write(file: Path, columns: dict[str, np.ndarray]) -> str:
    """Write arrays; return the SHA-256 of the file."""
    try:
        return write_checked(file, safetensors.numpy.save(columns))
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error}); free space or give another --shard_dir") from error


def _record(file: Path, digest: str) -> FileRecord:
    with safe_open(file, framework="numpy") as opened:
        lengths = opened.get_tensor("lengths")
    return FileRecord(digest, file.stat().st_size, len(lengths), int(lengths.sum()))


def _write_index(folder: Path, files: dict[str, np.ndarray], labels: np.ndarray) -> str:
    """Write lengths and labels of all rows; return the SHA-256 of the file."""
    index = {"labels": labels}
    for name in files:
        columns = safetensors.numpy.load_file(folder / name)
        for lengths in columns.keys() & {"lengths", f"{TEACHER}lengths"}:
            index.setdefault(lengths, np.zeros(len(labels), np.int32))[columns["rows"]] = columns[lengths]
    return _write(folder / INDEX, index)


# -- The program -------------------------------------------------------------------------------------------------------


class _Alone:
    """The only worker: no launcher started others, or there is no MPI library."""

    rank, size = 0, 1

    def allgather(self, value: T) -> list[T]:
        return [value]


def find_workers() -> Workers:
    """The workers that the launcher started; a single one needs no MPI library.

    Raises:
        UserError: the launcher started several that do not find each other; each would do all the work.
    """
    env = os.environ
    under_srun = "SLURM_PROCID" in env and "SLURM_STEP_ID" in env
    num_started = int(
        env.get("OMPI_COMM_WORLD_SIZE") or env.get("PMI_SIZE") or (under_srun and env.get("SLURM_STEP_NUM_TASKS")) or 1
    )
    if num_started == 1 and "PMIX_RANK" not in env:
        return _Alone()
    try:
        from mpi4py import MPI

        workers: Workers = MPI.COMM_WORLD
        reason = "MPI sees one of them"
    except (ImportError, RuntimeError) as error:
        workers, reason = _Alone(), f"mpi4py finds no MPI library ({first_line(error)})"
    if workers.size < num_started:
        raise UserError(
            f"{num_started} processes were started, but {reason}; start them with srun --mpi=pmix (srun --mpi=list "
            "names what the site has) or the MPI library's own mpirun"
        )
    return workers


def main(args: argparse.Namespace) -> None:
    """Make the shards of a task, then copy each node's shards to its scratch disk if there is one.

    Raises:
        UserError: as `find_workers` and `make`, or what cannot be read or copied.
    """
    workers = find_workers()
    if workers.size > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has one core
    hosts = workers.allgather(socket.gethostname())
    nodes = list(dict.fromkeys(hosts))
    node, scratch = nodes.index(hosts[workers.rank]), scratch_of(args.scratch_dir)

    def inputs() -> tuple[Task, datasets.Dataset, tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]]:
        if scratch is not None:
            shards_of_node(node, len(nodes))  # raises if the nodes do not divide the shards
        settings = scripts.data_settings(args)
        encoder = contract.find_encoder(args.teacher, "teacher", with_weights=False)
        student_init = encoder
        if args.student_init:
            student_init = contract.find_encoder(args.student_init, "student_init", with_weights=False)
        tokenizers = contract.load_tokenizers(encoder, student_init)
        task, splits, notes = reading.load(settings, contract.classes_of(encoder))
        if workers.rank == 0 and notes:
            print("\n".join(notes))
        if holds_out(settings, task):
            check_holdout(task, label_array(splits["train"].data.column("label")))
        return task, splits["train"], tokenizers

    task, rows, (tokenizer, teacher_tokenizer) = _agree(workers, inputs)
    select_on = select_on_of(scripts.data_settings(args), task)
    folder = Path(args.shard_dir)
    manifest, notes = make(workers, task, rows, tokenizer, args.max_seq_length, select_on, folder, teacher_tokenizer)
    if workers.rank == 0:
        for note in notes:
            print(note)
        num_tokens = manifest.files[INDEX].num_tokens
        num_bytes = sum(record.num_bytes for record in manifest.files.values())
        print(
            f"{manifest.folder}: {manifest.num_rows:,} rows of {task.name}, {num_tokens:,} tokens, "
            f"{num_bytes / MIB:,.1f} MiB in {NUM_SHARDS} shards by {workers.size} workers on {len(nodes)} nodes; "
            f"{len(notes)} files made, the others kept",
            flush=True,
        )
    if scratch is not None:
        names = [*shards_of_node(node, len(nodes)), HOLDOUT, INDEX]
        is_first_here = hosts.index(hosts[workers.rank]) == workers.rank
        _agree(workers, lambda: stage(manifest, names, scratch) if is_first_here else None)
        if workers.rank == 0:
            print(f"{len(names) - 2} shards on each node's {scratch}, verified", flush=True)


def _agree(workers: Workers, action: Callable[[], T]) -> T:
    """Run `action` on every worker (collective); an error on any worker is raised on all, as by `dist.agree`."""
    result, error = None, None
    try:
        result = action()
    except Exception as caught:
        error = caught
    texts = workers.allgather(None if error is None else str(error) or type(error).__name__)
    if error is not None and not isinstance(error, ValueError | OSError):
        raise error
    message = next((text for text in texts if text is not None), None)
    if message is not None:
        raise UserError(message) from error
    return cast(T, result)


if __name__ == "__main__":
    scripts.shard()
