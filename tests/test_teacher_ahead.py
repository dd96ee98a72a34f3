"""The order of the teacher's forward passes, and that every micro-batch gets its own outputs."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from peakd_ds.data.batches import GlobalBatch
from peakd_ds.data.tokens import MicroBatch, TeacherOutputs
from peakd_ds.packed.packing import pack
from peakd_ds.results.meter import TeacherClock
from peakd_ds.teacher.online import with_teacher_outputs


def make_batches(sizes: list[int], log: list[str]) -> Iterator[GlobalBatch]:
    """Global batches of the given numbers of micro-batches; micro-batch k holds row k."""
    row = 0
    for num_micros in sizes:
        rows = range(row, row + num_micros)
        row += num_micros

        def micros(rows: range = rows) -> Iterator[MicroBatch]:
            for number in rows:
                log.append(f"made {number}")
                ids = [np.full(3, number)]
                inputs = pack(ids, ids)
                yield MicroBatch(inputs, torch.zeros(1), torch.tensor([number]), 1)

        yield GlobalBatch(micros(), num_items=num_micros, num_tokens=3 * num_micros)


def drive(sizes: list[int], is_ahead: bool) -> tuple[list[str], list[tuple[int, float]]]:
    log: list[str] = []

    def teacher_forward(micro: MicroBatch) -> TeacherOutputs:
        assert not torch.is_grad_enabled()
        log.append(f"forward {int(micro.rows)}")
        return micro.rows.float() * 10, []

    seen = []
    batches = with_teacher_outputs(make_batches(sizes, log), teacher_forward, TeacherClock(), is_ahead)
    for number, batch in enumerate(batches):
        assert batch.num_items == sizes[number]
        for micro in batch.micro_batches:
            log.append(f"used {int(micro.rows)}")
            assert micro.inputs["input_ids"].unique().tolist() == micro.rows.tolist()
            seen.append((int(micro.rows), micro.teacher_outputs[0].item()))
    return log, seen


@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("sizes", [[], [1], [3], [1, 1, 1], [2, 3, 1]])
def test_every_micro_batch_has_its_own_outputs_once(sizes: list[int], is_ahead: bool) -> None:
    log, seen = drive(sizes, is_ahead)
    assert seen == [(row, 10.0 * row) for row in range(sum(sizes))]
    for row in range(sum(sizes)):
        assert [line for line in log if line.endswith(f" {row}")] == [f"made {row}", f"forward {row}", f"used {row}"]


@pytest.mark.parametrize("sizes", [[3], [1, 1, 1], [2, 1]])
def test_ahead_the_next_forward_pass_starts_before_outputs_are_used(sizes: list[int]) -> None:
    log = [line for line in drive(sizes, True)[0] if not line.startswith("made")]
    assert log == ["forward 0", "forward 1", "used 0", "forward 2", "used 1", "used 2"]


def test_in_turn_each_forward_pass_starts_when_its_outputs_are_used() -> None:
    log, _ = drive([2, 1], False)
    assert log == [f"{what} {row}" for row in range(3) for what in ("made", "forward", "used")]
