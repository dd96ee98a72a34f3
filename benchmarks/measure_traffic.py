"""How many bytes an optimiser step of the distill stage sends: measured, as a formula, and projected. docs/scaling.md.

    torchrun --nproc_per_node 2 benchmarks/measure_traffic.py measure --teacher CLASSIFIER ... >> docs/scaling.jsonl
    python benchmarks/measure_traffic.py tables docs/scaling.jsonl

`measure` takes train.py's options, runs three steps and counts the last with DeepSpeed's comms logger. `tables` sets
what was counted beside the formula, and projects steps on more GPUs from it.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peakd_ds import stages, train
from peakd_ds.cluster import run_lock
from peakd_ds.command_line import parse
from peakd_ds.config import RunConfig
from peakd_ds.data.batches import epoch_slots, global_batches
from peakd_ds.engine import engines
from peakd_ds.engine.ds_config import zero_stage
from peakd_ds.errors import UserError, exit_with
from peakd_ds.programs.traffic import Sizes, Traffic, formula
from peakd_ds.ranks import dist
from peakd_ds.ranks.outcome import noted
from peakd_ds.results.log import RunLog
from peakd_ds.run import open_run

NUM_STEPS = 3
"""Sharded engines find the order of their layers in the first steps; later ones are all alike."""


@dataclass(frozen=True)
class Measured:
    """A counted step."""

    sizes: Sizes
    traffic: Traffic
    num_calls: int
    """Collectives, those of a few bytes included."""
    teacher_run_params: int
    """Weights in the matrices of layers, as often as they run: what a token is multiplied with."""
    student_run_params: int

    @staticmethod
    def from_json(line: str) -> "Measured":
        values = json.loads(line)
        return Measured(**{**values, "sizes": Sizes(**values["sizes"]), "traffic": Traffic(**values["traffic"])})


# -- Measuring ---------------------------------------------------------------------------------------------------------


def measure(config: RunConfig) -> Measured:
    """Count a step of the distill stage (collective)."""
    import deepspeed.comm

    run = open_run(config)
    with run_lock.owned(run.folder):
        stage = stages.build_stage("distill", run, RunLog(run.folder))
        module = train.build(stage, run.config)
        engine = engines.training_engine(module, run.config, run.student_ds_config, NUM_STEPS, "distill")
        slots = epoch_slots(len(run.train_rows), config.global_batch_size, config.seed, 0)[:NUM_STEPS]
        if len(slots) < NUM_STEPS:
            raise UserError(f"an epoch has {len(slots)} steps and {NUM_STEPS} are needed; lower --global_batch_size")
        logger = deepspeed.comm.comm.comms_logger
        deepspeed.comm.configure(enabled=True, prof_all=True, verbose=False)
        try:
            batches = global_batches(run.train, run.train_rows, slots, run.micro_and_accum[1])
            for batch in stage.answered(batches):
                logger.comms_dict = {}
                for micro in batch.micro_batches:
                    loss, _ = stage.loss(engine, micro, batch, False)
                    engine.backward(loss.total * engines.undo_averaging(engine))
                    engine.step()
        finally:
            deepspeed.comm.configure(enabled=False)
        sizes = _sizes_of(run, engine)
        engine.destroy()
    sent = {name: sum(size * record[0] for size, record in log.items()) for name, log in logger.comms_dict.items()}
    unknown = sent.keys() - {"all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor"}
    assert not unknown, f"collectives that the formula does not know: {unknown}"
    return Measured(
        sizes,
        Traffic(sent.get("all_reduce", 0), sent.get("reduce_scatter_tensor", 0), sent.get("all_gather_into_tensor", 0)),
        sum(record[0] for log in logger.comms_dict.values() for record in log.values()),
        layer_params(run.teacher_source.config.hidden_size, run.teacher_source.config.num_hidden_layers),
        layer_params(run.student_init.config.hidden_size, run.student_depth),
    )


def _sizes_of(run: Any, engine: Any) -> Sizes:

    def count(module: Any, is_counted: Any) -> int:
        parameters = {id(parameter): parameter for parameter in module.parameters()}.values()
        return sum(getattr(p, "ds_numel", p.numel()) for p in parameters if is_counted(p))

    def is_kept_whole(parameter: Any) -> bool:
        return getattr(parameter, "ds_persist", False)

    teacher_stage = zero_stage(run.teacher_ds_config)
    return Sizes(
        num_ranks=dist.world_size(),
        num_accum_steps=run.micro_and_accum[1],
        student_stage=zero_stage(run.student_ds_config),
        teacher_stage=teacher_stage,
        student_params=count(engine.module, lambda p: True),
        student_small_params=count(engine.module, is_kept_whole),
        teacher_sharded_params=count(run.teacher().module, lambda p: not is_kept_whole(p)) if teacher_stage == 3 else 0,
        bytes_per_number=4 if run.config.dtype == "fp32" else 2,
    )


# -- Projecting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What a projection assumes."""

    gpus_per_node: int
    gpu_flops_per_s: float
    """What a GPU reaches, not what its maker promises."""
    node_bytes_per_s: float
    """Of a node's links to others, one way, all together."""
    seconds_per_call: float
    """To start a collective, for each doubling of the number of nodes."""


@dataclass(frozen=True)
class Step:
    """A projected optimiser step."""

    compute_s: float
    comm_s: float

    @property
    def efficiency(self) -> float:
        """Share of the step that computes if nothing overlaps: the worst case."""
        return self.compute_s / (self.compute_s + self.comm_s)


def flops_per_rank(teacher_params: int, student_params: int, num_tokens: int) -> float:
    """Of one step: 2 for each token and parameter that runs in a forward pass, 4 more in a backward pass.

    Args:
        teacher_params: in matrices of layers, counted as often as they run; embeddings are looked up, not multiplied.
        student_params: the same.
        num_tokens: of this rank, padding included.
    """
    return num_tokens * (2.0 * teacher_params + 6.0 * student_params)


def project(sizes: Sizes, flops: float, num_calls: int, machine: Machine) -> Step:
    """A step on `sizes.num_ranks` GPUs. A ring enters and leaves each node once, so what one rank sends is what a node
    sends; between the GPUs of one node nothing is counted."""
    num_nodes = -(-sizes.num_ranks // machine.gpus_per_node)
    comm_s = 0.0
    if num_nodes > 1:
        sent = formula(sizes).sent(sizes.num_ranks)
        comm_s = sent / machine.node_bytes_per_s + num_calls * machine.seconds_per_call * math.log2(num_nodes)
    return Step(flops / machine.gpu_flops_per_s, comm_s)


def layer_params(hidden: int, num_layers: int) -> int:
    """Weights of the matrices in so many BERT layers: four of hidden x hidden, two of hidden x 4 hidden."""
    return num_layers * 12 * hidden * hidden


# -- The program -------------------------------------------------------------------------------------------------------

NUM_GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


def measured_table(measured: Sequence[Measured]) -> str:
    """What was counted and what the formula says, in Markdown."""
    lines = [
        "| ranks | student | teacher | all_reduce | reduce_scatter | all_gather | calls | sent by a rank | formula |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in measured:
        sizes, sent = one.sizes, one.traffic.sent(one.sizes.num_ranks)
        traffic = (one.traffic.all_reduce, one.traffic.reduce_scatter, one.traffic.all_gather)
        lines.append(
            f"| {sizes.num_ranks} | stage {sizes.student_stage} | stage {sizes.teacher_stage} | "
            + " | ".join(f"{number:,.0f}" for number in traffic)
            + f" | {one.num_calls} | {sent:,.0f} | {formula(sizes).sent(sizes.num_ranks):,.0f} |"
        )
    return "\n".join(lines)


def projected_table(measured: Sequence[Measured], machine: Machine, num_tokens: int) -> str:
    """Milliseconds of a step and efficiency in bf16, for the stages as counted on most ranks, in Markdown."""
    most = max(one.sizes.num_ranks for one in measured)
    lines = [
        "| student | teacher | " + " | ".join(f"{n:,} GPUs" for n in NUM_GPUS) + " |",
        "|---|---|" + "---|" * len(NUM_GPUS),
    ]
    for one in (one for one in measured if one.sizes.num_ranks == most):
        flops = flops_per_rank(one.teacher_run_params, one.student_run_params, num_tokens)
        cells = []
        for num_gpus in NUM_GPUS:
            sizes = replace(one.sizes, num_ranks=num_gpus, num_accum_steps=1, bytes_per_number=2)
            step = project(sizes, flops, one.num_calls, machine)
            cells.append(f"{1e3 * (step.compute_s + step.comm_s):.1f} ms, {step.efficiency:.0%}")
        lines.append(f"| stage {one.sizes.student_stage} | stage {one.sizes.teacher_stage} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(argv: Sequence[str]) -> str:
    """The tables of docs/scaling.md."""
    parser = argparse.ArgumentParser(prog="measure_traffic.py tables")
    parser.add_argument("file", type=Path, help="lines that `measure` printed")
    parser.add_argument("--node_gbit", type=float, nargs="+", default=[100, 400, 3200], help="links of a node [Gbit/s]")
    parser.add_argument("--gpus_per_node", type=int, default=8)
    parser.add_argument("--gpu_tflops", type=float, default=200, help="reached in bf16 [TFLOP/s]")
    parser.add_argument("--call_us", type=float, default=20, help="to start a collective, a doubling of nodes [us]")
    parser.add_argument("--tokens", type=int, default=32 * 128, help="of a rank in a step, padding included")
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
    """`measure` under a launcher, `tables` alone."""
    if argv[:1] == ["tables"]:
        print(tables(argv[1:]))
    elif argv[:1] == ["measure"]:
        config = parse(argv[1:])
        dist.init(config.rank_timeout)
        measured = measure(config)
        if dist.is_main():
            print(json.dumps(asdict(measured)), flush=True)
    else:
        raise UserError("give measure and train.py's options, or tables and a file of what it printed")


def cli() -> None:
    """What launchers start."""
    try:
        with noted(tells_end=False):
            main(sys.argv[1:])
    except (UserError, OSError) as error:
        exit_with(error, "measure_traffic.py")


if __name__ == "__main__":
    cli()
