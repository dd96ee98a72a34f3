"""The two DeepSpeed engines of a rank, the trained model's and the frozen teacher's: all of deepspeed.initialize.

Files in ds_configs/ say how an engine is spread (ZeRO stage, precision, offload). What the run's own settings fix
(batch sizes, clipping) is filled in here, so that no number is stated twice.
"""

import contextlib
import io
from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups
from torch import nn
from transformers import get_linear_schedule_with_warmup

from peakd_ds.config import RunConfig
from peakd_ds.engine.ds_config import batch_plan, zero_stage
from peakd_ds.engine.state import create_adam_state, loss_scaler, write_full
from peakd_ds.errors import UserError
from peakd_ds.ranks import dist

MONITORS = {"tensorboard", "wandb", "csv_monitor", "comet"}


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
    create_adam_state(engine, 0)
    for name, parameter in engine.module.named_parameters():
        write_full(engine, parameter, None, weights[name])  # DeepSpeed's came by way of bf16 or fp16
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
    return engine.dp_world_size * loss_scaler(engine).get("cur_scale", 1.0)


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
