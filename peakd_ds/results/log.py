"""The log of a run: console lines or a progress bar, metrics.jsonl and TensorBoard, written by rank 0.

Each stage has its own TensorBoard folder (RUN/tb/STAGE) and step counter. A resumed stage drops what was logged after
its checkpoint, so that no point is logged twice.
"""

import contextlib
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from peakd_ds.cluster import run_lock
from peakd_ds.engine import engines
from peakd_ds.engine.checkpoint import TrainState
from peakd_ds.errors import UserError
from peakd_ds.files import write_atomically
from peakd_ds.ranks import dist
from peakd_ds.ranks.slurm_env import describe_start
from peakd_ds.results.meter import TERMS


class RunLog:
    """Writes on rank 0 and does nothing on other ranks. `start_stage` must come before a stage's first step."""

    def __init__(self, folder: Path):
        self.folder, self.writes = folder, dist.is_main()
        self.writer: SummaryWriter | None = None
        self.bar: tqdm | None = None
        self.stage = ""
        self.failure: Exception | None = None
        quiet_libraries()

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one, unless nobody can read it any more."""
        if self.writes:
            with contextlib.suppress(OSError):  # the terminal was closed, or the reader of a pipe is gone
                tqdm.write(text, file=sys.stderr)
                sys.stderr.flush()

    def start_stage(self, stage: str, num_epochs: int, num_steps: int, step: int, settings_yaml: str) -> None:
        """Open the stage's files at `step`, and drop what an earlier start wrote after it."""
        self.stage = stage
        self.say(f"stage {stage}: {num_epochs} epochs, {num_steps} steps" + (f", from step {step}" if step else ""))
        if not self.writes:
            return
        self._drop_metrics_after(stage, step)
        fresh = not (self.folder / "tb" / stage).exists()
        self.writer = SummaryWriter(str(self.folder / "tb" / stage), purge_step=step + 1)
        if fresh:
            self.writer.add_text("settings", "".join(f"    {line}\n" for line in settings_yaml.splitlines()), 0)
            self.writer.add_custom_scalars(_CUSTOM_SCALARS)
        self.writer.add_text("start", describe_start(dist.world_size()), step)
        self.bar = tqdm(
            total=num_steps,
            initial=step,
            desc=stage,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            leave=False,
        )

    def advance(self) -> None:
        """Count an optimizer step in the progress bar."""
        if self.bar is not None:
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

        Args:
            measured: (metrics, extras), as `StepMeter.reduce` returns them.
        """
        metrics, extras = measured
        values = {**metrics, "lr": lr, "grad_norm": engines.grad_norm(engine)}
        if not self.writes:
            return
        self._monitor(engine, values)
        self._append({"stage": self.stage, "step": step, "epoch": epoch, **values})
        self._scalars({f"train/{name}": value for name, value in {**values, **extras}.items()}, step)
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{values['loss']:.4f}")
            if self.bar.disable:
                self.say(
                    f"{self.stage} step {step}/{num_steps}  loss {values['loss']:.4f} "
                    f"(hard {values['hard_loss']:.4f} soft {values['soft_loss']:.4f} hidden "
                    f"{values['hidden_loss']:.6f})  lr {values['lr']:.2e}  {values['samples_per_s']:.1f} samples/s"
                )

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
        """Log an evaluation on `split` (holdout or dev)."""
        if not self.writes:
            return
        self._append(
            {
                "stage": self.stage,
                "step": step,
                "epoch": epoch,
                "split": split,
                **{f"eval_{name}": value for name, value in metrics.items()},
            }
        )
        self._scalars({f"eval/{name}": value for name, value in metrics.items()}, step)
        self.say(f"{self.stage} step {step}  {split}: " + "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()))

    def figure(self, tag: str, figure: Figure, step: int = 0) -> None:
        if self.writer is not None:
            self.writer.add_figure(tag, figure, step)

    def final(self, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Log metrics on dev, as scalars and with the settings on TensorBoard's HPARAMS page."""
        if self.writes:
            shutil.rmtree(self.folder / "tb" / "final", ignore_errors=True)  # of an earlier start of a run that is over
            simple = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
            with SummaryWriter(str(self.folder / "tb")) as writer:
                writer.add_hparams(simple, {f"dev/{name}": value for name, value in metrics.items()}, run_name="final")

    def end_stage(self, score: str, state: TrainState, selected_on: str) -> None:
        """Close the stage's files and say which epoch is the best."""
        self.say(
            f"stage {self.stage} is over: {score} {state.best_score:.4f} on {selected_on} picks epoch "
            f"{state.best_epoch} of {state.epoch}"
        )
        if self.writer is not None:
            self.writer.close()
            self.writer = None
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def stop_if_failed(self) -> None:
        """Raise UserError on every rank (collective) if rank 0 could not write its files, as on a full disk."""

        def check() -> None:
            if self.failure is not None:
                raise UserError(
                    f"the log in {self.folder} cannot be written ({self.failure}); free some space, then "
                    "start the same command again"
                )

        dist.on_main(check)

    def _scalars(self, values: Mapping[str, float | None], step: int) -> None:
        assert self.writer is not None
        try:
            for name, value in values.items():
                if value is not None:
                    self.writer.add_scalar(name, value, step)
        except OSError as error:  # TensorBoard's thread found the disk full
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


_CUSTOM_SCALARS = {
    "losses": {
        "terms": ["Multiline", [f"train/{name}" for name in TERMS]],
        "hidden distance by pair": ["Multiline", ["train/hidden_distance/.*"]],
    },
    "speed": {
        "samples/s and tokens/s": ["Multiline", ["train/samples_per_s", "train/tokens_per_s"]],
        "shares": ["Multiline", ["train/padding_share", "train/teacher_time_share", "train/teacher_hidden_share"]],
    },
    "evaluation": {"metrics": ["Multiline", ["eval/.*"]]},
}
