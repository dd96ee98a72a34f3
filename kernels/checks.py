"""Checks of the arguments of `distillation_loss`; each raises ValueError with the value, the rule and the remedy."""

import math
from collections.abc import Sequence

from torch import Tensor

REDUCTIONS = ("batchmean", "mean")


def check_settings(
    temperature: float,
    alpha: float,
    beta: float,
    reduction: str,
    num_items: int | Tensor | None = None,
    num_tokens: int | Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    label_divisor: float | Tensor | None = None,
) -> None:
    """Check the numbers and names among the arguments; the value of a tensor is not read."""
    if not 0 < temperature < math.inf:  # also catches NaN
        raise ValueError(f"temperature {temperature} is not a finite number above 0; Pea-KD uses 10")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha} is not in [0, 1]; 0 uses labels only, 1 teacher logits only")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta {beta} is not a finite number >= 0; 0 disables the hidden-state loss")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} is unknown; use {' or '.join(map(repr, REDUCTIONS))}")
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
    if isinstance(label_divisor, Tensor):
        if label_divisor.ndim != 0:
            raise ValueError(f"label_divisor has shape {list(label_divisor.shape)}, not []; pass a 0-dim tensor")
    elif label_divisor is not None and not 0 <= label_divisor < math.inf:
        raise ValueError(
            f"label_divisor {label_divisor} is not a finite number >= 0; pass the sum of the global batch's weights"
        )


def check_logits(student: Tensor, teacher: Tensor | None, alpha: float) -> None:
    """Check the logits of both models, and that there is what alpha weighs."""
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


def check_labels(
    labels: Tensor | None, label_weights: Tensor | None, student_logits: Tensor, is_multi_label: bool
) -> None:
    """Check labels and their weights against the student's logits, which are checked already."""
    shape = list(student_logits.shape)
    if labels is not None:
        num_dims = 2 if is_multi_label else 1
        if labels.shape != student_logits.shape[:num_dims]:
            expected = "[N, C] with multi_label" if is_multi_label else "[N]"
            raise ValueError(f"labels {list(labels.shape)} do not match student_logits {shape}; pass {expected}")
        _check_device("labels", labels, student_logits)
        if shape[1] > 1 and labels.is_floating_point() and not is_multi_label:
            raise ValueError(
                f"labels are {labels.dtype} but student_logits {shape} have classes; "
                f"pass integer class ids, or logits [N, 1] for regression"
            )
    if label_weights is not None:
        if labels is None:
            raise ValueError("label_weights weigh labels, which are None; pass labels, or no weights")
        if label_weights.shape != student_logits.shape[:1]:
            raise ValueError(f"label_weights {list(label_weights.shape)} do not match student_logits {shape}; pass [N]")
        _check_floating("label_weights", label_weights)
        _check_device("label_weights", label_weights, student_logits)


def check_hidden(
    student_hidden: Sequence[Tensor],
    teacher_hidden: Sequence[Tensor],
    attention_mask: Tensor | None,
    student_logits: Tensor,
) -> None:
    """Check the hidden states of both models, and the mask if they are [B, S, H]."""
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
