"""The online teacher asked about the next micro-batch while the student works on this one.

On a GPU a replicated teacher has a CUDA stream of its own, so that its kernels fill what the student's leave free. A
teacher at ZeRO 3 gathers weights from the other ranks in every pass; it is asked in turn, on the student's stream, so
that no rank has two collectives in flight in another order than its peers. On a CPU, which has no idle units to fill,
it is asked in turn too.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from peakd_ds.data.batches import GlobalBatch
from peakd_ds.data.tokens import MicroBatch
from peakd_ds.ranks.device import on_gpu
from peakd_ds.results.meter import TeacherClock

Answer = tuple[torch.Tensor | None, list[torch.Tensor]]
"""The teacher's logits [B, C], None where nothing reads them, and its matched states, for the rows that count."""


def answered(
    batches: Iterator[GlobalBatch], ask: Callable[[MicroBatch], Answer], clock: TeacherClock, is_ahead: bool
) -> Iterator[GlobalBatch]:
    """The same batches, their micro-batches with `answer`.

    Args:
        ask: The frozen teacher's forward pass, without a graph.
        clock: Measures its time, and how much of it the student had to wait for.
        is_ahead: Ask about each micro-batch before the one before it is used, over the end of a global batch too.
    """
    stream = _teacher_stream() if is_ahead and on_gpu() else None

    def start(micro: MicroBatch) -> tuple[MicroBatch, Any]:
        """Queue the teacher's pass; `done` tells when the device has finished it."""
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())  # which copies the inputs to the device
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            with torch.no_grad(), clock:
                answer = ask(micro)
            done = stream.record_event() if stream is not None else None
        return replace(micro, answer=answer), done

    def finish(micro: MicroBatch, done: Any) -> MicroBatch:
        """Make the student's stream wait for the answer, and tell the allocator which streams use which tensors."""
        if stream is not None:
            with clock.waiting():
                torch.cuda.current_stream().wait_event(done)
            logits, states = micro.answer
            for tensor in states if logits is None else (logits, *states):
                tensor.record_stream(torch.cuda.current_stream())
            for tensor in (*micro.inputs.values(), *vars(micro.inputs["packing"]).values()):
                if isinstance(tensor, torch.Tensor):
                    tensor.record_stream(stream)
        return micro

    following = _one_ahead(batches) if is_ahead else ((batch, batch.micro_batches, None) for batch in batches)
    begun: tuple[MicroBatch, Any] | None = None  # asked, not yet used

    def ask_each(micros: Iterator[MicroBatch], first_of_next: MicroBatch | None) -> Iterator[MicroBatch]:
        nonlocal begun
        if not is_ahead:
            yield from (finish(*start(micro)) for micro in micros)
            return
        queue = [*micros, *([first_of_next] if first_of_next is not None else [])]
        begun = begun or start(queue[0])
        for after in queue[1:]:
            ready, begun = begun, start(after)
            yield finish(*ready)
        if first_of_next is None:
            ready, begun = begun, None
            yield finish(*ready)

    for batch, micros, first_of_next in following:
        yield replace(batch, micro_batches=ask_each(iter(micros), first_of_next))


@functools.cache
def _teacher_stream() -> torch.cuda.Stream:
    """One for all epochs: the allocator keeps freed memory for each stream apart."""
    return torch.cuda.Stream()


def _one_ahead(
    batches: Iterator[GlobalBatch],
) -> Iterator[tuple[GlobalBatch, list[MicroBatch], MicroBatch | None]]:
    """Each batch with its micro-batches and the first one of the next batch."""
    held: tuple[GlobalBatch, list[MicroBatch]] | None = None
    for batch in batches:
        micros = list(batch.micro_batches)
        if held is not None:
            yield (*held, micros[0])
        held = batch, micros
    if held is not None:
        yield (*held, None)
