"""peakd-plan: what a distill stage will hold and send, rank by rank, before it is started on a cluster.

    peakd-plan --teacher bert-large-uncased --world_size 8 --gpu_memory_gib 40
    peakd-plan --teacher_layers 24 --teacher_hidden 1024 --world_size 8 --json

The models are built on the meta device from the run's own configurations and their parameters counted: no weight is
read and no GPU is needed. Each formula names what it was read from in DeepSpeed 0.19.8, in deepspeed/runtime/; bytes
sent are those of traffic.py.
"""

import argparse
import contextlib
import itertools
import json
import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, BertConfig

from peakd_ds.config import RunConfig
from peakd_ds.data.tasks import get_task
from peakd_ds.engine import engines
from peakd_ds.engine.ds_config import DTYPES, batch_plan, load_ds_config
from peakd_ds.errors import UserError, first_line
from peakd_ds.model.build import MatchedStudent, layer_pairs, student_config, task_head, teacher_config
from peakd_ds.packed.packing import WIDTH_MULTIPLE
from peakd_ds.programs import scripts
from peakd_ds.programs.traffic import Sizes, formula
from peakd_ds.sps import SPSBertForSequenceClassification
from peakd_ds.teacher import cache as teacher_cache

with contextlib.redirect_stdout(sys.stderr):  # where DeepSpeed warns, when imported, that there is no GPU
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

TEACHERS = ("teacher_zero0", "teacher_zero3", "teacher_zero3_offload")
FP32 = 4
GIB = 2**30
HEADROOM = 0.1
"""Share of the GPU left to the CUDA context, NCCL and fragmentation, which are not planned."""


# -- Engines -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """A model, how it is spread, and over how many ranks W."""

    groups: tuple[tuple[int, ...], ...]
    """Elements of each parameter, shared ones once, by group and in the order of the optimiser."""
    zero: DeepSpeedZeroConfig
    dtype: str
    world_size: int

    @staticmethod
    def of(module: nn.Module, name: str, option: str, dtype: str, world_size: int) -> "Engine":
        """With a ds config's `zero_optimization` as DeepSpeed reads it, its defaults included."""
        groups = engines._parameter_groups(module, 0.0)
        zero = DeepSpeedZeroConfig(**load_ds_config(name, option).get("zero_optimization", {}))
        return Engine(tuple(tuple(p.numel() for p in group["params"]) for group in groups), zero, dtype, world_size)

    @property
    def element_size(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def num_params(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def flat_groups(self) -> tuple[int, ...]:
        """Elements of each group padded to 2 W: nccl_start_alignment_factor in zero/stage_1_and_2.py."""
        return tuple(math.ceil(sum(group) / (2 * self.world_size)) * 2 * self.world_size for group in self.groups)

    @property
    def sharded(self) -> int:
        """A rank's part at stage 3, each parameter padded to W: _aligned_size in zero/partition_parameters.py."""
        return sum(math.ceil(size / self.world_size) for group in self.groups for size in group)

    @property
    def persistent(self) -> int:
        """Elements in small tensors, which stage 3 keeps whole: ds_persist in zero/partition_parameters.py."""
        limit = int(self.zero.param_persistence_threshold) if self.zero.stage == 3 else 0
        return sum(size for group in self.groups for size in group if size <= limit)

    @property
    def reaching_into_a_part(self) -> int:
        """Elements of the parameters that reach into a rank's part, for the rank with most.

        Stage 2 in fp32 keeps their gradients whole: grads_in_partition in zero/stage_1_and_2.py. An embedding larger
        than a part is so held by each rank that has some of it.
        """
        of_rank = [0] * self.world_size
        for group, flat in zip(self.groups, self.flat_groups, strict=True):
            part, start = flat // self.world_size, 0
            for size in group:
                for rank in range(start // part, (start + size - 1) // part + 1):
                    of_rank[rank] += size
                start += size
        return max(of_rank)


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank holds for a model, of the trained one when its backward pass ends."""

    weights: int
    gradients: int = 0
    masters: int = 0  # fp32 weights that AdamW updates, beyond `weights`
    moments: int = 0
    buffers: int = 0  # the reduce bucket, and at stage 3 the weights that are gathered for use
    host: int = 0  # in CPU memory, pinned


def student_memory(engine: Engine) -> Memory:
    """Memory of `engines.training_engine` with `zero{stage}_{dtype}` of ds_configs/.

    Stage 0: fp32 is torch's AdamW on the weights themselves; bf16 has fp32 copies (unfused_optimizer.py).
    Stage 1: AdamW works on an fp32 copy of this rank's part, also in fp32. bf16 is bf16_optimizer.py, which has fp32
    gradients of all parameters (fp32_groups_gradients_flat; bf16's own leave as they come) and no bucket; fp32 is
    zero/stage_1_and_2.py, which has the whole gradients when it starts to reduce them.
    Stage 2: zero/stage_1_and_2.py, where gradients leave as they come. In fp32 all that reach into this rank's part
    stay (copy_grads_in_partition), in bf16 a flat fp32 part (_build_compact_grad_partition_buffer).
    Stage 3: zero/stage3.py; fp32 gradients of this rank's part (grad_partitions_flat_buffer).
    The bucket is allocated whole, however small the model: setup_buckets in stage_1_and_2.py (twice with
    overlap_comm), `# IPG` in stage3.py.
    """
    n, e, zero, world_size = engine.num_params, engine.element_size, engine.zero, engine.world_size
    if zero.stage == 0:
        return Memory(e * n, e * n, 0 if engine.dtype == "fp32" else FP32 * n, 2 * FP32 * n)
    bucket = e * int(zero.reduce_bucket_size)
    if zero.stage == 3:
        part, whole = engine.sharded, 0
        if world_size > 1:  # on one rank the whole weights are views of the part: NoGatherHandle
            whole = engine.persistent
            bucket += e * min(n - whole, int(zero.max_live_parameters))
        return Memory(e * (part + whole), FP32 * part, FP32 * part, 2 * FP32 * part, bucket)
    flat = sum(engine.flat_groups)
    part = flat // world_size
    bucket *= 2 if zero.overlap_comm else 1
    if zero.stage == 1 and engine.dtype == "bf16":
        gradients, bucket = FP32 * flat, 0
    elif zero.stage == 1:
        gradients = e * n
    else:
        gradients = FP32 * part if engine.dtype == "bf16" else e * engine.reaching_into_a_part
    return Memory(e * flat, gradients, FP32 * part, 2 * FP32 * part, bucket)


def teacher_memory(engine: Engine) -> Memory:
    """Memory of `engines.teacher_engine`: weights alone, whole or sharded, in the run's dtype; `buffers` is a bound.

    Stage 3 gathers a module's weights, and ahead of their use as many as reach the prefetch bucket, its last parameter
    crossing it (_fetch_sub_module_impl in zero/partitioned_param_coordinator.py); after its forward pass a module's are
    let go. What is gathered together lies in one flat buffer, until the last of it is used, and in copies for each
    parameter (AllGatherCoalescedHandle in zero/partition_parameters.py): hence twice.
    """
    e, is_offloaded, largest = engine.element_size, engine.zero.offload_param is not None, max(map(max, engine.groups))
    if engine.zero.stage == 0:
        return Memory(e * engine.num_params)
    part, whole, gathered = e * engine.sharded, 0, 0
    if engine.world_size > 1 or is_offloaded:
        whole = e * engine.persistent
        gathered = e * min(engine.num_params - engine.persistent, int(engine.zero.prefetch_bucket_size) + 2 * largest)
    on_gpu, host = (0, part) if is_offloaded else (part, 0)
    return Memory(whole + on_gpu, buffers=2 * gathered, host=host)


def traffic_sizes(student: Engine, teacher: Engine, num_accum_steps: int) -> Sizes:
    """What the formula of traffic.py for the bytes of a step needs."""
    return Sizes(
        num_ranks=student.world_size,
        num_accum_steps=num_accum_steps,
        student_stage=int(student.zero.stage),
        teacher_stage=int(teacher.zero.stage),
        student_params=student.num_params,
        student_small_params=student.persistent,
        teacher_sharded_params=teacher.num_params - teacher.persistent if teacher.zero.stage == 3 else 0,
        bytes_per_number=student.element_size,
    )


# -- Activations: bounds -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """A packed micro-batch (packed/packing.py) at its largest."""

    rows: int
    tokens: int  # of all rows
    width: int  # tokens to which attention pads each row
    element_size: int
    on_gpu: bool = True


def layer_bytes(encoder: BertConfig, batch: Batch, first_only: bool = False) -> int:
    """At most what a BertLayer keeps for its backward pass, and what its forward pass has at once.

    For each token that asks, the first of each row or all: the layer's input, the input of the attention's dense layer,
    inputs of both LayerNorms, the first's output (5 hidden); input and output of the activation function; two dropout
    masks, whose elements have a byte on a GPU and the dtype's size on a CPU (packed/cpu.py); the LayerNorms' statistics
    (16 bytes). For each padded token: query, key, value, and on a GPU, where attention is fused, its output and an fp32
    number a head; on a CPU each head's weights and their dropout mask (_CpuAttention).
    """
    e, hidden, heads = batch.element_size, encoder.hidden_size, encoder.num_attention_heads
    asking, padded = (batch.rows, batch.rows) if first_only else (batch.tokens, batch.rows * batch.width)
    kept = asking * (e * (5 * hidden + 2 * encoder.intermediate_size) + 2 * (1 if batch.on_gpu else e) * hidden + 16)
    if batch.on_gpu:
        return kept + batch.rows * batch.width * (4 * e * hidden + FP32 * heads)
    return kept + batch.rows * batch.width * 3 * e * hidden + 2 * e * padded * heads * batch.width


def student_activations(matched: Any, teacher_hidden: int, batch: Batch) -> int:
    """At most the bytes that a MatchedStudent keeps for backward: a layer that runs twice counts twice.

    Only first tokens ask in the last layer, unless all its tokens are matched (sps.py). Besides layers: embeddings,
    matched states with their gradients (kernels/fused.py has them early), and the pooler's rows.
    """
    encoder, is_cls = matched.student.config, matched.hidden_loss == "cls"
    per_token, depth = batch.element_size * encoder.hidden_size, encoder.num_effective_layers
    first_only = is_cls or all(layer < depth for layer, _ in matched.pairs)
    layers = (depth - 1) * layer_bytes(encoder, batch) + layer_bytes(encoder, batch, first_only)
    taken = len(matched.pairs) * (batch.rows if is_cls else batch.tokens)
    matched_states = 2 * taken * (per_token + batch.element_size * teacher_hidden)
    return layers + batch.tokens * (3 * per_token + 5 * 8) + matched_states + 4 * batch.rows * per_token


def teacher_activations(encoder: BertConfig, matched: Any, batch: Batch) -> int:
    """At most those of a forward pass without graph: a layer, states around it, two answers (teacher/online.py)."""
    taken = 2 * len(matched.pairs) * (batch.rows if matched.hidden_loss == "cls" else batch.tokens)
    return layer_bytes(encoder, batch) + batch.element_size * encoder.hidden_size * (2 * batch.tokens + taken)


# -- The plan ----------------------------------------------------------------------------------------------------------


def read_encoder(path: str, option: str) -> BertConfig:
    """The config.json of a folder or hub id; weights are not looked at. Raises UserError if it is no BERT's."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # as contract.find_encoder
        raise UserError(
            f"--{option} {path} is neither a folder with config.json nor a model that the hub gives "
            f"({first_line(error)}); give one of these, or --teacher_layers and --teacher_hidden"
        ) from error
    if config.model_type != "bert":
        raise UserError(f"--{option} {path} is a {config.model_type} model; take a bert")
    if config.hidden_size % config.num_attention_heads:
        sizes = (
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {config.num_attention_heads}"
        )
        raise UserError(f"--{option} {path}: {sizes}; mend its config.json")
    return config


def shaped_encoder(layers: int, hidden: int, vocab_size: int) -> BertConfig:
    """A BERT of BERT's own proportions: heads of 64, feed-forward of 4 times the hidden size."""
    sizes: dict[str, Any] = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 4 * hidden}
    return BertConfig(num_attention_heads=hidden // 64, vocab_size=vocab_size, **sizes)


def build_on_meta(config: RunConfig, teacher: BertConfig, student_init: BertConfig) -> tuple[Any, Any]:
    """(teacher, matched student) without storage, as model/build.py makes them for a run."""
    try:
        task = get_task(config.task)
    except ValueError as error:
        raise UserError(f"--task: {error}") from error
    sizes = student_config(config, student_init, task_head(task))
    pairs = layer_pairs(config.layer_map, sizes.num_effective_layers, teacher.num_hidden_layers)
    with torch.device("meta"):
        student = SPSBertForSequenceClassification(sizes)
        matched = MatchedStudent(student, pairs, teacher.hidden_size, config.hidden_loss)
        return SPSBertForSequenceClassification(teacher_config(config, task, teacher)), matched


def make_plan(config: RunConfig, teacher: BertConfig, student_init: BertConfig, options: Any) -> dict[str, Any]:
    """Every choice with its figures in bytes, and the one to take. Raises UserError for sizes that do not fit."""
    world_size, tokens = options.world_size, options.tokens_per_row or config.max_seq_length
    micro, accum = batch_plan(config.global_batch_size, config.micro_batch_size, world_size)
    for option, encoder in (("teacher", teacher), ("student_init", student_init)):
        most = encoder.max_position_embeddings
        if config.max_seq_length > most:
            rule = f"is longer than the {most} positions of --{option}"
            raise UserError(f"--max_seq_length {config.max_seq_length} {rule}; set at most {most}")
    width = math.ceil(config.max_seq_length / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    frozen, matched = build_on_meta(config, teacher, student_init)
    dtypes = scripts.PLAN_DTYPES if options.dtype == "auto" else (options.dtype,)
    choices = []
    for dtype, stage, name in itertools.product(dtypes, range(4), TEACHERS):
        student = Engine.of(matched, f"zero{stage}_{dtype}", "student_ds_config", dtype, world_size)
        frozen_engine = Engine.of(frozen, name, "teacher_ds_config", dtype, world_size)
        batch = Batch(micro, math.ceil(micro * tokens), width, student.element_size)
        held, teacher_held = asdict(student_memory(student)), asdict(teacher_memory(frozen_engine))
        held["activations"] = student_activations(matched, teacher.hidden_size, batch)
        teacher_held["activations"] = teacher_activations(teacher, matched, batch)
        host = held.pop("host") + teacher_held.pop("host")
        teacher_held = {part: teacher_held[part] for part in ("weights", "buffers", "activations")}  # nothing else
        sent = formula(traffic_sizes(student, frozen_engine, accum)).sent(world_size)
        choice = {"student": f"zero{stage}_{dtype}", "teacher": name, "host": host, "sent_per_step": round(sent)}
        total = sum(held.values()) + sum(teacher_held.values())
        choices.append(choice | {"student_memory": held, "teacher_memory": teacher_held, "total": total})
    of_row = frozen.config.num_labels, len({layer for _, layer in matched.pairs}), teacher.hidden_size
    cached = dtypes if config.hidden_loss == "cls" else ()
    return {
        "teacher_parameters": frozen_engine.num_params,
        "student_parameters": student.num_params,
        "stored_layers": config.num_hidden_layers,
        "effective_layers": matched.student.config.num_effective_layers,
        "layer_pairs": len(matched.pairs),
        **{"global_batch_size": config.global_batch_size, "micro_batch_size": micro, "num_accum_steps": accum},
        **{"world_size": world_size, "tokens": batch.tokens},
        "train_rows": options.train_rows,
        "cache_bytes_per_row": {dtype: teacher_cache.row_bytes(*of_row, dtype) for dtype in cached},
        "choices": choices,
        "recommended": recommend(choices, options.gpu_memory_gib * GIB),
    }


def recommend(choices: list[dict[str, Any]], gpu_memory: float) -> dict[str, Any]:
    """The choice that sends fewest bytes of those that fit, ties going to less memory, with the reason.

    A student at stage 3 comes last: it waits for each layer's weights, where the other stages send once a step.
    """
    room = gpu_memory * (1 - HEADROOM)
    limit = f"{show(room)} ({HEADROOM:.0%} of the GPU is left free)"
    sound = [c for c in choices if c["student"] != "zero0_bf16"]  # it sums gradients in bf16
    fitting = [c for c in sound if c["total"] <= room]
    if not fitting:
        least = show(min(c["total"] for c in sound))
        remedy = "lower --micro_batch_size or --max_seq_length, or take more ranks or larger GPUs"
        return {"index": None, "why": f"nothing fits in {limit}; the smallest takes {least}: {remedy}"}
    best = min(fitting, key=lambda c: (c["student"].startswith("zero3"), c["sent_per_step"], c["total"]))
    why = (
        f"of the {len(fitting)} choices that fit in {limit} it sends least, {show(best['sent_per_step'])} a step and "
        f"rank, and takes {show(best['total'])} (zero0_bf16 aside, and student zero3 where another fits)"
    )
    return {"index": choices.index(best), "why": why}


def show(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def table(plan: dict[str, Any]) -> str:
    """The plan as Markdown."""
    rows, best = plan["train_rows"], plan["recommended"]["index"]
    lines = [
        "teacher: {teacher_parameters:,} parameters".format(**plan),
        "student: {student_parameters:,} parameters, {stored_layers} stored layers run as {effective_layers}, "
        "{layer_pairs} matched layer pairs".format(**plan),
        "batch: global {global_batch_size} = micro {micro_batch_size} x accum {num_accum_steps} x world {world_size}, "
        "{tokens:,} tokens a micro-batch".format(**plan),
    ]
    for dtype, size in plan["cache_bytes_per_row"].items():
        total = f", {show(size * rows)} for {rows:,} rows" if rows else ""
        lines.append(f"teacher cache in {dtype}: {size:,} bytes a row{total}")
    lines += ["", "Memory of a rank, and bytes that it sends in an optimiser step:", ""]
    for number, choice in enumerate(plan["choices"]):
        sizes = choice["student_memory"] | {f"teacher {name}": size for name, size in choice["teacher_memory"].items()}
        sizes |= {"total on GPU": choice["total"], "on host": choice["host"], "sent a step": choice["sent_per_step"]}
        cells = [choice["student"], choice["teacher"].removeprefix("teacher_"), *map(show, sizes.values())]
        if number == 0:
            lines += [f"| {' | '.join(['student', 'teacher', *sizes])} |", "|---" * len(cells) + "|"]
        lines.append(f"| {' | '.join(cells)} |" + (" <-" if number == best else ""))
    words = "none"
    if best is not None:
        words = "--student_ds_config {student} --teacher_ds_config {teacher}".format(**plan["choices"][best])
    return "\n".join([*lines, "", f"Take: {words}", f"Why: {plan['recommended']['why']}."])


# -- The command -------------------------------------------------------------------------------------------------------


def main(options: argparse.Namespace) -> None:
    """Print the plan."""
    config = RunConfig(**{name: getattr(options, name) for name in scripts.PLAN_SETTINGS})
    shape = options.teacher_layers, options.teacher_hidden, options.teacher_vocab_size
    teacher = read_encoder(config.teacher, "teacher") if config.teacher else shaped_encoder(*shape)
    student_init = read_encoder(config.student_init, "student_init") if config.student_init else teacher
    plan = make_plan(config, teacher, student_init, options)
    print(json.dumps(plan, indent=2) if options.json else table(plan))


if __name__ == "__main__":
    scripts.plan()
