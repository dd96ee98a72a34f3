"""The distillation loss behind one function, whatever computes it.

This package imports wherever PyTorch does: Triton is imported when its backend is first asked for.

    reference.py        plain autograd PyTorch, the ground truth
    fused.py            the same loss with gradients computed in the forward pass, by one of two backends:
    torch_backend.py      in chunks of plain or compiled PyTorch, for CPUs
    triton_backend.py     on GPUs, launching
    triton_kernels.py       the device code
"""

import functools
import importlib
import importlib.util
import logging
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from peakd_ds.kernels.fused import LossCall, fused_loss
from peakd_ds.kernels.reference import DistillationLoss, compute_dtype, reference_loss

__all__ = [
    "BACKENDS",
    "DistillationLoss",
    "DistillationLossModule",
    "check_backend",
    "choose_backend",
    "distillation_loss",
]

BACKENDS = ("auto", "triton", "torch", "reference")
_REDUCTIONS = ("batchmean", "mean")

logger = logging.getLogger(__name__)


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    student_hidden: Sequence[Tensor],
    teacher_hidden: Sequence[Tensor],
    *,
    temperature: float,
    alpha: float,
    beta: float,
    attention_mask: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "batchmean",
    ignore_index: int = -100,
    num_items: int | Tensor | None = None,
    num_tokens: int | Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    backend: str = "auto",
) -> DistillationLoss:
    """Hard, soft and hidden-state loss of Patient KD (Sun et al. 2019, arXiv 1908.09355), and their sum.

        total  = (1 - alpha) * hard + alpha * soft + beta * hidden
        hard   = cross-entropy(student_logits, labels), mean over rows
        soft   = T^2 * KL(softmax(teacher_logits / T) || softmax(student_logits / T)), mean over rows
        hidden = (student / ||student||_2 - teacher / ||teacher||_2)^2, mean over pairs, vectors and H

    With C = 1, regression, `hard` and `soft` are the mean squared errors of the student's score against label
    and teacher score, without T. A mean over nothing (N = 0, every label ignored, every token padded) is 0.

    bf16, fp16, fp32 and fp64 are taken, student and teacher may differ, and computed in fp32, or in fp64 when a
    logit or hidden tensor is fp64 (the reference: always in fp64). Teacher tensors never receive a gradient. Only
    `total` carries one, once: but for the reference, gradients are computed in the forward pass (none under
    `torch.no_grad`), and a second backward raises RuntimeError.

    Args:
        student_logits: [N, C] pre-softmax scores. -inf is a masked class.
        teacher_logits: [N, C], or None: `soft` is then 0 and alpha must be 0.
        labels: [N] class ids, or float scores when C = 1, or None: `hard` is then 0.
        student_hidden: K tensors of one shape, [B, H] ([CLS] vectors) or [B, S, H]; none: `hidden` is 0.
        teacher_hidden: K tensors of the same shape, in the order of their student layers.
        temperature: T > 0 of the soft loss.
        alpha: weight of `soft`, in [0, 1].
        beta: weight of `hidden`, >= 0.
        attention_mask: [B, S], 0 at padding, which then counts nowhere; None: all tokens count. [B, H] states
            have no tokens and take no notice of it.
        normalize: L2-normalise each hidden vector first (eps 1e-12).
        reduction: "batchmean" divides the soft loss by rows; "mean" also by C, as the older code of Patient
            KD and Pea-KD did (with two classes its alpha means half as much).
        ignore_index: a row with this label counts in neither `hard` nor `soft`. Its hidden states still
            count: it is a sample, only its label is missing.
        num_items: rows to divide by in `hard`, `soft` and [B, H] `hidden`, an int or a 0-dim tensor. With the
            count of the global batch, the losses of all micro-batches and ranks add up to its mean. None:
            `hard` and `soft` divide by the local rows that are not ignored, `hidden` by all B.
        num_tokens: the same for [B, S, H] `hidden`: the tokens to divide by; None: the local non-padded ones.
        grad_scale: the upstream gradient that `total` is going to get, a number or a 0-dim tensor on the device, above
            0; for example fp16's loss scale. Gradients are multiplied by it before they are rounded to the student's
            dtype, so that small ones do not vanish in fp16, and the backward pass has nothing left to do. Another
            upstream gradient is still right: they are then rescaled. No effect on the reference.
        backend: "triton" (GPUs), "torch" (any device; compiled for large inputs on a CPU), "reference" (plain
            autograd), or "auto": see `choose_backend`.

    Returns:
        DistillationLoss; only `total` carries a gradient.

    Raises:
        ValueError: a setting is out of range, or shapes, dtypes or devices do not fit together, or the backend cannot
            run here.
        IndexError: a class id is out of range, on a CPU. A GPU is not waited for: there the loss is NaN (triton), or
            the device stops (the others).
    """
    _check_settings(temperature, alpha, beta, reduction, num_items, num_tokens, grad_scale)
    _check_logits(student_logits, teacher_logits, labels, alpha)
    _check_hidden(student_hidden, teacher_hidden, attention_mask, student_logits)
    has_tokens = bool(student_hidden) and student_hidden[0].ndim == 3
    settings: dict[str, Any] = dict(
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        attention_mask=attention_mask if has_tokens else None,
        normalize=normalize,
        reduction=reduction,
        ignore_index=ignore_index,
        num_items=_on_host_or_device(num_items, student_logits),
        num_tokens=_on_host_or_device(num_tokens, student_logits),
    )
    dtype = compute_dtype(student_logits, teacher_logits, *student_hidden, *teacher_hidden)
    chosen = _resolve(backend, student_logits.device, is_double=dtype == torch.float64)
    if chosen == "reference":
        return reference_loss(student_logits, teacher_logits, labels, student_hidden, teacher_hidden, **settings)
    call = LossCall(
        student_logits,
        None if teacher_logits is None else teacher_logits.detach(),
        labels,
        tuple(student_hidden),
        tuple(state.detach() for state in teacher_hidden),
        **settings,
        grad_scale=1.0 if grad_scale is None else _on_host_or_device(grad_scale, student_logits),
    )
    return fused_loss(_backend_module(chosen), call)


class DistillationLossModule(nn.Module):
    """`distillation_loss` with its settings kept: a module for those who compose losses as modules."""

    def __init__(
        self,
        *,
        temperature: float,
        alpha: float,
        beta: float,
        normalize: bool = True,
        reduction: str = "batchmean",
        ignore_index: int = -100,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check_settings(temperature, alpha, beta, reduction, None, None, None)
        if backend not in BACKENDS:
            raise ValueError(f"backend {backend!r} is unknown; use one of {', '.join(BACKENDS)}")
        self.settings: dict[str, Any] = dict(
            temperature=temperature,
            alpha=alpha,
            beta=beta,
            normalize=normalize,
            reduction=reduction,
            ignore_index=ignore_index,
            backend=backend,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor | None,
        student_hidden: Sequence[Tensor] = (),
        teacher_hidden: Sequence[Tensor] = (),
        *,
        attention_mask: Tensor | None = None,
        num_items: int | Tensor | None = None,
        num_tokens: int | Tensor | None = None,
        grad_scale: float | Tensor | None = None,
    ) -> DistillationLoss:
        """See `distillation_loss`."""
        return distillation_loss(
            student_logits,
            teacher_logits,
            labels,
            student_hidden,
            teacher_hidden,
            attention_mask=attention_mask,
            num_items=num_items,
            num_tokens=num_tokens,
            grad_scale=grad_scale,
            **self.settings,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())


# -- Backends ----------------------------------------------------------------------------------------------------------


@functools.cache
def choose_backend(device_type: str) -> tuple[str, str]:
    """The backend that "auto" means on "cuda" (NVIDIA or AMD), "cpu" or another device, and why; logged once."""
    if device_type != "cuda":
        chosen, reason = "torch", f"tensors are on {device_type}"
    elif importlib.util.find_spec("triton") is None:
        chosen, reason = "torch", "there is a GPU, but triton is not installed"
    else:
        chosen, reason = "triton", "tensors are on a GPU"
    logger.info("distillation loss: backend %s, since %s", chosen, reason)
    return chosen, reason


def check_backend(backend: str, device: torch.device, is_double: bool = False) -> None:
    """Raise ValueError, with the remedy, for a backend that is unknown or cannot run on `device`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    if backend != "triton":
        return
    if is_double:
        raise ValueError("backend 'triton' computes in fp32 and was given fp64; use backend 'torch' or 'reference'")
    if device.type != "cuda" and not _is_triton_interpreted():
        raise ValueError(
            f"backend 'triton' needs a GPU, and the tensors are on {device}; use backend 'torch', or set "
            "TRITON_INTERPRET=1 before the program starts, which is slow and meant for tests"
        )
    if importlib.util.find_spec("triton") is None:
        raise ValueError("backend 'triton' needs triton, which is not installed; install it or use backend 'torch'")


def _resolve(backend: str, device: torch.device, is_double: bool) -> str:
    if backend == "auto":
        chosen, _ = choose_backend(device.type)
        return "torch" if chosen == "triton" and is_double else chosen
    check_backend(backend, device, is_double)
    return backend


@functools.cache
def _is_triton_interpreted() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _backend_module(name: str) -> ModuleType:
    return importlib.import_module(f"peakd_ds.kernels.{name}_backend")


def _on_host_or_device(value: Any, student_logits: Tensor) -> Any:
    """A count or scale as a number, or as a tensor on the loss's device: a tensor on the CPU is no use to a GPU."""
    if isinstance(value, Tensor) and value.device != student_logits.device:
        return value.item() if value.device.type == "cpu" else value.to(student_logits.device)
    return value


# -- Checks ------------------------------------------------------------------------------------------------------------


def _check_settings(
    temperature: float,
    alpha: float,
    beta: float,
    reduction: str,
    num_items: int | Tensor | None,
    num_tokens: int | Tensor | None,
    grad_scale: float | Tensor | None,
) -> None:
    if not 0 < temperature < math.inf:  # also catches NaN
        raise ValueError(f"temperature {temperature} is not a finite number above 0; Pea-KD uses 10")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha} is not in [0, 1]; 0 is labels only, 1 is teacher logits only")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta {beta} is not a finite number >= 0; 0 leaves hidden states out")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} is unknown; use {' or '.join(map(repr, _REDUCTIONS))}")
    for name, count in (("num_items", num_items), ("num_tokens", num_tokens)):
        if isinstance(count, Tensor):
            if count.ndim != 0:
                raise ValueError(f"{name} has shape {list(count.shape)}, not []; pass a 0-dim tensor")
        elif count is not None and count < 0:
            raise ValueError(f"{name} {count} is negative; pass the count of the global batch")
    if isinstance(grad_scale, Tensor):
        if grad_scale.ndim != 0:
            raise ValueError(f"grad_scale has shape {list(grad_scale.shape)}, not []; pass a 0-dim tensor")
    elif grad_scale is not None and not 0 < grad_scale < math.inf:
        raise ValueError(f"grad_scale {grad_scale} is not a finite number above 0; pass the expected upstream gradient")


def _check_logits(student: Tensor, teacher: Tensor | None, labels: Tensor | None, alpha: float) -> None:
    if student.ndim != 2 or student.shape[1] == 0:
        raise ValueError(f"student_logits have shape {list(student.shape)}; pass [N, C] with C >= 1")
    _check_floating("student_logits", student)
    if teacher is None:
        if alpha != 0:
            raise ValueError(f"alpha {alpha} needs teacher_logits, not None; pass them or set alpha to 0")
    else:
        if teacher.shape != student.shape:
            raise ValueError(
                f"student_logits {list(student.shape)} and teacher_logits {list(teacher.shape)} differ; "
                f"both models need the same rows and classes"
            )
        _check_floating("teacher_logits", teacher)
        _check_device("teacher_logits", teacher, student)
    if labels is not None:
        if labels.shape != student.shape[:1]:
            raise ValueError(f"labels {list(labels.shape)} do not fit student_logits {list(student.shape)}; pass [N]")
        _check_device("labels", labels, student)
        if student.shape[1] > 1 and labels.is_floating_point():
            raise ValueError(
                f"labels are {labels.dtype} but student_logits {list(student.shape)} have classes; "
                f"pass integer class ids, or logits [N, 1] for regression"
            )


def _check_hidden(
    student_hidden: Sequence[Tensor],
    teacher_hidden: Sequence[Tensor],
    attention_mask: Tensor | None,
    student_logits: Tensor,
) -> None:
    if len(student_hidden) != len(teacher_hidden):
        raise ValueError(
            f"{len(student_hidden)} student_hidden and {len(teacher_hidden)} teacher_hidden states differ in "
            f"number; pass one teacher state per matched student layer"
        )
    for k, (student, teacher) in enumerate(zip(student_hidden, teacher_hidden, strict=True)):
        if student.shape != teacher.shape:
            raise ValueError(
                f"{_shapes(k, student, teacher)} differ; both models need the same batch, length and hidden size"
            )
        if student.ndim not in (2, 3) or student.shape[-1] == 0 or student.shape != student_hidden[0].shape:
            raise ValueError(
                f"{_shapes(k, student, teacher)} are not [B, H] or [B, S, H], or not shaped like the first pair"
            )
        for side, state, first in (("student", student, student_hidden[0]), ("teacher", teacher, teacher_hidden[0])):
            _check_floating(f"{side}_hidden", state, k)
            _check_device(f"{side}_hidden", state, student_logits, k)
            if state.dtype != first.dtype:
                raise ValueError(
                    f"{side}_hidden[{k}] {list(state.shape)} are {state.dtype}, {side}_hidden[0] {first.dtype}; "
                    "use one dtype for all states of a model"
                )
    if student_hidden and student_hidden[0].ndim == 3 and attention_mask is not None:
        if attention_mask.shape != student_hidden[0].shape[:2]:
            raise ValueError(
                f"attention_mask {list(attention_mask.shape)} does not fit hidden states "
                f"{list(student_hidden[0].shape)}; pass [B, S]"
            )
        _check_device("attention_mask", attention_mask, student_logits)


def _shapes(k: int, student: Tensor, teacher: Tensor) -> str:
    return f"student_hidden[{k}] {list(student.shape)} and teacher_hidden[{k}] {list(teacher.shape)}"


def _check_floating(name: str, tensor: Tensor, k: int | None = None) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name}{'' if k is None else f'[{k}]'} are {tensor.dtype}; pass bf16, fp16, fp32 or fp64")


def _check_device(name: str, tensor: Tensor, student_logits: Tensor, k: int | None = None) -> None:
    if tensor.device != student_logits.device:
        raise ValueError(
            f"{name}{'' if k is None else f'[{k}]'} are on {tensor.device}, student_logits on "
            f"{student_logits.device}; use one device"
        )
