"""A faster first step of gradient accumulation on CPUs. Nothing here changes a result."""

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import nn


def copy_first_gradients(optimizer: BF16_Optimizer) -> None:
    """Make DeepSpeed's bf16 optimizer copy the first micro-batch's gradients into its fp32 gradients, which are zero.

    DeepSpeed adds them, by way of an fp32 copy of each: seven times as slow, a tenth of a small student's step.
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
