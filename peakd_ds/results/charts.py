"""TensorBoard's files of a run: charts of each stage in RUN/tb/STAGE, the results in RUN/tb/results.

Charts of several lines have one tag and a folder for each line, since TensorBoard draws the same tag of all folders in
one chart: STAGE/loss has the sum in tb/STAGE and the terms in tb/STAGE/hard, soft and hidden; STAGE/eval/METRIC has the
student in tb/STAGE and the teacher in tb/STAGE/teacher. Tags sort so that scores and loss come first.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from peakd_ds.ranks import dist
from peakd_ds.ranks.slurm_env import describe_start
from peakd_ds.results.meter import TERMS

GROUPS = {
    **dict.fromkeys(("lr", "grad_norm"), "optimizer/"),
    "hidden_distance": "pairs/",
    **dict.fromkeys(("samples_per_s", "tokens_per_s", "step_ms", "memory_mib"), "speed/"),
    **dict.fromkeys(("padding_share", "teacher_time_share", "teacher_hidden_share"), "speed/"),
}
"""Where the charts of what a step measures stand; they sort after eval/ and loss."""
RESULTS = "results"
"""Folder of the results; earlier versions wrote `final`."""


class StageCharts:
    """Writes the charts of a stage.

    Args:
        folder: RUN/tb/STAGE.
        weights: The weight of each term in the loss, by the names of TERMS.
        teacher_scores: The teacher's metrics on the rows that pick epochs.
        step: Where the stage starts or goes on; what was written after it is dropped.
    """

    def __init__(
        self, folder: Path, weights: Mapping[str, float], teacher_scores: Mapping[str, float], step: int
    ) -> None:
        self.stage, self.weights, self.teacher_scores = folder.name, weights, teacher_scores
        self.is_fresh = not folder.exists()
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)
        terms = [name.removesuffix("_loss") for name in weights] if len(weights) > 1 else []
        self.lines = {
            name: SummaryWriter(str(folder / name), purge_step=step + 1)
            for name in (*terms, *(["teacher"] if teacher_scores else []))
        }
        if step == 0:
            self._teacher_line(teacher_scores, 0)

    def texts(self, settings_yaml: str, step: int) -> None:
        """Write the settings, once, and what starts here."""
        if self.is_fresh:
            self.writer.add_text("settings", "".join(f"    {line}\n" for line in settings_yaml.splitlines()), 0)
        self.writer.add_text("start", describe_start(dist.world_size()), step)

    def step(self, values: Mapping[str, float | None], step: int) -> None:
        """Write a training step: the loss, its terms times their weights, speeds and all that was measured beside."""
        for name, value in values.items():
            if value is not None and name not in TERMS[1:]:
                self.writer.add_scalar(f"{self.stage}/{GROUPS.get(name.split('/')[0], '')}{name}", value, step)
        for name, weight in self.weights.items():
            line, value = self.lines.get(name.removesuffix("_loss")), values[name]
            if line is not None and value is not None:
                line.add_scalar(f"{self.stage}/loss", weight * value, step)

    def evaluation(self, metrics: Mapping[str, float], step: int) -> None:
        """Write an evaluation, and the teacher's scores at the same place."""
        for name, value in metrics.items():
            self.writer.add_scalar(f"{self.stage}/eval/{name}", value, step)
        self._teacher_line(metrics, step)

    def _teacher_line(self, metrics: Mapping[str, float], step: int) -> None:
        for name in metrics:
            if name in self.teacher_scores:
                self.lines["teacher"].add_scalar(f"{self.stage}/eval/{name}", self.teacher_scores[name], step)

    def close(self) -> None:
        """Write what is left and close the files."""
        for writer in (self.writer, *self.lines.values()):
            writer.close()


def write_results(
    folder: Path, settings: Mapping[str, Any], metrics: Mapping[str, float], table: str, figures: Mapping[str, Figure]
) -> None:
    """Write the results in place of those of an earlier start of a run that is over.

    Args:
        folder: RUN/tb.
        settings: For the HPARAMS page.
        metrics: By tag.
        table: In Markdown, for the TEXT page.
        figures: By tag.
    """
    for name in (RESULTS, "final"):
        shutil.rmtree(folder / name, ignore_errors=True)
    simple = {
        name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in settings.items()
    }
    with SummaryWriter(str(folder / RESULTS)) as writer:
        # Not add_hparams: it needs a file in `folder`, a run named ".". Without the first summary, which lists columns,
        # TensorBoard takes those of all runs that it shows, settings that differ first.
        for summary in hparams(simple, dict(metrics))[1:]:
            writer._get_file_writer().add_summary(summary)
        for tag, value in metrics.items():
            writer.add_scalar(tag, value)
        writer.add_text("results", table)
        for tag, figure in figures.items():
            writer.add_figure(tag, figure)
