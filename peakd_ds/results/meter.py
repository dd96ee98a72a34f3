"""What a training step measures: loss terms on the device, speed, memory and the teacher's share of the time."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from peakd_ds.errors import UserError
from peakd_ds.kernels import DistillationLoss
from peakd_ds.ranks import dist
from peakd_ds.ranks.device import device, on_gpu

TERMS = ("loss", "hard_loss", "soft_loss", "hidden_loss")


class StepMeter:
    """Collects the loss of each step on the device; only log steps reduce it over ranks and copy it to the host."""

    def __init__(self, stage: str, teacher_clock: "TeacherClock | None" = None) -> None:
        self.stage, self.teacher_clock = stage, teacher_clock or TeacherClock()
        self.terms = torch.zeros(4, device=device())  # this rank's share of total, hard, soft, hidden
        self.pair_distances: torch.Tensor | None = None
        self.first_bad_step = torch.full((), torch.iinfo(torch.int64).max, device=device())
        self.bad_terms = torch.zeros(4, device=device())
        self.num_steps = self.num_samples = self.num_tokens = self.num_positions = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Start counting samples per second again, so that evaluation and saving do not count."""
        self.start = time.perf_counter()
        self.num_steps = self.num_samples = self.num_tokens = self.num_positions = 0
        self.teacher_clock.take()

    def start_step(self) -> None:
        """Clear the loss of the last step."""
        self.terms.zero_()
        self.pair_distances = None

    def add(self, loss: DistillationLoss, pair_distances: torch.Tensor | None, num_positions: int) -> None:
        """Add a micro-batch's shares of the loss and of each pair's distance [K], and its number of positions."""
        self.terms += torch.stack([term.detach().float() for term in loss])
        self.num_positions += num_positions
        if pair_distances is not None:
            self.pair_distances = pair_distances + (0 if self.pair_distances is None else self.pair_distances)

    def end_step(self, step: int, num_samples: int, num_tokens: int) -> None:
        """Count a step, and note the first one whose loss is not finite, without waiting for the device."""
        is_first = ~torch.isfinite(self.terms).all() & (self.first_bad_step > step)
        self.bad_terms = torch.where(is_first, self.terms, self.bad_terms)
        self.first_bad_step = torch.where(is_first, step, self.first_bad_step)
        self.num_steps += 1
        self.num_samples += num_samples
        self.num_tokens += num_tokens

    def stop_if_not_finite(self, checkpoints: Path) -> None:
        """Raise UserError on every rank (collective) if a loss was NaN or infinite on any rank."""
        worst = dist.all_reduce(self.first_bad_step.clone(), torch.distributed.ReduceOp.MIN)
        if worst.item() == torch.iinfo(torch.int64).max:
            return
        mine = self.bad_terms if self.first_bad_step == worst else torch.zeros_like(self.bad_terms)
        values = dist.all_reduce(torch.where(torch.isfinite(mine), 0.0, 1.0)).tolist()
        names = [name for name, value in zip(TERMS, values, strict=True) if value]
        raise UserError(
            f"{self.stage} step {int(worst)}: {', '.join(names[1:] or names)} is NaN or infinite; the last "
            f"good checkpoint is kept in {checkpoints}: in another --run_dir, lower --lr or take --dtype fp32"
        )

    def reduce(self) -> tuple[dict[str, float], dict[str, float]]:
        """(metrics, extras) of the step and of the time since the clock was restarted (collective)."""
        mine = [float(self.num_positions), *self.teacher_clock.take()]
        sums = [self.terms.double(), torch.tensor(mine, device=device(), dtype=torch.float64)]
        if self.pair_distances is not None:
            sums.append(self.pair_distances.double())
        total = dist.all_reduce(torch.cat(sums)).tolist()
        seconds = time.perf_counter() - self.start  # after the reduction, which waits for the device
        metrics = dict(zip(TERMS, total[:4], strict=True))
        metrics["samples_per_s"] = self.num_samples / seconds
        metrics["tokens_per_s"] = self.num_tokens / seconds
        metrics["padding_share"] = 1 - self.num_tokens / max(total[4], 1)
        extras = {"memory_mib": memory_mib(), "step_ms": 1000 * seconds / max(self.num_steps, 1)}
        if total[5]:
            extras["teacher_time_share"] = total[5] / dist.world_size() / seconds
            extras["teacher_hidden_share"] = 1 - total[6] / total[5]  # of its time: what the student did not wait for
        if self.pair_distances is not None:
            extras |= {f"hidden_distance/pair_{number}": value for number, value in enumerate(total[7:], start=1)}
        return metrics, extras


class TeacherClock:
    """Seconds that the teacher's forward passes take, and that the student waits for them, since the last `take`.

    On a GPU, events in the streams measure both without stalling them. In turn, the student waits for all of it.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.passes: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if on_gpu():
            self._begin(self.passes)
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if on_gpu():
            self.passes[-1][1].record()
        else:
            self.seconds += time.perf_counter() - self.start

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the block, in which the student's stream waits for the teacher's."""
        self._begin(self.waits)
        yield
        self.waits[-1][1].record()

    def take(self) -> tuple[float, float]:
        """(seconds of the teacher, seconds of waiting for it); synchronises the device, so only on log steps."""
        if self.passes or self.waits:
            torch.cuda.synchronize()
        if self.passes:
            self.seconds = sum(start.elapsed_time(end) for start, end in self.passes) / 1000
        waited = sum(start.elapsed_time(end) for start, end in self.waits) / 1000 if self.waits else self.seconds
        seconds, self.seconds, self.passes, self.waits = self.seconds, 0.0, [], []
        return seconds, waited

    @staticmethod
    def _begin(events: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> None:
        events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        events[-1][0].record()


def memory_mib() -> float:
    """Peak memory of this rank in MiB: of its GPU, or resident on a CPU."""
    if on_gpu():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
