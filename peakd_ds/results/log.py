"""The log of a run: console lines or a progress bar, metrics.jsonl and TensorBoard, written by rank 0.

Each stage has its own TensorBoard folder (RUN/tb/STAGE) and step counter. A resumed stage drops what was logged after
its checkpoint, so that no point is logged twice. charts.py writes TensorBoard's files.
"""

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from deepspeed import DeepSpeedEngine
from matplotlib.figure import Figure
from tqdm import tqdm

from peakd_ds.cluster import run_lock
from peakd_ds.engine import engines
from peakd_ds.engine.checkpoint import TrainState
from peakd_ds.errors import UserError
from peakd_ds.files import write_atomically
from peakd_ds.ranks import dist
from peakd_ds.results import charts
from peakd_ds.results.charts import StageCharts
from peakd_ds.results.forecast import Forecast
from peakd_ds.results.meter import TERMS

TITLES = {
    "teacher": "the teacher is fine-tuned on the labels",
    "ptp": "the student is pretrained with the teacher's predictions",
    "distill": "the student is distilled",
}


class LoggedStage(Protocol):
    """What the log reads of a stage."""

    name: str
    weights: dict[str, float]
    """The weight of each term in the loss, by the names of TERMS."""
    teacher_scores: dict[str, float]
    """The teacher's metrics on the rows that pick epochs; empty if it has none."""


class RunLog:
    """Writes on rank 0 and does nothing on other ranks. `start_stage` must come before a stage's first step.

    Attributes:
        forecast: How long the rest of the run takes; knows no stage until the program gives one that does.
    """

    def __init__(self, folder: Path):
        self.folder, self.writes = folder, dist.is_main()
        self.forecast = Forecast([], 0.0)
        self.charts: StageCharts | None = None
        self.bar: tqdm | None = None
        self.stage = ""
        self.weights: dict[str, float] = {}
        self.teacher_scores: dict[str, float] = {}
        self.failure: Exception | None = None
        quiet_libraries()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        """Close what is open, so that the next line stands below the progress bar and not in it."""
        with contextlib.suppress(OSError):  # a full disk has been told
            self._close()

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one, unless nobody can read it any more."""
        if self.writes:
            with contextlib.suppress(OSError):  # the terminal was closed, or the reader of a pipe is gone
                tqdm.write(text, file=sys.stderr)
                sys.stderr.flush()

    def title(self, stage: str) -> None:
        """Print the title of a stage that begins."""
        names = self.forecast.names
        number = f" ({names.index(stage) + 1} of {len(names)})" if stage in names else ""
        self.say(f"\n== {stage}{number}: {TITLES[stage]} ==")

    def start_stage(self, stage: LoggedStage, num_epochs: int, num_steps: int, step: int, settings_yaml: str) -> None:
        """Open the stage's files at `step`, and drop what an earlier start wrote after it."""
        self.stage, self.weights, self.teacher_scores = stage.name, stage.weights, stage.teacher_scores
        terms = " + ".join(f"{weight:g} {_short(name)}" for name, weight in self.weights.items())
        self.say(
            f"stage {self.stage}: {num_epochs} epochs, {num_steps} steps"
            + (f", from step {step}" if step else "")
            + (f"; loss = {terms}" if len(self.weights) > 1 else "")
        )
        if not self.writes:
            return
        if self.stage in self.forecast.names:
            self.forecast.start_stage(self.stage, step)
        self._drop_metrics_after(self.stage, step)
        self.charts = StageCharts(self.folder / "tb" / self.stage, self.weights, self.teacher_scores, step)
        self.charts.texts(settings_yaml, step)
        self.bar = tqdm(
            total=num_steps,
            initial=step,
            desc=self.stage,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            leave=False,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]",
        )

    def advance(self) -> None:
        """Count an optimizer step in the progress bar."""
        if self.bar is not None:
            self.forecast.end_step()
            self.bar.update()

    def step(
        self,
        step: int,
        num_steps: int,
        epoch: int,
        measured: tuple[Mapping[str, float], Mapping[str, float]],
        lr: float,
        engine: DeepSpeedEngine,
    ) -> None:
        """Log a training step: metrics to metrics.jsonl, TensorBoard and DeepSpeed's monitors, extras to TensorBoard.

        metrics.jsonl has every term as it is; lines and charts have those of the stage, times their weights.

        Args:
            measured: (metrics, extras), as `StepMeter.reduce` returns them.
        """
        metrics, extras = measured
        values = {**metrics, "lr": lr, "grad_norm": engines.grad_norm(engine)}
        if not self.writes:
            return
        self._monitor(engine, values)
        self._append({"stage": self.stage, "step": step, "epoch": epoch, **values})
        with self._failures_kept():
            assert self.charts is not None
            self.charts.step({**values, **extras}, step)
        if self.bar is not None:
            left = self.forecast.in_words()
            self.bar.set_postfix_str(", ".join(part for part in (f"loss {values['loss']:.4f}", left) if part), False)
            if self.bar.disable:
                line = (
                    f"{self.stage} step {step}/{num_steps}  loss {values['loss']:.4f}{self._terms(metrics)}  "
                    f"lr {values['lr']:.2e}  {values['samples_per_s']:.1f} samples/s"
                )
                self.say(f"{line}  {left}" if left else line)

    def _terms(self, metrics: Mapping[str, float]) -> str:
        """The terms of the loss times their weights, as " = 0.2 hard + 0.3 soft"; "" if there is only one."""
        if len(self.weights) < 2:
            return ""
        terms = (f"{weight * metrics[name]:.4f} {_short(name)}" for name, weight in self.weights.items())
        return " = " + " + ".join(terms)

    def _monitor(self, engine: DeepSpeedEngine, values: Mapping[str, float | None]) -> None:
        """Write to DeepSpeed's own monitors (csv, wandb, ...) if the DeepSpeed config turns one on."""
        if engine.monitor.enabled:
            engine.monitor.write_events(
                [
                    (f"{self.stage}/{name}", value, engine.global_samples)
                    for name, value in values.items()
                    if value is not None
                ]
            )

    def evaluation(self, step: int, epoch: int, split: str, metrics: Mapping[str, float]) -> None:
        """Log an evaluation on `split` (holdout or dev), and the teacher's metrics on the same rows beside it."""
        if not self.writes:
            return
        self._append(
            {
                "stage": self.stage,
                "step": step,
                "epoch": epoch,
                "split": split,
                **{f"eval_{name}": value for name, value in metrics.items()},
                **{f"teacher_{name}": value for name, value in self.teacher_scores.items()},
            }
        )
        with self._failures_kept():
            assert self.charts is not None
            self.charts.evaluation(metrics, step)
        self.say(f"{self.stage} step {step}  {split}: " + "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()))

    def figure(self, tag: str, figure: Figure, step: int = 0) -> None:
        if self.charts is not None:
            self.charts.writer.add_figure(tag, figure, step)

    def final(
        self, settings: Mapping[str, Any], metrics: Mapping[str, float], table: str, figures: Mapping[str, Figure]
    ) -> None:
        """Log the results on dev: metrics, with the settings on TensorBoard's HPARAMS page, a table and figures."""
        if self.writes:
            charts.write_results(self.folder / "tb", settings, metrics, table, figures)

    def end_stage(self, score: str, state: TrainState, selected_on: str) -> None:
        """Close the stage's files and say which epoch is the best."""
        self.say(
            f"stage {self.stage} is over: {score} {state.best_score:.4f} on {selected_on} picks epoch "
            f"{state.best_epoch} of {state.epoch}"
        )
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.charts is not None:
            self.charts.close()
            self.charts = None

    def stop_if_failed(self) -> None:
        """Raise UserError on every rank (collective) if rank 0 could not write its files, as on a full disk."""

        def check() -> None:
            if self.failure is not None:
                raise UserError(
                    f"the log in {self.folder} cannot be written ({self.failure}); free some space, then "
                    "start the same command again"
                )

        dist.on_main(check)

    @contextlib.contextmanager
    def _failures_kept(self) -> Iterator[None]:
        """Keep an error of a full disk for `stop_if_failed`; TensorBoard's thread finds it."""
        try:
            yield
        except OSError as error:
            self.failure = error

    def _append(self, record: Mapping[str, Any]) -> None:
        try:
            run_lock.check()
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        except (OSError, UserError) as error:  # other ranks are on their way to a collective: raise it there
            self.failure = error

    def _drop_metrics_after(self, stage: str, step: int) -> None:
        file = self.folder / "metrics.jsonl"
        if file.exists():
            kept = [record for record in read_metrics(file) if record["stage"] != stage or record["step"] <= step]
            write_atomically(file, "".join(json.dumps(record) + "\n" for record in kept))


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl. Lines that are no record are left out: a kill may cut a line, a disk damage one."""
    records = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            is_step = "loss" in record and all(isinstance(record[name], int | float) for name in TERMS)
            if isinstance(record["stage"], str) and isinstance(record["step"], int) and (is_step or "split" in record):
                records.append(record)
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return records


def quiet_libraries() -> None:
    """Silence what DeepSpeed, transformers and torch log at warning level and below; errors stay."""
    import transformers

    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _short(term: str) -> str:
    """hard_loss as hard."""
    return term.removesuffix("_loss")
