"""The distillation loss behind one function, whatever computes it.

This package imports wherever PyTorch does: a backend that needs more imports it when it is first asked for.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from peakd_ds.kernels.reference import DistillationLoss, reference_loss

__all__ = ["DistillationLoss", "distillation_loss"]

_BACKENDS = ("auto", "reference")
_REDUCTIONS = ("batchmean", "mean")


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

    Any mix of bf16, fp16, fp32 and fp64 is taken, and computed in fp32, or in fp64 when a logit or hidden
    tensor is fp64. Teacher tensors never receive a gradient.

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
        grad_scale: for backends that compute gradients in the forward pass. No effect on the reference, whose
            autograd takes any upstream gradient.
        backend: "auto" or "reference": plain PyTorch is the one backend of this build.

    Returns:
        DistillationLoss; only `total` carries a gradient.

    Raises:
        ValueError: a setting is out of range, or shapes, dtypes or devices do not fit together. Class ids are
            not looked at, which would synchronise with the GPU: PyTorch's own error reports one out of range.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend {backend!r} is not in this build; it has {', '.join(_BACKENDS)}")
    _check_settings(temperature, alpha, beta, reduction, num_items, num_tokens)
    _check_logits(student_logits, teacher_logits, labels, alpha)
    _check_hidden(student_hidden, teacher_hidden, attention_mask, student_logits)
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


def _check_settings(
    temperature: float,
    alpha: float,
    beta: float,
    reduction: str,
    num_items: int | Tensor | None,
    num_tokens: int | Tensor | None,
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
        shapes = f"student_hidden[{k}] {list(student.shape)} and teacher_hidden[{k}] {list(teacher.shape)}"
        if student.shape != teacher.shape:
            raise ValueError(f"{shapes} differ; both models need the same batch, length and hidden size")
        if student.ndim not in (2, 3) or student.shape[-1] == 0 or student.shape != student_hidden[0].shape:
            raise ValueError(f"{shapes} are not [B, H] or [B, S, H], or not shaped like the first pair")
        for name, state in ((f"student_hidden[{k}]", student), (f"teacher_hidden[{k}]", teacher)):
            _check_floating(name, state)
            _check_device(name, state, student_logits)
    if student_hidden and student_hidden[0].ndim == 3 and attention_mask is not None:
        if attention_mask.shape != student_hidden[0].shape[:2]:
            raise ValueError(
                f"attention_mask {list(attention_mask.shape)} does not fit hidden states "
                f"{list(student_hidden[0].shape)}; pass [B, S]"
            )
        _check_device("attention_mask", attention_mask, student_logits)


def _check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} are {tensor.dtype}; pass bf16, fp16, fp32 or fp64")


def _check_device(name: str, tensor: Tensor, student_logits: Tensor) -> None:
    if tensor.device != student_logits.device:
        raise ValueError(f"{name} are on {tensor.device}, student_logits on {student_logits.device}; use one device")
