"""The two DeepSpeed engines of a rank, the trained model's and the frozen teacher's: all of deepspeed.initialize.

Files in ds_configs/ say how an engine is spread (ZeRO stage, precision, offload). What the run's own settings fix
(batch sizes, clipping) is filled in here, so that no number is stated twice.
"""

import contextlib
import importlib.resources
import io
import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import groups
from torch import nn
from transformers import get_linear_schedule_with_warmup

from peakd_ds import dist, engine_state
from peakd_ds.config import RunConfig, UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MONITORS = {"tensorboard", "wandb", "csv_monitor", "comet"}
_SECTIONS = ("zero_optimization", "bf16", "fp16")
FILLED_IN = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
}


def batch_plan(global_batch_size: int, micro_batch_size: int, world_size: int) -> tuple[int, int]:
    """(micro, accum) with global = micro x accum x world and the largest micro that is at most `micro_batch_size`.

    Raises:
        UserError: the global batch is not a multiple of the number of ranks.
    """
    local, rest = divmod(global_batch_size, world_size)
    if rest:
        below, above = local * world_size, (local + 1) * world_size
        choice = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"--global_batch_size {global_batch_size} is not a multiple of the {world_size} ranks; "
            f"set {choice}, or start another number of ranks"
        )
    micro = max(size for size in range(1, min(local, micro_batch_size) + 1) if local % size == 0)
    return micro, local // micro


def load_ds_config(name: str, option: str) -> dict[str, Any]:
    """A DeepSpeed config by file path, or by name from ds_configs/.

    Raises:
        UserError: no such file, not JSON, or it holds a number that the run's own settings fill in.
    """
    builtin = importlib.resources.files("peakd_ds.ds_configs")
    known = sorted(item.name.removesuffix(".json") for item in builtin.iterdir() if item.name.endswith(".json"))
    try:
        text = (builtin / f"{name}.json").read_text() if name in known else Path(name).read_text()
        config = json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--{option} {name} is neither a file nor one of {', '.join(known)}; give one of these"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(f"--{option} {name} is not JSON ({error}); mend the file or take one of ds_configs/") from error
    if not isinstance(config, dict):
        raise UserError(f"--{option} {name} is JSON, but not an object; write it like those in ds_configs/")
    _check_sections(config, f"--{option} {name}")
    stated = FILLED_IN & config.keys()
    if stated:
        raise UserError(
            f"--{option} {name} sets {sorted(stated)[0]}, which follows from the run's own settings; "
            "take it out of the file"
        )
    return config


def _check_sections(config: Any, source: str) -> None:
    """What DeepSpeed would find wrong only when the engine starts, which for a teacher may be hours into the run."""
    if not isinstance(config, dict) or not all(isinstance(config.get(name, {}), dict) for name in _SECTIONS):
        raise UserError(f"{source} must be a JSON object, and so must its {', '.join(_SECTIONS)}; see ds_configs/")
    if all(config.get(name, {}).get("enabled") for name in ("bf16", "fp16")):
        raise UserError(f"{source} enables bf16 and fp16; enable one")
    try:
        DeepSpeedZeroConfig(**config.get("zero_optimization", {}))
    except ValueError as error:  # pydantic's, several lines
        raise UserError(
            f"{source}: zero_optimization is not right ({' '.join(str(error).split())}); mend it"
        ) from error


def zero_stage(ds_config: dict[str, Any]) -> int:
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def resolve(config: RunConfig, is_bf16_fast: bool) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(dtype, training ds config, teacher ds config) as the engines will get them, without batch sizes.

    Args:
        is_bf16_fast: What `--dtype auto` goes by; the same on every rank.

    Raises:
        UserError: dtype and file disagree; fp16 without a GPU, or at student stage 0; a teacher at stage 1 or 2.
    """
    on_gpu = dist.on_gpu()
    dtype = config.dtype
    if config.student_ds_config:
        student = load_ds_config(config.student_ds_config, "student_ds_config")
        stated = next((name for name in ("bf16", "fp16") if student.get(name, {}).get("enabled")), "fp32")
        if dtype not in ("auto", stated):
            raise UserError(
                f"--dtype {dtype} does not fit --student_ds_config {config.student_ds_config}, which is "
                f"{stated}; set --dtype {stated} or take another config"
            )
        dtype = stated
    else:
        if dtype == "auto":
            dtype = "bf16" if is_bf16_fast else "fp32"
        student = load_ds_config(f"zero1_{dtype}", "student_ds_config")
    if dtype == "fp16" and zero_stage(student) == 0:
        raise UserError(
            f"--student_ds_config {config.student_ds_config} trains in fp16 at ZeRO stage 0, where DeepSpeed does not "
            "scale the loss and small gradients vanish; take zero1_fp16"
        )
    if dtype == "fp16" and not on_gpu:
        raise UserError(
            "fp16 needs a GPU: CPU kernels and gloo have no loss scaling in half precision; set --dtype bf16 or fp32"
        )
    teacher = load_ds_config(config.teacher_ds_config, "teacher_ds_config")
    if zero_stage(teacher) in (1, 2):
        raise UserError(
            f"--teacher_ds_config {config.teacher_ds_config} has ZeRO stage {zero_stage(teacher)}, which "
            "shards optimiser states and gradients, and a frozen teacher has neither; take stage 0 "
            "(replicated) or 3 (sharded)"
        )
    other = next((name for name in ("bf16", "fp16") if name != dtype and teacher.get(name, {}).get("enabled")), None)
    if other is not None:
        raise UserError(
            f"--teacher_ds_config {config.teacher_ds_config} enables {other}, but the run is in {dtype}: the teacher "
            f"computes in the run's dtype; take {other} out of the file, or set --dtype {other}"
        )
    if dtype != "fp32":
        teacher[dtype] = {"enabled": True}
    return dtype, student, teacher


def has_fast_bf16() -> bool:
    """Whether the GPU, or else the CPU (AVX512_BF16 or AMX), multiplies bf16 matrices natively."""
    if dist.on_gpu():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def training_engine(module: nn.Module, config: RunConfig, ds_config: dict[str, Any], num_steps: int, name: str) -> Any:
    """An engine that trains `module` with AdamW and linear warm-up and decay over `num_steps` optimiser steps.

    DeepSpeed's own monitors, where the config turns one on, write under `name`, the stage's.

    torch's fused AdamW needs no compiler on any device. `engine.backward(loss)` expects this rank's share of the
    global-batch mean, times `undo_averaging(engine)`.
    """
    micro, accum = batch_plan(config.global_batch_size, config.micro_batch_size, dist.world_size())
    ds_config = {
        # On, as by default, it makes the host wait for the whole GPU, the teacher's stream too, twice a micro-batch.
        "timers": {"throughput": {"enabled": False}},
        **ds_config,
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accum,
        "gradient_clipping": config.max_grad_norm,  # explicit: DeepSpeed's default is 1.0, at every stage
        "zero_force_ds_cpu_optimizer": False,
        **{
            monitor: {**ds_config[monitor], "job_name": f"{ds_config[monitor].get('job_name', 'peakd_ds')}_{name}"}
            for monitor in ("tensorboard", "csv_monitor")
            if monitor in ds_config
        },
    }
    optimizer = torch.optim.AdamW(_parameter_groups(module, config.weight_decay), lr=config.lr, fused=True)
    scheduler = get_linear_schedule_with_warmup(optimizer, round(config.warmup_ratio * num_steps), num_steps)
    weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    engine = _initialize(model=module, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config)
    if dist.world_size() == 1 and zero_stage(ds_config) <= 1 and not hasattr(engine.optimizer, "reduce_gradients"):
        engine.enable_backward_allreduce = False  # no one to average with: DeepSpeed would copy all the same
    if hasattr(engine.optimizer, "fp32_groups_has_gradients"):
        _copy_first_gradients(engine.optimizer)
    engine_state.create_adam_state(engine, 0)
    for name, parameter in engine.module.named_parameters():
        engine_state.write_full(engine, parameter, None, weights[name])  # DeepSpeed's came by way of bf16 or fp16
    assert engine.dp_world_size == dist.world_size(), "the engine does not average gradients over all ranks"
    return engine


def _copy_first_gradients(optimizer: Any) -> None:
    """Have DeepSpeed's bf16 optimiser copy the first micro-batch's gradients into its fp32 ones, which are zero then.

    It would add them, each by way of an fp32 copy: seven times the time, a tenth of a small student's step on a CPU.
    """
    add = optimizer._update_hp_grad

    @torch.no_grad()
    def copy_or_add(parameter: nn.Parameter, group: int, index: int, clear_lp_grads: bool) -> None:
        has_gradients = optimizer.fp32_groups_has_gradients[group]
        if parameter.grad is None or has_gradients[index] or clear_lp_grads:
            return add(parameter, group, index, clear_lp_grads)
        parameter._hp_grad = optimizer.fp32_groups_gradients[group][index]  # type: ignore[attr-defined]
        parameter._hp_grad.copy_(parameter.grad.view_as(parameter._hp_grad))  # type: ignore[attr-defined]
        has_gradients[index] = True

    optimizer._update_hp_grad = copy_or_add


def teacher_engine(model: nn.Module, ds_config: dict[str, Any]) -> Any:
    """An engine without optimiser around the frozen teacher, at ZeRO stage 0 or 3, in eval mode.

    It gets no monitor: two engines that monitor under one name write into the same files.
    """
    ds_config = {name: value for name, value in ds_config.items() if name not in MONITORS}
    model.requires_grad_(False)
    engine = _initialize(
        model=model,
        config={**ds_config, "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0},
    )
    engine.eval()
    return engine


def undo_averaging(engine: Any) -> int:
    """The factor against DeepSpeed's averaging over ranks and accumulation: our losses already are shares of a mean."""
    return engine.dp_world_size * engine.gradient_accumulation_steps()


def expected_upstream(engine: Any) -> float:
    """The gradient that a loss gets under `engine.backward(loss * undo_averaging(engine))`, fp16's scale included."""
    return engine.dp_world_size * engine_state.loss_scaler(engine).get("cur_scale", 1.0)


def stop_if_skipped(engine: Any, stage: str, step: int) -> None:
    """Raise UserError where DeepSpeed has left out steps without a word, its gradient norm being NaN or infinite.

    The norm is of all ranks, so all raise or none. fp16 skips steps while it looks for its loss scale.
    """
    if engine.skipped_steps and not engine.fp16_enabled():
        raise UserError(
            f"{stage} step {step}: the gradient is NaN or infinite, and {engine.skipped_steps} steps were skipped; the "
            "last good checkpoint is kept: in another --run_dir, lower --lr or take --dtype fp32"
        )


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Biases and LayerNorm weights (the one-dimensional parameters) are not decayed, as in BERT's own recipe."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() <= 1], "weight_decay": 0.0},
    ]


def _initialize(**arguments: Any) -> deepspeed.DeepSpeedEngine:
    """deepspeed.initialize, free of what it leaves behind and of what it prints.

    It keeps an earlier engine's process groups in module globals, and a later engine silently inherits them: it would
    then average over too few ranks. The bf16 optimiser prints its memory use at every construction.
    """
    groups.mpu = None
    groups.mesh_device = None
    with contextlib.redirect_stdout(io.StringIO()):
        return deepspeed.initialize(**arguments, dist_init_required=False)[0]
