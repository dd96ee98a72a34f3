"""The frozen teacher asked once: its logits and matched [CLS] vectors for every row of a split, kept in files.

A cache is filled by all ranks together, each its share of the parts (blocks of the row order, at most 64), and read by
memory map, by row number: so it holds for any shuffling, number of ranks and accumulation, for the ptp and distill
stages, for later runs and for other nodes that see the folder. A killed build goes on with the parts that are missing.

    DIR/train/
      manifest.json          what the answers were made from; another teacher, data or dtype never reads them
      part-00.safetensors .. rows int64 [n], logits float32 [n, C], cls [n, L, H] in bf16 for bf16 runs, else float32
      part-00.sha256 ..      its checksum, written after it: a part without one is built again
      lock.json              who is building, while somebody is

N rows of the split, n of a part, B of a batch, C classes, L matched layers, H the teacher's hidden size.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from peakd_ds.cluster import run_lock
from peakd_ds.data.batches import NUM_SHARDS
from peakd_ds.data.tokens import Split, tokenizer_digest
from peakd_ds.errors import UserError
from peakd_ds.files import sha256_of, whole_file, write_atomically
from peakd_ds.ranks import dist, preempt
from peakd_ds.ranks.device import to_device
from peakd_ds.run import Run

FORMAT = 3
PART_ROWS = 128  # of a part, until there are 64; with fewer, forward passes cost little less
SPARE_BYTES = 64 * 2**20  # free space to leave, which checkpoints and exports also need

Say = Callable[[str], None]


@dataclass(frozen=True)
class Answers:
    """What the teacher said about one split, read by memory map."""

    folder: Path
    parts: list[dict[str, Tensor]]
    bounds: np.ndarray
    """int64 [parts + 1]: part i holds rows bounds[i] up to bounds[i + 1]."""
    columns: list[int]
    """Where each layer that was asked for stands in `cls`."""

    def logits(self, rows: Tensor) -> Tensor:
        """Logits float32 [N, C] of int64 rows [N], on the CPU; nothing else is read."""
        return torch.cat([part["logits"] for part in self.parts])[rows]

    def of(self, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits float32 [B, C] of int64 rows [B] and, for each layer asked for, [CLS] vectors [B, H], on the device.

        Raises:
            UserError: a row that the split did not have when the cache was built.
        """
        numbers = rows.cpu().numpy()
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.bounds[-1]:
            raise UserError(
                f"{self.folder} has rows 0 to {self.bounds[-1] - 1}, not {numbers.min()} to {numbers.max()}; take "
                "another --teacher_cache"
            )
        places = np.searchsorted(self.bounds, numbers, side="right") - 1
        found = [(self.parts[p], int(row - self.bounds[p])) for p, row in zip(places, numbers, strict=True)]
        if not found:  # a rank that has no row left
            part = self.parts[0]
            found_logits, found_cls = part["logits"][:0], part["cls"][:0]
        else:
            found_logits = torch.stack([part["logits"][i] for part, i in found])
            found_cls = torch.stack([part["cls"][i] for part, i in found])
        found_cls = to_device(found_cls)
        return to_device(found_logits), [found_cls[:, column] for column in self.columns]


def answers_of(run: Run, say: Say) -> dict[str, Answers] | None:
    """The teacher's answers for "train" and the split that picks epochs, under their names (collective).

    None where the teacher runs beside the student. Opened and verified once in a run.
    """
    if run.answers is None and _choose(run, say):
        selection_name, split, _ = run.selection
        train = open_answers(run, "train", run.train, [j for _, j in run.pairs], say)
        other = train if split is run.train else open_answers(run, run.task.eval_splits[0], split, [], say)
        run.drop_teacher()
        run.answers = {"train": train, selection_name: other}
    return run.answers


def _choose(run: Run, say: Say) -> bool:
    """Whether this run reads the teacher's answers from a cache (collective); says why where it is `auto` to choose."""
    config = run.config
    has_ptp = "ptp" in config.stages and config.ptp and not run.task.is_regression
    if config.teacher_mode == "online" or not (run.loss_reads_teacher or has_ptp):
        return False
    if config.teacher_mode == "cached":
        return True
    if run.pairs and config.hidden_loss == "tokens":
        say("teacher_mode auto: online, since --hidden_loss tokens compares every token and a cache keeps [CLS] alone")
        return False
    if config.data_placement == "sharded":
        say("teacher_mode auto: online, since --data_placement sharded leaves each node its own rows")
        return False

    def look() -> tuple[int, int]:
        folder = folder_of(run, "train")
        num_parts = _num_parts(len(run.train))
        num_missing = len(_missing(folder, num_parts))
        num_bytes = len(run.train) * _row_bytes(run, sorted({j for _, j in run.pairs})) * num_missing // num_parts
        return num_bytes, _free_bytes(folder)

    wanted, free = dist.on_main(look)
    fits = wanted + SPARE_BYTES <= free
    say(
        f"teacher_mode auto: {'cached' if fits else 'online'}, since the loss needs [CLS] alone and "
        f"{_mib(wanted)} {'fit' if fits else 'do not fit'} in {_mib(free)} of free space"
    )
    return fits


def folder_of(run: Run, split_name: str) -> Path:
    return Path(run.config.teacher_cache or run.folder / "teacher_cache") / split_name


def open_answers(run: Run, split_name: str, split: Split, layers: Sequence[int], say: Say) -> Answers:
    """The teacher's answers for a split, built first where they are not whole (collective).

    The teacher's engine is started only if a part is missing.

    Args:
        split_name: Name of the split in the data.
        layers: 1-based teacher layers whose [CLS] vectors are wanted.

    Raises:
        UserError: the folder holds answers of something else, a part is damaged, another host's build is silent, or
            the disk is too small. What is whole stays.
    """
    folder, num_parts = folder_of(run, split_name), _num_parts(len(split))
    stored = sorted(set(layers))

    def find() -> tuple[dict[str, Any], list[int]]:
        identity = _identity(run, split_name, split)
        return _check_manifest(folder, identity, stored), _missing(folder, num_parts)

    manifest, missing = dist.on_main(find)
    if missing:
        with run_lock.waiting_for(folder / "lock.json", say):
            manifest, missing = dist.on_main(find)  # another start may have built them meanwhile
            if missing:
                dist.on_main(
                    lambda: _prepare(folder, manifest, len(split), _row_bytes(run, manifest["layers"]), missing, say)
                )
                _build(run, folder, manifest, split, missing, say)
    parts = dist.agree(lambda: _open_parts(folder, manifest, _bounds(len(split))))
    return Answers(folder, parts, _bounds(len(split)), [manifest["layers"].index(layer) for layer in layers])


# -- What a cache was made from ----------------------------------------------------------------------------------------


def _identity(run: Run, split_name: str, split: Split) -> dict[str, Any]:
    """Everything that the answers depend on but the layers, under the names that messages use."""
    source = Path(run.teacher_source.path) if run.teacher_source.is_classifier else run.folder / "teacher"
    if not source.is_dir():
        source = Path(snapshot_download(str(run.teacher_source.path), allow_patterns=["*.safetensors", "config.json"]))
    files = [*sorted(source.glob("*.safetensors")), source / "config.json"]
    return {
        "format": FORMAT,
        "task": run.task.name,
        "texts": list(run.task.text_columns),
        "split": split_name,
        "rows": len(split),
        "data": json.loads((run.folder / "data.json").read_text())[split_name],
        "max_seq_length": run.config.max_seq_length,
        "tokenizer": tokenizer_digest(run.tokenizer),
        "teacher": hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest(),
        "dtype": run.config.dtype,
    }


def _check_manifest(folder: Path, identity: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    """The manifest there, which may hold more layers, or a new one. Raises UserError that says what differs."""
    file = folder / "manifest.json"
    if not file.exists():
        if any(folder.glob("part-*")):
            raise UserError(
                f"{folder} holds parts but no manifest.json, so it cannot be told what made them; delete the folder or "
                "take another --teacher_cache"
            )
        return identity | {"layers": layers}
    try:
        manifest = json.loads(file.read_text())
        found, stored = {name: manifest.get(name) for name in identity}, list(manifest["layers"])
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); delete {folder} or take another --teacher_cache") from error
    changed = [
        f"{name} {_short(found[name])} there, {_short(identity[name])} here"
        for name in identity
        if found[name] != identity[name]
    ]
    if set(layers) - set(stored):
        changed.append(f"layers {stored} there, {layers} here")
    if changed:
        raise UserError(
            f"--teacher_cache {folder.parent} holds another teacher's or another run's answers ({'; '.join(changed)}); "
            "nothing was changed there: take another --teacher_cache"
        )
    return manifest


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


# -- Building ----------------------------------------------------------------------------------------------------------


def _prepare(
    folder: Path, manifest: dict[str, Any], num_rows: int, row_bytes: int, missing: list[int], say: Say
) -> None:
    """Say the size, check that it fits, and write what the parts will be made from."""
    num_parts = _num_parts(num_rows)
    wanted, free = num_rows * row_bytes * len(missing) // num_parts, _free_bytes(folder)
    kept = f", {num_parts - len(missing)} of {num_parts} parts are there" if len(missing) < num_parts else ""
    say(f"teacher cache {folder}: {num_rows:,} rows, {_mib(wanted)} to build, {_mib(free)} free{kept}")
    if wanted + SPARE_BYTES > free:
        raise UserError(
            f"the teacher cache needs {_mib(wanted)}, and {_mib(SPARE_BYTES)} to spare, but {folder} has {_mib(free)} "
            "free; free some, set --teacher_cache to a larger disk, or take --teacher_mode online"
        )
    for left in folder.glob(".part-*"):  # of a killed build
        left.unlink()
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def _build(run: Run, folder: Path, manifest: dict[str, Any], split: Split, missing: list[int], say: Say) -> None:
    """Ask the teacher about the missing parts (collective), each rank its share.

    In a round each rank has one part or none, and all make the same number of forward passes: sharded engines talk to
    each other in every pass.
    """
    teacher = run.teacher()
    bounds, layers, start = _bounds(len(split)), manifest["layers"], time.perf_counter()
    num_passes = -(-int(np.diff(bounds).max()) // run.eval_batch_size)
    share = np.array_split(missing, dist.world_size())[dist.rank()]
    for turn in range(-(-len(missing) // dist.world_size())):
        part = int(share[turn]) if turn < len(share) else None
        rows = np.arange(bounds[part], bounds[part + 1]) if part is not None else np.zeros(0, np.int64)
        tensors = _ask(teacher, split, rows, num_passes, layers, run)

        def write(part: int | None = part, tensors: dict[str, Tensor] = tensors) -> None:
            if part is not None:
                _write_part(folder, part, tensors, _digest(manifest))
            if dist.is_main():
                run_lock.touch(folder / "lock.json")

        dist.agree(write)
        preempt.leave_if(preempt.stop_agreed())
    say(f"teacher cache {folder}: built in {time.perf_counter() - start:.1f} s")


@torch.no_grad()
def _ask(
    teacher: Any, split: Split, rows: np.ndarray, num_passes: int, layers: list[int], run: Run
) -> dict[str, Tensor]:
    """The tensors of one part; rows of like length are asked together, which saves padding."""
    dtype = torch.bfloat16 if run.config.dtype == "bf16" else torch.float32
    first = int(rows[0]) if len(rows) else 0
    logits = torch.zeros(len(rows), run.task.num_labels)
    cls = torch.zeros(len(rows), len(layers), run.teacher_source.config.hidden_size, dtype=dtype)
    by_length = rows[np.argsort(-split.lengths[rows], kind="stable")]
    for chunk in np.array_split(by_length, num_passes):
        micro = split.micro_batch(chunk)
        answer, hidden = teacher(layers, **micro.inputs)
        if len(chunk):
            places = torch.from_numpy(chunk - first)
            logits[places] = answer.float().cpu()
            for column, states in enumerate(hidden):
                cls[places, column] = states.to("cpu", dtype)
    return {"rows": torch.from_numpy(rows), "logits": logits, "cls": cls}


def _write_part(folder: Path, part: int, tensors: dict[str, Tensor], digest: str) -> None:
    file = folder / f"part-{part:02d}.safetensors"
    content = save(tensors, metadata={"manifest": digest})
    try:
        with whole_file(file) as temporary:
            temporary.write_bytes(content)
        write_atomically(_checksum_file(file), f"{hashlib.sha256(content).hexdigest()}  {file.name}\n")
    except OSError as error:
        raise UserError(
            f"{file} cannot be written ({error.strerror or error}); free space or set --teacher_cache to another disk: "
            "the parts that are whole are kept, and the same command goes on from them"
        ) from error


def _checksum_file(file: Path) -> Path:
    return file.with_suffix(".sha256")


def _num_parts(num_rows: int) -> int:
    return min(NUM_SHARDS, -(-num_rows // PART_ROWS))


def _bounds(num_rows: int) -> np.ndarray:
    return np.arange(_num_parts(num_rows) + 1) * num_rows // _num_parts(num_rows)


def _missing(folder: Path, num_parts: int) -> list[int]:
    files = [folder / f"part-{part:02d}.safetensors" for part in range(num_parts)]
    return [part for part, file in enumerate(files) if not (file.exists() and _checksum_file(file).exists())]


def _row_bytes(run: Run, layers: Sequence[int]) -> int:
    return row_bytes(run.task.num_labels, len(layers), run.teacher_source.config.hidden_size, run.config.dtype)


def row_bytes(num_labels: int, num_layers: int, hidden: int, dtype: str) -> int:
    """Bytes that one row takes in the files: row number, fp32 logits, [CLS] of so many layers."""
    return 8 + 4 * num_labels + (2 if dtype == "bf16" else 4) * num_layers * hidden


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


# -- Reading -----------------------------------------------------------------------------------------------------------


def _open_parts(folder: Path, manifest: dict[str, Any], bounds: np.ndarray) -> list[dict[str, Tensor]]:
    """All parts, mapped; the checksums of this rank's share are verified, the others by other ranks."""
    parts = []
    for part in range(len(bounds) - 1):
        file = folder / f"part-{part:02d}.safetensors"
        remedy = f"delete {file}, and the same command builds this part again"
        is_verified_here = part % dist.world_size() == dist.rank()
        if is_verified_here and _checksum_file(file).read_text().split()[:1] != [sha256_of(file)]:
            raise UserError(f"{file} is damaged (its checksum differs); {remedy}")
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in ("rows", "logits", "cls")}
                made_from = (opened.metadata() or {}).get("manifest")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} is damaged ({str(error).splitlines()[0]}); {remedy}") from error
        if made_from != _digest(manifest):
            raise UserError(f"{file} belongs to another cache than {folder / 'manifest.json'} tells of; {remedy}")
        wanted = torch.arange(int(bounds[part]), int(bounds[part + 1]))
        if not torch.equal(tensors["rows"], wanted):
            absent = sorted(set(wanted.tolist()) - set(tensors["rows"].tolist()))[:1]
            raise UserError(f"{file} has no row {absent[0] if absent else 'in its place'}; {remedy}")
        parts.append(tensors)
    return parts
