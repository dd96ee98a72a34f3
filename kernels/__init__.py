"""The distillation loss: one function, several backends.

Importing this package needs only PyTorch; Triton is imported when its backend is first used.

    reference.py         plain autograd PyTorch, the ground truth
    fused.py             the same loss with gradients computed in the forward pass, by one of two backends:
    torch_backend.py       for CPUs: chunks of plain or compiled PyTorch
    triton_backend.py      for GPUs: launches of
    triton_kernels.py        device code for hidden states and for up to 256 classes
    triton_streaming.py      device code for more classes, which no stage of training has
"""

import functools
import importlib.util
import logging
import math
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from peakd_ds.kernels.fused import Backend, LossInputs, fused_loss
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
_Number = TypeVar("_Number", int, float)

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
    """Hard, soft and hidden-state loss of Patient KD (Sun et al. 2019, arXiv:1908.09355, section 3), and their sum.

        total  = (1 - alpha) * hard + alpha * soft + beta * hidden
        hard   = cross-entropy(student_logits, labels), mean over rows
        soft   = T^2 * KL(softmax(teacher_logits / T) || softmax(student_logits / T)), mean over rows
        hidden = (student / ||student||_2 - teacher / ||teacher||_2)^2, mean over layer pairs, vectors and H

    With C = 1 (regression), `hard` and `soft` are the mean squared errors of the student's score against the label and
    the teacher's score, without T. A mean over no elements (N = 0, all labels ignored, all tokens padding) is 0.

    Inputs are bf16, fp16, fp32 or fp64; student and teacher may differ. The computation is in fp32, or in fp64 if a
    logit or hidden tensor is fp64; the reference is always in fp64. Only the student's tensors receive gradients, and
    only through `total`. Except with the reference, gradients are computed in the forward pass (not under
    `torch.no_grad`), and a second backward raises RuntimeError.

    Precision in fp32: terms are within 2e-6 of float64, relative to the larger of the term and 1, with one exception.
    With more than 256 classes and T <= 20, the `soft` of a row has an absolute error of typically 5e-8 * T^2, at most
    2.5e-7 * T^2 in our tests (2e-5 and 1e-4 at T = 20). At a higher T, or with fewer classes, the KL divergence is
    summed without cancellation and the exception does not apply; with many classes on a CPU this takes 1.4 to 2.7 times
    as long. The gradient of `soft` is T * (q - p), so with nearly flat distributions its relative error is about
    6e-8 * T / d, where d is the typical difference of student and teacher logits.

    Args:
        student_logits: [N, C] pre-softmax scores; -inf masks a class.
        teacher_logits: [N, C], or None: `soft` is then 0, and alpha must be 0.
        labels: [N] class ids in any integer dtype, or scores, float or integer, when C = 1; None: `hard` is 0.
        student_hidden: One tensor per layer pair, all [B, H] ([CLS] vectors) or all [B, S, H]; empty: `hidden` is 0.
        teacher_hidden: The teacher's tensors, in the same order and of the same shape.
        temperature: T of the soft loss, > 0.
        alpha: Weight of `soft`, in [0, 1].
        beta: Weight of `hidden`, >= 0.
        attention_mask: [B, S], 0 at padding tokens, which do not count; None: all tokens count. Ignored with [B, H].
        normalize: L2-normalise each hidden vector first, with eps 1e-12.
        reduction: "batchmean" divides the soft loss by rows, as `torch.nn.KLDivLoss` does; "mean" also divides it by
            C, as the published code of Patient KD and Pea-KD does (with two classes it halves the soft loss).
        ignore_index: Rows with this label are left out of `hard` and `soft`, but not out of `hidden`.
        num_items: Rows to divide `hard`, `soft` and [B, H] `hidden` by, an int or a 0-dim tensor. With the count of
            the global batch, the losses of all micro-batches and ranks add up to its mean. None: `hard` and `soft` are
            divided by the rows that are not ignored, `hidden` by B.
        num_tokens: Tokens to divide [B, S, H] `hidden` by, likewise; None: the tokens that are not padding.
        grad_scale: Expected upstream gradient of `total`, > 0, a number or a 0-dim tensor on the device; for example
            the loss scale of fp16. Gradients are multiplied by it before they are rounded to the student's dtype, so
            small ones do not vanish in fp16 and the backward pass has nothing to do. If the upstream gradient differs,
            the backward pass rescales them. No effect on the reference.
        backend: "triton" (GPUs), "torch" (any device; compiled for large inputs on a CPU), "reference" (plain
            autograd), or "auto": see `choose_backend`.

    Returns:
        DistillationLoss: total, hard, soft, hidden.

    Raises:
        ValueError: A setting is out of range; shapes, dtypes or devices do not match; or the backend cannot run here.
        IndexError: A class id is out of range, on a CPU. On a GPU, which is not synchronised, the loss is NaN
            ("triton") or a device-side assertion fails ("torch" and "reference").
    """
    _check_settings(temperature, alpha, beta, reduction, num_items, num_tokens, grad_scale)
    _check_logits(student_logits, teacher_logits, labels, alpha)
    _check_hidden(student_hidden, teacher_hidden, attention_mask, student_logits)
    if labels is not None:
        labels = _widened(labels)
    device = student_logits.device
    has_tokens = bool(student_hidden) and student_hidden[0].ndim == 3
    attention_mask = attention_mask if has_tokens else None
    num_items, num_tokens = _on_device(num_items, device), _on_device(num_tokens, device)
    dtype = compute_dtype(student_logits, teacher_logits, *student_hidden, *teacher_hidden)
    chosen = _resolve(backend, device, is_double=dtype == torch.float64)
    if chosen == "reference":
        return reference_loss(
            student_logits,
            teacher_logits,
            labels,
            student_hidden,
            teacher_hidden,
            temperature=temperature,
            alpha=alpha,
            beta=beta,
            attention_mask=attention_mask,
            normalize=normalize,
            reduction=reduction,
            ignore_index=ignore_index,
            num_items=num_items,
            num_tokens=num_tokens,
        )
    inputs = LossInputs(
        student_logits_NC=student_logits,
        teacher_logits_NC=None if teacher_logits is None else teacher_logits.detach(),
        labels_N=labels,
        student_hidden_BSH=tuple(student_hidden),
        teacher_hidden_BSH=tuple(states.detach() for states in teacher_hidden),
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        attention_mask_BS=attention_mask,
        normalize=normalize,
        reduction=reduction,
        ignore_index=ignore_index,
        num_items=num_items,
        num_tokens=num_tokens,
        grad_scale=1.0 if grad_scale is None else cast(float | Tensor, _on_device(grad_scale, device)),
    )
    return fused_loss(_backend_module(chosen), inputs)


class DistillationLossModule(nn.Module):
    """`distillation_loss` as a module that holds the settings."""

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
        """The loss of these inputs; arguments, result and errors as in `distillation_loss`."""
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
    """The backend that "auto" selects on a device type such as "cuda" (NVIDIA or AMD) or "cpu", and the reason.

    Logged at the first call for each device type.
    """
    if device_type != "cuda":
        chosen, reason = "torch", f"tensors are on {device_type}"
    elif importlib.util.find_spec("triton") is None:
        chosen, reason = "torch", "there is a GPU, but triton is not installed"
    else:
        chosen, reason = "triton", "tensors are on a GPU"
    logger.info("distillation loss: backend %s, since %s", chosen, reason)
    return chosen, reason


def check_backend(backend: str, device: torch.device, is_double: bool = False) -> None:
    """Check that a backend exists and can run on a device.

    Args:
        backend: One of `BACKENDS`.
        device: Where the tensors are.
        is_double: Whether a tensor is fp64.

    Raises:
        ValueError: It does not or cannot; the message has the remedy.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    if backend != "triton":
        return
    if is_double:
        raise ValueError("backend 'triton' computes in fp32, and a tensor is fp64; use backend 'torch' or 'reference'")
    if device.type != "cuda" and not _is_triton_interpreted():
        raise ValueError(
            f"backend 'triton' needs a GPU, and the tensors are on {device}; use backend 'torch', or set "
            "TRITON_INTERPRET=1 before the program starts (slow, for tests)"
        )
    if importlib.util.find_spec("triton") is None:
        raise ValueError("backend 'triton' needs triton, which is not installed; install it or use backend 'torch'")


def _resolve(backend: str, device: torch.device, is_double: bool) -> str:
    """The backend to run: the argument after a check, or the choice for "auto"."""
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


def _backend_module(name: str) -> Backend:
    if name == "triton":
        from peakd_ds.kernels import triton_backend

        return triton_backend
    from peakd_ds.kernels import torch_backend

    return torch_backend


def _on_device(value: _Number | Tensor | None, device: torch.device) -> _Number | Tensor | None:
    """A count or scale that kernels on the device can read: a number, or a tensor on the device."""
    if isinstance(value, Tensor) and value.device != device:
        return cast(_Number, value.item()) if value.device.type == "cpu" else value.to(device)
    return value


def _widened(labels: Tensor) -> Tensor:
    """Labels in a dtype that can represent ignore_index: int64 for integers, at least fp32 for floats.

    In a narrow dtype the comparison with ignore_index wraps or rounds: -100 is 156 in uint8, 257 is 256 in bf16.
    """
    if not labels.is_floating_point():
        return labels.long()
    return labels.float() if labels.itemsize < 4 else labels


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
        raise ValueError(f"alpha {alpha} is not in [0, 1]; 0 uses labels only, 1 teacher logits only")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta {beta} is not a finite number >= 0; 0 disables the hidden-state loss")
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
            raise ValueError(f"labels {list(labels.shape)} do not match student_logits {list(student.shape)}; pass [N]")
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
                f"attention_mask {list(attention_mask.shape)} does not match hidden states "
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
