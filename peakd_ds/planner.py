"""peakd-plan: what a distill stage will hold and send, rank by rank, before it is started on a cluster.

    peakd-plan --teacher bert-large-uncased --world_size 8 --gpu_memory_gib 40
    peakd-plan --teacher_layers 24 --teacher_hidden 1024 --world_size 8 --json

The models are built on the meta device by the run's own builders: parameters are counted, activations are traced, no
weight is read and no GPU is needed. Each formula stands once, beside what it was read from (DeepSpeed 0.19.8).

W ranks, N parameters, e bytes of an element in the run's dtype, H hidden, S tokens.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn
from transformers import AutoConfig, BertConfig, BertForSequenceClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peakd_ds import ds_engine, modeling
from peakd_ds.config import RunConfig, UserError, _Parser, add_setting, exit_with
from peakd_ds.sps import SPSBertForSequenceClassification
from peakd_ds.tasks import get_task

SETTINGS = (
    "task teacher student_init num_hidden_layers sharing shuffle_qk dropout layer_map hidden_loss max_seq_length "
    "global_batch_size micro_batch_size"
).split()
"""Settings of a run that change the plan; they keep their names, ranges and defaults."""

TEACHERS = ("teacher_zero0", "teacher_zero3", "teacher_zero3_offload")
FP32 = 4
GIB, MIB = 2**30, 2**20
HEADROOM = 0.1
"""Share of the GPU left to the CUDA context, NCCL and fragmentation, which are not planned."""
MAX_WORLD_SIZE = 1_000_000


@dataclass(frozen=True)
class Parameters:
    """What the formulas need of a model: its parameters' sizes, in the order and the groups of the optimiser."""

    groups: tuple[tuple[int, ...], ...]

    @property
    def total(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(size for group in self.groups for size in group)

    def flat(self, world_size: int) -> int:
        """N, each group padded to 2 W: flatten_dense_tensors_aligned in stage_1_and_2.py and bf16_optimizer.py."""
        return sum(math.ceil(sum(group) / (2 * world_size)) * 2 * world_size for group in self.groups)

    def sharded(self, world_size: int) -> int:
        """A rank's part at stage 3, where each parameter is padded to W: _aligned_size in partition_parameters.py."""
        return sum(math.ceil(size / world_size) for size in self.sizes)

    def persistent(self, threshold: int) -> int:
        """Elements of small parameters, which stage 3 keeps whole besides: ds_persist in partition_parameters.py."""
        return sum(size for size in self.sizes if size <= threshold)

    def touching_a_partition(self, world_size: int) -> int:
        """Elements of the parameters that reach into a rank's part, for the rank with most.

        Stages 1 and 2 keep their gradients whole until the step: params_in_partition in stage_1_and_2.py.
        """
        most = [0] * world_size
        for group in self.groups:
            part = self._padded(group, world_size) // world_size
            start = 0
            for size in group:
                for rank in range(start // part, (start + size - 1) // part + 1):
                    most[rank] += size
                start += size
        return max(most)

    @staticmethod
    def _padded(group: tuple[int, ...], world_size: int) -> int:
        return math.ceil(sum(group) / (2 * world_size)) * 2 * world_size


@dataclass(frozen=True)
class StudentMemory:
    """Bytes that a rank holds for the trained model."""

    weights: int
    gradients: int
    """At the end of backward; at stage 1, which reduces them there, just before."""
    masters: int
    """fp32 weights that AdamW updates, beyond `weights`."""
    moments: int
    buffers: int
    """Reduce buckets, and at stage 3 the weights that are gathered for use."""


@dataclass(frozen=True)
class TeacherMemory:
    """Bytes that a rank holds for the frozen model."""

    weights: int
    buffers: int
    host: int
    """In CPU memory, pinned."""


def count_parameters(module: nn.Module) -> Parameters:
    """Sizes by optimiser group, shared parameters once."""
    groups = ds_engine._parameter_groups(module, 0.0)
    return Parameters(tuple(tuple(p.numel() for p in group["params"]) for group in groups))


def student_memory(parameters: Parameters, stage: int, dtype: str, world_size: int) -> StudentMemory:
    """Memory of `ds_engine.training_engine` with `zero{stage}_{dtype}` of ds_configs/.

    Stage 0: fp32 is torch's AdamW on the weights themselves; bf16 has an fp32 copy of each (FP16_UnfusedOptimizer's
    kind). Gradients are in the run's dtype.
    Stage 1: AdamW works on an fp32 copy of this rank's part, also in fp32. bf16 goes to bf16_optimizer.py, which holds
    fp32 gradients of all of N beside the bf16 ones; fp32 to stage_1_and_2.py.
    Stage 2: as 1, but a rank keeps gradients of its own part, in bf16 as a flat fp32 partition.
    Stage 3: weights and fp32 gradients of this rank's part (grad_partitions_flat_buffer in stage3.py).
    Stages 2, 3 and 1 in fp32 allocate a bucket of reduce_bucket_size elements, however small the model is
    (setup_buckets in stage_1_and_2.py, `# IPG` in stage3.py).
    """
    n, e, flat = parameters.total, element_size(dtype), parameters.flat(world_size)
    zero = zero_config(f"zero{stage}_{dtype}", "student_ds_config")
    bucket = int(zero.reduce_bucket_size) * e
    if stage == 0:
        masters = 0 if dtype == "fp32" else FP32 * n
        return StudentMemory(e * n, e * n, masters, 2 * FP32 * n, 0)
    if stage == 3:
        part = parameters.sharded(world_size)
        persistent = parameters.persistent(int(zero.param_persistence_threshold))
        gathered = e * min(n - persistent, int(zero.max_live_parameters))
        weights = e * (part + persistent)
        return StudentMemory(weights, FP32 * part, FP32 * part, 2 * FP32 * part, bucket + gathered)
    part = flat // world_size
    if stage == 1 and dtype == "bf16":
        gradients, bucket = FP32 * flat + e * n, 0
    elif stage == 1:
        gradients = e * n
    elif dtype == "bf16":
        gradients = FP32 * part
    elif world_size == 1:
        gradients = 0  # they stay views of the bucket
    else:
        gradients = e * parameters.touching_a_partition(world_size)
    return StudentMemory(e * flat, gradients, FP32 * part, 2 * FP32 * part, bucket)


def teacher_memory(parameters: Parameters, name: str, dtype: str, world_size: int) -> TeacherMemory:
    """Memory of `ds_engine.teacher_engine`: weights alone, whole or sharded, in the run's dtype.

    At stage 3 layers are gathered as they are used and let go (partitioned_param_coordinator.py): at most
    stage3_max_live_parameters, and what is fetched ahead besides is within that.
    """
    e, zero = element_size(dtype), zero_config(name, "teacher_ds_config")
    if zero.stage == 0:
        return TeacherMemory(e * parameters.total, 0, 0)
    part = e * parameters.sharded(world_size)
    persistent = parameters.persistent(int(zero.param_persistence_threshold))
    gathered = e * min(
        parameters.total - persistent,
        int(zero.max_live_parameters),
        max(parameters.sizes) + int(zero.prefetch_bucket_size),
    )
    is_offloaded = zero.offload_param is not None
    return TeacherMemory(e * persistent + (0 if is_offloaded else part), gathered, part if is_offloaded else 0)


def bytes_sent(collective: str, size: int, world_size: int) -> int:
    """Bytes that a rank sends when a ring moves a tensor of `size` bytes (whole): NCCL's bandwidth formulas."""
    return {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}[collective] * size * (world_size - 1) // world_size


def student_traffic(parameters: Parameters, stage: int, dtype: str, world_size: int, accum: int) -> dict[str, int]:
    """Whole tensor bytes per optimiser step that go through each collective, for the student.

    Stages 0 and 1 reduce at the accumulation boundary, 2 and 3 after every micro-batch. Stages 1 and 2 all-reduce
    (use_multi_rank_bucket_allreduce, on by default) and then gather the updated weights. Stage 3 gathers weights that
    are not persistent for every micro-batch, once, since within stage3_max_reuse_distance they stay for backward, and
    the persistent ones after the step.
    """
    n, e = parameters.total, element_size(dtype)
    if stage == 0:
        return {"all_reduce": e * n}
    if stage in (1, 2):
        return {
            "all_reduce": e * n * (accum if stage == 2 else 1),
            "all_gather": e * parameters.flat(world_size),
        }
    threshold = int(zero_config(f"zero3_{dtype}", "student_ds_config").param_persistence_threshold)
    persistent = parameters.persistent(threshold)
    return {
        "reduce_scatter": e * n * accum,
        "all_gather": e * ((n - persistent) * accum + persistent),
    }


def teacher_traffic(parameters: Parameters, name: str, dtype: str, accum: int) -> dict[str, int]:
    """Whole tensor bytes per optimiser step for the teacher: stage 3 gathers what is not persistent in each forward."""
    zero = zero_config(name, "teacher_ds_config")
    if zero.stage == 0:
        return {}
    whole = parameters.total - parameters.persistent(int(zero.param_persistence_threshold))
    return {"all_gather": element_size(dtype) * whole * accum}


def element_size(dtype: str) -> int:
    return ds_engine.DTYPES[dtype].itemsize


def zero_config(name: str, option: str) -> Any:
    """DeepSpeed's own reading of a file in ds_configs/, its defaults included."""
    return DeepSpeedZeroConfig(**ds_engine.load_ds_config(name, option).get("zero_optimization", {}))


# -- Activations -------------------------------------------------------------------------------------------------------


class _FusedAttention(torch.autograd.Function):
    """What flash and memory-efficient attention keep for backward: q, k, v, output and an fp32 log-sum per query."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


def _fused_attention(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> tuple[Any, None]:
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None  # type: ignore[no-untyped-call]


ALL_ATTENTION_FUNCTIONS.register("peakd_plan_fused", _fused_attention)


def activation_bytes(module: Any, batch: int, tokens: int, device: str) -> int:
    """Bytes that one forward of a MatchedStudent on the meta device keeps for backward, each storage once.

    `gpu`: fused attention and one-byte dropout masks. `cpu`: with dropout, torch takes the plain attention, which keeps
    S x S scores, and dropout masks have the size of the states; without, the fused one.
    """
    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    encoder = module.student.config
    if device == "gpu" or encoder.attention_probs_dropout_prob == 0:
        encoder._attn_implementation = "peakd_plan_fused"
    dropouts = [layer for layer in module.modules() if isinstance(layer, nn.Dropout)] if device == "gpu" else []
    for layer in dropouts:
        layer.forward = lambda x, p=layer.p: torch.native_dropout(x, p, True)[0] if p else x  # type: ignore[method-assign]
    ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
    mask = torch.zeros(batch, 1, tokens, tokens, dtype=next(module.parameters()).dtype, device="meta")
    module.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        answer = module(input_ids=ids, token_type_ids=ids, attention_mask=mask)
    del answer
    return sum(storage.nbytes() for storage in kept.values())


def teacher_activation_bytes(teacher: BertConfig, batch: int, tokens: int, dtype: str, with_hidden: bool) -> int:
    """What a forward without graph holds: every layer's states where a loss asks for them, and one FFN's insides."""
    states = teacher.num_hidden_layers + 1 if with_hidden else 2
    return element_size(dtype) * batch * tokens * (states * teacher.hidden_size + 2 * teacher.intermediate_size)


def cache_bytes_per_row(num_labels: int, num_pairs: int, teacher_hidden: int, dtype: str) -> int:
    """A training row in a teacher cache: logits in fp32, the matched layers' [CLS] in the run's dtype."""
    return FP32 * num_labels + element_size(dtype) * num_pairs * teacher_hidden


# -- Models ------------------------------------------------------------------------------------------------------------


def read_encoder(path: str, option: str) -> BertConfig:
    """The config.json of a folder or hub id; weights are not looked at. Raises UserError if it is no BERT's."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # as modeling.find_encoder
        raise UserError(
            f"--{option} {path} is neither a folder with config.json nor a model that the hub gives "
            f"({modeling._first_line(error)}); give one of these, or shapes with --{option.split('_')[0]}_hidden"
        ) from error
    if config.model_type != "bert":
        raise UserError(f"--{option} {path} is a {config.model_type} model; take a bert")
    return config


def shaped_encoder(side: str, layers: int, hidden: int, vocab_size: int) -> BertConfig:
    """A BERT of BERT's own proportions: heads of 64, feed-forward 4 H. Raises UserError for sizes that cannot be."""
    if layers < 1 or hidden < 1 or vocab_size < 1 or layers > 10_000 or hidden > 1_000_000 or vocab_size > 100_000_000:
        raise UserError(
            f"--{side}_layers {layers}, --{side}_hidden {hidden}, --{side}_vocab_size {vocab_size} are no sizes of a "
            "BERT; set 1 to 10000 layers, 1 to 1000000 hidden, 1 to 100000000 entries"
        )
    if hidden % min(hidden, 64):
        raise UserError(f"--{side}_hidden {hidden} is not a multiple of 64, the size of an attention head; set one")
    return BertConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=max(1, hidden // 64),
        intermediate_size=4 * hidden,
        vocab_size=vocab_size,
    )


def build_on_meta(config: RunConfig, teacher: BertConfig, student_init: BertConfig, dtype: str) -> tuple[Any, Any]:
    """(teacher, matched student) without storage, as modeling.py makes them for a run."""
    task = get_task(config.task)
    head = modeling.task_head(task)
    teacher_settings = {k: v for k, v in teacher.to_dict().items() if k not in ("id2label", "label2id")} | head
    with torch.device("meta"):
        student = SPSBertForSequenceClassification(modeling.student_config(config, student_init, head))
        depth = student.config.num_effective_layers
        pairs = modeling.layer_pairs(config.layer_map, depth, teacher.num_hidden_layers)
        matched = modeling.MatchedStudent(student, pairs, teacher.hidden_size, config.hidden_loss)
        frozen = BertForSequenceClassification(BertConfig(**teacher_settings))
    return frozen.to(ds_engine.DTYPES[dtype]), matched.to(ds_engine.DTYPES[dtype])


# -- The plan ----------------------------------------------------------------------------------------------------------


def make_plan(config: RunConfig, teacher: BertConfig, student_init: BertConfig, options: Any) -> dict[str, Any]:
    """Every choice with its figures in bytes, and the one to take."""
    micro, accum = ds_engine.batch_plan(config.global_batch_size, config.micro_batch_size, options.world_size)
    world_size, tokens = options.world_size, config.max_seq_length
    for option, encoder in (("teacher", teacher), ("student_init", student_init)):
        if tokens > encoder.max_position_embeddings:
            raise UserError(
                f"--max_seq_length {tokens} is longer than the {encoder.max_position_embeddings} positions of "
                f"--{option}; set at most {encoder.max_position_embeddings}"
            )
    choices, cache, shown = [], {}, {}
    for dtype in ("bf16", "fp32") if options.dtype == "auto" else (options.dtype,):
        frozen, matched = build_on_meta(config, teacher, student_init, dtype)
        sizes, teacher_sizes = count_parameters(matched), count_parameters(frozen)
        activations = activation_bytes(matched, micro, tokens, options.device)
        pairs = matched.pairs
        teacher_activations = teacher_activation_bytes(teacher, micro, tokens, dtype, bool(pairs))
        cache[dtype] = cache_bytes_per_row(frozen.config.num_labels, len(pairs), teacher.hidden_size, dtype)
        shown = {
            "teacher_parameters": teacher_sizes.total,
            "student_parameters": sizes.total,
            "stored_layers": config.num_hidden_layers,
            "effective_layers": matched.student.config.num_effective_layers,
            "layer_pairs": len(pairs),
        }
        for stage in range(4):
            student = student_memory(sizes, stage, dtype, world_size)
            for name in TEACHERS:
                held = teacher_memory(teacher_sizes, name, dtype, world_size)
                traffic = [student_traffic(sizes, stage, dtype, world_size, accum)]
                traffic.append(teacher_traffic(teacher_sizes, name, dtype, accum))
                sent = sum(bytes_sent(kind, size, world_size) for part in traffic for kind, size in part.items())
                choices.append(
                    {
                        "student_stage": stage,
                        "teacher": name,
                        "dtype": dtype,
                        "student": asdict(student),
                        "teacher_memory": asdict(held),
                        "activations": activations,
                        "teacher_activations": teacher_activations,
                        "total": sum(asdict(student).values())
                        + held.weights
                        + held.buffers
                        + activations
                        + teacher_activations,
                        "sent_per_step": sent,
                    }
                )
    rows = options.train_rows
    return {
        "models": shown,
        "batch": {"global": config.global_batch_size, "micro": micro, "accum": accum, "world": world_size},
        "gpu_memory": int(options.gpu_memory_gib * GIB),
        "device": options.device,
        "cache": {dtype: {"per_row": size, "rows": rows, "total": size * rows} for dtype, size in cache.items()},
        "choices": choices,
        "recommended": recommend(choices, options.gpu_memory_gib * GIB),
    }


def recommend(choices: list[dict[str, Any]], gpu_memory: float) -> dict[str, Any]:
    """The choice that sends fewest bytes of those that fit, ties going to less memory, with the reason.

    A student at stage 3 comes last: it waits for each layer's weights as it needs them, where the other stages send
    once a step.
    """
    room = gpu_memory * (1 - HEADROOM)
    sound = [c for c in choices if not (c["student_stage"] == 0 and c["dtype"] == "bf16")]
    fitting = [c for c in sound if c["total"] <= room]
    if not fitting:
        least = min(sound, key=lambda c: c["total"])
        why = (
            f"nothing fits in {show(room)} ({HEADROOM:.0%} of the GPU is left free); the smallest takes "
            f"{show(least['total'])}: lower --micro_batch_size or --max_seq_length, or take more ranks or larger GPUs"
        )
        return {"index": None, "why": why}
    best = min(fitting, key=lambda c: (c["student_stage"] == 3, c["sent_per_step"], c["total"]))
    without_3 = (
        "" if best["student_stage"] == 3 else " without a student at stage 3, which waits for each layer's weights,"
    )
    why = (
        f"of the {len(fitting)} choices that fit in {show(room)} ({HEADROOM:.0%} of the GPU is left free)"
        f"{without_3} it sends the fewest bytes ({show(best['sent_per_step'])} a step and rank), "
        f"and takes {show(best['total'])}; "
        "zero0_bf16 is not considered, because it sums gradients in bf16"
    )
    return {"index": choices.index(best), "why": why}


def show(size: float) -> str:
    """Bytes as GiB or MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def table(plan: dict[str, Any]) -> str:
    """The plan as Markdown."""
    models, batch = plan["models"], plan["batch"]
    lines = [
        f"teacher: {models['teacher_parameters']:,} parameters",
        f"student: {models['student_parameters']:,} parameters, {models['stored_layers']} stored layers run as "
        f"{models['effective_layers']}, {models['layer_pairs']} matched layer pairs",
        f"batch: global {batch['global']} = micro {batch['micro']} x accum {batch['accum']} x world {batch['world']}",
    ]
    for dtype, cache in plan["cache"].items():
        total = f", {show(cache['total'])} for {cache['rows']:,} rows" if cache["rows"] else ""
        lines.append(f"teacher cache in {dtype}: {cache['per_row']:,} bytes a row{total}")
    header = (
        "dtype,student,teacher,weights,gradients,fp32 masters,moments,buffers,activations,teacher weights,"
        "teacher buffers,teacher activations,total on GPU,on host,sent a step"
    ).split(",")
    lines += ["", "Memory of a rank, and bytes that it sends in an optimiser step:", "", _row(header)]
    lines.append(_row(["---"] * len(header)))
    for number, choice in enumerate(plan["choices"]):
        student, teacher = choice["student"], choice["teacher_memory"]
        sizes = [student[name] for name in ("weights", "gradients", "masters", "moments", "buffers")]
        sizes += [choice["activations"], teacher["weights"], teacher["buffers"], choice["teacher_activations"]]
        sizes += [choice["total"], teacher["host"], choice["sent_per_step"]]
        mark = " <-" if number == plan["recommended"]["index"] else ""
        name = f"zero{choice['student_stage']}"
        lines.append(
            _row([choice["dtype"], name, choice["teacher"].removeprefix("teacher_"), *map(show, sizes)]) + mark
        )
    lines.append("")
    if plan["recommended"]["index"] is None:
        return "\n".join([*lines, f"Take: none. Why: {plan['recommended']['why']}."])
    best = plan["choices"][plan["recommended"]["index"]]
    words = f"--student_ds_config zero{best['student_stage']}_{best['dtype']} --teacher_ds_config {best['teacher']}"
    return "\n".join([*lines, f"Take: {words}", f"Why: {plan['recommended']['why']}."])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# -- The command -------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The settings of a run that matter here, and what only a plan needs."""
    parser = _Parser(prog="peakd-plan", allow_abbrev=False, description=(__doc__ or "").split("\n")[0])
    for spec in fields(RunConfig):
        if spec.name in SETTINGS:
            add_setting(parser, spec)
    parser.set_defaults(task="mnli")

    def number(name: str, kind: type, default: Any, help: str) -> None:
        shown = "none" if default is None else default
        parser.add_argument(
            f"--{name}", type=kind, default=default, metavar=name.upper(), help=f"{help}; default {shown}]"
        )

    number("world_size", int, 1, "ranks [GPUs; range 1 to 1000000")
    number("gpu_memory_gib", float, 80.0, "memory of one GPU [GiB; range > 0")
    number("teacher_layers", int, None, "in place of --teacher, with --teacher_hidden [layers; range >= 1")
    number("teacher_hidden", int, None, "hidden size, a multiple of 64; feed-forward is 4 times it [range >= 1")
    number("teacher_vocab_size", int, 30522, "[entries; range >= 1")
    number("student_hidden", int, None, "in place of --student_init, another width than the teacher's [range >= 1")
    number("train_rows", int, 0, "rows to cache teacher answers for [rows; range >= 0")
    parser.add_argument(
        "--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto plans for both [default auto]"
    )
    parser.add_argument(
        "--device", choices=("gpu", "cpu"), default="gpu", help="whose attention and dropout to count [default gpu]"
    )
    parser.add_argument("--json", action="store_true", help="print every figure as JSON, in bytes")
    return parser


def main(argv: Sequence[str]) -> None:
    """Print the plan for the given words."""
    options, unknown = build_parser().parse_known_args(argv)
    if unknown:
        raise UserError(f"unknown option {unknown[0]}; --help lists all")
    config = RunConfig(**{name: getattr(options, name) for name in SETTINGS})
    check(config, options)
    teacher = (
        read_encoder(options.teacher, "teacher")
        if options.teacher
        else shaped_encoder("teacher", options.teacher_layers, options.teacher_hidden, options.teacher_vocab_size)
    )
    if config.student_init:
        student_init = read_encoder(config.student_init, "student_init")
    elif options.student_hidden is not None:
        student_init = shaped_encoder("student", config.num_hidden_layers, options.student_hidden, teacher.vocab_size)
    else:
        student_init = teacher
    plan = make_plan(config, teacher, student_init, options)
    print(json.dumps(plan, indent=2) if options.json else table(plan))


def check(config: RunConfig, options: argparse.Namespace) -> None:
    """Raise UserError for the first number that cannot be."""
    for spec in fields(RunConfig):
        value, is_right = getattr(config, spec.name), spec.metadata["check"]
        if spec.name in SETTINGS and value is not None and is_right is not None and not is_right(value):
            raise UserError(f"--{spec.name} {value} is outside its range {spec.metadata['range']}; set one within")
    if config.sharing == "none" and config.shuffle_qk:
        raise UserError("--shuffle_qk needs a second run of a layer, and --sharing none has none; drop one")
    if config.num_hidden_layers > 10_000:
        raise UserError(f"--num_hidden_layers {config.num_hidden_layers} is above 10000; set less")
    if not 1 <= options.world_size <= MAX_WORLD_SIZE:
        raise UserError(
            f"--world_size {options.world_size} is outside its range 1 to {MAX_WORLD_SIZE}; set the number of GPUs"
        )
    if not (options.gpu_memory_gib > 0 and math.isfinite(options.gpu_memory_gib)):
        raise UserError(
            f"--gpu_memory_gib {options.gpu_memory_gib} is outside its range > 0; set the GPU's memory in GiB"
        )
    if options.train_rows < 0:
        raise UserError(f"--train_rows {options.train_rows} is outside its range >= 0; set the number of training rows")
    has_shape = options.teacher_layers is not None and options.teacher_hidden is not None
    has_some_shape = options.teacher_layers is not None or options.teacher_hidden is not None
    if bool(options.teacher) == has_some_shape or (has_some_shape and not has_shape):
        raise UserError("the teacher is not clear; give --teacher, or both --teacher_layers and --teacher_hidden")
    if config.student_init and options.student_hidden is not None:
        raise UserError("--student_init and --student_hidden both say what the student is; give one")
    if config.teacher and Path(config.teacher).is_dir() and not (Path(config.teacher) / "config.json").exists():
        raise UserError(f"--teacher {config.teacher} has no config.json; give a folder that save_pretrained wrote")


def cli() -> None:
    """Console script."""
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        exit_with(error, "peakd-plan")


if __name__ == "__main__":
    cli()
