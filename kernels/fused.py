"""The fused loss as an autograd function, for any backend.

A backend computes loss and gradients together in the forward pass, while a row is in registers or cache. The backward
pass only hands the gradients out, rescaled if the upstream gradient is not the expected one.

Shape suffixes as in `reference.py`. Hidden states are [B, H] or [B, S, H]; the suffix BSH stands for both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from peakd_ds.kernels.reference import DistillationLoss

FEW_CLASSES = 256
"""Largest C whose soft loss always takes the precise form. In Triton, such a row fits the registers of one warp."""
PRECISE_KL_ABOVE = 20.0
"""T above which the soft loss of more classes takes the precise form too: the error of the plain one grows with T^2."""


@dataclass(frozen=True, slots=True)
class LossInputs:
    """The checked arguments of one `distillation_loss`, teacher tensors detached, and numbers derived from them."""

    student_logits_NC: Tensor
    teacher_logits_NC: Tensor | None
    labels_N: Tensor | None
    """int64 class ids; with C = 1 int64, fp32 or fp64 scores."""
    student_hidden_BSH: tuple[Tensor, ...]
    """One tensor per layer pair."""
    teacher_hidden_BSH: tuple[Tensor, ...]
    temperature: float
    alpha: float
    beta: float
    attention_mask_BS: Tensor | None
    """None with [B, H] states."""
    normalize: bool
    reduction: str
    ignore_index: int
    num_items: int | Tensor | None
    num_tokens: int | Tensor | None
    grad_scale: float | Tensor
    labels_NC: Tensor | None = None
    """0 and 1 in any dtype: the labels with `multi_label`, in place of `labels_N`."""
    label_weights_N: Tensor | None = None
    """In the dtype of the computation."""
    label_divisor: float | Tensor | None = None
    multi_label: bool = False

    @property
    def has_labels(self) -> bool:
        return self.labels_N is not None or self.labels_NC is not None

    @property
    def num_classes(self) -> int:
        return self.student_logits_NC.shape[1]

    @property
    def is_regression(self) -> bool:
        return self.num_classes == 1 and not self.multi_label

    @property
    def needs_precise_kl(self) -> bool:
        """Whether the KL divergence is summed without cancellation, which is slower; see `distillation_loss`."""
        return self.num_classes <= FEW_CLASSES or self.temperature > PRECISE_KL_ABOVE

    @property
    def soft_factor(self) -> float:
        """`soft` = this * (KL divergences summed over rows) / rows: T^2, divided by C with reduction "mean"."""
        factor = 1.0 if self.is_regression else self.temperature**2
        return factor / self.num_classes if self.reduction == "mean" else factor

    @property
    def soft_grad_factor(self) -> float:
        """The same factor for the gradient with respect to the logits, which are divided by T."""
        return self.soft_factor if self.is_regression else self.soft_factor / self.temperature

    @property
    def hidden_factor(self) -> float:
        """`hidden` = this * (squared differences summed over pairs, vectors and H) / vectors: 1 / (K * H)."""
        states = self.student_hidden_BSH
        return 1.0 / (len(states) * states[0].shape[-1]) if states else 0.0

    @property
    def row_divisor(self) -> int | Tensor | None:
        """Rows to divide `soft` by, and `hard` if `hard_divisor` is None.

        None: the backend counts the rows whose label is not ignored.
        """
        if self.num_items is not None:
            return self.num_items
        return len(self.student_logits_NC) if self.labels_N is None else None

    @property
    def hard_divisor(self) -> float | Tensor | None:
        """What the weighted sum of hard losses is divided by, 0 if no row has a label.

        None: `hard` has no weights, and the divisor of `soft`.
        """
        if not self.has_labels:
            return None
        if self.label_divisor is not None or self.label_weights_N is None:
            return self.label_divisor
        weights_N = self.label_weights_N
        if self.labels_N is not None:
            weights_N = weights_N.masked_fill(self.labels_N == self.ignore_index, 0)
        return weights_N.sum()

    @property
    def vector_divisor(self) -> int | Tensor | None:
        """Vectors to divide `hidden` by; None: the backend counts the tokens that are not padding."""
        if not self.student_hidden_BSH:
            return 0
        shape = self.student_hidden_BSH[0].shape
        divisor = self.num_tokens if len(shape) == 3 else self.num_items
        if divisor is not None or self.attention_mask_BS is not None:
            return divisor
        return shape[:-1].numel()


class LossAndGrads(NamedTuple):
    """The result of a backend's `compute`."""

    total: Tensor
    """0-dim, with its own storage, so `loss /= n` works in place."""
    terms: tuple[Tensor, Tensor, Tensor]
    """hard, soft, hidden: 0-dim, unweighted."""
    grad_logits_NC: Tensor | None
    """In the dtype of the student's logits, times grad_scale; None if not needed, or zero everywhere."""
    grad_hidden_KBSH: tuple[Tensor, ...]
    """In the dtype of the student's states, times grad_scale: blocks of one or more layer pairs, in order; or empty."""


class Backend(Protocol):
    """The functions of a backend module: `torch_backend` or `triton_backend`."""

    def compute(self, inputs: LossInputs, needs_grad_logits: bool, needs_grad_hidden: bool) -> LossAndGrads:
        """Loss, and the gradients that are needed."""

    def rescale(self, grads: Sequence[Tensor], grad_total: Tensor, grad_scale: float | Tensor) -> None:
        """Multiply gradients in place by grad_total / grad_scale, unless that is 1 up to rounding.

        Args:
            grads: At most grad_logits_NC and the blocks of grad_hidden_KBSH.
            grad_total: Gradient with respect to `total`, 0-dim.
            grad_scale: The factor that `compute` put into the gradients.
        """


def fused_loss(backend: Backend, inputs: LossInputs) -> DistillationLoss:
    """The loss, with gradients computed at once unless under `torch.no_grad`."""
    student = (inputs.student_logits_NC, *inputs.student_hidden_BSH)
    total, *terms = _FusedLoss.apply(backend, inputs, torch.is_grad_enabled(), *student)
    return DistillationLoss(total, *terms)


class _Context(FunctionCtx):
    """What autograd sets, and what the forward pass leaves for the backward pass."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]
    backend: Backend
    grad_scale: float | Tensor
    has_grad_logits: bool
    needs_grad_hidden: list[bool]
    is_used: bool


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, backend: Backend, inputs: LossInputs, is_grad_enabled: bool, *student: Tensor
    ) -> tuple[Tensor, ...]:
        needs_grad_logits, *needs_grad_hidden = (is_grad_enabled and needed for needed in ctx.needs_input_grad[3:])
        result = backend.compute(inputs, needs_grad_logits, any(needs_grad_hidden))
        grad_logits = () if result.grad_logits_NC is None else (result.grad_logits_NC,)
        ctx.save_for_backward(*grad_logits, *result.grad_hidden_KBSH)
        ctx.backend, ctx.grad_scale, ctx.is_used = backend, inputs.grad_scale, False
        ctx.has_grad_logits, ctx.needs_grad_hidden = bool(grad_logits), needs_grad_hidden
        ctx.mark_non_differentiable(*result.terms)
        ctx.set_materialize_grads(False)
        return result.total, *result.terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _Context, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if ctx.is_used:
            raise RuntimeError(
                "second backward through distillation_loss: its gradients are computed in the forward pass and freed "
                "after one backward; call distillation_loss again, or use backend='reference'"
            )
        ctx.is_used = True
        grads = list(ctx.saved_tensors)
        grad_logits_NC: Tensor | None = None
        grad_hidden_BSH: list[Tensor | None] = [None] * len(ctx.needs_grad_hidden)
        if grads and grad_total is not None:
            ctx.backend.rescale(grads, grad_total, ctx.grad_scale)
            if ctx.has_grad_logits:
                grad_logits_NC = grads.pop(0)
            if grads:
                pairs = (grad_BSH for block_KBSH in grads for grad_BSH in block_KBSH.unbind(0))
                needed = zip(pairs, ctx.needs_grad_hidden, strict=True)
                grad_hidden_BSH = [grad_BSH if is_needed else None for grad_BSH, is_needed in needed]
        return None, None, None, grad_logits_NC, *grad_hidden_BSH
