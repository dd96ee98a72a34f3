"""The full fp32 weights and Adam moments of an engine, at any ZeRO stage and precision.

DeepSpeed's safe_get and safe_set functions serve ZeRO 1 to 3 and their bf16 variant. At stage 0 the optimizer is
torch's own (fp32) or one that keeps an fp32 copy of each parameter (bf16).
"""

from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from peakd_ds.ranks import dist

MOMENTS = ("exp_avg", "exp_avg_sq")


def _masters_at_stage_0(engine: DeepSpeedEngine) -> dict[int, torch.Tensor]:
    """The fp32 master of each parameter, by the parameter's id."""
    if not hasattr(engine.optimizer, "fp32_groups"):
        return {id(parameter): parameter for parameter in engine.module.parameters()}
    groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {id(low): high for lows, highs in groups for low, high in zip(lows, highs, strict=True)}


def _is_stage_0(engine: DeepSpeedEngine) -> bool:
    return engine.zero_optimization_stage() == 0


def _master_tensors(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """The tensors that AdamW updates on this rank: flat partitions from stage 1 on."""
    if _is_stage_0(engine):
        return list(_masters_at_stage_0(engine).values())
    names = ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups")
    return next(getattr(engine.optimizer, name) for name in names if hasattr(engine.optimizer, name))


def create_adam_state(engine: DeepSpeedEngine, adam_step: int) -> None:
    """Give AdamW the state that it would make in its first step, with zero moments.

    A checkpoint needs tensors to load into. Besides, DeepSpeed's ZeRO 1 and 2 would link the moments of the first
    parameter group only (they link after that group's step, when the other groups have none), and its stage-0 optimizer
    for bf16 counts a step with zero gradients that it takes when it is made.
    """
    state = engine.basic_optimizer.state
    for master in _master_tensors(engine):
        state[master] = {
            "step": torch.tensor(float(adam_step), device=master.device),
            **{key: torch.zeros_like(master) for key in MOMENTS},
        }
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def adam_step(engine: DeepSpeedEngine) -> int:
    """Steps that AdamW has counted, for its bias correction; fewer than optimizer steps if fp16 has skipped some."""
    return int(next(iter(engine.basic_optimizer.state.values()))["step"])


def loss_scaler(engine: DeepSpeedEngine) -> dict[str, float]:
    """The state of fp16's dynamic loss scaler (scale, steps since an overflow); empty without fp16."""
    return {name: value for name, value in _scaler_fields(engine).items() if isinstance(value, int | float)}


def set_loss_scaler(engine: DeepSpeedEngine, numbers: dict[str, float]) -> None:
    """Restore the state that `loss_scaler` returned, so that fp16 continues at the same scale."""
    _scaler_fields(engine).update(numbers)


def _scaler_fields(engine: DeepSpeedEngine) -> dict[str, Any]:
    if not engine.fp16_enabled():
        return {}
    return vars(getattr(engine.optimizer, "loss_scaler", None) or engine.optimizer.loss_scale_config)


def read_full(engine: DeepSpeedEngine, parameter: nn.Parameter, moment: str | None) -> torch.Tensor:
    """The full fp32 weight (`moment` None) or Adam moment of a parameter (collective)."""
    if _is_stage_0(engine):
        master = _masters_at_stage_0(engine)[id(parameter)]
        return master if moment is None else engine.basic_optimizer.state[master][moment]
    if moment is None:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, moment)


@torch.no_grad()
def write_full(engine: DeepSpeedEngine, parameter: nn.Parameter, moment: str | None, value: torch.Tensor) -> None:
    """Set this rank's part of the fp32 weight or Adam moment from the full value; every rank must call it."""
    if _is_stage_0(engine):
        master = _masters_at_stage_0(engine)[id(parameter)]
        (master if moment is None else engine.basic_optimizer.state[master][moment]).copy_(value)
    elif engine.zero_optimization_stage() == 3:
        # The full-value API reads past the end of parameters whose size the ranks do not divide.
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        part = value.flatten()[dist.rank() * size : (dist.rank() + 1) * size]
        part = nn.functional.pad(part, (0, size - part.numel()))
        if moment is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, moment)
    elif moment is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, moment)
