"""The cached teacher: its logits and matched vectors of rows for every row of a split, computed once and kept in files.

All ranks fill a cache together, each its share of the parts (blocks of the row order, at most 64). It is memory-mapped
and read by row number, so it fits any shuffling, number of ranks and accumulation, the ptp and the distill stage, later
runs, and other nodes that see the folder. What a run needs and the cache lacks is added: parts that a killed build left
out, and layers that no earlier run has matched. `cache_files.py` describes the files.

N rows of the split, n of a part, B of a batch, C classes, L matched layers, H the teacher's hidden size.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peakd_ds.cluster import run_lock
from peakd_ds.config import RunConfig
from peakd_ds.data.tasks import Task
from peakd_ds.data.tokens import Split, TeacherOutputs, earlier_tokenizer_digest, tokenizer_digest
from peakd_ds.errors import UserError
from peakd_ds.files import sha256_of
from peakd_ds.model.build import check_saved_teacher
from peakd_ds.ranks import dist, preempt
from peakd_ds.ranks.device import to_device
from peakd_ds.teacher import cache_files
from peakd_ds.teacher.cache_files import CacheFiles, Gap, Manifest, Part, mib
from peakd_ds.teacher.online import OnlineTeacher

Say = Callable[[str], None]


@dataclass(frozen=True)
class CachedOutputs:
    """The teacher's outputs for one split, memory-mapped."""

    folder: Path
    parts: list[Part]
    bounds: np.ndarray
    """int64 [parts + 1]: part i holds rows bounds[i] up to bounds[i + 1]."""
    columns: list[int]
    """For each layer that the run matches, its place in the layers of a part."""

    def logits(self, rows_N: Tensor) -> Tensor:
        """float32 [N, C] of int64 rows [N], on the CPU; hidden states are not read."""
        return torch.cat([part.logits_nC for part in self.parts])[rows_N]

    def of(self, rows_B: Tensor, with_logits: bool = True) -> TeacherOutputs:
        """Logits float32 [B, C], or None, of int64 rows [B], and vectors of rows [B, H] of each matched layer, on the
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
        part = self.parts[0]
        logits_BC, layers_BH = part.logits_nC[:0], [cls_nH[:0] for cls_nH in part.cls_nH]
        if found:  # a rank may be without rows
            logits_BC = torch.stack([part.logits_nC[i] for part, i in found])
            layers_BH = [torch.stack([part.cls_nH[place][i] for part, i in found]) for place in range(len(part.cls_nH))]
        if layers_BH:
            layers_BH = list(to_device(torch.stack(layers_BH, 1)).unbind(1))  # one copy
        return to_device(logits_BC) if with_logits else None, [layers_BH[column] for column in self.columns]


@dataclass
class TeacherCache:
    """The cache of a run: whether it is used, its folders, and its outputs once they are opened."""

    config: RunConfig
    task: Task
    teacher: OnlineTeacher
    tokenizer: PreTrainedTokenizerBase
    """The teacher's."""
    layers: tuple[int, ...]
    """1-based teacher layers whose vectors of rows the loss matches."""
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
                selection = self.open_split(self.task.dev_split, self.selection_split, (), say)
            self.teacher.stop()
            self._outputs = {"train": train, self.selection_name: selection}
        return self._outputs

    def check_space(self) -> None:
        """Raise UserError, before any stage runs, if the disk has no room for the parts and layers that are missing, if
        they may not be written, or if a cache is there that cannot be read."""
        if self.config.teacher_mode != "cached" or not self.is_needed:
            return
        splits = {"train": (self.train, self.layers)}
        if self.selection_split is not self.train:
            splits[self.task.dev_split] = (self.selection_split, ())
        needed = sum(self._missing_bytes(name, split, layers) for name, (split, layers) in splits.items())
        if needed:
            cache_files.check_writable(self.folder_of("train"))
        cache_files.check_room(self.folder_of("train"), needed)

    def folder_of(self, split_name: str) -> Path:
        return Path(self.config.teacher_cache or Path(self.config.run_dir) / "teacher_cache") / split_name

    def open_split(self, name: str, split: Split, layers: Sequence[int], say: Say) -> CachedOutputs:
        """Outputs for a split; missing parts and layers are built first (collective). Only then does the teacher's
        engine start.

        Args:
            name: Name of the split in the data.
            layers: 1-based teacher layers whose vectors of rows are needed.

        Raises:
            UserError: the folder holds outputs of something else, a file is damaged or may not be read, another host's
                build is silent, or the disk is too small. Finished files stay.
        """
        folder, stored = self.folder_of(name), sorted(set(layers))

        def find() -> tuple[CacheFiles, list[Gap]]:
            earlier = {"tokenizer": earlier_tokenizer_digest(self.tokenizer)}
            manifest = cache_files.checked_manifest(folder, self._identity(name, split), earlier)
            files = CacheFiles(folder, len(split), manifest)
            gaps = files.gaps(stored)
            if gaps:
                cache_files.check_writable(folder)
            return files, gaps

        files, gaps = dist.on_main(find)
        if gaps:
            with run_lock.waiting_for(folder / "lock.json", say):
                files, gaps = dist.on_main(find)  # another start may have built them meanwhile
                if gaps:
                    self._build(files, split, gaps, say)
        parts = dist.agree(lambda: files.open(stored))
        return CachedOutputs(folder, parts, files.bounds, [stored.index(layer) for layer in layers])

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
            needed = self._missing_bytes("train", self.train, self.layers)
            return needed, cache_files.free_bytes(self.folder_of("train"))

        needed, free = dist.on_main(measure)
        fits = needed + cache_files.SPARE_BYTES <= free
        say(
            f"teacher_mode auto: {'cached' if fits else 'online'}, since the loss needs [CLS] alone and "
            f"{mib(needed)} {'fit' if fits else 'do not fit'} in {mib(free)} of free space"
        )
        return fits

    def _missing_bytes(self, split_name: str, split: Split, layers: Sequence[int]) -> int:
        """Bytes of the files that a cache of this run lacks, whatever else it holds."""
        folder = self.folder_of(split_name)
        files = CacheFiles(folder, len(split), cache_files.read_manifest(folder))
        return self._num_bytes(files, files.gaps(layers))

    def _num_bytes(self, files: CacheFiles, gaps: Sequence[Gap]) -> int:
        return files.num_bytes(gaps, self.task.num_labels, self.teacher.hidden_size, self.config.dtype)

    def _identity(self, split_name: str, split: Split) -> Manifest:
        """Everything that the outputs depend on under the names that messages use."""
        source = self.teacher.folder
        if self.teacher.source.is_classifier:
            source = Path(self.teacher.source.path)
        else:
            check_saved_teacher(source)
        if not source.is_dir():
            patterns = ["*.safetensors", "config.json"]
            source = Path(snapshot_download(str(self.teacher.source.path), allow_patterns=patterns))
        files = [*sorted(source.glob("*.safetensors")), source / "config.json"]
        pooling = self.teacher.source.pooling
        return {
            "task": self.task.name,
            "texts": list(self.task.text_columns),
            "split": split_name,
            "rows": len(split),
            "data": self.fingerprints[split_name],
            "max_seq_length": self.config.max_seq_length,
            "tokenizer": tokenizer_digest(self.tokenizer),
            "teacher": hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest(),
            "dtype": self.config.dtype,
            **({} if pooling == "cls" or not self.layers else {"pooling": pooling}),
        }

    # -- Building ------------------------------------------------------------------------------------------------------

    def _build(self, files: CacheFiles, split: Split, gaps: list[Gap], say: Say) -> None:
        """Compute what is missing (collective), each rank its share of the parts.

        In a round each rank has one part or none, and all ranks make the same forward passes: sharded engines
        communicate in every forward pass. The teacher always goes on to its logits, also where layers alone are
        missing, so that a layer has the same bits whichever run adds it.
        """
        num_bytes = self._num_bytes(files, gaps)
        say(
            f"teacher cache {files.folder}: {len(split):,} rows, {mib(num_bytes)} to build, "
            f"{mib(cache_files.free_bytes(files.folder))} free{files.summary(gaps)}"
        )

        def prepare() -> None:
            cache_files.check_room(files.folder, num_bytes)
            files.prepare()

        dist.on_main(prepare)
        engine, start, split = self.teacher.engine(), time.perf_counter(), split.for_teacher()
        bounds = files.bounds
        in_parts = files.layers_in_parts if any(gap.lacks_logits for gap in gaps) else ()
        layers = sorted({*in_parts, *(layer for gap in gaps for layer in gap.layers)})
        num_passes = -(-int(np.diff(bounds).max()) // self.eval_batch_size)
        share = [gaps[i] for i in np.array_split(np.arange(len(gaps)), dist.world_size())[dist.rank()]]
        for turn in range(-(-len(gaps) // dist.world_size())):
            gap = share[turn] if turn < len(share) else None
            rows = np.zeros(0, np.int64) if gap is None else np.arange(bounds[gap.part], bounds[gap.part + 1])
            logits_nC, cls_nH = self._compute(engine, split, rows, num_passes, layers)

            def write(gap: Gap | None = gap, logits_nC: Tensor = logits_nC, cls_nH: dict[int, Tensor] = cls_nH) -> None:
                if gap is not None:
                    files.write(gap, logits_nC, cls_nH)
                if dist.is_main():
                    run_lock.touch(files.folder / "lock.json")

            dist.agree(write)
            preempt.leave_if(preempt.stop_agreed())
        say(f"teacher cache {files.folder}: built in {time.perf_counter() - start:.1f} s")

    @torch.no_grad()
    def _compute(
        self, engine: DeepSpeedEngine, split: Split, rows: np.ndarray, num_passes: int, layers: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits [n, C] and, by layer, vectors of rows [n, H] of one part.

        Rows of similar length share a forward pass, which saves padding.
        """
        dtype = torch.bfloat16 if self.config.dtype == "bf16" else torch.float32
        first = int(rows[0]) if len(rows) else 0
        logits_nC = torch.zeros(len(rows), self.task.num_labels)
        cls_nH = {layer: torch.zeros(len(rows), self.teacher.hidden_size, dtype=dtype) for layer in layers}
        by_length = rows[np.argsort(-split.lengths[rows], kind="stable")]
        for chunk in np.array_split(by_length, num_passes):
            micro = split.micro_batch(chunk)
            logits_BC, states = engine(layers, **micro.inputs)
            if len(chunk):
                places = torch.from_numpy(chunk - first)
                logits_nC[places] = logits_BC.float().cpu()
                for layer, states_BH in zip(layers, states, strict=True):
                    cls_nH[layer][places] = states_BH.to("cpu", dtype)
        return logits_nC, cls_nH
