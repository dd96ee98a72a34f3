"""peakd-plan: memory and network traffic of a distill stage on each rank, before it is started on a cluster.

    peakd-plan --teacher bert-large-uncased --world_size 8 --gpu_memory_gib 40
    peakd-plan --teacher_layers 24 --teacher_hidden 1024 --world_size 8 --json

The models are built on the meta device from the run's settings, and their parameters are counted: no weights are read
and no GPU is needed. Each formula names its source in deepspeed/runtime/ of DeepSpeed 0.19.8; traffic.py has the bytes
that are sent.
"""

import argparse
import itertools
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn
from transformers import BertConfig, PreTrainedConfig, PreTrainedModel

from peakd_ds.config import RunConfig
from peakd_ds.data.tasks import Task, get_task, own_task
from peakd_ds.engine import engines
from peakd_ds.engine.ds_config import DTYPES, batch_plan, load_ds_config
from peakd_ds.errors import UserError
from peakd_ds.families import is_packed
from peakd_ds.model import contract
from peakd_ds.model.build import MatchedStudent, layer_pairs
from peakd_ds.model.contract import Pretrained
from peakd_ds.model.sizes import Parameters, count_parameters, teacher_and_student_on_meta
from peakd_ds.packed.packing import WIDTH_MULTIPLE
from peakd_ds.programs import scripts
from peakd_ds.programs.activations import Batch, student_activations, teacher_activations
from peakd_ds.programs.traffic import Sizes, step_traffic
from peakd_ds.results import markdown
from peakd_ds.sps import execution_order
from peakd_ds.teacher.cache_files import row_bytes

TEACHERS = ("teacher_zero0", "teacher_zero3", "teacher_zero3_offload")
FP32 = 4
GIB = 2**30
HEADROOM = 0.1
"""Share of the GPU kept free for the CUDA context, NCCL and fragmentation, which are not planned."""


# -- Engines -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """A model, its ZeRO settings and the number of ranks W that it is sharded over."""

    groups: tuple[tuple[int, ...], ...]
    """Elements of each parameter, by group, in the optimizer's order; a shared parameter counts once."""
    zero: DeepSpeedZeroConfig
    dtype: str
    world_size: int

    @staticmethod
    def of(module: nn.Module, name: str, option: str, dtype: str, world_size: int) -> "Engine":
        """The engine of `module` with the ds config `name` of --`option`, completed by DeepSpeed's defaults."""
        groups = engines.parameter_groups(module, 0.0)
        zero = DeepSpeedZeroConfig(**load_ds_config(name, option).get("zero_optimization", {}))
        return Engine(tuple(tuple(p.numel() for p in group["params"]) for group in groups), zero, dtype, world_size)

    @property
    def element_size(self) -> int:
        """Bytes of a weight."""
        return DTYPES[self.dtype].itemsize

    @property
    def num_params(self) -> int:
        """Stored parameters."""
        return sum(map(sum, self.groups))

    @property
    def flat_groups(self) -> tuple[int, ...]:
        """Elements of each group, padded to 2 W (nccl_start_alignment_factor in zero/stage_1_and_2.py)."""
        return tuple(math.ceil(sum(group) / (2 * self.world_size)) * 2 * self.world_size for group in self.groups)

    @property
    def sharded(self) -> int:
        """Elements of a rank's part at stage 3, with padding to W (_aligned_size in zero/partition_parameters.py)."""
        return sum(math.ceil(size / self.world_size) for group in self.groups for size in group)

    @property
    def persistent(self) -> int:
        """Elements in small tensors, which stage 3 does not shard (ds_persist in zero/partition_parameters.py)."""
        limit = int(self.zero.param_persistence_threshold) if self.zero.stage == 3 else 0
        return sum(size for group in self.groups for size in group if size <= limit)

    @property
    def overlapping_one_part(self) -> int:
        """Elements of all parameters that overlap a rank's part, for the rank with most of them.

        Stage 2 in fp32 keeps the full gradients of these parameters (grads_in_partition in zero/stage_1_and_2.py), so
        several ranks hold the gradient of an embedding that is larger than a part.
        """
        elements = [0] * self.world_size
        for group, flat in zip(self.groups, self.flat_groups, strict=True):
            part, start = flat // self.world_size, 0
            for size in group:
                for rank in range(start // part, (start + size - 1) // part + 1):
                    elements[rank] += size
                start += size
            elements[-1] += flat - start  # zeros that fill the last part
        return max(elements)


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank holds for a model; for the student, at the end of its backward pass."""

    weights: int
    gradients: int = 0
    masters: int = 0  # fp32 weights that AdamW updates, beyond `weights`
    moments: int = 0
    buffers: int = 0  # the reduce bucket, and the weights that stage 3 has gathered
    host: int = 0  # in CPU memory, pinned


def student_memory(engine: Engine) -> Memory:
    """Memory of `engines.training_engine` with `zero{stage}_{dtype}` of ds_configs/.

    Stage 0: in fp32, torch's AdamW updates the weights themselves; in bf16 there are fp32 copies
    (unfused_optimizer.py).
    Stage 1: AdamW updates an fp32 copy of this rank's part, even in fp32. bf16 uses bf16_optimizer.py, which holds fp32
    gradients of all parameters (fp32_groups_gradients_flat; it frees the bf16 gradients at once) and has no bucket.
    fp32 uses zero/stage_1_and_2.py, which holds all gradients when it starts to reduce them.
    Stage 2: zero/stage_1_and_2.py reduces and frees gradients as they come. fp32 keeps those of parameters that overlap
    this rank's part (copy_grads_in_partition), bf16 a flat fp32 part (_build_compact_grad_partition_buffer).
    Stage 3: zero/stage3.py holds fp32 gradients of this rank's part (grad_partitions_flat_buffer).
    The bucket has its full size even for a small model: setup_buckets in stage_1_and_2.py (two buckets with
    overlap_comm), `# IPG` in stage3.py.
    """
    n, e, zero, world_size = engine.num_params, engine.element_size, engine.zero, engine.world_size
    if zero.stage == 0:
        return Memory(e * n, e * n, 0 if engine.dtype == "fp32" else FP32 * n, 2 * FP32 * n)
    bucket = e * int(zero.reduce_bucket_size)
    if zero.stage == 3:
        part, unsharded = engine.sharded, 0
        if world_size > 1:  # on one rank, gathered weights are views of the part (NoGatherHandle)
            unsharded = engine.persistent
            bucket += e * min(n - unsharded, int(zero.max_live_parameters))
        return Memory(e * (part + unsharded), FP32 * part, FP32 * part, 2 * FP32 * part, bucket)
    flat = sum(engine.flat_groups)
    part = flat // world_size
    bucket *= 2 if zero.overlap_comm else 1
    if zero.stage == 1 and engine.dtype == "bf16":
        gradients, bucket = FP32 * flat, 0
    elif zero.stage == 1:
        gradients = e * n
    else:
        gradients = FP32 * part if engine.dtype == "bf16" else e * engine.overlapping_one_part
    return Memory(e * flat, gradients, FP32 * part, 2 * FP32 * part, bucket)


def teacher_memory(engine: Engine) -> Memory:
    """Memory of `engines.teacher_engine`: only weights, in the run's dtype; `buffers` is an upper bound.

    Stage 3 gathers the weights of the current module and prefetches later ones until the prefetch bucket is full, which
    the last parameter may exceed (_fetch_sub_module_impl in zero/partitioned_param_coordinator.py). It frees a module's
    weights after its forward pass. Weights that are gathered together are held twice: in one flat buffer until the last
    of them is used, and in a copy for each parameter (AllGatherCoalescedHandle in zero/partition_parameters.py).
    """
    e, is_offloaded, largest = engine.element_size, engine.zero.offload_param is not None, max(map(max, engine.groups))
    if engine.zero.stage == 0:
        return Memory(e * engine.num_params)
    part, unsharded, gathered = e * engine.sharded, 0, 0
    if engine.world_size > 1 or is_offloaded:
        unsharded = e * engine.persistent
        gathered = e * min(engine.num_params - engine.persistent, int(engine.zero.prefetch_bucket_size) + 2 * largest)
    on_gpu, host = (0, part) if is_offloaded else (part, 0)
    return Memory(unsharded + on_gpu, buffers=2 * gathered, host=host)


def traffic_sizes(student: Engine, teacher: Engine, num_accum_steps: int) -> Sizes:
    """Sizes for `traffic.step_traffic`, which gives the bytes of an optimizer step."""
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


# -- The plan ----------------------------------------------------------------------------------------------------------


def encoder_of_shape(num_layers: int, hidden: int, vocab_size: int) -> Pretrained:
    """A model of BERT's proportions: heads of 64, a feed-forward size of 4 times the hidden size."""
    sizes: dict[str, Any] = {"num_hidden_layers": num_layers, "hidden_size": hidden, "intermediate_size": 4 * hidden}
    config = BertConfig(num_attention_heads=hidden // 64, vocab_size=vocab_size, **sizes)
    return Pretrained(str(num_layers), "teacher_layers", config, is_classifier=False)


def planned_task(name: str, num_labels: int | None) -> Task:
    """The task of that name, or one of own rows with `num_labels` labels. Raises UserError for an unknown name."""
    if num_labels is not None:
        names = tuple(map(str, range(num_labels))) if num_labels > 1 else ()
        return own_task("rows", "classes" if names else "scores", ("text",), names)
    try:
        return get_task(name)
    except ValueError as error:
        raise UserError(f"--task: {error}") from error


def build_on_meta(
    config: RunConfig, teacher: PreTrainedConfig, student_init: PreTrainedConfig, num_labels: int | None = None
) -> tuple[PreTrainedModel, MatchedStudent]:
    """(teacher, matched student) on the meta device, as model/build.py makes them for a run.

    Args:
        num_labels: Of own rows, in place of the config's task.

    Raises:
        UserError: an unknown task, or a layer map that does not fit the depths.
    """
    task = planned_task(config.task, num_labels)
    depth = len(execution_order(config.num_hidden_layers, config.sharing, config.swaps_qk))
    pairs = layer_pairs(config.layer_map, depth, teacher.num_hidden_layers)
    frozen, student = teacher_and_student_on_meta(config, task, teacher, student_init)
    with torch.device("meta"):
        return frozen, MatchedStudent(student, pairs, teacher.hidden_size, config.hidden_loss)


def make_plan(
    config: RunConfig, teacher: Pretrained, student_init: Pretrained, options: argparse.Namespace
) -> dict[str, Any]:
    """Every choice of ZeRO stages and dtype with its sizes in bytes, and the recommended one.

    Args:
        options: Of peakd-plan; what RunConfig has not: ranks, GPUs, dtype, rows.

    Raises:
        UserError: sizes that do not fit each other.
    """
    micro, accum = batch_plan(config.global_batch_size, config.micro_batch_size, options.world_size)
    for encoder in (teacher, student_init):
        contract.check_length(config.max_seq_length, encoder)
    frozen, matched = build_on_meta(config, teacher.config, student_init.config, options.num_labels)
    dtypes = scripts.PLAN_DTYPES if options.dtype == "auto" else (options.dtype,)
    num_tokens = math.ceil(micro * (options.tokens_per_row or config.max_seq_length))
    width = math.ceil(config.max_seq_length / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    choices = []
    for dtype, stage, name in itertools.product(dtypes, range(4), TEACHERS):
        student_name = f"zero{stage}_{dtype}"
        student = Engine.of(matched, student_name, "student_ds_config", dtype, options.world_size)
        frozen_engine = Engine.of(frozen, name, "teacher_ds_config", dtype, options.world_size)
        batch = Batch(micro, num_tokens, width, student.element_size)
        memory = choice_memory(matched, student, teacher.config, frozen_engine, batch)
        sent = step_traffic(traffic_sizes(student, frozen_engine, accum)).sent(options.world_size)
        choices.append({"student": student_name, "teacher": name, "sent_per_step": round(sent), **memory})
    row_sizes = (
        int(frozen.config.num_labels or 0),
        len({layer for _, layer in matched.pairs}),
        teacher.config.hidden_size,
    )
    cached = dtypes if config.hidden_loss == "cls" else ()
    return {
        "padded": [who for who, encoder in (("teacher", teacher), ("student", student_init)) if _is_padded(encoder)],
        "teacher_parameters": frozen_engine.num_params,
        "teacher_parameters_of": count_parameters(frozen)._asdict(),
        "student_parameters": student.num_params,
        "student_parameters_of": count_parameters(matched.student, matched)._asdict(),
        "stored_layers": config.num_hidden_layers,
        "effective_layers": matched.student.config.num_effective_layers,
        "layer_pairs": len(matched.pairs),
        **{"global_batch_size": config.global_batch_size, "micro_batch_size": micro, "num_accum_steps": accum},
        **{"world_size": options.world_size, "tokens": num_tokens},
        "train_rows": options.train_rows,
        "cache_bytes_per_row": {dtype: row_bytes(*row_sizes, dtype) for dtype in cached},
        "choices": choices,
        "recommended": recommend(choices, options.gpu_memory_gib * GIB),
    }


def _is_padded(encoder: Pretrained) -> bool:
    return not is_packed(encoder.config)


def choice_memory(
    matched: MatchedStudent, student: Engine, teacher_config: PreTrainedConfig, teacher: Engine, batch: Batch
) -> dict[str, Any]:
    """Bytes that a rank holds under a choice: of the student, of the teacher, their sum on the GPU, and on the host."""
    student_bytes, teacher_bytes = asdict(student_memory(student)), asdict(teacher_memory(teacher))
    host = student_bytes.pop("host") + teacher_bytes.pop("host")
    student_bytes["activations"] = student_activations(matched, teacher_config.hidden_size, batch)
    teacher_bytes["activations"] = teacher_activations(teacher_config, matched, batch)
    teacher_bytes = {part: teacher_bytes[part] for part in ("weights", "buffers", "activations")}  # the rest is 0
    total = sum(student_bytes.values()) + sum(teacher_bytes.values())
    return {"host": host, "student_memory": student_bytes, "teacher_memory": teacher_bytes, "total": total}


def recommend(choices: list[dict[str, Any]], gpu_memory: float) -> dict[str, Any]:
    """The index of the choice that sends least among those that fit, or None, and the reason.

    Of equal choices the one with less memory. A student at stage 3 comes last, because it waits for the weights of each
    layer, where the other stages send once a step.
    """
    room = gpu_memory * (1 - HEADROOM)
    limit = f"{show(room)} ({HEADROOM:.0%} of the GPU is kept free)"
    candidates = [c for c in choices if c["student"] != "zero0_bf16"]  # it sums gradients in bf16
    fitting = [c for c in candidates if c["total"] <= room]
    if not fitting:
        least = show(min(c["total"] for c in candidates))
        remedy = "lower --micro_batch_size or --max_seq_length, or take more ranks or larger GPUs"
        return {"index": None, "why": f"nothing fits in {limit}; the smallest choice takes {least}: {remedy}"}
    best = min(fitting, key=lambda c: (c["student"].startswith("zero3"), c["sent_per_step"], c["total"]))
    why = (
        f"it sends least of the {len(fitting)} choices that fit in {limit}: {show(best['sent_per_step'])} a step and "
        f"rank; it takes {show(best['total'])} (never zero0_bf16, and student zero3 only if nothing else fits)"
    )
    return {"index": choices.index(best), "why": why}


def show(size: float) -> str:
    """A number of bytes in MiB or GiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def to_markdown(plan: dict[str, Any]) -> str:
    """The plan as Markdown; an arrow marks the recommended choice."""
    num_rows, best = plan["train_rows"], plan["recommended"]["index"]
    lines = [
        f"teacher: {Parameters(**plan['teacher_parameters_of'])}",
        f"student: {Parameters(**plan['student_parameters_of'])}, "
        "{stored_layers} stored layers run as {effective_layers}, {layer_pairs} matched layer pairs".format(**plan),
        "batch: global {global_batch_size} = micro {micro_batch_size} x accum {num_accum_steps} x world {world_size}, "
        "{tokens:,} tokens a micro-batch".format(**plan),
    ]
    if plan["padded"]:
        lines.append(f"padding: rows of the {' and the '.join(plan['padded'])} are padded to the longest")
    for dtype, size in plan["cache_bytes_per_row"].items():
        total = f", {show(size * num_rows)} for {num_rows:,} rows" if num_rows else ""
        lines.append(f"teacher cache in {dtype}: {size:,} bytes a row{total}")
    lines += ["", "Memory of a rank, and bytes that it sends in an optimizer step:", ""]
    rows = [_cells(choice) for choice in plan["choices"]]
    table = markdown.table(list(rows[0]), [list(row.values()) for row in rows]).splitlines()
    words = "none"
    if best is not None:
        table[2 + best] += " <-"
        words = "--student_ds_config {student} --teacher_ds_config {teacher}".format(**plan["choices"][best])
    return "\n".join([*lines, *table, "", f"Take: {words}", f"Why: {plan['recommended']['why']}."])


def _cells(choice: dict[str, Any]) -> dict[str, str]:
    """The table's cells for one choice, by column."""
    sizes = choice["student_memory"] | {f"teacher {part}": size for part, size in choice["teacher_memory"].items()}
    sizes |= {"total on GPU": choice["total"], "on host": choice["host"], "sent a step": choice["sent_per_step"]}
    names = {"student": choice["student"], "teacher": choice["teacher"].removeprefix("teacher_")}
    return names | {column: show(size) for column, size in sizes.items()}


# -- The command -------------------------------------------------------------------------------------------------------


def main(options: argparse.Namespace) -> None:
    """Print the plan, as Markdown or with --json as JSON. Raises UserError as `make_plan` and `find_encoder`."""
    config = RunConfig(**{name: getattr(options, name) for name in scripts.PLAN_SETTINGS})
    if config.teacher:
        teacher = contract.find_encoder(config.teacher, "teacher", with_weights=False)
    else:
        teacher = encoder_of_shape(options.teacher_layers, options.teacher_hidden, options.teacher_vocab_size)
    student_init = teacher
    if config.student_init:
        student_init = contract.find_encoder(config.student_init, "student_init", with_weights=False)
    plan = make_plan(config, teacher, student_init, options)
    print(json.dumps(plan, indent=2) if options.json else to_markdown(plan))


if __name__ == "__main__":
    scripts.plan()
