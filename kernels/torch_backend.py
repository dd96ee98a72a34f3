"""The fused loss in PyTorch: the backend for CPUs, which also runs on other devices.

Rows are processed in chunks that stay in the cache, one layer pair after another, and each chunk computes its gradient
together with its loss. Chunks of large inputs go through `torch.compile`, which fuses their operations, if there is a
C++ compiler; small inputs do not repay the compilation.

Shape suffixes as in `reference.py`; in a chunk, N and B count the rows of the chunk.
"""

import functools
import logging
import shutil
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from peakd_ds.kernels.fused import LossAndGrads, LossInputs
from peakd_ds.kernels.reference import at_least_one, compute_dtype
from peakd_ds.kernels.torch_multi_label import multi_label_chunk

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

CHUNK_ELEMENTS = 2**21
"""Elements per chunk, few enough that a chunk and its temporaries stay in the cache."""
COMPILED_FROM = 2**22
"""Elements of an input from which compiling its chunks pays: about ten seconds, once per process."""


def compute(inputs: LossInputs, needs_grad_logits: bool, needs_grad_hidden: bool) -> LossAndGrads:
    """Loss, and the gradients that are needed; see `peakd_ds.kernels.fused.Backend`."""
    dtype = compute_dtype(
        inputs.student_logits_NC, inputs.teacher_logits_NC, *inputs.student_hidden_BSH, *inputs.teacher_hidden_BSH
    )
    hard = soft = hidden = zero = inputs.student_logits_NC.new_zeros((), dtype=dtype)
    grad_logits_NC: Tensor | None = None
    grad_hidden_KBSH: tuple[Tensor, ...] = ()
    if inputs.has_labels or inputs.teacher_logits_NC is not None:
        hard, soft, grad_logits_NC = _logits_loss(inputs, dtype, needs_grad_logits)
    if inputs.student_hidden_BSH:
        hidden, grad_hidden_KBSH = _hidden_loss(inputs, dtype, needs_grad_hidden and inputs.beta > 0)
    weighted_terms = ((1 - inputs.alpha, hard), (inputs.alpha, soft), (inputs.beta, hidden))
    total = zero.clone()
    for weight, term in weighted_terms:
        if weight != 0:  # the loss of a masked class is inf, and 0 * inf is NaN
            total += weight * term
    return LossAndGrads(total, (hard.clone(), soft.clone(), hidden.clone()), grad_logits_NC, grad_hidden_KBSH)


def rescale(grads: Sequence[Tensor], grad_total: Tensor, grad_scale: float | Tensor) -> None:
    """Multiply gradients in place by grad_total / grad_scale; see `peakd_ds.kernels.fused.Backend`."""
    factor = grad_total / torch.as_tensor(grad_scale, dtype=grad_total.dtype)
    # Only on a CPU is the factor compared with 1: on other devices that would synchronise.
    if factor.device.type == "cpu" and abs(factor - 1) <= 2 * torch.finfo(factor.dtype).eps:
        return
    for grad in grads:
        grad.mul_(factor)


# -- Logits ------------------------------------------------------------------------------------------------------------


def _logits_loss(inputs: LossInputs, dtype: torch.dtype, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hard and soft loss, and the gradient of their weighted sum, [N, C]."""
    student_NC, teacher_NC, labels_N = inputs.student_logits_NC, inputs.teacher_logits_NC, inputs.labels_N
    device = student_NC.device
    label_weights_N, inverse_divisor = _label_weights(inputs, dtype)
    is_valid_N: Tensor | None = None
    num_rows = inputs.row_divisor
    if labels_N is not None:
        is_valid_N = labels_N != inputs.ignore_index
        num_rows = is_valid_N.sum() if num_rows is None else num_rows
        if not inputs.is_regression:
            is_read_N = is_valid_N if label_weights_N is None else is_valid_N & (label_weights_N != 0)
            _check_class_ids(labels_N, is_read_N, inputs.num_classes)
            labels_N = labels_N.masked_fill(~is_read_N, 0)
    assert num_rows is not None  # without labels, the divisor is the number of rows
    inverse_rows = torch.as_tensor(at_least_one(num_rows), dtype=dtype, device=device).reciprocal()
    inverse_divisor = inverse_rows if inverse_divisor is None else inverse_divisor
    grad_scale = torch.as_tensor(inputs.grad_scale, dtype=dtype, device=device)
    # A term of weight 0, or without its input, is left out of the gradient.
    hard_weight = 1 - inputs.alpha if inputs.has_labels else 0.0
    soft_weight = inputs.alpha * inputs.soft_grad_factor if teacher_NC is not None else 0.0
    needs_grad = needs_grad and (hard_weight != 0 or soft_weight != 0)
    grad_NC = torch.empty_like(student_NC, memory_format=torch.contiguous_format) if needs_grad else None

    labels = inputs.labels_NC if inputs.multi_label else labels_N
    chunk_loss = _maybe_compiled(_chunk_of(inputs), student_NC)
    hard, soft = inverse_rows.new_zeros(()), inverse_rows.new_zeros(())
    chunk_rows = max(1, CHUNK_ELEMENTS // inputs.num_classes)
    for start in range(0, len(student_NC), chunk_rows):
        rows = slice(start, start + chunk_rows)
        chunk_hard, chunk_soft = chunk_loss(
            student_NC[rows],
            _slice(teacher_NC, rows),
            _slice(labels, rows),
            _slice(is_valid_N, rows),
            _slice(label_weights_N, rows),
            _slice(grad_NC, rows),
            torch.as_tensor(inputs.temperature, dtype=dtype, device=device),
            inverse_divisor * grad_scale * hard_weight if hard_weight != 0 else None,
            inverse_rows * grad_scale * soft_weight if soft_weight != 0 else None,
            inputs.needs_precise_kl,
        )
        hard, soft = hard + chunk_hard, soft + chunk_soft
    return hard * inverse_divisor, soft * inputs.soft_factor * inverse_rows, grad_NC


def _label_weights(inputs: LossInputs, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Weights of the rows' hard losses and the inverse of their divisor, both 0 if no row has a label; or None."""
    divisor = inputs.hard_divisor
    if divisor is None:
        return None, None
    student_NC = inputs.student_logits_NC
    divisor = torch.as_tensor(divisor, dtype=dtype, device=student_NC.device)
    has_labels = divisor > 0
    weights_N = inputs.label_weights_N
    if weights_N is None:
        weights_N = student_NC.new_ones(len(student_NC), dtype=dtype)
    return weights_N.masked_fill(~has_labels, 0), divisor.reciprocal().masked_fill(~has_labels, 0)


def _chunk_of(inputs: LossInputs) -> Callable[..., tuple[Tensor, Tensor]]:
    if inputs.multi_label:
        return multi_label_chunk
    return _regression_chunk if inputs.is_regression else _classes_chunk


def _check_class_ids(labels_N: Tensor, is_valid_N: Tensor, num_classes: int) -> None:
    """Raise IndexError on a CPU, as PyTorch does; on other devices the gather below fails on the device."""
    if labels_N.device.type == "cpu":
        is_wrong_N = is_valid_N & ((labels_N < 0) | (labels_N >= num_classes))
        if is_wrong_N.any():
            row = int(is_wrong_N.nonzero()[0])
            raise IndexError(f"label {int(labels_N[row])} of row {row} is out of bounds for {num_classes} classes")


def _regression_chunk(
    student_NC: Tensor,
    teacher_NC: Tensor | None,
    labels_N: Tensor | None,
    is_valid_N: Tensor | None,
    label_weights_N: Tensor | None,
    grad_NC: Tensor | None,
    temperature: Tensor,
    hard_weight: Tensor | None,
    soft_weight: Tensor | None,
    precise_kl: bool,
) -> tuple[Tensor, Tensor]:
    """Squared errors of scores, C = 1, summed over rows; writes `grad_NC`.

    Of temperature only the dtype matters, and precise_kl not at all: the signature is that of `_classes_chunk`.
    """
    hard = soft = torch.zeros_like(temperature)
    total_grad_NC = torch.zeros_like(student_NC, dtype=temperature.dtype)
    labels_NC = None if labels_N is None else labels_N[:, None]
    for target_NC, weight in ((labels_NC, hard_weight), (teacher_NC, soft_weight)):
        if target_NC is None:
            continue
        error_NC = student_NC.to(temperature.dtype) - target_NC.to(temperature.dtype)
        if is_valid_N is not None:
            error_NC = error_NC.masked_fill(~is_valid_N[:, None], 0)
        if target_NC is labels_NC and label_weights_N is not None:
            error_NC = error_NC.masked_fill((label_weights_N == 0)[:, None], 0)
            squared = (error_NC.square() * label_weights_N[:, None]).sum()
            weight = None if weight is None else weight * label_weights_N[:, None]
        else:
            squared = error_NC.square().sum()
        if target_NC is teacher_NC:
            soft = squared
        else:
            hard = squared
        if weight is not None:
            total_grad_NC += error_NC * (2 * weight)
    if grad_NC is not None:
        grad_NC.copy_(total_grad_NC)
    return hard, soft


def _classes_chunk(
    student_NC: Tensor,
    teacher_NC: Tensor | None,
    labels_N: Tensor | None,
    is_valid_N: Tensor | None,
    label_weights_N: Tensor | None,
    grad_NC: Tensor | None,
    temperature: Tensor,
    hard_weight: Tensor | None,
    soft_weight: Tensor | None,
    precise_kl: bool,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and KL divergence summed over rows; writes `grad_NC`.

    The maximum is subtracted before the division by T, so differences between large logits stay exact. Ignored rows
    are set to zero in student and teacher, so NaN and inf in them have no effect.
    """
    dtype = temperature.dtype
    hard = soft = all_grad_NC = label_grad_N1 = torch.zeros_like(temperature)
    student_NC = student_NC.to(dtype)
    if is_valid_N is not None:
        student_NC = student_NC.masked_fill(~is_valid_N[:, None], 0)
    student_NC = student_NC - student_NC.amax(dim=1, keepdim=True)
    if labels_N is not None:
        assert is_valid_N is not None
        label_logit_N1 = student_NC.gather(1, labels_N[:, None])
        hard_student_NC, hard_label_N1 = student_NC, label_logit_N1
        if label_weights_N is not None:  # rows of weight 0 are set to zero as ignored rows are, but for `hard` alone
            hard_student_NC = student_NC.masked_fill((label_weights_N == 0)[:, None], 0)
            hard_label_N1 = hard_student_NC.gather(1, labels_N[:, None])
            hard_weight = None if hard_weight is None else hard_weight * label_weights_N[:, None]
        exp_student_NC = hard_student_NC.exp()
        student_sum_N1 = exp_student_NC.sum(dim=1, keepdim=True)
        hard_N1 = (student_sum_N1.log() - hard_label_N1).masked_fill(~is_valid_N[:, None], 0)
        hard = (hard_N1 if label_weights_N is None else hard_N1 * label_weights_N[:, None]).sum()
        if grad_NC is not None and hard_weight is not None:
            factor_N1 = hard_weight * is_valid_N[:, None] / student_sum_N1
            all_grad_NC = exp_student_NC * factor_N1  # softmax only; the label's column is overwritten at the end
            label_grad_N1 = hard_label_N1.exp() * factor_N1 - hard_weight * is_valid_N[:, None]
    if teacher_NC is not None:
        teacher_NC = teacher_NC.to(dtype)
        if is_valid_N is not None:
            teacher_NC = teacher_NC.masked_fill(~is_valid_N[:, None], 0)
        teacher_NC = (teacher_NC - teacher_NC.amax(dim=1, keepdim=True)) / temperature
        student_NC = student_NC / temperature
        exp_student_NC, exp_teacher_NC = student_NC.exp(), teacher_NC.exp()
        student_sum_N1 = exp_student_NC.sum(dim=1, keepdim=True)
        teacher_sum_N1 = exp_teacher_NC.sum(dim=1, keepdim=True)
        soft = _kl_divergence(
            student_NC, teacher_NC, exp_student_NC, exp_teacher_NC, student_sum_N1, teacher_sum_N1, precise_kl
        ).sum()
        if grad_NC is not None and soft_weight is not None:
            row_weight = soft_weight if is_valid_N is None else soft_weight * is_valid_N[:, None]
            student_factor_N1, teacher_factor_N1 = row_weight / student_sum_N1, row_weight / teacher_sum_N1
            all_grad_NC = all_grad_NC + exp_student_NC * student_factor_N1 - exp_teacher_NC * teacher_factor_N1
            if labels_N is not None and hard_weight is not None:
                label_teacher_N1 = teacher_NC.gather(1, labels_N[:, None])
                label_grad_N1 = label_grad_N1 + (label_logit_N1 / temperature).exp() * student_factor_N1
                label_grad_N1 = label_grad_N1 - label_teacher_N1.exp() * teacher_factor_N1
    if grad_NC is not None:
        grad_NC.copy_(all_grad_NC)
        if labels_N is not None and hard_weight is not None:
            grad_NC.scatter_(1, labels_N[:, None], label_grad_N1.to(grad_NC.dtype))
    return hard, soft


def _kl_divergence(
    student_NC: Tensor,
    teacher_NC: Tensor,
    exp_student_NC: Tensor,
    exp_teacher_NC: Tensor,
    student_sum_N1: Tensor,
    teacher_sum_N1: Tensor,
    is_precise: bool,
) -> Tensor:
    """KL(p || q) of each row, [N, 1]; logits are divided by T, the exponentials and their sums not normalised.

    KL = m + log r with d = teacher - student, m = sum p d, r = student_sum / teacher_sum. At a high temperature both
    distributions are nearly flat, so m and log r almost cancel, and T^2 magnifies the rounding error. If is_precise, a
    small KL is computed as log1p(u) without cancellation: u = sum p (exp(m - d) - 1 - (m - d)), plus exp(m) q for
    classes with p = 0. fp64 never needs it.
    """
    has_mass_NC = exp_teacher_NC > 0  # 0 * log 0 = 0
    d_NC = torch.where(has_mass_NC, teacher_NC - student_NC, 0)
    m_N1 = (exp_teacher_NC * d_NC).sum(dim=1, keepdim=True) / teacher_sum_N1
    plain_N1 = m_N1 + (student_sum_N1 / teacher_sum_N1).log()
    if not is_precise or student_NC.dtype == torch.float64:
        return plain_N1
    x_NC = m_N1 - d_NC
    excess_NC = torch.where(x_NC.abs() < 0.25, _exp_minus_tangent(x_NC), x_NC.exp() - 1 - x_NC)
    terms_NC = torch.where(has_mass_NC, exp_teacher_NC * excess_NC, exp_student_NC * m_N1.exp()) / teacher_sum_N1
    u_N1 = terms_NC.sum(dim=1, keepdim=True)
    return torch.where(u_N1 < 0.25, u_N1.log1p(), plain_N1)


def _exp_minus_tangent(x: Tensor) -> Tensor:
    """exp(x) - 1 - x for small x, by its Taylor series."""
    return x.square() * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x / 5040)))))


# -- Hidden states -----------------------------------------------------------------------------------------------------


def _hidden_loss(inputs: LossInputs, dtype: torch.dtype, needs_grad: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Mean squared distance over layer pairs, vectors and H, and the gradient of `beta` times it.

    Gradients are one block [1, B, S, H] per pair: the allocator reuses blocks of that size, but returns a larger one to
    the system, which then has to clear it again in every step.
    """
    first = inputs.student_hidden_BSH[0]
    is_valid_BS = None if inputs.attention_mask_BS is None else inputs.attention_mask_BS != 0
    num_vectors = inputs.vector_divisor
    if num_vectors is None:
        assert is_valid_BS is not None
        num_vectors = is_valid_BS.sum()
    factor = torch.as_tensor(at_least_one(num_vectors), dtype=dtype, device=first.device).reciprocal()
    factor = factor * inputs.hidden_factor
    grad_factor = factor * torch.as_tensor(inputs.grad_scale, dtype=dtype, device=first.device) * (2 * inputs.beta)
    num_pairs = len(inputs.student_hidden_BSH)
    blocks = []
    chunk_loss = _maybe_compiled(_hidden_chunk, first, num_pairs)
    chunk_samples = max(1, CHUNK_ELEMENTS // max(1, first[:1].numel()))
    squared = factor.new_zeros(())
    for student_BSH, teacher_BSH in zip(inputs.student_hidden_BSH, inputs.teacher_hidden_BSH, strict=True):
        grad_BSH: Tensor | None = None
        if needs_grad:
            grad_BSH = torch.empty(student_BSH.shape, dtype=student_BSH.dtype, device=student_BSH.device)
            blocks.append(grad_BSH[None])
        for start in range(0, len(student_BSH), chunk_samples):
            samples = slice(start, start + chunk_samples)
            squared = squared + chunk_loss(
                student_BSH[samples],
                teacher_BSH[samples],
                _slice(is_valid_BS, samples),
                _slice(grad_BSH, samples),
                grad_factor,
                inputs.normalize,
            )
    return squared * factor, tuple(blocks)


def _hidden_chunk(
    student_BSH: Tensor,
    teacher_BSH: Tensor,
    is_valid_BS: Tensor | None,
    grad_BSH: Tensor | None,
    grad_factor: Tensor,
    normalize: bool,
) -> Tensor:
    """Squared differences summed over vectors and H; writes `grad_BSH`."""
    student_BSH, teacher_BSH = student_BSH.to(grad_factor.dtype), teacher_BSH.to(grad_factor.dtype)
    if is_valid_BS is not None:
        student_BSH = student_BSH.masked_fill(~is_valid_BS[..., None], 0)
        teacher_BSH = teacher_BSH.masked_fill(~is_valid_BS[..., None], 0)
    if normalize:
        student_norm = torch.linalg.vector_norm(student_BSH, dim=-1, keepdim=True)
        inverse_norm = student_norm.clamp_min(1e-12).reciprocal()
        teacher_norm = torch.linalg.vector_norm(teacher_BSH, dim=-1, keepdim=True)
        unit_BSH = student_BSH * inverse_norm
        difference_BSH = unit_BSH - teacher_BSH * teacher_norm.clamp_min(1e-12).reciprocal()
        if grad_BSH is not None:
            # d/ds of |s/|s| - t|^2 / 2 is (d - u (u.d)) / |s|; below eps the clamped norm is a constant
            along = torch.linalg.vecdot(unit_BSH, difference_BSH)[..., None].masked_fill(student_norm <= 1e-12, 0)
            grad_BSH.copy_(torch.addcmul(difference_BSH, unit_BSH, along, value=-1) * (inverse_norm * grad_factor))
    else:
        difference_BSH = student_BSH - teacher_BSH
        if grad_BSH is not None:
            grad_BSH.copy_(difference_BSH * grad_factor)
    return difference_BSH.square().sum()


# -- Chunks ------------------------------------------------------------------------------------------------------------


def _slice(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _maybe_compiled(function: Callable[P, R], first: Tensor, count: int = 1) -> Callable[P, R]:
    """The function, compiled if `count` tensors like `first` are large and on a CPU with a C++ compiler."""
    if first.device.type != "cpu" or first.numel() * count < COMPILED_FROM or not _has_compiler():
        return function
    return _compiled(function)


@functools.cache
def _has_compiler() -> bool:
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@functools.cache
def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function through `torch.compile`; if that fails, a warning and the function itself."""
    compiled = torch.compile(function, dynamic=True)
    has_failed = False

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal has_failed
        if not has_failed:
            try:
                return compiled(*args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                has_failed = True
                reason = str(error).strip().splitlines()[0]
                logger.warning("torch.compile failed; the loss runs uncompiled, which is slower: %s", reason)
        return function(*args, **kwargs)

    return run
