"""The fused loss in plain PyTorch: the path for CPUs, and the one that runs anywhere.

Rows are taken in chunks that stay in the cache, layers one after another, and each chunk's gradient is computed beside
its loss. Large inputs go through `torch.compile`, which makes one loop of a chunk's operations, where there is a C++
compiler; small ones would only wait for it.
"""

import functools
import logging
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peakd_ds.kernels.fused import Computed, LossCall
from peakd_ds.kernels.reference import at_least_one, compute_dtype

logger = logging.getLogger(__name__)

CHUNK_ELEMENTS = 2**21
"""Elements of one chunk: what the cache holds of it and its few temporaries."""
FEW_CLASSES = 256
"""Up to so many classes the soft loss takes a form that costs more and rounds less."""
COMPILED_FROM = 2**22
"""Elements of a call from which compiling its chunks, some ten seconds once in a process, is worth the wait."""


def compute(call: LossCall, logits_grad: bool, hidden_grad: bool) -> Computed:
    """See `peakd_ds.kernels.fused`."""
    dtype = compute_dtype(call.student_logits, call.teacher_logits, *call.student_hidden, *call.teacher_hidden)
    hard = soft = hidden = zero = call.student_logits.new_zeros((), dtype=dtype)
    of_logits: Tensor | None = None
    of_hidden: tuple[Tensor, ...] = ()
    if call.labels is not None or call.teacher_logits is not None:
        hard, soft, of_logits = _logits_loss(call, dtype, logits_grad)
    if call.student_hidden:
        hidden, of_hidden = _hidden_loss(call, dtype, hidden_grad and call.beta > 0)
    weighted = ((1 - call.alpha, hard), (call.alpha, soft), (call.beta, hidden))
    total = zero.clone()
    for weight, term in weighted:
        if weight != 0:
            total += weight * term
    return Computed(total, (hard.clone(), soft.clone(), hidden.clone()), of_logits, of_hidden)


def rescale(gradients: Sequence[Tensor], upstream: Tensor, grad_scale: float | Tensor) -> None:
    """See `peakd_ds.kernels.fused`. On a CPU the factor is looked at; elsewhere that would wait for the device."""
    factor = upstream / torch.as_tensor(grad_scale, dtype=upstream.dtype)
    if factor.device.type == "cpu" and abs(factor - 1) <= 2 * torch.finfo(factor.dtype).eps:
        return  # 1 but for rounding
    for gradient in gradients:
        gradient.mul_(factor)


# -- Logits ------------------------------------------------------------------------------------------------------------


def _logits_loss(call: LossCall, dtype: torch.dtype, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Means of the hard and the soft loss, and the gradient of their weighted sum."""
    student, teacher, labels, kept = call.student_logits, call.teacher_logits, call.labels, None
    num_rows = call.rows_given
    if labels is not None:
        kept = labels != call.ignore_index
        num_rows = kept.sum() if num_rows is None else num_rows
        if not call.is_regression:
            _check_class_ids(labels, kept, call.num_classes)
            labels = labels.long().masked_fill(~kept, 0)
    assert num_rows is not None  # without labels, all rows count
    per_row = torch.as_tensor(at_least_one(num_rows), dtype=dtype, device=student.device).reciprocal()
    grad_scale = torch.as_tensor(call.grad_scale, dtype=dtype, device=student.device)
    # a term that does not count in the total, or is not there, leaves no trace in the gradient
    hard_weight = 1 - call.alpha if labels is not None else 0.0
    soft_weight = call.alpha * call.soft_grad_factor if teacher is not None else 0.0
    needs_grad = needs_grad and (hard_weight != 0 or soft_weight != 0)
    grad = torch.empty_like(student, memory_format=torch.contiguous_format) if needs_grad else None

    chunk_loss = _maybe_compiled(_regression_chunk if call.is_regression else _classes_chunk, student)
    hard, soft = per_row.new_zeros(()), per_row.new_zeros(())
    chunk_rows = max(1, CHUNK_ELEMENTS // call.num_classes)
    for start in range(0, len(student), chunk_rows):
        rows = slice(start, start + chunk_rows)
        chunk_hard, chunk_soft = chunk_loss(
            *(None if tensor is None else tensor[rows] for tensor in (student, teacher, labels, kept, grad)),
            torch.as_tensor(call.temperature, dtype=dtype, device=student.device),
            per_row * grad_scale * hard_weight if hard_weight != 0 else None,
            per_row * grad_scale * soft_weight if soft_weight != 0 else None,
        )
        hard, soft = hard + chunk_hard, soft + chunk_soft
    return hard * per_row, soft * call.soft_factor * per_row, grad


def _check_class_ids(labels: Tensor, kept: Tensor, num_classes: int) -> None:
    """As PyTorch's own: an IndexError on a CPU; on other devices the gather below stops the device."""
    if labels.device.type == "cpu":
        wrong = kept & ((labels < 0) | (labels >= num_classes))
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise IndexError(f"label {int(labels[row])} of row {row} is out of bounds for {num_classes} classes")


def _regression_chunk(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    kept: Tensor | None,
    grad: Tensor | None,
    temperature: Tensor,
    hard_weight: Tensor | None,
    soft_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sums of squared errors of scores [n, 1]; the gradient goes into `grad`."""
    hard = soft = torch.zeros_like(temperature)
    total_grad = torch.zeros_like(student, dtype=temperature.dtype)
    for target, weight in ((None if labels is None else labels[:, None], hard_weight), (teacher, soft_weight)):
        if target is None:
            continue
        error = student.to(temperature.dtype) - target.to(temperature.dtype)
        if kept is not None:
            error = error.masked_fill(~kept[:, None], 0)
        squared = error.square().sum()
        if target is teacher:
            soft = squared
        else:
            hard = squared
        if weight is not None:
            total_grad += error * (2 * weight)
    if grad is not None:
        grad.copy_(total_grad)
    return hard, soft


def _classes_chunk(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    kept: Tensor | None,
    grad: Tensor | None,
    temperature: Tensor,
    hard_weight: Tensor | None,
    soft_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sums of cross-entropy and KL over rows [n, C]; the gradient goes into `grad`.

    Logits are shifted by their maximum before they are divided by T, which keeps differences of large logits exact. A
    row that is not kept becomes zeros in student and teacher, so what it holds, even NaN, is gone.
    """
    dtype = temperature.dtype
    hard = soft = whole_grad = label_grad = torch.zeros_like(temperature)
    student = student.to(dtype)
    if kept is not None:
        student = student.masked_fill(~kept[:, None], 0)
    student = student - student.amax(dim=1, keepdim=True)
    if labels is not None:
        assert kept is not None
        exp_student = student.exp()
        total = exp_student.sum(dim=1, keepdim=True)
        label_logit = student.gather(1, labels[:, None])
        hard = (total.log() - label_logit).masked_fill(~kept[:, None], 0).sum()
        if grad is not None and hard_weight is not None:
            factor = hard_weight * kept[:, None] / total
            whole_grad = exp_student * factor  # without the label's 1, which its column alone gets, at the end
            label_grad = label_logit.exp() * factor - hard_weight * kept[:, None]
    if teacher is not None:
        teacher = teacher.to(dtype)
        if kept is not None:
            teacher = teacher.masked_fill(~kept[:, None], 0)
        teacher = (teacher - teacher.amax(dim=1, keepdim=True)) / temperature
        student = student / temperature
        exp_student, exp_teacher = student.exp(), teacher.exp()
        student_total = exp_student.sum(dim=1, keepdim=True)
        teacher_total = exp_teacher.sum(dim=1, keepdim=True)
        soft = _divergence(student, teacher, exp_student, exp_teacher, student_total, teacher_total).sum()
        if grad is not None and soft_weight is not None:
            row_weight = soft_weight if kept is None else soft_weight * kept[:, None]
            student_factor, teacher_factor = row_weight / student_total, row_weight / teacher_total
            whole_grad = whole_grad + exp_student * student_factor - exp_teacher * teacher_factor
            if labels is not None and hard_weight is not None:
                label_teacher = teacher.gather(1, labels[:, None])
                label_grad = label_grad + (label_logit / temperature).exp() * student_factor
                label_grad = label_grad - label_teacher.exp() * teacher_factor
    if grad is not None:
        grad.copy_(whole_grad)
        if labels is not None and hard_weight is not None:
            grad.scatter_(1, labels[:, None], label_grad.to(grad.dtype))
    return hard, soft


def _divergence(
    student: Tensor,
    teacher: Tensor,
    exp_student: Tensor,
    exp_teacher: Tensor,
    student_total: Tensor,
    teacher_total: Tensor,
) -> Tensor:
    """KL of rows [n, 1]: m + log r, with r = student_total / teacher_total, d = teacher - student, m its mean under p.

    At a high temperature both models are nearly flat, m and log r all but cancel, and T^2 magnifies what rounding
    leaves. So where the divergence of a few classes is small it is taken as log1p(u) of a sum without cancellation,
    u = sum of p (exp(m - d) - 1 - (m - d)), to which classes without a teacher's mass (p = 0) add exp(m) q / p_total.
    """
    has_mass = exp_teacher > 0  # 0 * log 0 = 0
    d = torch.where(has_mass, teacher - student, 0)
    m = (exp_teacher * d).sum(dim=1, keepdim=True) / teacher_total
    plain = m + (student_total / teacher_total).log()
    if student.shape[1] > FEW_CLASSES or student.dtype == torch.float64:
        return plain
    x = m - d
    excess = torch.where(x.abs() < 0.25, _exp_minus_tangent(x), x.exp() - 1 - x)
    u = (torch.where(has_mass, exp_teacher * excess, exp_student * m.exp()) / teacher_total).sum(dim=1, keepdim=True)
    return torch.where(u < 0.25, u.log1p(), plain)


def _exp_minus_tangent(x: Tensor) -> Tensor:
    """exp(x) - 1 - x near 0, by its series."""
    return x.square() * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x / 5040)))))


# -- Hidden states -----------------------------------------------------------------------------------------------------


def _hidden_loss(call: LossCall, dtype: torch.dtype, needs_grad: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Mean squared distance over pairs, vectors and H, and for each pair the gradient of `beta` times it, [1, ...].

    A tensor for each pair: the allocator keeps blocks of such a size, and gives the system back larger ones, which
    would then have to be cleared anew in every step.
    """
    first = call.student_hidden[0]
    kept = None if call.attention_mask is None else call.attention_mask != 0
    num_vectors = call.vectors_given
    if num_vectors is None:
        assert kept is not None
        num_vectors = kept.sum()
    factor = torch.as_tensor(at_least_one(num_vectors), dtype=dtype, device=first.device).reciprocal()
    factor = factor * call.hidden_factor
    grad_factor = factor * torch.as_tensor(call.grad_scale, dtype=dtype, device=first.device) * (2 * call.beta)
    num_pairs = len(call.student_hidden)
    grads = []
    chunk_loss = _maybe_compiled(_hidden_chunk, first, num_pairs)
    samples = max(1, CHUNK_ELEMENTS // max(1, first[:1].numel()))
    squared = factor.new_zeros(())
    for student, teacher in zip(call.student_hidden, call.teacher_hidden, strict=True):
        grad = torch.empty(student.shape, dtype=student.dtype, device=student.device) if needs_grad else None
        if grad is not None:
            grads.append(grad[None])
        for start in range(0, len(student), samples):
            part = slice(start, start + samples)
            squared = squared + chunk_loss(
                student[part],
                teacher[part],
                None if kept is None else kept[part],
                None if grad is None else grad[part],
                grad_factor,
                call.normalize,
            )
    return squared * factor, tuple(grads)


def _hidden_chunk(
    student: Tensor, teacher: Tensor, kept: Tensor | None, grad: Tensor | None, grad_factor: Tensor, normalize: bool
) -> Tensor:
    """Sum of squared differences of vectors [..., H]; the gradient goes into `grad`."""
    student, teacher = student.to(grad_factor.dtype), teacher.to(grad_factor.dtype)
    if kept is not None:
        student = student.masked_fill(~kept[..., None], 0)
        teacher = teacher.masked_fill(~kept[..., None], 0)
    if normalize:
        length = torch.linalg.vector_norm(student, dim=-1, keepdim=True)
        inverse = length.clamp_min(1e-12).reciprocal()
        teacher_length = torch.linalg.vector_norm(teacher, dim=-1, keepdim=True)
        unit = student * inverse
        difference = unit - teacher * teacher_length.clamp_min(1e-12).reciprocal()
        if grad is not None:
            # d/ds of |s/|s| - t|^2 / 2 is (d - u (u.d)) / |s|; below the eps the length is a constant
            along = torch.linalg.vecdot(unit, difference)[..., None].masked_fill(length <= 1e-12, 0)
            grad.copy_(torch.addcmul(difference, unit, along, value=-1) * (inverse * grad_factor))
    else:
        difference = student - teacher
        if grad is not None:
            grad.copy_(difference * grad_factor)
    return difference.square().sum()


# -- Compilation -------------------------------------------------------------------------------------------------------


def _maybe_compiled(function: Callable[..., Any], first: Tensor, count: int = 1) -> Callable[..., Any]:
    """`function`, compiled where the call is large and there is a C++ compiler."""
    if first.device.type != "cpu" or first.numel() * count < COMPILED_FROM or not _has_compiler():
        return function
    return _compiled(function)


@functools.cache
def _has_compiler() -> bool:
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(function, dynamic=True)
    is_broken = False

    def run(*arguments: Any) -> Any:
        nonlocal is_broken
        if not is_broken:
            try:
                return compiled(*arguments)
            except torch._dynamo.exc.TorchDynamoException as error:
                is_broken = True
                reason = str(error).strip().splitlines()[0]
                logger.warning("torch.compile failed for the loss, which now runs uncompiled and slower: %s", reason)
        return function(*arguments)

    return run
