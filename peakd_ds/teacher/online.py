"""The online teacher: a frozen engine beside the student's, whose forward pass can run one micro-batch ahead.

On a GPU a replicated teacher has a CUDA stream of its own, so its kernels use what the student's kernels leave idle. A
teacher at ZeRO 3 gathers weights from other ranks in every forward pass; it runs in turn, on the student's stream, so
that all ranks issue their collectives in the same order. On a CPU it runs in turn too: there are no idle units to use.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from peakd_ds.config import RunConfig
from peakd_ds.data.batches import GlobalBatch
from peakd_ds.data.tasks import Task
from peakd_ds.data.tokens import MicroBatch, Split, TeacherOutputs
from peakd_ds.engine import engines
from peakd_ds.engine.ds_config import zero_stage
from peakd_ds.model.build import Teacher, load_teacher
from peakd_ds.model.contract import Pretrained
from peakd_ds.ranks import dist
from peakd_ds.ranks.device import on_gpu
from peakd_ds.results import evaluation
from peakd_ds.results.meter import TeacherClock


class OnlineTeacher:
    """The frozen teacher of a run. Its engine starts when it is first needed, and can be stopped and started again.

    Attributes:
        source: The model that the user named: a classifier, or an encoder that the teacher stage fine-tunes first.
        folder: Where the teacher stage saves the fine-tuned classifier.
        clock: Measures its forward passes in training.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        source: Pretrained,
        folder: Path,
        ds_config: dict[str, Any],
        eval_batch_size: int,
    ) -> None:
        self.source, self.folder, self.ds_config, self.clock = source, folder, ds_config, TeacherClock()
        self._config, self._task, self._eval_batch_size = config, task, eval_batch_size
        self._engine: DeepSpeedEngine | None = None

    @property
    def hidden_size(self) -> int:
        return self.source.config.hidden_size

    @property
    def zero_stage(self) -> int:
        return zero_stage(self.ds_config)

    def is_trained(self) -> bool:
        """Whether there is a trained teacher (collective): the user's classifier, or the one of this run."""
        return self.source.is_classifier or dist.on_main(self.folder.exists)

    def engine(self) -> DeepSpeedEngine:
        """The teacher's engine (collective when it starts)."""
        if self._engine is None:
            module = dist.agree(self._load)
            self._engine = engines.teacher_engine(module, self.ds_config)
        return self._engine

    def _load(self) -> Teacher:
        return Teacher(load_teacher(self._config, self._task, self.source, self.folder), self.source.pooling)

    def stop(self) -> None:
        """Free the engine's memory (collective)."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None

    def logits(self, split: Split, rows: np.ndarray) -> Tensor:
        """float32 [N, C] over the given rows of a split, on the CPU (collective)."""
        engine, split = self.engine(), split.for_teacher()
        return evaluation.predict(
            lambda inputs: engine(**inputs)[0], split, rows, self._eval_batch_size, self._task.num_labels
        )[0]

    def forward(self, micro: MicroBatch, layers: Sequence[int], with_logits: bool) -> TeacherOutputs:
        """Outputs for the rows of a micro-batch that are not filler.

        Args:
            micro: With the teacher's tokens, as `Split.micro_batch_for_teacher` gives it.
            layers: 1-based layers whose hidden states are returned.
            with_logits: Whether logits are returned.
        """
        n = micro.num_real
        logits, states = self.engine()(layers, self._config.hidden_loss, with_logits, **micro.inputs)
        return logits[:n] if with_logits else None, [tensor[:n] for tensor in states]

    def runs_ahead(self) -> bool:
        """Whether its forward pass may overlap the student's: a replicated teacher on a GPU."""
        return on_gpu() and self.zero_stage == 0


def with_teacher_outputs(
    batches: Iterator[GlobalBatch],
    teacher_forward: Callable[[MicroBatch], TeacherOutputs],
    clock: TeacherClock,
    is_ahead: bool,
) -> Iterator[GlobalBatch]:
    """The same batches, whose micro-batches carry `teacher_outputs`.

    Args:
        teacher_forward: The frozen teacher's forward pass; runs without a graph, on the teacher's stream, as does the
            copy of its own tokens if it makes one.
        clock: Measures the teacher's time, and how much of it the student waits for.
        is_ahead: Start each forward pass before the previous micro-batch is used, across global batches too.
    """
    stream = _teacher_stream() if is_ahead and on_gpu() else None

    def launch(micro: MicroBatch) -> tuple[MicroBatch, torch.cuda.Event | None]:
        """Queue the teacher's forward pass; the event says when the device has finished it."""
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())  # which copies the inputs to the device
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            with torch.no_grad(), clock:
                outputs = teacher_forward(micro)
            done = stream.record_event() if stream is not None else None
        return replace(micro, teacher_outputs=outputs), done

    def collect(micro: MicroBatch, done: torch.cuda.Event | None) -> MicroBatch:
        """Make the student's stream wait for the outputs, and tell the allocator which streams use which tensors."""
        if stream is not None and done is not None:
            with clock.waiting():
                torch.cuda.current_stream().wait_event(done)
            assert micro.teacher_outputs is not None
            logits, states = micro.teacher_outputs
            for tensor in states if logits is None else (logits, *states):
                tensor.record_stream(torch.cuda.current_stream())
            for tensor in (*micro.inputs.values(), *vars(micro.inputs["packing"]).values()):
                if isinstance(tensor, Tensor):
                    tensor.record_stream(stream)
        return micro

    if not is_ahead:
        for batch in batches:
            yield replace(batch, micro_batches=(collect(*launch(micro)) for micro in batch.micro_batches))
        return

    launched: tuple[MicroBatch, torch.cuda.Event | None] | None = None  # its outputs are not used yet

    def one_ahead(micros: list[MicroBatch], first_of_next: MicroBatch | None) -> Iterator[MicroBatch]:
        nonlocal launched
        queue = [*micros, *([first_of_next] if first_of_next is not None else [])]
        launched = launched or launch(queue[0])
        for following in queue[1:]:
            ready, launched = launched, launch(following)
            yield collect(*ready)
        if first_of_next is None:
            ready, launched = launched, None
            yield collect(*ready)

    for batch, micros, first_of_next in _with_next_micro_batch(batches):
        yield replace(batch, micro_batches=one_ahead(micros, first_of_next))


@functools.cache
def _teacher_stream() -> torch.cuda.Stream:
    """One stream for all epochs: the allocator keeps freed memory for each stream apart."""
    return torch.cuda.Stream()


def _with_next_micro_batch(
    batches: Iterator[GlobalBatch],
) -> Iterator[tuple[GlobalBatch, list[MicroBatch], MicroBatch | None]]:
    """Each batch with its micro-batches and the first micro-batch of the next batch."""
    held: tuple[GlobalBatch, list[MicroBatch]] | None = None
    for batch in batches:
        micros = list(batch.micro_batches)
        if held is not None:
            yield (*held, micros[0])
        held = batch, micros
    if held is not None:
        yield (*held, None)
