"""The cached teacher: its logits and matched [CLS] vectors for every row of a split, computed once and kept in files.

All ranks fill a cache together, each its share of the parts (blocks of the row order, at most 64). It is memory-mapped
and read by row number, so it fits any shuffling, number of ranks and accumulation, the ptp and the distill stage, later
runs, and other nodes that see the folder. A build that was killed continues with the missing parts.

    DIR/train/
      manifest.json          what the outputs were computed from; a run with another teacher, data or dtype is refused
      manifest.sha256        its checksum
      part-00.safetensors .. rows int64 [n], logits float32 [n, C], cls [n, L, H] in bf16 for bf16 runs, else float32
      part-00.sha256 ..      its checksum, written after it: a part without one is computed again
      lock.json              the start that is building

N rows of the split, n of a part, B of a batch, C classes, L matched layers, H the teacher's hidden size.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peakd_ds.cluster import run_lock
from peakd_ds.config import RunConfig
from peakd_ds.data.batches import NUM_SHARDS
from peakd_ds.data.tasks import Task
from peakd_ds.data.tokens import Split, TeacherOutputs, tokenizer_digest
from peakd_ds.errors import UserError, first_line
from peakd_ds.files import (
    damage_of_written,
    damaged,
    is_written,
    parse_json,
    remove_leftovers,
    sha256_of,
    write_checked,
)
from peakd_ds.model.build import check_saved_teacher
from peakd_ds.ranks import dist, preempt
from peakd_ds.ranks.device import to_device
from peakd_ds.teacher.online import OnlineTeacher

FORMAT = 3
PART_ROWS = 128
"""Rows of a part, until there are 64 parts; with fewer rows, a forward pass costs little less."""
SPARE_BYTES = 64 * 2**20
"""Free space to leave for checkpoints and exports."""

Say = Callable[[str], None]
Manifest = dict[str, Any]


@dataclass(frozen=True)
class CachedOutputs:
    """The teacher's outputs for one split, memory-mapped."""

    folder: Path
    parts: list[dict[str, Tensor]]
    bounds: np.ndarray
    """int64 [parts + 1]: part i holds rows bounds[i] up to bounds[i + 1]."""
    columns: list[int]
    """Column of `cls` for each layer that the run matches."""

    def logits(self, rows_N: Tensor) -> Tensor:
        """float32 [N, C] of int64 rows [N], on the CPU; hidden states are not read."""
        return torch.cat([part["logits"] for part in self.parts])[rows_N]

    def of(self, rows_B: Tensor, with_logits: bool = True) -> TeacherOutputs:
        """Logits float32 [B, C], or None, of int64 rows [B], and [CLS] vectors [B, H] of each matched layer, on the
        device.

        Raises:
            UserError: a row that the split did not have when the cache was built.
        """
        numbers = rows_B.cpu().numpy()
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.bounds[-1]:
            raise UserError(
                f"{self.folder} has rows 0 to {self.bounds[-1] - 1}, not {numbers.min()} to {numbers.max()}; take "
                "another --teacher_cache"
            )
        places = np.searchsorted(self.bounds, numbers, side="right") - 1
        found = [(self.parts[p], int(row - self.bounds[p])) for p, row in zip(places, numbers, strict=True)]
        if not found:  # a rank without rows
            part = self.parts[0]
            logits_BC, cls_BLH = part["logits"][:0], part["cls"][:0]
        else:
            logits_BC = torch.stack([part["logits"][i] for part, i in found])
            cls_BLH = torch.stack([part["cls"][i] for part, i in found])
        cls_BLH = to_device(cls_BLH)
        return to_device(logits_BC) if with_logits else None, [cls_BLH[:, column] for column in self.columns]


@dataclass
class TeacherCache:
    """The cache of a run: whether it is used, its folders, and its outputs once they are opened."""

    config: RunConfig
    task: Task
    teacher: OnlineTeacher
    tokenizer: PreTrainedTokenizerBase
    layers: tuple[int, ...]
    """1-based teacher layers whose [CLS] vectors the loss matches."""
    is_needed: bool
    """Whether any chosen stage reads the teacher."""
    fingerprints: dict[str, str]
    """Fingerprint of the rows of each split."""
    train: Split
    selection_name: str
    selection_split: Split
    eval_batch_size: int
    _outputs: dict[str, CachedOutputs] | None = field(default=None, init=False)

    def outputs(self, say: Say) -> dict[str, CachedOutputs] | None:
        """Outputs for "train" and the split that picks epochs, by name (collective); None if the teacher is online.

        They are opened, and built if need be, once in a run.
        """
        if self._outputs is None and self._is_used(say):
            train = self.open_split("train", self.train, self.layers, say)
            selection = train
            if self.selection_split is not self.train:
                selection = self.open_split(self.task.eval_splits[0], self.selection_split, (), say)
            self.teacher.stop()
            self._outputs = {"train": train, self.selection_name: selection}
        return self._outputs

    def check_space(self) -> None:
        """Raise UserError if the disk has no room for the parts that are missing, before any stage runs."""
        if self.config.teacher_mode != "cached" or not self.is_needed:
            return
        splits = {"train": (self.train, len(set(self.layers)))}
        if self.selection_split is not self.train:
            splits[self.task.eval_splits[0]] = (self.selection_split, 0)
        needed = sum(
            self._num_bytes(len(split), num_layers, len(_missing(self.folder_of(name), _num_parts(len(split)))))
            for name, (split, num_layers) in splits.items()
        )
        _check_free(self.folder_of("train"), needed)

    def folder_of(self, split_name: str) -> Path:
        return Path(self.config.teacher_cache or Path(self.config.run_dir) / "teacher_cache") / split_name

    def open_split(self, name: str, split: Split, layers: Sequence[int], say: Say) -> CachedOutputs:
        """Outputs for a split; missing parts are built first (collective). Only then does the teacher's engine start.

        Args:
            name: Name of the split in the data.
            layers: 1-based teacher layers whose [CLS] vectors are needed.

        Raises:
            UserError: the folder holds outputs of something else, a part is damaged, another host's build is silent,
                or the disk is too small. Finished parts stay.
        """
        folder, bounds = self.folder_of(name), _bounds(len(split))
        stored = sorted(set(layers))

        def find() -> tuple[Manifest, list[int]]:
            identity = self._identity(name, split)
            return _check_manifest(folder, identity, stored), _missing(folder, len(bounds) - 1)

        manifest, missing = dist.on_main(find)
        if missing:
            with run_lock.waiting_for(folder / "lock.json", say):
                manifest, missing = dist.on_main(find)  # another start may have built them meanwhile
                if missing:
                    num_bytes = self._num_bytes(len(split), len(manifest["layers"]), len(missing))
                    dist.on_main(lambda: _prepare(folder, manifest, len(split), num_bytes, missing, say))
                    self._build(folder, manifest, split, missing, say)
        parts = dist.agree(lambda: _open_parts(folder, manifest, bounds))
        return CachedOutputs(folder, parts, bounds, [manifest["layers"].index(layer) for layer in layers])

    def _is_used(self, say: Say) -> bool:
        """Whether this run reads a cache (collective); says why if the setting is `auto`."""
        config = self.config
        if config.teacher_mode == "online" or not self.is_needed:
            return False
        if config.teacher_mode == "cached":
            return True
        if self.layers and config.hidden_loss == "tokens":
            say("teacher_mode auto: online, since --hidden_loss tokens compares every token and a cache keeps [CLS]")
            return False
        if config.data_placement == "sharded":
            say("teacher_mode auto: online, since --data_placement sharded gives each node its own rows")
            return False

        def measure() -> tuple[int, int]:
            folder = self.folder_of("train")
            num_missing = len(_missing(folder, _num_parts(len(self.train))))
            num_layers = len(set(self.layers))
            return self._num_bytes(len(self.train), num_layers, num_missing), _free_bytes(folder)

        needed, free = dist.on_main(measure)
        fits = needed + SPARE_BYTES <= free
        say(
            f"teacher_mode auto: {'cached' if fits else 'online'}, since the loss needs [CLS] alone and "
            f"{_mib(needed)} {'fit' if fits else 'do not fit'} in {_mib(free)} of free space"
        )
        return fits

    def _num_bytes(self, num_rows: int, num_layers: int, num_missing: int) -> int:
        """Bytes of the missing parts."""
        size = row_bytes(self.task.num_labels, num_layers, self.teacher.hidden_size, self.config.dtype)
        return num_rows * size * num_missing // _num_parts(num_rows)

    def _identity(self, split_name: str, split: Split) -> Manifest:
        """Everything that the outputs depend on except the layers, under the names that messages use."""
        source = self.teacher.folder
        if self.teacher.source.is_classifier:
            source = Path(self.teacher.source.path)
        else:
            check_saved_teacher(source)
        if not source.is_dir():
            patterns = ["*.safetensors", "config.json"]
            source = Path(snapshot_download(str(self.teacher.source.path), allow_patterns=patterns))
        files = [*sorted(source.glob("*.safetensors")), source / "config.json"]
        return {
            "format": FORMAT,
            "task": self.task.name,
            "texts": list(self.task.text_columns),
            "split": split_name,
            "rows": len(split),
            "data": self.fingerprints[split_name],
            "max_seq_length": self.config.max_seq_length,
            "tokenizer": tokenizer_digest(self.tokenizer),
            "teacher": hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest(),
            "dtype": self.config.dtype,
        }

    # -- Building ------------------------------------------------------------------------------------------------------

    def _build(self, folder: Path, manifest: Manifest, split: Split, missing: list[int], say: Say) -> None:
        """Compute the missing parts (collective), each rank its share.

        In a round each rank has one part or none, and all ranks make the same number of forward passes: sharded
        engines communicate in every forward pass.
        """
        engine, start = self.teacher.engine(), time.perf_counter()
        bounds, layers = _bounds(len(split)), manifest["layers"]
        num_passes = -(-int(np.diff(bounds).max()) // self.eval_batch_size)
        share = np.array_split(missing, dist.world_size())[dist.rank()]
        for turn in range(-(-len(missing) // dist.world_size())):
            part = int(share[turn]) if turn < len(share) else None
            rows = np.arange(bounds[part], bounds[part + 1]) if part is not None else np.zeros(0, np.int64)
            tensors = self._compute(engine, split, rows, num_passes, layers)

            def write(part: int | None = part, tensors: dict[str, Tensor] = tensors) -> None:
                if part is not None:
                    _write_part(folder, part, tensors, _digest(manifest))
                if dist.is_main():
                    run_lock.touch(folder / "lock.json")

            dist.agree(write)
            preempt.leave_if(preempt.stop_agreed())
        say(f"teacher cache {folder}: built in {time.perf_counter() - start:.1f} s")

    @torch.no_grad()
    def _compute(
        self, engine: DeepSpeedEngine, split: Split, rows: np.ndarray, num_passes: int, layers: list[int]
    ) -> dict[str, Tensor]:
        """The tensors of one part; rows of similar length share a forward pass, which saves padding."""
        dtype = torch.bfloat16 if self.config.dtype == "bf16" else torch.float32
        first = int(rows[0]) if len(rows) else 0
        logits_nC = torch.zeros(len(rows), self.task.num_labels)
        cls_nLH = torch.zeros(len(rows), len(layers), self.teacher.hidden_size, dtype=dtype)
        by_length = rows[np.argsort(-split.lengths[rows], kind="stable")]
        for chunk in np.array_split(by_length, num_passes):
            micro = split.micro_batch(chunk)
            logits_BC, states = engine(layers, **micro.inputs)
            if len(chunk):
                places = torch.from_numpy(chunk - first)
                logits_nC[places] = logits_BC.float().cpu()
                for column, states_BH in enumerate(states):
                    cls_nLH[places, column] = states_BH.to("cpu", dtype)
        return {"rows": torch.from_numpy(rows), "logits": logits_nC, "cls": cls_nLH}


def row_bytes(num_labels: int, num_layers: int, hidden_size: int, dtype: str) -> int:
    """Bytes of one row in the files: row number, float32 logits, and [CLS] vectors of `num_layers` layers."""
    return 8 + 4 * num_labels + (2 if dtype == "bf16" else 4) * num_layers * hidden_size


# -- Files -------------------------------------------------------------------------------------------------------------


def _check_manifest(folder: Path, identity: Manifest, layers: list[int]) -> Manifest:
    """The manifest in the folder, which may have more layers, or a new one.

    Raises:
        UserError: the folder holds other outputs; the message says what differs.
    """
    file = folder / "manifest.json"
    if not file.exists():
        if any(folder.glob("part-*")):
            raise UserError(
                f"{folder} holds parts but no manifest.json that says what made them; delete the folder or take "
                "another --teacher_cache"
            )
        return identity | {"layers": layers}
    remedy = f"delete {folder} or take another --teacher_cache"
    damage = damage_of_written(file)
    if damage is not None:
        raise damaged(folder, damage, remedy)
    try:
        manifest = parse_json(file.read_text())
        found, stored = {name: manifest.get(name) for name in identity}, list(manifest["layers"])
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise damaged(file, str(error), remedy) from error
    changed = [
        f"{name} {_short(found[name])} there, {_short(identity[name])} here"
        for name in identity
        if found[name] != identity[name]
    ]
    if set(layers) - set(stored):
        changed.append(f"layers {stored} there, {layers} here")
    if changed:
        raise UserError(
            f"--teacher_cache {folder.parent} holds another teacher's or another run's outputs ({'; '.join(changed)}); "
            "nothing was changed there: take another --teacher_cache"
        )
    return manifest


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _prepare(folder: Path, manifest: Manifest, num_rows: int, num_bytes: int, missing: list[int], say: Say) -> None:
    """Say the size, check that it fits, and write the manifest.

    Raises:
        UserError: it does not fit.
    """
    num_parts = _num_parts(num_rows)
    kept = f", {num_parts - len(missing)} of {num_parts} parts are there" if len(missing) < num_parts else ""
    say(
        f"teacher cache {folder}: {num_rows:,} rows, {_mib(num_bytes)} to build, {_mib(_free_bytes(folder))} free{kept}"
    )
    _check_free(folder, num_bytes)
    remove_leftovers(folder, "part-*")
    write_checked(folder / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())


def _check_free(folder: Path, num_bytes: int) -> None:
    """Raise UserError if the disk has no room for this many bytes and some to spare."""
    free = _free_bytes(folder)
    if num_bytes + SPARE_BYTES > free:
        raise UserError(
            f"the teacher cache needs {_mib(num_bytes)}, and {_mib(SPARE_BYTES)} to spare, but {folder} has "
            f"{_mib(free)} free; free some, set --teacher_cache to a larger disk, or take --teacher_mode online"
        )


def _write_part(folder: Path, part: int, tensors: dict[str, Tensor], digest: str) -> None:
    file = _part_file(folder, part)
    try:
        write_checked(file, save(tensors, metadata={"manifest": digest}))
    except OSError as error:
        raise UserError(
            f"{file} cannot be written ({error.strerror or error}); free space or set --teacher_cache to another disk: "
            "finished parts are kept, and the same command continues from them"
        ) from error


def _part_file(folder: Path, part: int) -> Path:
    return folder / f"part-{part:02d}.safetensors"


def _num_parts(num_rows: int) -> int:
    return min(NUM_SHARDS, -(-num_rows // PART_ROWS))


def _bounds(num_rows: int) -> np.ndarray:
    return np.arange(_num_parts(num_rows) + 1) * num_rows // _num_parts(num_rows)


def _missing(folder: Path, num_parts: int) -> list[int]:
    return [part for part in range(num_parts) if not is_written(_part_file(folder, part))]


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def _open_parts(folder: Path, manifest: Manifest, bounds: np.ndarray) -> list[dict[str, Tensor]]:
    """All parts, memory-mapped; each rank compares the checksums of its share of them.

    Raises:
        UserError: a part is damaged or does not belong to this cache.
    """
    parts = []
    for part in range(len(bounds) - 1):
        file = _part_file(folder, part)
        remedy = f"delete {file}, and the same command computes this part again"
        if part % dist.world_size() == dist.rank():
            damage = damage_of_written(file)
            if damage is not None:
                raise damaged(folder, damage, remedy)
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in ("rows", "logits", "cls")}
                made_from = (opened.metadata() or {}).get("manifest")
        except (OSError, SafetensorError) as error:
            raise damaged(file, first_line(error), remedy) from error
        if made_from != _digest(manifest):
            raise UserError(f"{file} belongs to another cache than {folder / 'manifest.json'} describes; {remedy}")
        expected = torch.arange(int(bounds[part]), int(bounds[part + 1]))
        if not torch.equal(tensors["rows"], expected):
            absent = sorted(set(expected.tolist()) - set(tensors["rows"].tolist()))[:1]
            raise UserError(f"{file} has no row {absent[0] if absent else 'in its place'}; {remedy}")
        parts.append(tensors)
    return parts
