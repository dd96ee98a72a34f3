"""Loss of a chunk of rows with a yes or no in each class, for `torch_backend.py`.

Shape suffixes as in `reference.py`; N counts the rows of the chunk.
"""

import torch
from torch import Tensor


def multi_label_chunk(
    student_NC: Tensor,
    teacher_NC: Tensor | None,
    labels_NC: Tensor | None,
    is_valid_N: Tensor | None,
    label_weights_N: Tensor | None,
    grad_NC: Tensor | None,
    temperature: Tensor,
    hard_weight: Tensor | None,
    soft_weight: Tensor | None,
    precise_kl: bool,
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy, mean over classes, and KL divergence, summed over classes; both summed over rows.

    Writes `grad_NC`. is_valid_N is None and precise_kl has no effect: the signature is that of the other chunks of
    `torch_backend.py`.
    """
    dtype, num_classes = temperature.dtype, student_NC.shape[1]
    hard = soft = total_grad_NC = torch.zeros_like(temperature)
    student_NC = student_NC.to(dtype)
    if labels_NC is not None:
        labels_NC, hard_student_NC = labels_NC.to(dtype), student_NC
        if label_weights_N is not None:  # rows of weight 0 are set to zero, but for `hard` alone
            has_no_weight_N1 = (label_weights_N == 0)[:, None]
            labels_NC = labels_NC.masked_fill(has_no_weight_N1, 0)
            hard_student_NC = student_NC.masked_fill(has_no_weight_N1, 0)
        yes_NC = torch.where(labels_NC != 0, labels_NC * (-hard_student_NC).relu(), 0)  # 0 * inf = 0
        no_NC = torch.where(labels_NC != 1, (1 - labels_NC) * hard_student_NC.relu(), 0)
        hard_N = (yes_NC + no_NC + _log_of_one_plus(hard_student_NC)).sum(dim=1) / num_classes
        hard = (hard_N if label_weights_N is None else hard_N * label_weights_N).sum()
        if hard_weight is not None:
            factor = hard_weight / num_classes
            factor = factor if label_weights_N is None else factor * label_weights_N[:, None]
            total_grad_NC = (hard_student_NC.sigmoid() - labels_NC) * factor
    if teacher_NC is not None:
        teacher_NC = teacher_NC.to(dtype)
        soft = _bernoulli_kl(student_NC, teacher_NC, temperature).sum()
        if soft_weight is not None:
            difference_NC = (student_NC / temperature).sigmoid() - (teacher_NC / temperature).sigmoid()
            total_grad_NC = total_grad_NC + difference_NC * soft_weight
    if grad_NC is not None:
        grad_NC.copy_(total_grad_NC)
    return hard, soft


def _bernoulli_kl(student_NC: Tensor, teacher_NC: Tensor, temperature: Tensor) -> Tensor:
    """KL(sigmoid(teacher / T) || sigmoid(student / T)) of each element, summed without cancellation.

    It is the sum over yes and no of p (exp(y) - 1 - y) with y = log(q / p), where no term is negative. The rounding of
    `shift` is common to both y, so its effect on small terms is of second order.
    """
    is_equal_NC = student_NC == teacher_NC  # where inf - inf would be NaN
    student_NC, teacher_NC = student_NC.masked_fill(is_equal_NC, 0), teacher_NC.masked_fill(is_equal_NC, 0)
    scaled_student_NC, scaled_teacher_NC = student_NC / temperature, teacher_NC / temperature
    shift_NC = _log_of_one_plus(scaled_student_NC) - _log_of_one_plus(scaled_teacher_NC)
    total_NC = torch.zeros_like(shift_NC)
    for sign in (1, -1):  # yes, no
        p_NC, q_NC = (sign * scaled_teacher_NC).sigmoid(), (sign * scaled_student_NC).sigmoid()
        y_NC = ((-sign * teacher_NC).relu() - (-sign * student_NC).relu()) / temperature - shift_NC
        terms_NC = torch.where(y_NC.abs() < 0.5, p_NC * _exp_minus_tangent(y_NC), q_NC - p_NC - p_NC * y_NC)
        total_NC = total_NC + torch.where(p_NC == 0, q_NC, terms_NC)  # 0 * log 0 = 0
    return total_NC


def _log_of_one_plus(x: Tensor) -> Tensor:
    """log(1 + exp(-|x|)): with max(x, 0) added, the softplus of x."""
    return (-x.abs()).exp().log1p()


def _exp_minus_tangent(x: Tensor) -> Tensor:
    """exp(x) - 1 - x for |x| < 0.5, by its Taylor series."""
    tail = 1 / 120 + x * (1 / 720 + x * (1 / 5040 + x / 40320))
    return x.square() * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * tail)))
