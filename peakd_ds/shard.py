"""A task's training rows as 64 tokenised shards: made by MPI workers, copied to each node's scratch, read by train.py.

    srun --mpi=pmix peakd-shard --task mnli --teacher bert-base-uncased --shard_dir shards/mnli   # or mpirun, or alone
    train.py --data_placement sharded --shard_dir shards/mnli --scratch_dir /scratch ...

The shards are the canonical ones of data.py, so which rows a file holds depends on the data alone, and its bytes do not
depend on the workers. With n nodes, node i holds shards i * 64 / n up to (i + 1) * 64 / n, from which its ranks' slots
of every global batch come.

    SHARD_DIR/
      shard-00.safetensors .. shard-63.safetensors   rows, labels, lengths [n], input_ids, token_type_ids [tokens]
      holdout.safetensors    the same, of rows that only pick epochs; no rows with --select_on dev
      index.safetensors      lengths and labels of all training rows, which every rank needs
      manifest.json          what the files were made from, and the checksum of each; written last
      shard-00.json ..       until the manifest is there, the checksums of finished files: a later start goes on
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import safetensors.numpy
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from peakd_ds import data, dist, modeling
from peakd_ds.config import RunConfig, UserError, exit_with
from peakd_ds.data import NUM_SHARDS, Split, TokenRows
from peakd_ds.files import sha256_of, whole_file, write_atomically
from peakd_ds.tasks import Task, get_task

T = TypeVar("T")

FORMAT = 1
HOLDOUT = "holdout.safetensors"
INDEX = "index.safetensors"
MIB = 2**20


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says about one file."""

    sha256: str
    num_bytes: int
    num_rows: int
    num_tokens: int


@dataclass(frozen=True)
class Manifest:
    """A whole folder of shards."""

    folder: Path
    made_from: dict[str, Any]
    num_rows: int
    """Training rows, held out ones included."""
    files: dict[str, FileRecord]

    @property
    def data_fingerprint(self) -> str:
        return self.made_from["data"]

    def to_json(self) -> str:
        files = {name: asdict(record) for name, record in self.files.items()}
        return json.dumps({"made_from": self.made_from, "num_rows": self.num_rows, "files": files}, indent=1)


def describe(
    task: Task, data_fingerprint: str, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, select_on: str
) -> dict[str, Any]:
    """All that the bytes of the shards depend on."""
    return {
        "format": FORMAT,
        "num_shards": NUM_SHARDS,
        "task": task.name,
        "data": data_fingerprint,
        "tokenizer": data.tokenizer_digest(tokenizer),
        "max_seq_length": max_seq_length,
        "select_on": select_on,
    }


def rows_of_files(num_rows: int, select_on: str) -> dict[str, np.ndarray]:
    """Which of so many training rows each file holds: int64, sorted. The shards hold the rows trained on."""
    trained, held_out = np.arange(num_rows), np.arange(0)
    if select_on == "holdout":
        trained, held_out = data.split_holdout(num_rows)
    bounds = data.shard_bounds(len(trained))
    shards = {_shard_name(number): trained[bounds[number] : bounds[number + 1]] for number in range(NUM_SHARDS)}
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


# -- Reading them: train.py --------------------------------------------------------------------------------------------


def find(config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase, data_fingerprint: str | None) -> Manifest:
    """The shards of `--shard_dir`, checked against the settings and the nodes of this run; nothing is copied yet.

    Args:
        data_fingerprint: of the train split; None on ranks that have not read it and leave this check to others.

    Raises:
        UserError: no whole set of shards there, made from something else, or not for so many nodes.
    """
    manifest = read_manifest(Path(config.shard_dir))
    wanted = describe(
        task, data_fingerprint or manifest.data_fingerprint, tokenizer, config.max_seq_length, config.select_on
    )
    _check_made_from(manifest.folder, manifest.made_from, wanted)
    shards_of_node(dist.node_rank(), dist.num_nodes())
    rows = rows_of_files(manifest.num_rows, config.select_on)
    num_trained = manifest.num_rows - len(rows[HOLDOUT])
    if num_trained < dist.num_nodes():
        raise UserError(
            f"task {task.name} has {num_trained} rows to train on, fewer than the {dist.num_nodes()} nodes; "
            "set --data_placement replicated"
        )
    return manifest


def load(config: RunConfig, manifest: Manifest) -> Split:
    """The train split (collective), with the tokens of this node's shards and of the held out rows.

    One rank of each node copies its files to scratch and verifies them; a dry run verifies them where they are.

    Raises:
        UserError: a damaged file, or a scratch that is full or cannot be written; with its name and host.
    """
    node, num_nodes = dist.node_rank(), dist.num_nodes()
    names = [*shards_of_node(node, num_nodes), HOLDOUT]
    scratch = None if config.dry_run else _scratch(config.scratch_dir)
    dist.agree(lambda: stage(manifest, [*names, INDEX], scratch) if dist.local_rank() == 0 else None)

    def open_files() -> Split:
        folder = _staged_folder(manifest, scratch)
        index = load_file(folder / INDEX)
        lengths = index["lengths"].numpy().astype(np.int64)
        node_of = np.full(manifest.num_rows, data.ON_ALL_NODES)
        rows = rows_of_files(manifest.num_rows, manifest.made_from["select_on"])
        for other in range(num_nodes):
            for name in shards_of_node(other, num_nodes):
                node_of[rows[name]] = other
        held_here = TokenRows((_rows_of(folder / name) for name in names), lengths)
        return Split(held_here, lengths, index["labels"], node_of)

    return dist.agree(open_files)


def _rows_of(file: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Numbers and tokens of the rows in a file, mapped into memory."""
    tensors = load_file(file)
    return tensors["rows"].numpy(), {name: tensors[name].numpy() for name in TokenRows.COLUMNS}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of shards. Raises UserError where there is none, or it cannot be read."""
    file = folder / "manifest.json"
    if not file.exists():
        raise UserError(
            f"--shard_dir {folder} holds no whole set of shards (no manifest.json); make it with peakd-shard"
        )
    try:
        content = json.loads(file.read_text())
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
        return Manifest(folder, dict(content["made_from"]), int(content["num_rows"]), files)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}); run peakd-shard again, which makes what is missing") from error


# -- Staging: to each node's scratch -----------------------------------------------------------------------------------


def stage(manifest: Manifest, names: Sequence[str], scratch: Path | None) -> None:
    """Copy files to this node's scratch and verify each copy; whole ones that are there already are kept.

    Without a scratch the files are verified where they are.

    Raises:
        UserError: a damaged file, named; a scratch that is full or cannot be written, with the host.
    """
    if scratch is None:
        for name in names:
            _check_whole(manifest, name)
        return
    folder, host = _staged_folder(manifest, scratch), socket.gethostname()
    try:
        missing = [name for name in names if not _is_whole(folder / name, manifest.files[name])]
        folder.mkdir(parents=True, exist_ok=True)
        needed, free = sum(manifest.files[name].num_bytes for name in missing), shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"scratch {scratch} on {host} has {free / MIB:,.1f} MiB free, and this node's shards need "
                f"{needed / MIB:,.1f}; free space there or give another --scratch_dir"
            )
        for name in missing:
            with whole_file(folder / name) as copy:
                shutil.copyfile(manifest.folder / name, copy)
                if not _is_whole(copy, manifest.files[name]):
                    _check_whole(manifest, name)
                    raise UserError(
                        f"{name} was copied to {scratch} on {host} and came out different; the disk or the network is "
                        "failing: give another --scratch_dir or leave this host out"
                    )
    except OSError as error:
        raise UserError(
            f"shards cannot be copied to scratch {scratch} on {host} ({error}); free space there or give another "
            "--scratch_dir"
        ) from error


def _scratch(scratch_dir: str) -> Path | None:
    """The folder that the user or the site named, or the one that was made for the job, if any."""
    chosen = scratch_dir or os.environ.get("PEAKD_SCRATCH") or os.environ.get("SLURM_TMPDIR")
    return Path(chosen) if chosen else None


def _staged_folder(manifest: Manifest, scratch: Path | None) -> Path:
    """Where staged files lie: a folder for each content, so that runs on the same shards share them."""
    if scratch is None:
        return manifest.folder
    return scratch / f"peakd-shards-{hashlib.sha256(manifest.to_json().encode()).hexdigest()[:16]}"


def _is_whole(file: Path, record: FileRecord) -> bool:
    return file.exists() and file.stat().st_size == record.num_bytes and sha256_of(file) == record.sha256


def _check_whole(manifest: Manifest, name: str) -> None:
    file = manifest.folder / name
    if not _is_whole(file, manifest.files[name]):
        state = "is damaged (its SHA-256 is not the manifest's)" if file.exists() else "is missing"
        raise UserError(f"{file} {state}; run peakd-shard again, which makes it anew")


# -- Making them: peakd-shard ------------------------------------------------------------------------------------------


def make(
    workers: Any,
    task: Task,
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    select_on: str,
    folder: Path,
) -> tuple[Manifest, list[str]]:
    """Tokenise the train split `rows` into `folder` (collective over the workers); whole files there are kept.

    Args:
        workers: MPI's communicator.

    Returns:
        The manifest; a line for each file that was made, with the reason.

    Raises:
        UserError: more workers than shards, a folder with shards of something else, or a disk that is full.
    """
    if workers.size > NUM_SHARDS:
        raise UserError(
            f"{workers.size} workers are more than the {NUM_SHARDS} shards, so some would have nothing to do; "
            f"start at most {NUM_SHARDS}"
        )
    made_from = describe(task, rows._fingerprint, tokenizer, max_seq_length, select_on)
    files = rows_of_files(len(rows), select_on)
    records = _agree(workers, lambda: _records_in(folder, made_from, files))
    encode = data.encoder_of(task, tokenizer, max_seq_length)

    def make_mine() -> list[str]:
        told = []
        for name in list(files)[workers.rank :: workers.size]:
            if name in records and _is_whole(folder / name, records[name]):
                continue
            if name in records:
                told.append(f"{name}: {'damaged' if (folder / name).exists() else 'missing'}, made again")
            else:
                told.append(f"{name}: made")
            columns = encode_file(rows, files[name], encode, data.label_dtype(task))
            record = _write(folder / name, columns)
            write_atomically(_sidecar(folder, name), json.dumps({"made_from": made_from, "record": asdict(record)}))
        return told

    told = sorted(line for lines in workers.allgather(_agree(workers, make_mine)) for line in lines)

    def finish() -> None:
        """The index and the manifest, from all files; then nothing else is needed."""
        finished = _records_in(folder, made_from, files) | {INDEX: _write_index(folder, files, data.label_dtype(task))}
        manifest = Manifest(folder, made_from, len(rows), finished)
        write_atomically(folder / "manifest.json", manifest.to_json() + "\n")
        for name in files:
            _sidecar(folder, name).unlink(missing_ok=True)

    _agree(workers, lambda: finish() if workers.rank == 0 else None)
    return _agree(workers, lambda: read_manifest(folder)), told


def encode_file(
    rows: datasets.Dataset, numbers: np.ndarray, encode: Callable[[dict[str, list]], dict[str, list]], label_dtype: Any
) -> dict[str, np.ndarray]:
    """The tensors of one shard: rows int64 [n], labels [n], lengths int32 [n], and all tokens one after another."""
    columns = rows[numbers]
    encoded = encode(columns) if len(numbers) else {"input_ids": [], "token_type_ids": [], "length": []}

    def join(name: str, dtype: Any) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(np.asarray(ids, dtype) for ids in encoded[name])])

    return {
        "rows": numbers.astype(np.int64),
        "labels": np.asarray(columns["label"], label_dtype),
        "lengths": np.asarray(encoded["length"], np.int32),
        "input_ids": join("input_ids", np.int32),
        "token_type_ids": join("token_type_ids", np.uint8),
    }


def _records_in(folder: Path, made_from: dict[str, Any], files: Iterable[str]) -> dict[str, FileRecord]:
    """Checksums of the finished files: the manifest's, and those of an earlier start that did not get to it.

    One that cannot be read counts as none: its file is made again.

    Raises:
        UserError: they belong to shards of something else.
    """
    found: dict[str, FileRecord] = {}
    if (folder / "manifest.json").exists():
        with contextlib.suppress(UserError):
            manifest = read_manifest(folder)
            found = {name: record for name, record in manifest.files.items() if name in files}
        if found:
            _check_made_from(folder, manifest.made_from, made_from)
    for name in files:
        try:
            content = json.loads(_sidecar(folder, name).read_text())
            found[name], its_source = FileRecord(**content["record"]), content["made_from"]
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            continue
        _check_made_from(folder, its_source, made_from)
    return found


def _sidecar(folder: Path, name: str) -> Path:
    return (folder / name).with_suffix(".json")


def _check_made_from(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
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


def _write(file: Path, columns: dict[str, np.ndarray]) -> FileRecord:
    content = safetensors.numpy.save(columns)
    try:
        with whole_file(file) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error}); free space or give another --shard_dir") from error
    num_tokens = int(columns["lengths"].sum())
    return FileRecord(hashlib.sha256(content).hexdigest(), len(content), len(columns["lengths"]), num_tokens)


def _write_index(folder: Path, files: dict[str, np.ndarray], label_dtype: Any) -> FileRecord:
    num_rows = sum(map(len, files.values()))
    index = {"lengths": np.zeros(num_rows, np.int32), "labels": np.zeros(num_rows, label_dtype)}
    for name in files:
        columns = safetensors.numpy.load_file(folder / name)
        for column in index:
            index[column][columns["rows"]] = columns[column]
    return _write(folder / INDEX, index)


def _shard_name(number: int) -> str:
    return f"shard-{number:02d}.safetensors"


# -- The program -------------------------------------------------------------------------------------------------------


class _Alone:
    """The communicator of one process that no launcher started, or that has no MPI library."""

    rank, size = 0, 1

    def allgather(self, value: T) -> list[T]:
        return [value]


def find_workers() -> Any:
    """MPI's communicator over all workers that the launcher started; a lone process needs no MPI library.

    Raises:
        UserError: several processes that do not find each other, each of which would do all the work.
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

        workers: Any = MPI.COMM_WORLD
        reason = "MPI sees one of them"
    except (ImportError, RuntimeError) as error:
        workers, reason = _Alone(), f"mpi4py finds no MPI library ({str(error).splitlines()[0]})"
    if workers.size < num_started:
        raise UserError(
            f"{num_started} processes were started, but {reason}; start them with srun --mpi=pmix (srun --mpi=list "
            "names what the site has) or the MPI library's own mpirun"
        )
    return workers


def main(argv: Sequence[str]) -> None:
    """Make the shards of a task, then copy each node's to its scratch if there is one."""
    parser = argparse.ArgumentParser(
        prog="peakd-shard",
        description="Tokenise a task's training rows into 64 shards, with one MPI rank for each worker, and copy each "
        "node's shards to its scratch. Started again, it keeps what is whole and makes the rest.",
    )
    parser.add_argument("--task", required=True, help="task name as for train.py")
    parser.add_argument("--teacher", required=True, help="folder or hub id as for train.py; its tokenizer is used")
    parser.add_argument("--shard_dir", required=True, help="folder on a shared file system that receives the shards")
    parser.add_argument("--data_dir", default="", help="as for train.py [default $PEAKD_DATA_DIR, else the hub]")
    parser.add_argument(
        "--max_seq_length",
        type=int,
        default=RunConfig.max_seq_length,
        help="as for train.py [tokens; default %(default)s; range >= 8]",
    )
    parser.add_argument(
        "--select_on",
        choices=("holdout", "dev"),
        default=RunConfig.select_on,
        help="as for train.py: a held out tenth is not in the shards [default %(default)s]",
    )
    parser.add_argument(
        "--scratch_dir",
        default="",
        help="folder on each node's own disk [default $PEAKD_SCRATCH, else $SLURM_TMPDIR, else nothing is copied]",
    )
    args = parser.parse_args(argv)
    workers = find_workers()
    if workers.size > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one core
    hosts = workers.allgather(socket.gethostname())
    nodes = list(dict.fromkeys(hosts))
    node, scratch = nodes.index(hosts[workers.rank]), _scratch(args.scratch_dir)

    def read() -> tuple[Task, datasets.Dataset, PreTrainedTokenizerBase]:
        if scratch is not None:
            shards_of_node(node, len(nodes))
        if args.max_seq_length < 8:
            raise UserError(f"--max_seq_length {args.max_seq_length} is outside its range >= 8; set at least 8")
        task = get_task(args.task)
        tokenizer = modeling.load_tokenizer(modeling.find_encoder(args.teacher, "teacher"))
        rows = data.load_splits(task, args.data_dir or os.environ.get("PEAKD_DATA_DIR", ""))["train"]
        if args.select_on == "holdout":
            data.check_holdout(task, len(rows))
        return task, rows, tokenizer

    task, rows, tokenizer = _agree(workers, read)
    manifest, told = make(workers, task, rows, tokenizer, args.max_seq_length, args.select_on, Path(args.shard_dir))
    if workers.rank == 0:
        for line in told:
            print(line)
        num_tokens = sum(record.num_tokens for record in manifest.files.values())
        num_bytes = sum(record.num_bytes for record in manifest.files.values())
        print(
            f"{manifest.folder}: {manifest.num_rows:,} rows of {task.name}, {num_tokens:,} tokens, "
            f"{num_bytes / MIB:,.1f} MiB in {NUM_SHARDS} shards by {workers.size} workers on {len(nodes)} nodes; "
            f"{len(told)} files made, the others kept",
            flush=True,
        )
    if scratch is not None:
        names = [*shards_of_node(node, len(nodes)), HOLDOUT, INDEX]
        is_first_here = hosts.index(hosts[workers.rank]) == workers.rank
        _agree(workers, lambda: stage(manifest, names, scratch) if is_first_here else None)
        if workers.rank == 0:
            print(f"{len(names) - 2} shards on each node's {scratch}, verified", flush=True)


def _agree(workers: Any, action: Callable[[], T]) -> T:
    """Run `action` on every worker (collective); an error on any one ends all, as in `dist.agree`."""
    result, error = None, None
    try:
        result = action()
    except Exception as caught:
        error = caught
    texts = workers.allgather(None if error is None else str(error) or type(error).__name__)
    if error is not None and not isinstance(error, ValueError | OSError):
        raise error
    told = next((text for text in texts if text is not None), None)
    if told is not None:
        raise UserError(told) from error
    return result  # type: ignore[return-value]


def cli() -> None:
    """Console script, and what launchers start."""
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        exit_with(error, "peakd-shard")


if __name__ == "__main__":
    cli()
