"""How long the rest of a run takes, from the work of its stages and the speed that has been measured.

Work is counted in a unit of any size, the same for all stages. The seconds of a unit are measured in the current stage
after its first step, which compiles, with evaluations and checkpoints; until there are such steps, in the stage before.
Before the first measurement nothing is said.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StageWork:
    """What a stage computes, in units of work."""

    name: str
    num_steps: int
    num_epochs: int
    step: float
    """Of an optimizer step."""
    epoch_end: float
    """Of the evaluation after an epoch."""
    before: float = 0.0
    """Before the first step: the teacher's answers."""

    def rest(self, step: int) -> float:
        """The work that is left when `step` steps are done, of which the last one's epoch end may be due."""
        return (self.num_steps - step) * self.step + (self.num_epochs - self.epoch_ends(step)) * self.epoch_end

    def epoch_ends(self, step: int) -> int:
        """Epochs that were evaluated before step number `step` was done."""
        return max(step - 1, 0) * self.num_epochs // max(self.num_steps, 1)


class Forecast:
    """The seconds that a run still needs; without early stopping, which may end a stage sooner."""

    def __init__(self, stages: Sequence[StageWork], report: float) -> None:
        self.stages, self.report = list(stages), report
        self.seconds_per_unit: float | None = None
        self.place = 0
        self.step = 0
        self.first: tuple[float, int] | None = None
        """When the stage's first step in this process was over, and its number."""

    @property
    def names(self) -> list[str]:
        """The stages that run, in their order."""
        return [stage.name for stage in self.stages]

    def start_stage(self, name: str, step: int) -> None:
        """Begin a stage at a step."""
        self.place, self.step, self.first = self.names.index(name), step, None

    def end_step(self) -> None:
        """Count an optimizer step."""
        self.step += 1
        if self.first is None:
            self.first = time.perf_counter(), self.step

    def seconds_left(self) -> float | None:
        """Seconds to the end of the run; None if nothing is measured yet."""
        if not self.stages:
            return None
        stage = self.stages[self.place]
        if self.first is not None and self.step > self.first[1]:
            done = stage.rest(self.first[1]) - stage.rest(self.step)
            self.seconds_per_unit = (time.perf_counter() - self.first[0]) / done
        if self.seconds_per_unit is None:
            return None
        later = sum(stage.before + stage.rest(0) for stage in self.stages[self.place + 1 :])
        return (stage.rest(self.step) + later + self.report) * self.seconds_per_unit

    def in_words(self) -> str:
        """The rest of the run as "about 12 min left"; "" if nothing is measured yet."""
        seconds = self.seconds_left()
        return "" if seconds is None else f"about {duration(max(seconds, 1))} left"


def duration(seconds: float) -> str:
    """A time as people say it: 40 s, 12 min, 3 h 20 min, 2 d 5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
