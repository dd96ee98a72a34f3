"""When a stage logs, evaluates, saves and ends."""

from dataclasses import dataclass

from peakd_ds.config import RunConfig
from peakd_ds.data.division import TrainRows, steps_per_epoch
from peakd_ds.engine.checkpoint import TrainState


@dataclass(frozen=True)
class Due:
    """What follows an optimizer step."""

    log: bool
    evaluate: bool
    save: bool

    @property
    def anything(self) -> bool:
        return self.log or self.evaluate or self.save


@dataclass(frozen=True)
class Schedule:
    """The steps of a stage; the same on every rank."""

    num_epochs: int
    steps_per_epoch: int
    log_steps: int
    eval_steps: int
    save_steps: int
    patience: int
    """Epochs without a better score after which the stage ends; 0: it runs all epochs."""

    @staticmethod
    def of(config: RunConfig, stage: str, rows: TrainRows) -> "Schedule":
        """The schedule of a stage that trains on these rows."""
        return Schedule(
            config.epochs_of(stage),
            steps_per_epoch(rows, config.global_batch_size),
            config.log_steps,
            config.eval_steps,
            config.save_steps,
            config.early_stopping_patience,
        )

    @property
    def num_steps(self) -> int:
        return self.num_epochs * self.steps_per_epoch

    def is_logged(self, step: int) -> bool:
        """Whether the metrics of a step, counted from 1, are logged."""
        return step % self.log_steps == 0 or step == 1

    def due(self, state: TrainState, is_stopping: bool) -> Due:
        """What is due after the step that `state` counts last. The end of an epoch evaluates and saves by itself.

        Args:
            is_stopping: Whether the ranks have agreed to stop, which needs a checkpoint.
        """
        is_mid_epoch = state.batch < self.steps_per_epoch
        return Due(
            log=self.is_logged(state.step),
            evaluate=is_mid_epoch and _divides(self.eval_steps, state.step),
            save=is_mid_epoch and (is_stopping or _divides(self.save_steps, state.step)),
        )

    def is_over(self, state: TrainState) -> bool:
        """Whether all epochs are done, or early stopping ends the stage."""
        return state.epoch >= self.num_epochs or 0 < self.patience <= state.epochs_without_better


def _divides(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0
