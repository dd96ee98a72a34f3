"""The distillation loss: one function, several backends.

Importing this package needs only PyTorch; Triton is imported when its backend is first used.

    checks.py            the rules for its arguments
    reference.py         plain autograd PyTorch, the ground truth
    fused.py             the same loss with gradients computed in the forward pass, by one of two backends:
    torch_backend.py       for CPUs: chunks of plain or compiled PyTorch
    torch_multi_label.py     a chunk with a yes or no in each class
    triton_backend.py      for GPUs: launches of
    triton_kernels.py        device code for hidden states and for up to 256 classes
    triton_multi_label.py    device code for a yes or no in each class
    triton_streaming.py      device code for more classes, which no stage of training has
"""

import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from peakd_ds.kernels.checks import check_hidden, check_labels, check_logits, check_settings
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
    label_weights: Tensor | None = None,
    label_divisor: float | Tensor | None = None,
    multi_label: bool = False,
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

    With `multi_label`, each class is a yes or no of its own, also with C = 1; p = sigmoid(student_logits):

        hard   = -(y log p + (1 - y) log(1 - p)) with labels y, mean over C, then over rows
        soft   = T^2 * KL(sigmoid(teacher_logits / T) || sigmoid(student_logits / T)), summed over C, mean over rows

    where the KL divergence of two probabilities is that of yes and no, a log(a / b) + (1 - a) log((1 - a) / (1 - b)).
    A logit of -inf is a certain no, inf a certain yes. An element has no hard loss if it is certain of its label,
    and an infinite one if it is certain of the opposite; it has no soft loss if student and teacher are equal, and an
    infinite one if the student is certain of what the teacher is not. Gradients stay finite.

    With `label_weights` w or `label_divisor` d, the mean over rows of `hard` is a weighted one:

        hard   = sum over rows of w * (hard loss of the row) / d

    Without weights w is 1; without a divisor d is the sum of w, as in F.cross_entropy(weight=).

    Inputs are bf16, fp16, fp32 or fp64; student and teacher may differ. The computation is in fp32, or in fp64 if a
    logit or hidden tensor is fp64; the reference is always in fp64. Only the student's tensors receive gradients, and
    only through `total`. Except with the reference, gradients are computed in the forward pass (not under
    `torch.no_grad`), and a second backward raises RuntimeError.

    Precision in fp32: terms are within 2e-6 of float64, relative to the larger of the term and 1, with one exception.
    With more than 256 classes and T <= 20, the `soft` of a row has an absolute error of typically 5e-8 * T^2, at most
    2.5e-7 * T^2 in our tests (2e-5 and 1e-4 at T = 20). At a higher T, with fewer classes, or with `multi_label`, the
    KL divergence is summed without cancellation and the exception does not apply; with many classes on a CPU this takes
    1.4 to 2.7 times as long. The gradient of `soft` is T * (q - p), so with nearly flat distributions its relative
    error is about 6e-8 * T / d, where d is the typical difference of student and teacher logits.

    Args:
        student_logits: [N, C] pre-softmax scores; -inf masks a class.
        teacher_logits: [N, C], or None: `soft` is then 0, and alpha must be 0.
        labels: [N] class ids in any integer dtype, or scores, float or integer, when C = 1; with `multi_label`, [N, C]
            of 0 and 1 in any dtype (a number between them is a probability). None: `hard` is 0.
        student_hidden: One tensor per layer pair, all [B, H] ([CLS] vectors) or all [B, S, H]; empty: `hidden` is 0.
        teacher_hidden: The teacher's tensors, in the same order and of the same shape.
        temperature: T of the soft loss, > 0.
        alpha: Weight of `soft`, in [0, 1].
        beta: Weight of `hidden`, >= 0.
        attention_mask: [B, S], 0 at padding tokens, which do not count; None: all tokens count. Ignored with [B, H].
        normalize: L2-normalise each hidden vector first, with eps 1e-12.
        reduction: "batchmean" divides the soft loss by rows, as `torch.nn.KLDivLoss` does; "mean" also divides it by
            C, as the published code of Patient KD and Pea-KD does (with two classes it halves the soft loss).
        ignore_index: Rows with this label are left out of `hard` and `soft`, but not out of `hidden`. No effect with
            `multi_label`, where `label_weights` leaves rows out of `hard`.
        label_weights: [N] floats >= 0, the weight of each row's hard loss; for class weights, pass
            class_weights[labels]. A row of weight 0 is left out of `hard` alone: whatever its logits and label, it
            adds exactly 0 to `hard` and its gradient. None: `hard` has no weights.
        label_divisor: What the weighted sum of hard losses is divided by, in place of `num_items`: a number or a 0-dim
            tensor. With the sum of the weights of the global batch, the losses of all micro-batches and ranks add up
            to its weighted mean. 0 means that no row has a label: `hard` and its gradient are 0. None: with
            `label_weights`, the sum of the weights of the rows that are not ignored; else the rows, as for `soft`.
        multi_label: Each class is a yes or no of its own, instead of one class in C.
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
    check_settings(temperature, alpha, beta, reduction, num_items, num_tokens, grad_scale, label_divisor)
    check_logits(student_logits, teacher_logits, alpha)
    check_labels(labels, label_weights, student_logits, multi_label)
    check_hidden(student_hidden, teacher_hidden, attention_mask, student_logits)
    if labels is not None and not multi_label:
        labels = _widened(labels)
    device = student_logits.device
    has_tokens = bool(student_hidden) and student_hidden[0].ndim == 3
    attention_mask = attention_mask if has_tokens else None
    num_items, num_tokens = _on_device(num_items, device), _on_device(num_tokens, device)
    label_divisor = _on_device(label_divisor, device)
    dtype = compute_dtype(student_logits, teacher_logits, *student_hidden, *teacher_hidden)
    if label_weights is not None:
        label_weights = label_weights.detach().to(dtype)
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
            label_weights=label_weights,
            label_divisor=label_divisor,
            multi_label=multi_label,
            num_items=num_items,
            num_tokens=num_tokens,
        )
    inputs = LossInputs(
        student_logits_NC=student_logits,
        teacher_logits_NC=None if teacher_logits is None else teacher_logits.detach(),
        labels_N=None if multi_label else labels,
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
        labels_NC=labels if multi_label else None,
        label_weights_N=label_weights,
        label_divisor=label_divisor,
        multi_label=multi_label,
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
        multi_label: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_settings(temperature, alpha, beta, reduction)
        if backend not in BACKENDS:
            raise ValueError(f"backend {backend!r} is unknown; use one of {', '.join(BACKENDS)}")
        self.settings: dict[str, Any] = dict(
            temperature=temperature,
            alpha=alpha,
            beta=beta,
            normalize=normalize,
            reduction=reduction,
            ignore_index=ignore_index,
            multi_label=multi_label,
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
        label_weights: Tensor | None = None,
        label_divisor: float | Tensor | None = None,
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
            label_weights=label_weights,
            label_divisor=label_divisor,
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
