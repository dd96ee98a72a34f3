"""The files of a teacher cache: what is there, what is missing, and the checks of what is read.

    DIR/train/
      manifest.json           what the outputs were computed from; a run with another teacher, data or dtype is refused
      manifest.sha256         its checksum
      part-00.safetensors ..  rows int64 [n], logits float32 [n, C]
      layer-03-part-00.safetensors ..
                              rows int64 [n], cls [n, H] of teacher layer 3, in bf16 for bf16 runs, else float32
      part-00.sha256 ..       the checksum of each of these, written after it: a file without one is computed again
      lock.json               the start that is building

Files are added and never changed. Format 3, of earlier versions, keeps the layers that its manifest lists in the part
files, as cls [n, L, H]; they are read from there, and further layers are added beside them.

N rows of the split, n of a part, C classes, L layers, H the teacher's hidden size.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from peakd_ds.data.division import NUM_SHARDS
from peakd_ds.errors import UserError, first_line
from peakd_ds.files import (
    checksum_file,
    damage_of_written,
    damaged,
    is_written,
    parse_json,
    remove_leftovers,
    write_checked,
)
from peakd_ds.ranks import dist

FORMAT = 4
FORMAT_WITH_LAYERS_IN_PARTS = 3
PART_ROWS = 128
"""Rows of a part, until there are 64 parts; with fewer rows, a forward pass costs little less."""
SPARE_BYTES = 64 * 2**20
"""Free space to leave for checkpoints and exports."""
_ROW_NUMBER_BYTES = 8

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """The outputs of one part, memory-mapped."""

    logits_nC: Tensor
    cls_nH: list[Tensor]
    """[CLS] vectors of each requested layer, in that order."""


@dataclass(frozen=True)
class Gap:
    """What one part lacks."""

    part: int
    lacks_logits: bool
    layers: tuple[int, ...]
    """Layers whose own file is missing."""


@dataclass(frozen=True)
class CacheFiles:
    """The files of one split."""

    folder: Path
    num_rows: int
    manifest: Manifest
    """As it is on disk or will be written; empty if there is none and only gaps are wanted."""

    @property
    def bounds(self) -> np.ndarray:
        """int64 [parts + 1]: part i holds rows bounds[i] up to bounds[i + 1]."""
        return np.arange(self.num_parts + 1) * self.num_rows // self.num_parts

    @property
    def num_parts(self) -> int:
        return min(NUM_SHARDS, -(-self.num_rows // PART_ROWS))

    @property
    def layers_in_parts(self) -> list[int]:
        """Layers that lie in the part files (format 3)."""
        return self.manifest.get("layers", [])

    def file(self, part: int, layer: int | None = None) -> Path:
        """Where a part's logits are, or its [CLS] vectors of a layer that has files of its own."""
        name = f"part-{part:02d}.safetensors"
        return self.folder / (name if layer is None else f"layer-{layer:02d}-{name}")

    # -- What is missing -----------------------------------------------------------------------------------------------

    def gaps(self, layers: Sequence[int]) -> list[Gap]:
        """What must be computed before logits and the given layers (1-based) of all rows can be read."""
        outside = sorted(set(layers) - set(self.layers_in_parts))
        gaps = (
            Gap(
                part,
                not is_written(self.file(part)),
                tuple(layer for layer in outside if not is_written(self.file(part, layer))),
            )
            for part in range(self.num_parts)
        )
        return [gap for gap in gaps if gap.lacks_logits or gap.layers]

    def num_bytes(self, gaps: Sequence[Gap], num_labels: int, hidden_size: int, dtype: str) -> int:
        """Bytes of the missing files."""
        bounds, layer_bytes, total = self.bounds, _layer_bytes(hidden_size, dtype), 0
        for gap in gaps:
            row = len(gap.layers) * (_ROW_NUMBER_BYTES + layer_bytes)
            if gap.lacks_logits:
                row += row_bytes(num_labels, 0, hidden_size, dtype) + len(self.layers_in_parts) * layer_bytes
            total += row * int(bounds[gap.part + 1] - bounds[gap.part])
        return total

    def summary(self, gaps: Sequence[Gap]) -> str:
        """What is there already, for a message; "" if nothing is."""
        num_kept = self.num_parts - sum(gap.lacks_logits for gap in gaps)
        without = [gap for gap in gaps if not gap.lacks_logits]
        layers = sorted({layer for gap in without for layer in gap.layers})
        lack = f" ({len(without)} of them without layers {layers})" if without else ""
        return f", {num_kept} of {self.num_parts} parts are there{lack}" if num_kept else ""

    # -- Writing -------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Write the manifest, if it is not there, and delete what killed builds have left."""
        remove_leftovers(self.folder, "*part-*")
        file = self.folder / "manifest.json"
        if not file.exists():
            write_checked(file, (json.dumps(self.manifest, indent=2) + "\n").encode())

    def write(self, gap: Gap, logits_nC: Tensor, cls_nH: Mapping[int, Tensor]) -> None:
        """Write what a part lacks, its logits last: a part whose logits are there has the layers of its build.

        Args:
            cls_nH: [CLS] vectors by layer, at least of those that the part lacks.

        Raises:
            UserError: a file cannot be written; those before it stay.
        """
        bounds = self.bounds
        rows_n = torch.arange(int(bounds[gap.part]), int(bounds[gap.part + 1]))
        for layer in gap.layers:
            self._write(gap.part, layer, {"rows": rows_n, "cls": cls_nH[layer]})
        if gap.lacks_logits:
            tensors = {"rows": rows_n, "logits": logits_nC}
            if "layers" in self.manifest:
                inside = [cls_nH[layer] for layer in self.layers_in_parts]
                tensors["cls"] = torch.stack(inside, 1) if inside else torch.zeros(len(rows_n), 0, 0)
            self._write(gap.part, None, tensors)

    def _write(self, part: int, layer: int | None, tensors: dict[str, Tensor]) -> None:
        file = self.file(part, layer)
        try:
            write_checked(file, save(tensors, metadata=self._note(layer)))
        except OSError as error:
            raise UserError(
                f"{file} cannot be written ({error.strerror or error}); free space or set --teacher_cache to another "
                "disk: finished parts are kept, and the same command continues from them"
            ) from error

    def _note(self, layer: int | None) -> dict[str, str]:
        """The metadata of a file, which says to which cache and layer it belongs: one entry, since safetensors writes
        several in any order."""
        made_from = self.manifest if layer is None else self.manifest | {"layer": layer}
        return {"manifest": hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()}

    # -- Reading -------------------------------------------------------------------------------------------------------

    def open(self, layers: Sequence[int]) -> list[Part]:
        """All parts, memory-mapped, with the given layers (1-based); each rank compares the checksums of its share.

        Raises:
            UserError: a file is damaged, does not belong to this cache, or may not be read.
        """
        return [self._open_part(part, layers) for part in range(self.num_parts)]

    def _open_part(self, part: int, layers: Sequence[int]) -> Part:
        inside = self.layers_in_parts
        opened = self._open(part, None, ("logits", "cls") if set(inside) & set(layers) else ("logits",))
        return Part(
            opened["logits"],
            [
                opened["cls"][:, inside.index(layer)] if layer in inside else self._open(part, layer, ("cls",))["cls"]
                for layer in layers
            ],
        )

    def _open(self, part: int, layer: int | None, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of one file, which has the rows of the part."""
        file = self.file(part, layer)
        remedy = f"delete {file}, and the same command computes this part again"
        with _access_named(self.folder):
            _check_readable(file)
        if part % dist.world_size() == dist.rank():
            damage = damage_of_written(file)
            if damage is not None:
                raise damaged(self.folder, damage, remedy)
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in ("rows", *names)}
                note = opened.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise damaged(file, first_line(error), remedy) from error
        if note != self._note(layer):
            raise UserError(f"{file} belongs to another cache than {self.folder / 'manifest.json'} describes; {remedy}")
        expected = torch.arange(int(self.bounds[part]), int(self.bounds[part + 1]))
        if not torch.equal(tensors["rows"], expected):
            absent = sorted(set(expected.tolist()) - set(tensors["rows"].tolist()))[:1]
            raise UserError(f"{file} has no row {absent[0] if absent else 'in its place'}; {remedy}")
        return tensors


# -- The manifest ------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a folder; empty if there is none.

    Raises:
        UserError: it is damaged, may not be read, or is missing where there are parts.
    """
    file = folder / "manifest.json"
    with _access_named(folder):
        if not file.exists():
            if any(folder.glob("*part-*")):
                raise UserError(
                    f"{folder} holds parts but no manifest.json that says what made them; delete the folder or take "
                    "another --teacher_cache"
                )
            return {}
        _check_readable(file)
    remedy = f"delete {folder} or take another --teacher_cache"
    damage = damage_of_written(file)
    if damage is not None:
        raise damaged(folder, damage, remedy)
    try:
        manifest = parse_json(file.read_text())
        if not isinstance(manifest, dict):
            raise ValueError("it is no JSON object")
        if manifest.get("format") == FORMAT_WITH_LAYERS_IN_PARTS and not _is_list_of_ints(manifest.get("layers")):
            raise ValueError("'layers' is no list of numbers")
    except ValueError as error:
        raise damaged(file, str(error), remedy) from error
    return manifest


def checked_manifest(folder: Path, identity: Manifest, earlier: Manifest) -> Manifest:
    """The manifest in the folder, or the one to write there, which is `identity` with the format.

    Args:
        earlier: Entries as the former format has them.

    Raises:
        UserError: as `read_manifest`, or the folder holds other outputs; the message says what differs.
    """
    wanted = {"format": FORMAT} | identity
    manifest = read_manifest(folder)
    if not manifest:
        return wanted
    if manifest.get("format") == FORMAT_WITH_LAYERS_IN_PARTS:
        wanted |= {"format": FORMAT_WITH_LAYERS_IN_PARTS} | earlier
    changed = [
        f"{name} {_short(manifest.get(name))} there, {_short(value)} here"
        for name, value in wanted.items()
        if manifest.get(name) != value
    ]
    if changed:
        raise UserError(
            f"--teacher_cache {folder.parent} holds another teacher's or another run's outputs ({'; '.join(changed)}); "
            "nothing was changed there: take another --teacher_cache"
        )
    return manifest


def _is_list_of_ints(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


# -- Space and permissions ---------------------------------------------------------------------------------------------


def row_bytes(num_labels: int, num_layers: int, hidden_size: int, dtype: str) -> int:
    """Bytes of one row in the files: float32 logits, and [CLS] vectors of `num_layers` layers, with the row's number
    in each file."""
    layers = num_layers * (_ROW_NUMBER_BYTES + _layer_bytes(hidden_size, dtype))
    return _ROW_NUMBER_BYTES + 4 * num_labels + layers


def _layer_bytes(hidden_size: int, dtype: str) -> int:
    return (2 if dtype == "bf16" else 4) * hidden_size


def free_bytes(folder: Path) -> int:
    """Free space of the disk that a folder is on or will be on."""
    return shutil.disk_usage(_nearest(folder)).free


def check_room(folder: Path, num_bytes: int) -> None:
    """Raise UserError if the disk has no room for this many bytes and some to spare."""
    free = free_bytes(folder)
    if num_bytes + SPARE_BYTES > free:
        raise UserError(
            f"the teacher cache needs {mib(num_bytes)}, and {mib(SPARE_BYTES)} to spare, but {folder} has "
            f"{mib(free)} free; free some, set --teacher_cache to a larger disk, or take --teacher_mode online"
        )


def check_writable(folder: Path) -> None:
    """Raise UserError if files that a cache lacks may not be added."""
    nearest = _nearest(folder)
    if not os.access(nearest, os.W_OK | os.X_OK, effective_ids=True):
        raise UserError(
            f"the teacher cache {folder} lacks outputs of this run, but {nearest} may not be written; ask its owner, "
            "or take another --teacher_cache"
        )


def mib(num_bytes: int) -> str:
    """Bytes as messages show them."""
    return f"{num_bytes / 2**20:,.1f} MiB"


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _check_readable(file: Path) -> None:
    """Raise PermissionError if a file or its checksum may not be read; one that is missing is no matter here."""
    for path in (file, checksum_file(file)):
        with contextlib.suppress(FileNotFoundError):
            path.open("rb").close()


@contextlib.contextmanager
def _access_named(folder: Path) -> Iterator[None]:
    """Turn a denied access in the block, which reads the folder of another user, into a UserError."""
    try:
        yield
    except PermissionError as error:
        raise UserError(
            f"{error.filename} may not be read ({error.strerror}); ask its owner for `chmod -R a+rX {folder}`, or take "
            "another --teacher_cache"
        ) from error
