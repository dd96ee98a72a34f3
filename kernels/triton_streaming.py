"""Device code of the fused loss for more than 256 classes; `triton_backend.py` launches it.

No stage of training reaches this file: GLUE tasks have up to three classes, PTP has four. It serves other callers of
`distillation_loss`, with logits over a vocabulary for example.

    stream_kernel         one row per program, two passes over it; the second pass reads the row from the cache
    multi_label_kernel    one row per program, one pass over it, with a yes or no in each class

Notation as in `triton_kernels.py`.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from peakd_ds.kernels.triton_kernels import INF, LN_2, LOG2_E, NAN, _is_wrong_label, _label_weights, _read_scalar
from peakd_ds.kernels.triton_multi_label import multi_label_rows

LOWEST = tl.constexpr(-16777216.0)
"""-2^24: the lowest base-2 reference, down to which fp32 has all integers. It is finite so that x - reference is a
number while all logits so far are -inf. Logits below it, such as the filler -1e30, count as -inf."""

INTEGER_POWERS = (1, 2, 3, 4, 5, 6, 8, 10, 16, 20)
"""Temperatures for which exp(x) is computed from exp(x / T) by a few multiplications, not by a second exponential."""


@triton.jit
def _integer_power(x, N: tl.constexpr):
    """x ** N for N in INTEGER_POWERS."""
    if N == 1:
        return x
    x2 = x * x
    if N == 2:
        return x2
    if N == 3:
        return x2 * x
    x4 = x2 * x2
    if N == 4:
        return x4
    if N == 5:
        return x4 * x
    if N == 6:
        return x4 * x2
    x8 = x4 * x4
    if N == 8:
        return x8
    if N == 10:
        return x8 * x2
    x16 = x8 * x8
    if N == 16:
        return x16
    return x16 * x4  # 20


@triton.jit
def _references(maximum, scale, POWER: tl.constexpr):
    """Base-2 references of exp(x / T) and exp(x), given the largest x.

    They are integers, so x * scale - reference is one rounding of a fused multiply-add, and changing the reference of a
    sum multiplies it by an exact power of two.
    """
    soft = _reference(maximum, scale)
    if POWER > 0:
        hard = soft * POWER
    else:
        hard = _reference(maximum, LOG2_E)
    return soft, hard


@triton.jit
def _reference(maximum, scale):
    """The least integer that is at least maximum * scale, but not below LOWEST."""
    return tl.ceil(tl.maximum(maximum * scale, LOWEST))


@triton.jit
def _exponentials(x, soft_reference, hard_reference, scale, POWER: tl.constexpr):
    """exp(x / T) / 2^soft_reference and exp(x) / 2^hard_reference."""
    soft = tl.exp2(tl.fma(x, scale, -soft_reference))
    if POWER > 0:  # then hard_reference = POWER * soft_reference
        hard = _integer_power(soft, POWER)
    else:
        hard = tl.exp2(tl.fma(x, LOG2_E, -hard_reference))
    return soft, hard


@triton.jit
def _log2_hard(x, soft_reference, hard_reference, scale, POWER: tl.constexpr):
    """log2 of the second result of `_exponentials`, with the same rounding."""
    if POWER > 0:
        return tl.fma(x, scale, -soft_reference) * POWER
    else:
        return tl.fma(x, LOG2_E, -hard_reference)


@triton.jit
def _plain_kl_terms(student_log2, teacher_log2, exp_teacher, shift):
    """p log2(p / q), times the teacher's total, with log2(p / q) = teacher_log2 - student_log2 + shift.

    At a high temperature their sum cancels, and T^2 magnifies the rounding error.
    """
    terms = exp_teacher * ((teacher_log2 - student_log2) + shift)
    return tl.where(exp_teacher > 0, terms, 0.0)  # 0 * log 0 = 0


@triton.jit
def _precise_kl_terms(student, teacher, exp_student, exp_teacher, inverse_temperature, log_ratio, total_ratio):
    """p (exp(y) - 1 - y) with y = log(q / p), times the teacher's total: the same sum as p log(p / q), in nats.

    No term is negative, so nothing cancels. An error of log_ratio, the log of the ratio of both partition functions,
    shifts all y alike and has an effect of second order only.
    """
    y = (student - teacher) * inverse_temperature - log_ratio
    series = y * y * (0.5 + y * (1 / 6 + y * (1 / 24 + y * (1 / 120 + y * (1 / 720 + y * (1 / 5040))))))
    q = exp_student * total_ratio
    terms = tl.where(tl.abs(y) < 0.25, exp_teacher * series, q - exp_teacher - exp_teacher * y)
    return tl.where(exp_teacher > 0, terms, q)


@triton.jit(do_not_specialize=["student_start", "teacher_start", "grad_start"])
def stream_kernel(
    STUDENT,  # storage of the [N, C] logits
    TEACHER,  # storage of the [N, C] logits
    LABELS,  # [N]
    LABEL_WEIGHTS,  # [N], or None
    GRAD,  # out: storage of the [N, C] gradient
    PARTIALS,  # out: [N, 2]: hard, soft
    ROW_DIVISOR,  # rows to divide by, a number or a pointer to one
    HARD_DIVISOR,  # of the weighted sum of hard losses, likewise; None: ROW_DIVISOR, and no weights
    GRAD_SCALE,  # factor of the gradient, a number or a pointer to one
    num_classes,
    student_start,  # offset of row 0
    teacher_start,
    grad_start,
    student_stride,
    teacher_stride,
    grad_stride,
    ignore_index,
    inverse_temperature,
    hard_weight,
    soft_weight,  # of the gradient: alpha * T (/ C)
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    POWER: tl.constexpr,
    IS_PRECISE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_HARD_GRAD: tl.constexpr,
    HAS_SOFT_GRAD: tl.constexpr,
    ROW_DIVISOR_ON_DEVICE: tl.constexpr,
    HARD_DIVISOR_ON_DEVICE: tl.constexpr,
    GRAD_SCALE_ON_DEVICE: tl.constexpr,
):
    """Loss and gradient of one row: one pass for the softmax statistics, one backwards for the KL sum and gradient.

    A row is cut into [LANES, WIDTH] tiles. Each lane keeps a running maximum and sums ("online softmax") over WIDTH
    adjacent columns, which one thread holds, so the loops need neither shuffles nor barriers. Masks depend on the lane
    alone, so loads are WIDTH elements wide even if C is not a multiple of WIDTH. If the rows of student, teacher and
    gradient have the same misalignment (IS_ALIGNED), tiles begin at the row's first aligned column; the few columns
    before it, and those after the last full vector, form the ragged ends, a tile of their own.
    """
    HAS_GRAD: tl.constexpr = HAS_HARD_GRAD or HAS_SOFT_GRAD
    row = tl.program_id(0).to(tl.int64)
    scale = inverse_temperature * LOG2_E
    is_valid = row >= 0
    label = row * 0
    if HAS_LABELS:
        label = tl.load(LABELS + row).to(tl.int64)
        is_valid = label != ignore_index
    student_row = student_start + row * student_stride
    teacher_row = teacher_start + row * teacher_stride
    grad_row = grad_start + row * grad_stride

    num_head = 0
    student_body = student_row
    teacher_body = teacher_row
    grad_body = grad_row
    if IS_ALIGNED:
        num_head = tl.minimum((WIDTH - student_row % WIDTH) % WIDTH, num_classes).to(tl.int32)
        student_body = tl.multiple_of(student_row + num_head, WIDTH)
        teacher_body = tl.multiple_of(teacher_row + num_head, WIDTH)
        grad_body = tl.multiple_of(grad_row + num_head, WIDTH)
    num_vectors = (num_classes - num_head) // WIDTH
    end = tl.arange(0, 2 * WIDTH)  # columns of the ragged ends: head, then tail
    end_column = tl.where(end < WIDTH, end, num_head + num_vectors * WIDTH + (end - WIDTH))
    is_end = tl.where(end < WIDTH, end < num_head, end_column < num_classes)
    lane = tl.arange(0, LANES)
    within = tl.arange(0, WIDTH)[None, :]

    if is_valid:
        # -- first pass: maxima and sums of exponentials, per lane
        soft_ref = tl.full([LANES], LOWEST, tl.float32)
        hard_ref = tl.full([LANES], LOWEST, tl.float32)
        teacher_ref = tl.full([LANES], LOWEST, tl.float32)
        hard_sum = tl.zeros([LANES], tl.float32)
        soft_sum = tl.zeros([LANES], tl.float32)
        teacher_sum = tl.zeros([LANES], tl.float32)
        for start in range(0, num_vectors, LANES):
            vector = start + lane
            offset = vector[:, None] * WIDTH + within
            is_in = (vector < num_vectors)[:, None]
            student = tl.load(STUDENT + student_body + offset, mask=is_in, other=-INF).to(tl.float32)
            new_soft_ref, new_hard_ref = _references(tl.max(student, 1), scale, POWER)
            new_soft_ref = tl.maximum(new_soft_ref, soft_ref)
            new_hard_ref = tl.maximum(new_hard_ref, hard_ref)
            exp_soft, exp_hard = _exponentials(student, new_soft_ref[:, None], new_hard_ref[:, None], scale, POWER)
            soft_shrink = tl.exp2(soft_ref - new_soft_ref)
            if POWER > 0:
                hard_shrink = _integer_power(soft_shrink, POWER)
            else:
                hard_shrink = tl.exp2(hard_ref - new_hard_ref)
            hard_sum = hard_sum * hard_shrink + tl.sum(exp_hard, 1)
            soft_ref = new_soft_ref
            hard_ref = new_hard_ref
            if HAS_TEACHER:
                soft_sum = soft_sum * soft_shrink + tl.sum(exp_soft, 1)
                teacher = tl.load(TEACHER + teacher_body + offset, mask=is_in, other=-INF).to(tl.float32)
                new_teacher_ref = tl.maximum(_reference(tl.max(teacher, 1), scale), teacher_ref)
                exp_teacher = tl.exp2(tl.fma(teacher, scale, -new_teacher_ref[:, None]))
                teacher_sum = teacher_sum * tl.exp2(teacher_ref - new_teacher_ref) + tl.sum(exp_teacher, 1)
                teacher_ref = new_teacher_ref

        # -- ragged ends, and the sum over lanes
        student_end = tl.load(STUDENT + student_row + end_column, mask=is_end, other=-INF).to(tl.float32)
        soft_max, hard_max = _references(tl.max(student_end, 0), scale, POWER)
        soft_max = tl.maximum(soft_max, tl.max(soft_ref, 0))
        hard_max = tl.maximum(hard_max, tl.max(hard_ref, 0))
        end_exp_soft, end_exp_hard = _exponentials(student_end, soft_max, hard_max, scale, POWER)
        soft_shrink = tl.exp2(soft_ref - soft_max)
        if POWER > 0:
            hard_shrink = _integer_power(soft_shrink, POWER)
        else:
            hard_shrink = tl.exp2(hard_ref - hard_max)
        hard_total = tl.sum(hard_sum * hard_shrink, 0) + tl.sum(end_exp_hard, 0)

        weight = _read_scalar(GRAD_SCALE, GRAD_SCALE_ON_DEVICE) / tl.maximum(
            _read_scalar(ROW_DIVISOR, ROW_DIVISOR_ON_DEVICE), 1.0
        )
        hard = 0.0
        soft = 0.0
        label_grad = 0.0
        label_column = row * 0
        hard_factor = 0.0
        if HAS_LABELS:
            is_wrong = _is_wrong_label(label, num_classes)
            label_column = tl.where(is_wrong, 0, label)
            label_logit = tl.load(STUDENT + student_row + label_column).to(tl.float32)
            log2_label = _log2_hard(label_logit, soft_max, hard_max, scale, POWER)
            hard = tl.where(is_wrong, NAN, (tl.log2(hard_total) - log2_label) * LN_2)
            weight_of_hard = weight
            if HARD_DIVISOR is not None:
                label_weight, divisor = _label_weights(LABEL_WEIGHTS, HARD_DIVISOR, row, True, HARD_DIVISOR_ON_DEVICE)
                weight_of_hard = label_weight * _read_scalar(GRAD_SCALE, GRAD_SCALE_ON_DEVICE) / divisor
                hard = tl.where(label_weight != 0, hard * label_weight, 0.0)
            if HAS_HARD_GRAD:
                row_weight = tl.where(is_wrong, NAN, hard_weight * weight_of_hard)
                hard_factor = row_weight / hard_total
                _, label_exp = _exponentials(label_logit, soft_max, hard_max, scale, POWER)
                label_grad = label_exp * hard_factor - row_weight
                if HARD_DIVISOR is not None:
                    hard_factor = tl.where(label_weight != 0, hard_factor, 0.0)
                    label_grad = tl.where(label_weight != 0, label_grad, 0.0)
        student_factor = 0.0
        teacher_factor = 0.0
        if HAS_TEACHER:
            teacher_end = tl.load(TEACHER + teacher_row + end_column, mask=is_end, other=-INF).to(tl.float32)
            teacher_max = tl.maximum(_reference(tl.max(teacher_end, 0), scale), tl.max(teacher_ref, 0))
            end_student_log2 = tl.fma(student_end, scale, -soft_max)
            end_teacher_log2 = tl.fma(teacher_end, scale, -teacher_max)
            end_exp_teacher = tl.exp2(end_teacher_log2)
            soft_total = tl.sum(soft_sum * soft_shrink, 0) + tl.sum(end_exp_soft, 0)
            teacher_total = tl.sum(teacher_sum * tl.exp2(teacher_ref - teacher_max), 0) + tl.sum(end_exp_teacher, 0)
            shift = tl.log2(soft_total / teacher_total)
            log_ratio = (shift + (soft_max - teacher_max)) * LN_2
            total_ratio = teacher_total / soft_total
            if IS_PRECISE:
                end_kl = _precise_kl_terms(
                    student_end,
                    teacher_end,
                    end_exp_soft,
                    end_exp_teacher,
                    inverse_temperature,
                    log_ratio,
                    total_ratio,
                )
            else:
                end_kl = _plain_kl_terms(end_student_log2, end_teacher_log2, end_exp_teacher, shift)
            kl_sum = tl.zeros([LANES], tl.float32)
            if HAS_SOFT_GRAD:
                student_factor = soft_weight * weight / soft_total
                teacher_factor = soft_weight * weight / teacher_total
                if HAS_LABELS:
                    label_exp, _ = _exponentials(label_logit, soft_max, hard_max, scale, POWER)
                    teacher_logit = tl.load(TEACHER + teacher_row + label_column).to(tl.float32)
                    label_grad += label_exp * student_factor
                    label_grad -= tl.exp2(tl.fma(teacher_logit, scale, -teacher_max)) * teacher_factor

        # -- second pass, from the end of the row, which is still in the cache: KL sum and gradient
        if HAS_TEACHER or HAS_GRAD:
            num_tiles = tl.cdiv(num_vectors, LANES)
            for tile in range(0, num_tiles):
                vector = (num_tiles - 1 - tile) * LANES + lane
                offset = vector[:, None] * WIDTH + within
                is_in = (vector < num_vectors)[:, None]
                student = tl.load(STUDENT + student_body + offset, mask=is_in, other=-INF).to(tl.float32)
                exp_soft, exp_hard = _exponentials(student, soft_max, hard_max, scale, POWER)
                grad = tl.zeros([LANES, WIDTH], tl.float32)
                if HAS_HARD_GRAD:
                    grad = exp_hard * hard_factor
                    if HARD_DIVISOR is not None and not HAS_SOFT_GRAD:
                        # A row of weight 0 may have NaN in exp_hard; then exp_soft, which counts, has it too.
                        grad = tl.where(hard_factor != 0, grad, 0.0)
                if HAS_TEACHER:
                    teacher = tl.load(TEACHER + teacher_body + offset, mask=is_in, other=-INF).to(tl.float32)
                    student_log2 = tl.fma(student, scale, -soft_max)
                    teacher_log2 = tl.fma(teacher, scale, -teacher_max)
                    exp_teacher = tl.exp2(teacher_log2)
                    if IS_PRECISE:
                        kl = _precise_kl_terms(
                            student, teacher, exp_soft, exp_teacher, inverse_temperature, log_ratio, total_ratio
                        )
                    else:
                        kl = _plain_kl_terms(student_log2, teacher_log2, exp_teacher, shift)
                    kl_sum += tl.sum(kl, 1)
                    if HAS_SOFT_GRAD:
                        grad += exp_soft * student_factor - exp_teacher * teacher_factor
                if HAS_GRAD:
                    tl.store(GRAD + grad_body + offset, grad.to(GRAD.dtype.element_ty), mask=is_in)
        if HAS_GRAD:
            end_grad = end_exp_hard * hard_factor
            if HARD_DIVISOR is not None and not HAS_SOFT_GRAD:
                end_grad = tl.where(hard_factor != 0, end_grad, 0.0)
            if HAS_SOFT_GRAD:
                end_grad += end_exp_soft * student_factor - end_exp_teacher * teacher_factor
            tl.store(GRAD + grad_row + end_column, end_grad.to(GRAD.dtype.element_ty), mask=is_end)
            if HAS_HARD_GRAD:  # overwrite the label's column, after every other store of this row
                tl.debug_barrier()
                tl.store(GRAD + grad_row + label_column, label_grad.to(GRAD.dtype.element_ty))
        if HAS_TEACHER:
            soft = (tl.sum(kl_sum, 0) + tl.sum(end_kl, 0)) / teacher_total
            if not IS_PRECISE:
                soft *= LN_2
        tl.store(PARTIALS + row * 2, hard)
        tl.store(PARTIALS + row * 2 + 1, soft)
    else:  # ignored row: nothing is read, and the gradient is 0
        if HAS_GRAD:
            zero_tile = tl.zeros([LANES, WIDTH], GRAD.dtype.element_ty)
            for start in range(0, num_vectors, LANES):
                vector = start + lane
                offset = vector[:, None] * WIDTH + within
                tl.store(GRAD + grad_body + offset, zero_tile, mask=(vector < num_vectors)[:, None])
            tl.store(GRAD + grad_row + end_column, tl.zeros([2 * WIDTH], GRAD.dtype.element_ty), mask=is_end)
        tl.store(PARTIALS + row * 2, 0.0)
        tl.store(PARTIALS + row * 2 + 1, 0.0)


@triton.jit
def multi_label_kernel(
    STUDENT,  # [N, C] logits
    TEACHER,  # [N, C] logits
    LABELS,  # [N, C], contiguous
    LABEL_WEIGHTS,  # [N], or None
    GRAD,  # out: [N, C]
    PARTIALS,  # out: [N, 2]: hard, soft
    ROW_DIVISOR,  # rows to divide by, a number or a pointer to one
    HARD_DIVISOR,  # of the weighted sum of hard losses, likewise; None: ROW_DIVISOR, and no weights
    GRAD_SCALE,  # factor of the gradient, a number or a pointer to one
    num_classes,
    student_stride,
    teacher_stride,
    grad_stride,
    inverse_temperature,
    hard_weight,
    soft_weight,  # of the gradient: alpha * T (/ C)
    BLOCK: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_HARD_GRAD: tl.constexpr,
    HAS_SOFT_GRAD: tl.constexpr,
    ROW_DIVISOR_ON_DEVICE: tl.constexpr,
    HARD_DIVISOR_ON_DEVICE: tl.constexpr,
    GRAD_SCALE_ON_DEVICE: tl.constexpr,
):
    """Loss and gradients of one row with a yes or no in each class, in blocks of classes."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    in_range = row >= 0
    grad_scale = _read_scalar(GRAD_SCALE, GRAD_SCALE_ON_DEVICE)
    divisor = tl.maximum(_read_scalar(ROW_DIVISOR, ROW_DIVISOR_ON_DEVICE), 1.0)
    weight = grad_scale / divisor
    label_weight = tl.full([1], 1.0, tl.float32)
    if HARD_DIVISOR is not None:
        label_weight, divisor = _label_weights(LABEL_WEIGHTS, HARD_DIVISOR, row, in_range, HARD_DIVISOR_ON_DEVICE)
    hard = tl.zeros([1], tl.float32)
    soft = tl.zeros([1], tl.float32)
    for start in range(0, num_classes, BLOCK):
        block_hard, block_soft = multi_label_rows(
            STUDENT + (row * student_stride + start)[:, None],
            TEACHER + (row * teacher_stride + start)[:, None],
            LABELS + (row * num_classes + start)[:, None],
            GRAD + (row * grad_stride + start)[:, None],
            label_weight,
            in_range,
            num_classes - start,
            inverse_temperature,
            hard_weight * grad_scale / divisor / num_classes,
            soft_weight * weight,
            BLOCK,
            HAS_LABELS,
            HAS_TEACHER,
            HAS_HARD_GRAD,
            HAS_SOFT_GRAD,
        )
        hard += block_hard
        soft += block_soft
    tl.store(PARTIALS + row * 2, hard / num_classes)
    tl.store(PARTIALS + row * 2 + 1, soft)
