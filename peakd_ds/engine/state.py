"""fp32 weights and Adam moments of an engine, whole, at any ZeRO stage and precision.

ZeRO 1 to 3, and their bf16 variant, answer DeepSpeed's safe_get and safe_set functions. At stage 0 the optimiser is
torch's own (fp32) or one that keeps an fp32 copy of each parameter (bf16).
"""

from typing import Any

import torch
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


def _masters_at_stage_0(engine: Any) -> dict[int, torch.Tensor]:
    """fp32 master of each parameter by the parameter's id."""
    if not hasattr(engine.optimizer, "fp32_groups"):
        return {id(parameter): parameter for parameter in engine.module.parameters()}
    groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {id(low): high for lows, highs in groups for low, high in zip(lows, highs, strict=True)}


def _is_stage_0(engine: Any) -> bool:
    return engine.zero_optimization_stage() == 0


def _master_tensors(engine: Any) -> list[torch.Tensor]:
    """The tensors that AdamW updates on this rank: flat partitions from stage 1 on."""
    if _is_stage_0(engine):
        return list(_masters_at_stage_0(engine).values())
    names = ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups")
    return next(getattr(engine.optimizer, name) for name in names if hasattr(engine.optimizer, name))


def create_adam_state(engine: Any, adam_step: int) -> None:
    """Give AdamW the state that it otherwise makes in its first step, with zero moments.

    There must be something to load into, and without this DeepSpeed's ZeRO 1 and 2 link the moments of the first
    parameter group only (they link after that group's step, when the others have none yet), and its stage-0 optimiser
    for bf16 counts a step that it takes with zero gradients at construction.
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


def adam_step(engine: Any) -> int:
    """Steps that AdamW has counted, for its bias correction; fewer than optimiser steps where fp16 has skipped some."""
    return int(next(iter(engine.basic_optimizer.state.values()))["step"])


def loss_scaler(engine: Any) -> dict[str, float]:
    """The numbers of fp16's dynamic loss scaler (scale, steps since an overflow); empty without fp16."""
    return {name: value for name, value in _scaler_fields(engine).items() if isinstance(value, int | float)}


def set_loss_scaler(engine: Any, numbers: dict[str, float]) -> None:
    """Put back what `loss_scaler` gave, so that fp16 goes on at the same scale."""
    _scaler_fields(engine).update(numbers)


def _scaler_fields(engine: Any) -> dict[str, Any]:
    if not engine.fp16_enabled():
        return {}
    return vars(getattr(engine.optimizer, "loss_scaler", None) or engine.optimizer.loss_scale_config)


def read_full(engine: Any, parameter: nn.Parameter, moment: str | None) -> torch.Tensor:
    """The whole fp32 weight (`moment` None) or Adam moment of a parameter (collective)."""
    if _is_stage_0(engine):
        master = _masters_at_stage_0(engine)[id(parameter)]
        return master if moment is None else engine.basic_optimizer.state[master][moment]
    if moment is None:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, moment)


@torch.no_grad()
def write_full(engine: Any, parameter: nn.Parameter, moment: str | None, value: torch.Tensor) -> None:
    """Set this rank's part of the fp32 weight or Adam moment from the whole value; every rank must do it."""
    if _is_stage_0(engine):
        master = _masters_at_stage_0(engine)[id(parameter)]
        (master if moment is None else engine.basic_optimizer.state[master][moment]).copy_(value)
    elif engine.zero_optimization_stage() == 3:
        # The full-value API cuts past the end of parameters that the ranks do not divide: hand over this rank's part.
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
