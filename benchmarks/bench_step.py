"""Time a step of the student on DeepSpeed's engine and in a plain PyTorch loop, and its rate of arithmetic.

    python benchmarks/bench_step.py --task mrpc --data_dir DATA --teacher TEACHER --encoder demo/encoder --output FILE

Both have the same model, batches, loss and dtypes (in bf16, with fp32 masters) and take turns, batch by batch. Teacher
outputs are random and batches are made beforehand, so that only the step is timed. FILE receives

    engine_overhead      time of the engine's step / time of the loop's step - 1, the median over batches
    student_gflops       rate of the engine's step [GFLOP/s], counting no padding and only [CLS] in the last layer
    bf16_matmul_gflops   rate of a large matrix product in the same run [GFLOP/s]
    engine_step_ms, bare_step_ms
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from operator import truediv
from pathlib import Path

import cases as recipe
import numpy as np
import torch
from arithmetic import step_flops
from torch import Tensor, nn

from peakd_ds.command_line import parse
from peakd_ds.data.batches import global_batches
from peakd_ds.data.division import epoch_slots
from peakd_ds.data.tokens import MicroBatch
from peakd_ds.engine import engines
from peakd_ds.engine.ds_config import DTYPES
from peakd_ds.errors import UserError, exit_with
from peakd_ds.kernels import distillation_loss
from peakd_ds.model import vocabulary
from peakd_ds.model.build import MatchedStudent, build_student, task_head
from peakd_ds.ranks import dist
from peakd_ds.results.log import quiet_libraries
from peakd_ds.run import Run, open_run

ScaledLoss = Callable[[nn.Module, float], Tensor]
"""(module, upstream gradient of the loss) -> loss."""
WARM_UP_STEPS, PROFILED_STEPS = 3, 5
MATMUL_SIZE = 4096


def matmul_gflops(size: int = MATMUL_SIZE, rounds: int = 10) -> float:
    """Rate of a product of two bf16 matrices, the best of the rounds [GFLOP/s]."""
    a, b = (torch.randn(size, size).bfloat16() for _ in range(2))
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e9


class BareLoop:
    """A step without DeepSpeed: forward, backward, clip, fused AdamW on fp32 masters, copy to the weights."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, num_steps: int):
        self.module = module.train()
        self.masters = [parameter.detach().clone() for parameter in module.parameters()]
        self.weights = list(module.to(dtype).parameters())
        decayed = [master for master in self.masters if master.dim() > 1]
        others = [master for master in self.masters if master.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": recipe.WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.LR, fused=True)
        warm_up = max(1, round(recipe.WARMUP_RATIO * num_steps))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(step / warm_up, (num_steps - step) / max(1, num_steps - warm_up))
        )

    def step(self, loss_of: Callable[[nn.Module], Tensor]) -> None:
        """One step on the loss of the module."""
        loss_of(self.module).backward()
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = weight.grad.float() if weight.dtype != torch.float32 else weight.grad
            weight.grad = None
        nn.utils.clip_grad_norm_(self.masters, recipe.MAX_GRAD_NORM)
        self.optimizer.step()
        self.scheduler.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        for master in self.masters:
            master.grad = None


def measure(run: Run, num_batches: int, is_profiled: bool) -> dict[str, float]:
    """Time both steps in turn on the same batches, and optionally print a profile of the engine's step.

    Returns:
        The entries of FILE.

    Raises:
        UserError: fewer training rows than the warm-up takes.
    """
    num_steps = num_batches + WARM_UP_STEPS
    slots = full_batches(run, num_steps)
    bare = BareLoop(build(run), DTYPES[run.config.dtype], num_steps)
    engine = engines.training_engine(build(run), run.config, run.student_ds_config, num_steps, "bench")
    share_to_loss, grad_scale = engines.undo_averaging(engine), engines.expected_upstream(engine)
    engine.train()

    def engine_step(loss: ScaledLoss) -> None:
        engine.backward(loss(engine, grad_scale) * share_to_loss)
        engine.step()

    def bare_step(loss: ScaledLoss) -> None:
        bare.step(lambda module: loss(module, 1.0))

    engine_s, bare_s, flops = [], [], []
    for number, batch in enumerate(global_batches(run.train, run.train_rows, slots, 1)):
        (micro,) = list(batch.micro_batches)
        loss = random_loss(run, micro)
        if number % 2:
            engine_s.append(_seconds(engine_step, loss))
            bare_s.append(_seconds(bare_step, loss))
        else:
            bare_s.append(_seconds(bare_step, loss))
            engine_s.append(_seconds(engine_step, loss))
        lengths = run.train.lengths[micro.rows.numpy()].tolist()
        flops.append(step_flops(engine.module.student.config, run.student_depth, lengths, runs_all_tokens=False))
    if is_profiled:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(PROFILED_STEPS):
                engine_step(loss)  # on the last batch
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=45))
    engine_s, bare_s, flops = engine_s[WARM_UP_STEPS:], bare_s[WARM_UP_STEPS:], flops[WARM_UP_STEPS:]
    return {
        "bf16_matmul_gflops": matmul_gflops(),
        "engine_overhead": statistics.median(map(truediv, engine_s, bare_s)) - 1,
        "student_gflops": statistics.median(map(truediv, flops, engine_s)) / 1e9,
        "engine_step_ms": statistics.median(engine_s) * 1e3,
        "bare_step_ms": statistics.median(bare_s) * 1e3,
    }


def full_batches(run: Run, num_batches: int) -> np.ndarray:
    """Slots of `num_batches` global batches without empty slots, int64 [num_batches, batch size], over several epochs.

    Raises:
        UserError: fewer training rows than the warm-up takes.
    """
    num_rows, batch_size = len(run.train_rows), run.config.global_batch_size
    if num_rows < batch_size * WARM_UP_STEPS:
        raise UserError(
            f"--task {run.config.task} has {num_rows} training rows, but {WARM_UP_STEPS} batches of {batch_size} only "
            f"warm up; give a task with {batch_size * WARM_UP_STEPS} rows or more"
        )
    slots = np.zeros((0, batch_size), np.int64)
    for epoch in itertools.count():
        if len(slots) >= num_batches:
            break
        in_epoch = epoch_slots(num_rows, batch_size, 0, epoch)
        slots = np.concatenate([slots, in_epoch[(in_epoch >= 0).all(axis=1)]])
    return slots[:num_batches]


def build(run: Run) -> MatchedStudent:
    """The student as the distill stage trains it; always with the same weights."""
    torch.manual_seed(0)
    student = build_student(run.config, run.student_init, task_head(run.task))
    module = MatchedStudent(student, run.pairs, run.teacher.hidden_size, "cls")
    vocabulary.trim(module, run.used_tokens)
    return module


def random_loss(run: Run, micro: MicroBatch) -> ScaledLoss:
    """The distillation loss of a module on a micro-batch, with random teacher outputs."""
    config, dtype, num_rows = run.config, DTYPES[run.config.dtype], len(micro.labels)
    teacher_hidden = [torch.randn(num_rows, run.teacher.hidden_size).to(dtype) for _ in run.pairs]
    teacher_logits = torch.randn(num_rows, run.task.num_labels)

    def loss(module: nn.Module, grad_scale: float) -> Tensor:
        logits, hidden = module(**micro.inputs)
        return distillation_loss(
            logits,
            teacher_logits,
            micro.labels,
            hidden,
            teacher_hidden,
            temperature=config.temperature,
            alpha=config.alpha,
            beta=config.beta,
            grad_scale=grad_scale,
        ).total

    return loss


def _seconds(step: Callable[[ScaledLoss], None], loss: ScaledLoss) -> float:
    began = time.perf_counter()
    step(loss)
    return time.perf_counter() - began


def main() -> None:
    """Measure, and write FILE."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, help="as for train.py")
    parser.add_argument("--data_dir", required=True, help="as for train.py")
    parser.add_argument("--teacher", required=True, help="a classifier for the task, of which only the shape is used")
    parser.add_argument("--encoder", required=True, help="the encoder that the student starts from")
    parser.add_argument("--num_stored_layers", type=int, default=3, help="stored layers of the student; default 3")
    parser.add_argument("--batches", type=int, default=40, help="timed batches; default 40")
    parser.add_argument("--profile", action="store_true", help="also print torch.profiler's table of the engine's step")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()
    if arguments.num_stored_layers < 1:
        parser.error(f"--num_stored_layers {arguments.num_stored_layers}: a student has at least 1; set 1 or more")
    if arguments.batches < 1:
        parser.error(f"--batches {arguments.batches}: at least 1 batch must be timed; set 1 or more")
    dist.init()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "task": arguments.task,
            "data_dir": arguments.data_dir,
            "teacher": arguments.teacher,
            "student_init": arguments.encoder,
            "num_hidden_layers": arguments.num_stored_layers,
            "run_dir": folder,
            "select_on": "dev",
            "dropout": recipe.DROPOUT,
            "max_seq_length": recipe.MAX_SEQ_LENGTH,
            "temperature": recipe.TEMPERATURE,
            "alpha": recipe.ALPHA,
            "beta": recipe.BETA,
            "lr": recipe.LR,
            "weight_decay": recipe.WEIGHT_DECAY,
            "max_grad_norm": recipe.MAX_GRAD_NORM,
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        try:
            result = measure(open_run(parse([*words, "--no_ptp"])), arguments.batches, arguments.profile)
        except UserError as error:
            exit_with(error, "bench_step.py")
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    dist.leave()


if __name__ == "__main__":
    main()
