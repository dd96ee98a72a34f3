"""One step of the student on DeepSpeed's engine against the same step in a bare PyTorch loop, and what it computes.

    python benchmarks/bench_step.py --task mrpc --data_dir DATA --teacher TEACHER --encoder demo/encoder --output FILE

The same model, batches and loss; the loop has bf16 weights with fp32 masters where the engine has. The two take turns,
batch by batch. Teacher answers are made up and batches made before, so that only the step is timed. FILE receives

    engine_overhead      time of an engine's step over the loop's, less 1: the median over batches
    student_gflops       needed arithmetic of the engine's step, 10^9 a second: no padding, last layer for [CLS] alone
    bf16_matmul_gflops   of a large matrix product in the same run
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases as recipe
import numpy as np
import torch
from arithmetic import step_flops
from torch import Tensor, nn

from peakd_ds.command_line import parse
from peakd_ds.data.batches import epoch_slots, global_batches
from peakd_ds.engine import engines
from peakd_ds.engine.ds_config import DTYPES
from peakd_ds.errors import UserError, exit_with
from peakd_ds.kernels import distillation_loss
from peakd_ds.model import vocabulary
from peakd_ds.model.build import MatchedStudent, build_student, task_head
from peakd_ds.ranks import dist
from peakd_ds.results.log import quiet_libraries
from peakd_ds.run import Run, open_run

WARM_UP_STEPS, PROFILED_STEPS = 3, 5
MATMUL_SIZE = 4096


def matmul_gflops(size: int = MATMUL_SIZE, rounds: int = 10) -> float:
    """Rate of a product of two bf16 matrices, the best of the rounds."""
    a, b = (torch.randn(size, size).bfloat16() for _ in range(2))
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e9


class BareLoop:
    """What one writes without DeepSpeed: forward, backward, clip, fused AdamW on fp32 masters, weights copied back."""

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

    def step(self, loss_of: Callable[[Any], Tensor]) -> None:
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
    """Times of both on the same batches, in turn; then, if asked for, what the engine's step consists of, printed."""
    config = run.config
    dtype = DTYPES[config.dtype]
    num_steps = num_batches + WARM_UP_STEPS

    def build() -> MatchedStudent:
        torch.manual_seed(0)
        student = build_student(config, run.student_init, task_head(run.task))
        module = MatchedStudent(student, run.pairs, run.teacher_source.config.hidden_size, "cls")
        vocabulary.trim(module, run.used_tokens)
        return module

    bare = BareLoop(build(), dtype, num_steps)
    engine = engines.training_engine(build(), config, run.student_ds_config, num_steps, "bench")
    share_to_loss, grad_scale = engines.undo_averaging(engine), engines.expected_upstream(engine)
    engine.train()

    num_rows, batch_size = len(run.train_rows), config.global_batch_size
    if num_rows < batch_size * WARM_UP_STEPS:
        raise UserError(
            f"--task {config.task} has {num_rows} training rows; {WARM_UP_STEPS} batches of {batch_size} only warm up: "
            f"give a task with {batch_size * WARM_UP_STEPS} rows or more"
        )
    slots = np.zeros((0, batch_size), np.int64)
    for epoch in range(num_steps):  # until there are full batches enough
        of_epoch = epoch_slots(num_rows, batch_size, 0, epoch)
        slots = np.concatenate([slots, of_epoch[(of_epoch >= 0).all(axis=1)]])[:num_steps]
    ratios, rates, engine_ms, bare_ms = [], [], [], []
    for number, batch in enumerate(global_batches(run.train, run.train_rows, slots, 1)):
        (micro,) = list(batch.micro_batches)
        hidden = [torch.randn(len(micro.labels), run.teacher_source.config.hidden_size).to(dtype) for _ in run.pairs]
        answers = torch.randn(len(micro.labels), run.task.num_labels), hidden

        def loss_of(module: Any, scale: float = 1.0, micro: Any = micro, answers: Any = answers) -> Tensor:
            logits, states = module(**micro.inputs)
            return distillation_loss(
                logits,
                answers[0],
                micro.labels,
                states,
                answers[1],
                temperature=config.temperature,
                alpha=config.alpha,
                beta=config.beta,
                grad_scale=scale,
            ).total

        def engine_step(loss_of: Any = loss_of) -> None:
            engine.backward(loss_of(engine, grad_scale) * share_to_loss)
            engine.step()

        def bare_step(loss_of: Any = loss_of) -> None:
            bare.step(loss_of)

        order = (engine_step, bare_step) if number % 2 else (bare_step, engine_step)
        taken = {}
        for step in order:
            began = time.perf_counter()
            step()
            taken[step.__name__] = time.perf_counter() - began
        if number >= WARM_UP_STEPS:
            depth = run.student_depth
            lengths = run.train.lengths[micro.rows.numpy()].tolist()
            flops = step_flops(engine.module.student.config, depth, lengths, is_last_whole=False)
            ratios.append(taken["engine_step"] / taken["bare_step"])
            rates.append(flops / taken["engine_step"] / 1e9)
            engine_ms.append(taken["engine_step"] * 1e3)
            bare_ms.append(taken["bare_step"] * 1e3)
    if is_profiled:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(PROFILED_STEPS):  # of the last batch
                engine_step()
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=45))
    return {
        "bf16_matmul_gflops": matmul_gflops(),
        "engine_overhead": statistics.median(ratios) - 1,
        "student_gflops": statistics.median(rates),
        "engine_step_ms": statistics.median(engine_ms),
        "bare_step_ms": statistics.median(bare_ms),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, help="as for train.py")
    parser.add_argument("--data_dir", required=True, help="as for train.py")
    parser.add_argument("--teacher", required=True, help="classifier for the task; only its shape is used")
    parser.add_argument("--encoder", required=True, help="what the student starts from")
    parser.add_argument("--num_stored_layers", type=int, default=3, help="n of the student; default 3")
    parser.add_argument("--batches", type=int, default=40, help="timed batches; default 40")
    parser.add_argument("--profile", action="store_true", help="also print torch.profiler's table of the engine's step")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()
    if arguments.num_stored_layers < 1:
        parser.error(f"--num_stored_layers {arguments.num_stored_layers}: a student stores at least 1; set 1 or more")
    if arguments.batches < 1:
        parser.error(f"--batches {arguments.batches}: at least 1 must be timed; set 1 or more")
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
