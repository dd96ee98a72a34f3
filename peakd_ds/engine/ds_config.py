"""DeepSpeed configs: files of ds_configs/ or the user's, checked and completed with the precision of the run.

A file says how an engine is spread (ZeRO stage, offload). Batch sizes and clipping follow from the run's settings and
are filled in by engines.py, so no number is stated twice.
"""

import importlib.resources
import json
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from peakd_ds.config import RunConfig
from peakd_ds.errors import UserError
from peakd_ds.ranks.device import on_gpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

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
    if dtype == "fp16" and not on_gpu():
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
    if on_gpu():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
