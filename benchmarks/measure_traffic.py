"""The bytes that an optimizer step of the distill stage sends: counted, by formula, and projected to many GPUs.

    torchrun --nproc_per_node 2 benchmarks/measure_traffic.py measure --teacher CLASSIFIER ... >> docs/scaling.jsonl
    python benchmarks/measure_traffic.py tables docs/scaling.jsonl

`measure` takes train.py's options, runs three steps and counts the bytes of the last one with DeepSpeed's comms logger.
`tables` prints the tables of docs/scaling.md: the counts beside the formula, and steps projected to more GPUs.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine
from torch import nn

from peakd_ds import stages
from peakd_ds.cluster import run_lock
from peakd_ds.command_line import parse
from peakd_ds.config import RunConfig
from peakd_ds.data.batches import global_batches
from peakd_ds.data.division import epoch_slots
from peakd_ds.engine import engines
from peakd_ds.engine.ds_config import zero_stage
from peakd_ds.errors import UserError, exit_with
from peakd_ds.programs.traffic import Sizes, Traffic, step_traffic
from peakd_ds.ranks import dist
from peakd_ds.ranks.outcome import noted
from peakd_ds.results import markdown
from peakd_ds.results.log import RunLog
from peakd_ds.run import Run, open_run

NUM_STEPS = 3
"""Sharded engines learn the order of their layers in the first steps; later steps are all the same."""


@dataclass(frozen=True)
class Measured:
    """The counts of one step."""

    sizes: Sizes
    traffic: Traffic
    num_calls: int
    """Number of collectives, including those of a few bytes."""
    teacher_run_params: int
    """Weights that each token is multiplied by in the teacher: a matrix counts as often as it runs."""
    student_run_params: int
    """The same of the student."""

    @staticmethod
    def from_json(line: str) -> "Measured":
        """A line that `measure` printed. Raises ValueError, TypeError or KeyError for any other line."""
        values = json.loads(line)
        return Measured(**{**values, "sizes": Sizes(**values["sizes"]), "traffic": Traffic(**values["traffic"])})


# -- Measuring ---------------------------------------------------------------------------------------------------------


def measure(config: RunConfig) -> Measured:
    """Run three steps of the distill stage and count the last one (collective).

    Raises:
        UserError: as `open_run`, or an epoch has fewer than three steps.
    """
    import deepspeed.comm

    run = open_run(config)
    with run_lock.owned(run.folder):
        stage = stages.build_stage("distill", run, RunLog(run.folder))
        module = stages.build_module(stage, run)
        engine = engines.training_engine(module, run.config, run.student_ds_config, NUM_STEPS, "distill")
        slots = epoch_slots(len(run.train_rows), config.global_batch_size, config.seed, 0)[:NUM_STEPS]
        if len(slots) < NUM_STEPS:
            raise UserError(f"an epoch has {len(slots)} steps, but {NUM_STEPS} are needed; lower --global_batch_size")
        logger = deepspeed.comm.comm.comms_logger
        deepspeed.comm.configure(enabled=True, prof_all=True, verbose=False)
        try:
            batches = global_batches(run.train, run.train_rows, slots, run.num_accum_steps)
            for batch in stage.with_teacher_outputs(batches):
                logger.comms_dict = {}
                for micro in batch.micro_batches:
                    loss, _ = stage.loss(engine, micro, batch, False)
                    engine.backward(loss.total * engines.undo_averaging(engine))
                    engine.step()
        finally:
            deepspeed.comm.configure(enabled=False)
        sizes = sizes_of(run, engine)
        engine.destroy()
    counts = logger.comms_dict
    sent = {name: sum(size * record[0] for size, record in log.items()) for name, log in counts.items()}
    unknown = sent.keys() - {"all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor"}
    assert not unknown, f"collectives that the formula leaves out: {unknown}"
    return Measured(
        sizes,
        Traffic(sent.get("all_reduce", 0), sent.get("reduce_scatter_tensor", 0), sent.get("all_gather_into_tensor", 0)),
        sum(record[0] for log in counts.values() for record in log.values()),
        layer_params(run.teacher.hidden_size, run.teacher.source.config.num_hidden_layers),
        layer_params(run.student_init.config.hidden_size, run.student_depth),
    )


def sizes_of(run: Run, engine: DeepSpeedEngine) -> Sizes:
    """What the traffic of a step of this run depends on; `engine` trains the student."""

    def count(module: nn.Module, is_counted: Callable[[torch.Tensor], bool]) -> int:
        parameters = {id(parameter): parameter for parameter in module.parameters()}.values()
        return sum(getattr(p, "ds_numel", p.numel()) for p in parameters if is_counted(p))

    def is_unsharded(parameter: torch.Tensor) -> bool:
        return getattr(parameter, "ds_persist", False)

    teacher_stage, teacher_sharded = run.teacher.zero_stage, 0
    if teacher_stage == 3:
        teacher_sharded = count(run.teacher.engine().module, lambda p: not is_unsharded(p))
    return Sizes(
        num_ranks=dist.world_size(),
        num_accum_steps=run.num_accum_steps,
        student_stage=zero_stage(run.student_ds_config),
        teacher_stage=teacher_stage,
        student_params=count(engine.module, lambda p: True),
        student_small_params=count(engine.module, is_unsharded),
        teacher_sharded_params=teacher_sharded,
        bytes_per_number=4 if run.config.dtype == "fp32" else 2,
    )


# -- Projecting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What a projection assumes."""

    gpus_per_node: int
    gpu_flops_per_s: float
    """Reached in practice, below the peak of the data sheet."""
    node_bytes_per_s: float
    """One way, over all links of a node to the others."""
    seconds_per_call: float
    """Time to start a collective, for each doubling of the number of nodes."""


@dataclass(frozen=True)
class Step:
    """A projected optimizer step."""

    compute_s: float
    comm_s: float

    @property
    def efficiency(self) -> float:
        """Share of the step spent computing if computing and sending do not overlap, the worst case."""
        return self.compute_s / (self.compute_s + self.comm_s)


def flops_per_rank(teacher_params: int, student_params: int, num_tokens: int) -> float:
    """FLOPs of one step: 2 for each token and weight in a forward pass, 4 more in a backward pass.

    Args:
        teacher_params: Weights in the layers' matrices, counted as often as they run; embeddings are only looked up.
        student_params: The same of the student.
        num_tokens: Tokens of this rank, including padding.
    """
    return num_tokens * (2.0 * teacher_params + 6.0 * student_params)


def project(sizes: Sizes, flops: float, num_calls: int, machine: Machine) -> Step:
    """A step on `sizes.num_ranks` GPUs.

    A ring enters and leaves each node once, so a node sends as many bytes as a rank. Traffic within a node is free.

    Args:
        flops: Of one rank.
        num_calls: Collectives of a step.
    """
    num_nodes = -(-sizes.num_ranks // machine.gpus_per_node)
    comm_s = 0.0
    if num_nodes > 1:
        sent = step_traffic(sizes).sent(sizes.num_ranks)
        comm_s = sent / machine.node_bytes_per_s + num_calls * machine.seconds_per_call * math.log2(num_nodes)
    return Step(flops / machine.gpu_flops_per_s, comm_s)


def layer_params(hidden: int, num_layers: int) -> int:
    """Weights in the matrices of `num_layers` BERT layers: four of hidden x hidden, two of hidden x 4 hidden."""
    return num_layers * 12 * hidden * hidden


# -- The program -------------------------------------------------------------------------------------------------------

NUM_GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


def measured_table(measured: Sequence[Measured]) -> str:
    """The counts of each step beside the formula, in Markdown; sizes in bytes."""
    header = ["ranks", "student", "teacher", "all_reduce", "reduce_scatter", "all_gather", "calls", "sent by a rank"]
    rows = []
    for one in measured:
        sizes, traffic = one.sizes, one.traffic
        sent = (traffic.sent(sizes.num_ranks), step_traffic(sizes).sent(sizes.num_ranks))
        counted = (traffic.all_reduce, traffic.reduce_scatter, traffic.all_gather)
        rows.append(
            [
                *(sizes.num_ranks, f"stage {sizes.student_stage}", f"stage {sizes.teacher_stage}"),
                *(f"{size:,.0f}" for size in counted),
                one.num_calls,
                *(f"{size:,.0f}" for size in sent),
            ]
        )
    return markdown.table([*header, "formula"], rows)


def projected_table(measured: Sequence[Measured], machine: Machine, num_tokens: int) -> str:
    """Milliseconds of a step and efficiency in bf16, in Markdown, for each choice measured on the most ranks."""
    most = max(one.sizes.num_ranks for one in measured)
    rows = []
    for one in (one for one in measured if one.sizes.num_ranks == most):
        flops = flops_per_rank(one.teacher_run_params, one.student_run_params, num_tokens)
        cells = [f"stage {one.sizes.student_stage}", f"stage {one.sizes.teacher_stage}"]
        for num_gpus in NUM_GPUS:
            sizes = replace(one.sizes, num_ranks=num_gpus, num_accum_steps=1, bytes_per_number=2)
            step = project(sizes, flops, one.num_calls, machine)
            cells.append(f"{1e3 * (step.compute_s + step.comm_s):.1f} ms, {step.efficiency:.0%}")
        rows.append(cells)
    return markdown.table(["student", "teacher", *(f"{n:,} GPUs" for n in NUM_GPUS)], rows)


def tables(argv: Sequence[str]) -> str:
    """The tables of docs/scaling.md, a blank line between them. Raises UserError for a file without counts."""
    parser = argparse.ArgumentParser(prog="measure_traffic.py tables")
    parser.add_argument("file", type=Path, help="lines that `measure` printed")
    parser.add_argument(
        "--node_gbit", type=float, nargs="+", default=[100, 400, 3200], help="all links of a node [Gbit/s]"
    )
    parser.add_argument("--gpus_per_node", type=int, default=8)
    parser.add_argument("--gpu_tflops", type=float, default=200, help="speed of a GPU in bf16, as reached [TFLOP/s]")
    parser.add_argument(
        "--call_us", type=float, default=20, help="start of a collective, for each doubling of nodes [us]"
    )
    parser.add_argument("--tokens", type=int, default=32 * 128, help="tokens of a rank in a step, including padding")
    args = parser.parse_args(argv)
    try:
        measured = [Measured.from_json(line) for line in args.file.read_text().splitlines()]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{args.file} holds no lines of `measure` ({error}); give docs/scaling.jsonl") from error
    parts = [measured_table(measured)]
    for gbit in args.node_gbit:
        machine = Machine(args.gpus_per_node, args.gpu_tflops * 1e12, gbit * 1e9 / 8, args.call_us * 1e-6)
        parts.append(f"{gbit:,.0f} Gbit/s a node:\n\n" + projected_table(measured, machine, args.tokens))
    return "\n\n".join(parts)


def main(argv: Sequence[str]) -> None:
    """Run `measure` (under a launcher) or `tables`. Raises UserError for other words."""
    if argv[:1] == ["tables"]:
        print(tables(argv[1:]))
    elif argv[:1] == ["measure"]:
        config = parse(argv[1:])
        dist.init(config.rank_timeout)
        measured = measure(config)
        if dist.is_main():
            print(json.dumps(asdict(measured)), flush=True)
    else:
        raise UserError("give measure and train.py's options, or tables and a file of the lines that measure printed")


def cli() -> None:
    """The entry point."""
    try:
        with noted(marks_finished=False):
            main(sys.argv[1:])
    except (UserError, OSError) as error:
        exit_with(error, "measure_traffic.py")


if __name__ == "__main__":
    cli()
