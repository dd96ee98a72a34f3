"""Distillation loss in plain autograd PyTorch and fp64: the ground truth for the other backends.

`peakd_ds.kernels` checks the inputs; this file holds only the mathematics.

Shape suffixes: B batch, S tokens, H hidden size, C classes, N rows of logits, K layer pairs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class DistillationLoss(NamedTuple):
    """Loss of one micro-batch: four 0-dim tensors in the dtype of the computation, fp32 or fp64."""

    total: Tensor
    """(1 - alpha) * hard + alpha * soft + beta * hidden; the only term that carries a gradient."""
    hard: Tensor
    """Cross-entropy with the labels (squared error when C = 1), before the weight, detached."""
    soft: Tensor
    """T^2 * KL(teacher || student) (squared error when C = 1), before the weight, detached."""
    hidden: Tensor
    """Mean squared distance of hidden states, before the weight, detached."""


def reference_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    student_hidden: Sequence[Tensor],
    teacher_hidden: Sequence[Tensor],
    *,
    temperature: float,
    alpha: float,
    beta: float,
    attention_mask: Tensor | None,
    normalize: bool,
    reduction: str,
    ignore_index: int,
    label_weights: Tensor | None,
    label_divisor: float | Tensor | None,
    multi_label: bool,
    num_items: int | Tensor | None,
    num_tokens: int | Tensor | None,
) -> DistillationLoss:
    """The loss of `peakd_ds.kernels.distillation_loss`, with the same arguments, through autograd."""
    dtype = torch.float64
    hard = soft = hidden = zero = student_logits.new_zeros((), dtype=dtype)

    # Setting ignored rows to zero, rather than their loss, keeps NaN and inf in them out of the gradient (0 * NaN).
    is_ignored_N = torch.zeros_like(student_logits[:, 0], dtype=torch.bool)
    if labels is not None and not multi_label:
        # Compared in a wide type: in uint8, ignore_index -100 would be 156.
        labels = labels.to(dtype if student_logits.shape[1] == 1 else torch.int64)
        is_ignored_N = labels == ignore_index
    num_rows = at_least_one((~is_ignored_N).sum() if num_items is None else num_items)
    student_NC = student_logits.to(dtype).masked_fill(is_ignored_N[:, None], 0)

    if labels is not None:
        if multi_label or label_weights is not None or label_divisor is not None:
            weights_N, divisor = _label_weights(~is_ignored_N, label_weights, label_divisor, num_rows)
            hard = _weighted_hard_sum(student_NC, labels, weights_N, multi_label) / divisor
        else:
            hard = _hard_sum(student_NC, labels, ignore_index) / num_rows
    if teacher_logits is not None:
        teacher_NC = teacher_logits.detach().to(dtype).masked_fill(is_ignored_N[:, None], 0)
        soft = (_multi_label_soft_sum if multi_label else _soft_sum)(student_NC, teacher_NC, temperature) / num_rows
        if reduction == "mean":
            soft = soft / student_NC.shape[1]
    if student_hidden:
        hidden = _hidden_mean(
            [state.to(dtype) for state in student_hidden],
            [state.detach().to(dtype) for state in teacher_hidden],
            attention_mask,
            normalize,
            num_items,
            num_tokens,
        )

    # Terms of weight 0 are skipped: the loss of a masked class is inf, and 0 * inf is NaN.
    weighted_terms = ((1 - alpha, hard), (alpha, soft), (beta, hidden))
    total = sum((weight * term for weight, term in weighted_terms if weight != 0), zero)
    returned = compute_dtype(student_logits, teacher_logits, *student_hidden, *teacher_hidden)
    return DistillationLoss(*(term.to(returned) for term in (total, hard.detach(), soft.detach(), hidden.detach())))


def _hard_sum(student_NC: Tensor, labels_N: Tensor, ignore_index: int) -> Tensor:
    """Cross-entropy summed over rows; squared error when C = 1."""
    if student_NC.shape[1] == 1:
        error_N = student_NC[:, 0] - labels_N
        return error_N.masked_fill(labels_N == ignore_index, 0).square().sum()
    return F.cross_entropy(student_NC, labels_N, ignore_index=ignore_index, reduction="sum")


def _label_weights(
    is_valid_N: Tensor,
    label_weights_N: Tensor | None,
    label_divisor: float | Tensor | None,
    num_rows: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """Weights of the rows' hard losses, and their divisor. If that is 0, all weights are 0 and the divisor is 1."""
    weights_N = is_valid_N.to(torch.float64)
    if label_weights_N is not None:
        weights_N = label_weights_N.to(torch.float64).masked_fill(~is_valid_N, 0)
    if label_divisor is None:
        label_divisor = num_rows if label_weights_N is None else weights_N.sum()
    divisor = torch.as_tensor(label_divisor, dtype=torch.float64, device=weights_N.device)
    return weights_N.masked_fill(divisor == 0, 0), divisor.masked_fill(divisor == 0, 1)


def _weighted_hard_sum(student_NC: Tensor, labels: Tensor, weights_N: Tensor, multi_label: bool) -> Tensor:
    """The weighted sum over rows of `_hard_sum`'s loss, or with multi_label of the binary cross-entropy's mean over C.

    Rows of weight 0 are set to zero, as ignored rows are.
    """
    has_weight_N = weights_N != 0
    student_NC = student_NC.masked_fill(~has_weight_N[:, None], 0)
    if multi_label:
        labels_NC = labels.to(student_NC.dtype).masked_fill(~has_weight_N[:, None], 0)
        yes_NC = torch.where(labels_NC != 0, labels_NC * F.logsigmoid(student_NC), 0)  # 0 * log 0 = 0
        no_NC = torch.where(labels_NC != 1, (1 - labels_NC) * F.logsigmoid(-student_NC), 0)
        loss_N = -(yes_NC + no_NC).mean(dim=1)
    elif student_NC.shape[1] == 1:
        loss_N = (student_NC[:, 0] - labels.masked_fill(~has_weight_N, 0)).square()
    else:
        loss_N = F.cross_entropy(student_NC, labels.masked_fill(~has_weight_N, 0), reduction="none")
    return (weights_N * loss_N).sum()


def _multi_label_soft_sum(student_NC: Tensor, teacher_NC: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(sigmoid(teacher / T) || sigmoid(student / T)) of yes and no, summed over classes and rows."""
    total = student_NC.new_zeros(())
    for sign in (1, -1):  # yes, no
        log_student_NC = F.logsigmoid(sign * student_NC / temperature)
        log_teacher_NC = F.logsigmoid(sign * teacher_NC / temperature)
        kl_NC = log_teacher_NC.exp() * (log_teacher_NC - log_student_NC)
        total = total + torch.where(log_teacher_NC > -torch.inf, kl_NC, 0).sum()  # 0 * log 0 = 0
    return temperature**2 * total


def _soft_sum(student_NC: Tensor, teacher_NC: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)) summed over rows; squared error when C = 1."""
    if student_NC.shape[1] == 1:
        return (student_NC - teacher_NC).square().sum()
    log_student_NC = _log_softmax(student_NC, temperature)
    log_teacher_NC = _log_softmax(teacher_NC, temperature)
    teacher_prob_NC = log_teacher_NC.exp()
    kl_NC = teacher_prob_NC * (log_teacher_NC - log_student_NC)
    return temperature**2 * torch.where(teacher_prob_NC > 0, kl_NC, 0).sum()  # 0 * log 0 = 0


def _log_softmax(logits_NC: Tensor, temperature: float) -> Tensor:
    # The maximum is subtracted before the division by T, so differences between large logits stay exact.
    shifted_NC = logits_NC - logits_NC.detach().amax(dim=1, keepdim=True)
    return (shifted_NC / temperature).log_softmax(dim=1)


def _hidden_mean(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    attention_mask_BS: Tensor | None,
    normalize: bool,
    num_items: int | Tensor | None,
    num_tokens: int | Tensor | None,
) -> Tensor:
    """Squared difference of [B, H] or [B, S, H] states, averaged over layer pairs, vectors and H."""
    first = student_states[0]
    has_tokens = first.ndim == 3
    is_padding = first.new_zeros(first.shape[:-1], dtype=torch.bool)
    if has_tokens and attention_mask_BS is not None:
        is_padding = attention_mask_BS == 0
    divisor = num_tokens if has_tokens else num_items
    num_vectors = at_least_one((~is_padding).sum() if divisor is None else divisor)

    total = first.new_zeros(())
    for student, teacher in zip(student_states, teacher_states, strict=True):
        student = student.masked_fill(is_padding[..., None], 0)  # as ignored rows above
        teacher = teacher.masked_fill(is_padding[..., None], 0)
        if normalize:
            student = F.normalize(student, dim=-1, eps=1e-12)
            teacher = F.normalize(teacher, dim=-1, eps=1e-12)
        total = total + (student - teacher).square().sum()
    return total / (len(student_states) * first.shape[-1]) / num_vectors


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any of the tensors is fp64, else fp32."""
    is_double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def at_least_one(count: int | Tensor) -> int | Tensor:
    """The count, or 1 if it is 0, so that a mean over no elements is 0."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
