"""The fused loss as autograd sees it, whichever backend computes it.

Loss and gradients are computed together in the forward pass, while a row is in cache or registers, and the backward
pass hands the gradients out. A backend is a module with two functions:

    compute(call, logits_grad, hidden_grad) -> Computed
    rescale(gradients, upstream, grad_scale)   multiplies them in place by upstream / grad_scale
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peakd_ds.kernels.reference import DistillationLoss


@dataclass(frozen=True, slots=True)
class LossCall:
    """The checked arguments of one `distillation_loss`, teacher tensors detached. The derived numbers are Python's."""

    student_logits: Tensor
    """[N, C]"""
    teacher_logits: Tensor | None
    labels: Tensor | None
    """[N]"""
    student_hidden: tuple[Tensor, ...]
    """K of [B, H] or [B, S, H]"""
    teacher_hidden: tuple[Tensor, ...]
    temperature: float
    alpha: float
    beta: float
    attention_mask: Tensor | None
    """[B, S], only with [B, S, H]"""
    normalize: bool
    reduction: str
    ignore_index: int
    num_items: int | Tensor | None
    num_tokens: int | Tensor | None
    grad_scale: float | Tensor

    @property
    def num_classes(self) -> int:
        return self.student_logits.shape[1]

    @property
    def is_regression(self) -> bool:
        return self.num_classes == 1

    @property
    def soft_factor(self) -> float:
        """What turns a sum of KL divergences over rows into `soft` times rows: T^2, over C with reduction "mean"."""
        factor = 1.0 if self.is_regression else self.temperature**2
        return factor / self.num_classes if self.reduction == "mean" else factor

    @property
    def soft_grad_factor(self) -> float:
        """The same for its gradient with respect to the logits: d KL(T) / d logits has a factor 1 / T."""
        return self.soft_factor if self.is_regression else self.soft_factor / self.temperature

    @property
    def hidden_factor(self) -> float:
        """What turns a sum of squares over pairs, vectors and H into `hidden` times vectors: 1 / (K * H)."""
        return 1.0 / (len(self.student_hidden) * self.student_hidden[0].shape[-1]) if self.student_hidden else 0.0

    @property
    def rows_given(self) -> int | Tensor | None:
        """Rows to divide `hard` and `soft` by, unless they must be counted (None): those whose label is not ignored."""
        if self.num_items is not None:
            return self.num_items
        return len(self.student_logits) if self.labels is None else None

    @property
    def vectors_given(self) -> int | Tensor | None:
        """Vectors to divide `hidden` by, unless they must be counted (None): the tokens that are not padded."""
        if not self.student_hidden:
            return 0
        shape = self.student_hidden[0].shape
        given = self.num_tokens if len(shape) == 3 else self.num_items
        if given is not None or self.attention_mask is not None:
            return given
        return shape[:-1].numel()


class Computed(NamedTuple):
    """What a backend returns."""

    total: Tensor
    """0-dim, in a storage of its own, so that `loss /= n` works in place."""
    terms: tuple[Tensor, Tensor, Tensor]
    """hard, soft, hidden: 0-dim."""
    logits_grad: Tensor | None
    """[N, C] in the dtype of the student's logits, times grad_scale; None if not asked for, or zero."""
    hidden_grads: tuple[Tensor, ...]
    """The same for the student's hidden states: in order, blocks [k, ...] of one or several pairs; or none."""


def fused_loss(backend: ModuleType, call: LossCall) -> DistillationLoss:
    """Loss with gradients computed in the forward pass; under `torch.no_grad` none are."""
    total, *terms = _FusedLoss.apply(backend, call, torch.is_grad_enabled(), call.student_logits, *call.student_hidden)
    return DistillationLoss(total, *terms)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: ModuleType, call: LossCall, is_grad_enabled: bool, *student: Tensor
    ) -> tuple[Tensor, ...]:
        needs_logits, *needs_hidden = (is_grad_enabled and needed for needed in ctx.needs_input_grad[3:])
        computed = backend.compute(call, needs_logits, any(needs_hidden))
        ctx.save_for_backward(computed.logits_grad, *computed.hidden_grads)
        ctx.backend, ctx.grad_scale, ctx.needs_hidden, ctx.is_used = backend, call.grad_scale, needs_hidden, False
        ctx.mark_non_differentiable(*computed.terms)
        ctx.set_materialize_grads(False)
        return computed.total, *computed.terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.is_used:
            raise RuntimeError(
                "a second backward through distillation_loss: its gradients were computed in the forward pass and "
                "given away by the first; call distillation_loss again, or use backend='reference'"
            )
        ctx.is_used = True
        logits_grad, *blocks = ctx.saved_tensors
        if upstream is None:
            logits_grad, blocks = None, []
        gradients = [gradient for gradient in (logits_grad, *blocks) if gradient is not None]
        if gradients:
            ctx.backend.rescale(gradients, upstream, ctx.grad_scale)
        hidden_grads = [gradient for block in blocks for gradient in block.unbind(0)] or [None] * len(ctx.needs_hidden)
        wanted = (grad if need else None for grad, need in zip(hidden_grads, ctx.needs_hidden, strict=True))
        return None, None, None, logits_grad, *wanted
