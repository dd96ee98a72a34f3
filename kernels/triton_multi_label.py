"""Device code of the fused loss with a yes or no in each class; the kernels of the other files call it.

Notation as in `triton_kernels.py`.
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def multi_label_rows(
    student_pointer,  # [rows, 1]
    teacher_pointer,  # [rows, 1]
    label_pointer,  # [rows, 1]
    grad_pointer,  # [rows, 1]
    label_weight,  # [rows]
    in_range,  # [rows]
    num_columns,
    inverse_temperature,
    hard_weight,  # of the gradient, for an element
    soft_weight,
    COLUMNS: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_HARD_GRAD: tl.constexpr,
    HAS_SOFT_GRAD: tl.constexpr,
):
    """Binary cross-entropy times the row's weight, and KL divergence, summed over columns, [rows]; stores the gradient.

    Columns are classes; the pointers are those of the first one.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    is_in = in_range[:, None] & (column < num_columns)
    student = tl.load(student_pointer + column, mask=is_in, other=0.0).to(tl.float32)
    hard = tl.zeros_like(label_weight)
    soft = tl.zeros_like(label_weight)
    grad = tl.zeros_like(student)
    if HAS_LABELS:
        label = tl.load(label_pointer + column, mask=is_in, other=0).to(tl.float32)
        has_weight = is_in & (label_weight != 0)[:, None]
        yes = tl.where(label != 0, label * tl.maximum(-student, 0.0), 0.0)  # 0 * inf = 0
        no = tl.where(label != 1, (1 - label) * tl.maximum(student, 0.0), 0.0)
        terms = (yes + no + _log_of_one_plus(student)) * label_weight[:, None]
        hard = tl.sum(tl.where(has_weight, terms, 0.0), 1)
        if HAS_HARD_GRAD:
            row_weight = (hard_weight * label_weight)[:, None]
            grad += tl.where(has_weight, row_weight * (tl.sigmoid(student) - label), 0.0)
    if HAS_TEACHER:
        teacher = tl.load(teacher_pointer + column, mask=is_in, other=0.0).to(tl.float32)
        soft = tl.sum(_bernoulli_kl(student, teacher, inverse_temperature), 1)  # 0 where both are 0, out of range
        if HAS_SOFT_GRAD:
            q = tl.sigmoid(student * inverse_temperature)
            grad += soft_weight * (q - tl.sigmoid(teacher * inverse_temperature))
    if HAS_HARD_GRAD or HAS_SOFT_GRAD:
        tl.store(grad_pointer + column, grad.to(grad_pointer.dtype.element_ty), mask=is_in)
    return hard, soft


@triton.jit
def _bernoulli_kl(student, teacher, inverse_temperature):
    """KL(sigmoid(teacher / T) || sigmoid(student / T)) of each element, summed without cancellation.

    It is the sum over yes and no of p (exp(y) - 1 - y) with y = log(q / p), where no term is negative. The rounding of
    `shift` is common to both y, so its effect on small terms is of second order.
    """
    is_equal = student == teacher  # where inf - inf would be NaN
    student = tl.where(is_equal, 0.0, student)
    teacher = tl.where(is_equal, 0.0, teacher)
    scaled_student = student * inverse_temperature
    scaled_teacher = teacher * inverse_temperature
    shift = _log_of_one_plus(scaled_student) - _log_of_one_plus(scaled_teacher)
    yes = (tl.maximum(-teacher, 0.0) - tl.maximum(-student, 0.0)) * inverse_temperature - shift
    no = (tl.maximum(teacher, 0.0) - tl.maximum(student, 0.0)) * inverse_temperature - shift
    kl = _kl_terms(tl.sigmoid(scaled_teacher), tl.sigmoid(scaled_student), yes)
    return kl + _kl_terms(tl.sigmoid(-scaled_teacher), tl.sigmoid(-scaled_student), no)


@triton.jit
def _kl_terms(p, q, y):
    """p (exp(y) - 1 - y) with y = log(q / p); its Taylor series if y is small, and q where p = 0."""
    tail = 1 / 120 + y * (1 / 720 + y * (1 / 5040 + y * (1 / 40320)))
    series = y * y * (0.5 + y * (1 / 6 + y * (1 / 24 + y * tail)))
    return tl.where(p == 0, q, tl.where(tl.abs(y) < 0.5, p * series, q - p - p * y))


@triton.jit
def _log_of_one_plus(x):
    """log(1 + exp(-|x|)): with max(x, 0) added, the softplus of x."""
    return tl.log(1 + tl.exp(-tl.abs(x)))
