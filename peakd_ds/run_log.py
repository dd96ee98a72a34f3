"""What a run tells: console lines or a progress bar, metrics.jsonl and TensorBoard, from rank 0.

Each stage has a TensorBoard folder of its own (RUN/tb/STAGE) and step counter. A resumed stage drops what was written
after its checkpoint from both files, so that no point stands twice.
"""

import contextlib
import json
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from peakd_ds import dist, run_lock, slurm_job
from peakd_ds.config import UserError
from peakd_ds.files import write_atomically

TERMS = ("loss", "hard_loss", "soft_loss", "hidden_loss")


class RunLog:
    """Writes on rank 0, does nothing on others. Use `say` for lines, `start_stage` before a stage's first step."""

    def __init__(self, folder: Path):
        self.folder, self.writes = folder, dist.is_main()
        self.writer: SummaryWriter | None = None
        self.bar: tqdm | None = None
        self.stage = ""
        self.failure: Exception | None = None
        quiet_libraries()

    def say(self, text: str) -> None:
        """A line for people, beside a progress bar if there is one."""
        if self.writes:
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def start_stage(self, stage: str, num_steps: int, step: int, settings_yaml: str) -> None:
        """Open the stage's files at `step`, dropping what an earlier start wrote beyond it."""
        self.stage = stage
        if not self.writes:
            return
        self._drop_metrics_after(stage, step)
        fresh = not (self.folder / "tb" / stage).exists()
        self.writer = SummaryWriter(str(self.folder / "tb" / stage), purge_step=step + 1)
        if fresh:
            self.writer.add_text("settings", "".join(f"    {line}\n" for line in settings_yaml.splitlines()), 0)
            self.writer.add_custom_scalars(_CUSTOM_SCALARS)
        self.writer.add_text("start", slurm_job.describe_start(dist.world_size()), step)
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
        """One optimiser step is done."""
        if self.bar is not None:
            self.bar.update()

    def step(
        self,
        step: int,
        num_steps: int,
        epoch: int,
        values: Mapping[str, float | None],
        watched: Mapping[str, float],
    ) -> None:
        """A logged training step: `values` go to metrics.jsonl, these and `watched` to TensorBoard."""
        if not self.writes:
            return
        self._append({"stage": self.stage, "step": step, "epoch": epoch, **values})
        self._scalars({f"train/{name}": value for name, value in {**values, **watched}.items()}, step)
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{values['loss']:.4f}")
            if self.bar.disable:
                self.say(
                    f"{self.stage} step {step}/{num_steps}  loss {values['loss']:.4f} "
                    f"(hard {values['hard_loss']:.4f} soft {values['soft_loss']:.4f} hidden "
                    f"{values['hidden_loss']:.6f})  lr {values['lr']:.2e}  {values['samples_per_s']:.1f} samples/s"
                )

    def monitor(self, engine: Any, values: Mapping[str, float | None]) -> None:
        """The same to DeepSpeed's own monitors (csv, wandb, ...) where the DeepSpeed config turns one on."""
        if self.writes and engine.monitor.enabled:
            engine.monitor.write_events(
                [
                    (f"{self.stage}/{name}", value, engine.global_samples)
                    for name, value in values.items()
                    if value is not None
                ]
            )

    def evaluation(self, step: int, epoch: int, split: str, metrics: Mapping[str, float]) -> None:
        """An evaluation on `split` (holdout or dev)."""
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

    def figure(self, tag: str, figure: Any, step: int = 0) -> None:
        if self.writer is not None:
            self.writer.add_figure(tag, figure, step)

    def final(self, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Metrics on dev, as scalars and beside the settings on TensorBoard's HPARAMS page."""
        if self.writes:
            shutil.rmtree(self.folder / "tb" / "final", ignore_errors=True)  # of an earlier start of a run that is over
            simple = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
            with SummaryWriter(str(self.folder / "tb")) as writer:
                writer.add_hparams(simple, {f"dev/{name}": value for name, value in metrics.items()}, run_name="final")

    def end_stage(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def stop_if_failed(self) -> None:
        """Raise UserError on every rank (collective) if rank 0 could not write its files, on a full disk say."""

        def tell() -> None:
            if self.failure is not None:
                raise UserError(
                    f"the log in {self.folder} cannot be written ({self.failure}); free some space, then "
                    "start the same command again"
                )

        dist.on_main(tell)

    def _scalars(self, values: Mapping[str, float | None], step: int) -> None:
        assert self.writer is not None
        try:
            for name, value in values.items():
                if value is not None:
                    self.writer.add_scalar(name, value, step)
        except OSError as error:  # TensorBoard's thread met a full disk
            self.failure = error

    def _append(self, record: Mapping[str, Any]) -> None:
        try:
            run_lock.check()
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        except (OSError, UserError) as error:  # the other ranks are on their way to a collective: tell them there
            self.failure = error

    def _drop_metrics_after(self, stage: str, step: int) -> None:
        file = self.folder / "metrics.jsonl"
        if not file.exists():
            return
        kept = [line for line in file.read_text().splitlines() if _is_kept(line, stage, step)]
        write_atomically(file, "".join(line + "\n" for line in kept))


def _is_kept(line: str, stage: str, step: int) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False  # a line cut off by a kill
    return record["stage"] != stage or record["step"] <= step


class StepMeter:
    """Collects the loss of each step on the device; other ranks and the host hear of it on log steps only."""

    def __init__(self, stage: str, teacher_clock: "TeacherClock | None" = None) -> None:
        self.stage, self.teacher_clock = stage, teacher_clock or TeacherClock()
        self.terms = torch.zeros(4, device=dist.device())  # this rank's share of total, hard, soft, hidden
        self.pair_distances: torch.Tensor | None = None
        self.first_bad_step = torch.full((), torch.iinfo(torch.int64).max, device=dist.device())
        self.bad_terms = torch.zeros(4, device=dist.device())
        self.num_samples = self.num_tokens = self.num_positions = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out what is no training (evaluation, saving) from samples per second."""
        self.start = time.perf_counter()
        self.num_samples = self.num_tokens = self.num_positions = 0
        self.teacher_clock.take()

    def start_step(self) -> None:
        self.terms.zero_()
        self.pair_distances = None

    def add(self, loss: Any, pair_distances: torch.Tensor | None, num_positions: int) -> None:
        """A micro-batch's loss shares and the number of positions computed."""
        self.terms += torch.stack([term.detach().float() for term in loss])
        self.num_positions += num_positions
        if pair_distances is not None:
            self.pair_distances = pair_distances + (0 if self.pair_distances is None else self.pair_distances)

    def end_step(self, step: int, num_samples: int, num_tokens: int) -> None:
        """Remember, without waiting for the device, the first step whose loss is not finite."""
        is_first = ~torch.isfinite(self.terms).all() & (self.first_bad_step > step)
        self.bad_terms = torch.where(is_first, self.terms, self.bad_terms)
        self.first_bad_step = torch.where(is_first, step, self.first_bad_step)
        self.num_samples += num_samples
        self.num_tokens += num_tokens

    def stop_if_not_finite(self, checkpoints: Path) -> None:
        """Raise UserError on every rank (collective) if any rank has met a loss that is NaN or infinite."""
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
        """(metrics, watched) of the step and of the time since the clock was restarted (collective)."""
        mine = [float(self.num_positions), *self.teacher_clock.take()]
        sums = [self.terms.double(), torch.tensor(mine, device=dist.device(), dtype=torch.float64)]
        if self.pair_distances is not None:
            sums.append(self.pair_distances.double())
        total = dist.all_reduce(torch.cat(sums)).tolist()
        seconds = time.perf_counter() - self.start  # after the reduction, which waits for the device
        metrics = dict(zip(TERMS, total[:4], strict=True))
        metrics["samples_per_s"] = self.num_samples / seconds
        metrics["tokens_per_s"] = self.num_tokens / seconds
        metrics["padding_share"] = 1 - self.num_tokens / max(total[4], 1)
        watched = {"memory_mib": memory_mib()}
        if total[5]:
            watched["teacher_time_share"] = total[5] / dist.world_size() / seconds
            watched["teacher_hidden_share"] = 1 - total[6] / total[5]  # of its time: what the student did not wait for
        if self.pair_distances is not None:
            watched |= {f"hidden_distance/pair_{number}": value for number, value in enumerate(total[7:], start=1)}
        return metrics, watched


class TeacherClock:
    """Seconds that the teacher's forward passes take, and that the student waits for them, since the last `take`.

    On a GPU by events in the streams, which does not stall them. Asked in turn, the student waits for all of it.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.passes: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if dist.on_gpu():
            self._begin(self.passes)
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if dist.on_gpu():
            self.passes[-1][1].record()
        else:
            self.seconds += time.perf_counter() - self.start

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what makes the student's stream wait for the teacher's."""
        self._begin(self.waits)
        yield
        self.waits[-1][1].record()

    def take(self) -> tuple[float, float]:
        """(seconds of the teacher, seconds of waiting for it) so far; waits for the device, so only on log steps."""
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
    """Peak memory of this rank: of its GPU, or resident on a CPU."""
    if dist.on_gpu():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def quiet_libraries() -> None:
    """DeepSpeed and transformers tell much that a reader of this run has no use for; warnings stay."""
    import transformers

    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has renamed.
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
