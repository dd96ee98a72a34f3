"""The two DeepSpeed engines of a rank, the trained model's and the frozen teacher's; only here they are initialized.

ds_configs/ says how an engine is spread (ZeRO stage, precision, offload). ds_config.py fills in the run's numbers.
"""

import contextlib
import io
import math
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import groups
from torch import nn
from transformers import get_linear_schedule_with_warmup

from peakd_ds.config import RunConfig
from peakd_ds.engine.cpu import copy_first_gradients
from peakd_ds.engine.ds_config import teacher_ds_config, training_ds_config, zero_stage
from peakd_ds.engine.state import create_adam_state, loss_scaler, write_full
from peakd_ds.errors import UserError
from peakd_ds.ranks import dist


def training_engine(
    module: nn.Module, config: RunConfig, ds_config: dict[str, Any], num_steps: int, name: str
) -> DeepSpeedEngine:
    """An engine that trains `module` with AdamW and linear warm-up and decay over `num_steps` optimizer steps.

    `engine.backward(loss)` expects this rank's share of the global-batch mean, times `undo_averaging(engine)`. torch's
    fused AdamW needs no compiler on any device.

    Args:
        ds_config: The student's DeepSpeed config, without batch sizes.
        name: Name of the stage, under which DeepSpeed's monitors write if the config turns one on.
    """
    ds_config = training_ds_config(config, ds_config, name)
    optimizer = torch.optim.AdamW(parameter_groups(module, config.weight_decay), lr=config.lr, fused=True)
    scheduler = get_linear_schedule_with_warmup(optimizer, round(config.warmup_ratio * num_steps), num_steps)
    weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    engine = _initialize(model=module, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config)
    if dist.world_size() == 1 and zero_stage(ds_config) <= 1 and not hasattr(engine.optimizer, "reduce_gradients"):
        engine.enable_backward_allreduce = False  # nobody to average with: DeepSpeed would copy all gradients
    if hasattr(engine.optimizer, "fp32_groups_has_gradients"):
        copy_first_gradients(engine.optimizer)
    create_adam_state(engine, 0)
    for name, parameter in engine.module.named_parameters():
        write_full(engine, parameter, None, weights[name])  # DeepSpeed has rounded its own to bf16 or fp16
    assert engine.dp_world_size == dist.world_size(), "the engine does not average gradients over all ranks"
    return engine


def teacher_engine(model: nn.Module, ds_config: dict[str, Any]) -> DeepSpeedEngine:
    """An engine without optimizer around the frozen teacher, at ZeRO stage 0 or 3, in eval mode."""
    model.requires_grad_(False)
    engine = _initialize(model=model, config=teacher_ds_config(ds_config))
    engine.eval()
    return engine


def undo_averaging(engine: DeepSpeedEngine) -> int:
    """The factor that cancels DeepSpeed's averaging over ranks and accumulation: our losses are shares of a mean."""
    return engine.dp_world_size * engine.gradient_accumulation_steps()


def expected_upstream(engine: DeepSpeedEngine) -> float:
    """The upstream gradient of a loss in `engine.backward(loss * undo_averaging(engine))`, with fp16's scale."""
    return engine.dp_world_size * loss_scaler(engine).get("cur_scale", 1.0)


def stop_if_skipped(engine: DeepSpeedEngine, stage: str, step: int) -> None:
    """Raise UserError if DeepSpeed has silently skipped steps because the gradient norm was NaN or infinite.

    The norm is over all ranks, so all ranks raise or none. fp16 skips steps while it searches for its loss scale.
    """
    if engine.skipped_steps and not engine.fp16_enabled():
        raise UserError(
            f"{stage} step {step}: the gradient is NaN or infinite, and {engine.skipped_steps} steps were skipped; the "
            "last good checkpoint is kept: in another --run_dir, lower --lr or take --dtype fp32"
        )


def grad_norm(engine: DeepSpeedEngine) -> float | None:
    """Global gradient norm before clipping; None if fp16 has skipped the step, and in fp32 at stage 0."""
    norm = engine.get_global_grad_norm()
    return None if norm is None or not math.isfinite(norm) else float(norm)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with and without weight decay: biases and LayerNorms (one dimension) have none, as for BERT."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() <= 1], "weight_decay": 0.0},
    ]


def _initialize(**arguments: Any) -> deepspeed.DeepSpeedEngine:
    """deepspeed.initialize without its leftovers and its output.

    DeepSpeed keeps the process groups of an earlier engine in module globals; a later engine would inherit them and
    average over too few ranks. Its bf16 optimizer prints memory use whenever one is made.
    """
    groups.mpu = None
    groups.mesh_device = None
    with contextlib.redirect_stdout(io.StringIO()):
        return deepspeed.initialize(**arguments, dist_init_required=False)[0]
