"""Device code of the fused loss that training launches; `triton_backend.py` launches it.

    fused_kernel     logits of up to 256 classes and all hidden states in one launch, one warp per program, no barrier
    finish_kernel    1 program: sums the programs' partial losses in a fixed order
    rescale_kernel   backward: multiplies the stored gradients if the upstream gradient is not the expected one
    count_kernel     1 program: counts valid rows and tokens; not in training, which passes the counts

`triton_streaming.py` has the kernel for more classes.

Each input byte is read from memory once, and each gradient byte written once. There are no atomics, so results are
bitwise reproducible. Exponentials are in base 2, which the hardware computes natively.

Shape suffixes as in `reference.py`: B batch, S tokens, H hidden size, C classes, N rows of logits, K layer pairs.
Strides and offsets are in elements.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from peakd_ds.kernels.triton_multi_label import multi_label_rows

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))


@triton.jit
def _read_scalar(VALUE, IS_POINTER: tl.constexpr):
    """A number that the host passes by value, or by pointer if only the device knows it."""
    if IS_POINTER:
        value = tl.load(VALUE).to(tl.float32)
    else:
        value = VALUE
    return value


@triton.jit
def _label_weights(LABEL_WEIGHTS, HARD_DIVISOR, row, in_range, HARD_DIVISOR_ON_DEVICE: tl.constexpr):
    """Weights of the rows' hard losses, all 0 if the divisor is, and the divisor, 1 if it is 0."""
    divisor = _read_scalar(HARD_DIVISOR, HARD_DIVISOR_ON_DEVICE)
    if LABEL_WEIGHTS is None:
        label_weight = tl.where(in_range, 1.0, 0.0)
    else:
        label_weight = tl.load(LABEL_WEIGHTS + row, mask=in_range, other=0.0).to(tl.float32)
    return tl.where(divisor > 0, label_weight, 0.0), tl.where(divisor > 0, divisor, 1.0)


@triton.jit
def _is_wrong_label(label, num_classes):
    """Whether a class id is outside [0, C). It is never used as an index; the loss becomes NaN."""
    return (label < 0) | (label >= num_classes)


# -- Logits of few classes, and hidden states --------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows", "num_classes", "num_logit_programs", "num_hidden_programs", "num_vectors"])
def fused_kernel(
    STUDENT,  # [N, C] logits
    TEACHER,  # [N, C] logits
    LABELS,  # [N], or [N, C], contiguous, if MULTI_LABEL
    LABEL_WEIGHTS,  # [N], or None
    GRAD_LOGITS,  # out: [N, C], contiguous
    STUDENT_HIDDEN,  # K pointers to [B, S, H]
    TEACHER_HIDDEN,  # K pointers to [B, S, H]
    MASK,  # [B, S], contiguous, 0 at padding
    GRAD_HIDDEN,  # out: [K, B, S, H], contiguous
    PARTIALS,  # out: [2 * num_logit_programs + num_hidden_programs]: (hard, soft)..., hidden...
    ROW_DIVISOR,  # rows to divide by, a number or a pointer to one
    HARD_DIVISOR,  # of the weighted sum of hard losses, likewise; None: ROW_DIVISOR, and no weights
    VECTOR_DIVISOR,  # hidden vectors to divide by, a number or a pointer to one
    GRAD_SCALE,  # factor of the gradients, a number or a pointer to one
    num_rows,
    num_classes,
    student_stride,
    teacher_stride,
    ignore_index,
    num_logit_programs,
    num_hidden_programs,
    num_vectors,  # B * S
    tokens_per_sample,  # S; 1 for [CLS] vectors
    student_stride_b,  # these four in units of ALIGNMENT elements, so the compiler knows that factor
    student_stride_s,
    teacher_stride_b,
    teacher_stride_s,
    inverse_temperature,
    hard_weight,
    soft_weight,  # of the gradient: alpha * T (/ C)
    hidden_weight,
    ROWS_PER_PROGRAM: tl.constexpr,
    CLASSES_PADDED: tl.constexpr,
    VECTORS_PER_PROGRAM: tl.constexpr,
    H: tl.constexpr,
    H_PADDED: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_MASK: tl.constexpr,
    IS_REGRESSION: tl.constexpr,
    MULTI_LABEL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_HARD_GRAD: tl.constexpr,
    HAS_SOFT_GRAD: tl.constexpr,
    HAS_HIDDEN_GRAD: tl.constexpr,
    ROW_DIVISOR_ON_DEVICE: tl.constexpr,
    HARD_DIVISOR_ON_DEVICE: tl.constexpr,
    VECTOR_DIVISOR_ON_DEVICE: tl.constexpr,
    GRAD_SCALE_ON_DEVICE: tl.constexpr,
):
    """Loss and gradients: the first `num_logit_programs` programs process rows of logits, the others hidden vectors.

    A program of the second kind processes vectors of one layer pair.
    """
    program = tl.program_id(0)
    if program < num_logit_programs:
        row = program * ROWS_PER_PROGRAM + tl.arange(0, ROWS_PER_PROGRAM)
        in_range = row < num_rows
        is_valid = in_range
        label = tl.zeros([ROWS_PER_PROGRAM], tl.int64)
        if HAS_LABELS and not MULTI_LABEL:
            label = tl.load(LABELS + row, mask=in_range, other=ignore_index)
            is_valid = in_range & (label != ignore_index)
        weight = _read_scalar(GRAD_SCALE, GRAD_SCALE_ON_DEVICE) / tl.maximum(
            _read_scalar(ROW_DIVISOR, ROW_DIVISOR_ON_DEVICE), 1.0
        )
        label_weight = tl.full([ROWS_PER_PROGRAM], 1.0, tl.float32)
        weight_of_hard = weight
        if HARD_DIVISOR is not None:
            label_weight, divisor = _label_weights(LABEL_WEIGHTS, HARD_DIVISOR, row, in_range, HARD_DIVISOR_ON_DEVICE)
            weight_of_hard = _read_scalar(GRAD_SCALE, GRAD_SCALE_ON_DEVICE) / divisor
        row = row.to(tl.int64)
        if MULTI_LABEL:
            hard, soft = multi_label_rows(
                STUDENT + (row * student_stride)[:, None],
                TEACHER + (row * teacher_stride)[:, None],
                LABELS + (row * num_classes)[:, None],
                GRAD_LOGITS + (row * num_classes)[:, None],
                label_weight,
                in_range,
                num_classes,
                inverse_temperature,
                hard_weight * weight_of_hard / num_classes,
                soft_weight * weight,
                CLASSES_PADDED,
                HAS_LABELS,
                HAS_TEACHER,
                HAS_HARD_GRAD,
                HAS_SOFT_GRAD,
            )
            hard /= num_classes
        elif IS_REGRESSION:
            hard, soft = _regression_rows(
                STUDENT + row * student_stride,
                TEACHER + row * teacher_stride,
                GRAD_LOGITS + row,
                label,
                label_weight,
                in_range,
                is_valid,
                hard_weight * weight_of_hard,
                soft_weight * weight,
                HARD_DIVISOR is not None,
                HAS_LABELS,
                HAS_TEACHER,
                HAS_HARD_GRAD,
                HAS_SOFT_GRAD,
            )
        else:
            hard, soft = _class_rows(
                STUDENT + (row * student_stride)[:, None],
                TEACHER + (row * teacher_stride)[:, None],
                GRAD_LOGITS + (row * num_classes)[:, None],
                label,
                label_weight,
                in_range,
                is_valid,
                num_classes,
                inverse_temperature,
                hard_weight * weight_of_hard,
                soft_weight * weight,
                CLASSES_PADDED,
                HARD_DIVISOR is not None,
                HAS_LABELS,
                HAS_TEACHER,
                HAS_HARD_GRAD,
                HAS_SOFT_GRAD,
            )
        tl.store(PARTIALS + program * 2, tl.sum(hard, 0))
        tl.store(PARTIALS + program * 2 + 1, tl.sum(soft, 0))
    else:
        program -= num_logit_programs
        programs_per_pair = num_hidden_programs // NUM_PAIRS
        pair = program // programs_per_pair
        vector = (program % programs_per_pair) * VECTORS_PER_PROGRAM + tl.arange(0, VECTORS_PER_PROGRAM)
        has_vector = vector < num_vectors
        sample = (vector // tokens_per_sample).to(tl.int64)
        token = (vector % tokens_per_sample).to(tl.int64)
        is_token = has_vector
        if HAS_MASK:
            mask = tl.load(MASK + vector, mask=has_vector, other=0)
            is_token = has_vector & (mask != 0)
        weight = _read_scalar(GRAD_SCALE, GRAD_SCALE_ON_DEVICE) / tl.maximum(
            _read_scalar(VECTOR_DIVISOR, VECTOR_DIVISOR_ON_DEVICE), 1.0
        )
        student_offset = (sample * student_stride_b + token * student_stride_s) * ALIGNMENT
        teacher_offset = (sample * teacher_stride_b + token * teacher_stride_s) * ALIGNMENT
        grad_offset = (pair.to(tl.int64) * num_vectors + vector.to(tl.int64)) * H
        squared = _hidden_vectors(
            _pick(STUDENT_HIDDEN, pair, NUM_PAIRS) + student_offset[:, None],
            _pick(TEACHER_HIDDEN, pair, NUM_PAIRS) + teacher_offset[:, None],
            GRAD_HIDDEN + grad_offset[:, None],
            has_vector,
            is_token,
            hidden_weight * weight,
            H,
            H_PADDED,
            NORMALIZE,
            HAS_HIDDEN_GRAD,
        )
        tl.store(PARTIALS + num_logit_programs * 2 + program, tl.sum(squared, 0))


@triton.jit
def _regression_rows(
    student_pointer,
    teacher_pointer,
    grad_pointer,
    label,
    label_weight,
    in_range,
    is_valid,
    hard_weight,
    soft_weight,
    IS_WEIGHTED: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_HARD_GRAD: tl.constexpr,
    HAS_SOFT_GRAD: tl.constexpr,
):
    """Squared errors of the student's scores against labels and teacher, [rows] each; stores the gradient."""
    student = tl.load(student_pointer, mask=is_valid, other=0.0).to(tl.float32)
    hard = tl.zeros_like(student)
    soft = tl.zeros_like(student)
    grad = tl.zeros_like(student)
    if HAS_LABELS:
        error = tl.where(is_valid, student - label.to(tl.float32), 0.0)
        if IS_WEIGHTED:
            error = tl.where(label_weight != 0, error, 0.0)
        hard = error * error
        if IS_WEIGHTED:
            hard *= label_weight
            error *= label_weight
        if HAS_HARD_GRAD:
            grad += 2 * hard_weight * error
    if HAS_TEACHER:
        error = student - tl.load(teacher_pointer, mask=is_valid, other=0.0).to(tl.float32)
        soft = error * error
        if HAS_SOFT_GRAD:
            grad += 2 * soft_weight * error
    if HAS_HARD_GRAD or HAS_SOFT_GRAD:
        tl.store(grad_pointer, grad.to(grad_pointer.dtype.element_ty), mask=in_range)
    return hard, soft


@triton.jit
def _class_rows(
    student_pointer,  # [rows, 1]
    teacher_pointer,  # [rows, 1]
    grad_pointer,  # [rows, 1]
    label,
    label_weight,
    in_range,
    is_valid,
    num_classes,
    inverse_temperature,
    hard_weight,
    soft_weight,
    CLASSES_PADDED: tl.constexpr,
    IS_WEIGHTED: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_HARD_GRAD: tl.constexpr,
    HAS_SOFT_GRAD: tl.constexpr,
):
    """Cross-entropy and KL(teacher || student) at temperature T, [rows] each; stores the gradient.

    Rows stay in registers. The maximum is subtracted before the division by T, so differences between large logits
    stay exact.
    """
    column = tl.arange(0, CLASSES_PADDED)[None, :]
    is_class = column < num_classes
    is_loaded = is_valid[:, None] & is_class

    student = tl.load(student_pointer + column, mask=is_loaded, other=0.0).to(tl.float32)
    student = tl.where(is_class, student, -INF)
    student -= tl.max(student, 1)[:, None]
    hard = tl.zeros_like(tl.sum(student, 1))
    soft = tl.zeros_like(hard)
    grad = tl.zeros_like(student)
    if HAS_LABELS:
        exp_student = tl.exp2(student * LOG2_E)
        total = tl.sum(exp_student, 1)
        is_label = (column == label[:, None]) & is_class
        hard = tl.log2(total) * LN_2 - tl.sum(tl.where(is_label, student, 0.0), 1)
        hard = tl.where(_is_wrong_label(label, num_classes), NAN, hard)
        hard = tl.where(is_valid, hard, 0.0)
        if IS_WEIGHTED:
            hard = tl.where(label_weight != 0, hard * label_weight, 0.0)
        if HAS_HARD_GRAD:
            row_weight = tl.where(_is_wrong_label(label, num_classes), NAN, hard_weight)
            row_weight = tl.where(is_valid, row_weight, 0.0)
            if IS_WEIGHTED:
                row_weight = tl.where(label_weight != 0, row_weight * label_weight, 0.0)
            hard_grad = row_weight[:, None] * (exp_student / total[:, None] - is_label.to(tl.float32))
            if IS_WEIGHTED:  # 0 * NaN = 0
                hard_grad = tl.where(row_weight[:, None] != 0, hard_grad, 0.0)
            grad += hard_grad
    if HAS_TEACHER:
        teacher = tl.load(teacher_pointer + column, mask=is_loaded, other=0.0).to(tl.float32)
        teacher = tl.where(is_class, teacher, -INF)
        teacher = (teacher - tl.max(teacher, 1)[:, None]) * inverse_temperature
        student *= inverse_temperature
        exp_student = tl.exp2(student * LOG2_E)
        exp_teacher = tl.exp2(teacher * LOG2_E)
        student_total = tl.sum(exp_student, 1)
        teacher_total = tl.sum(exp_teacher, 1)
        soft = _kl_divergence(student, teacher, exp_student, exp_teacher, student_total, teacher_total)
        soft = tl.where(is_valid, soft, 0.0)
        if HAS_SOFT_GRAD:
            row_weight = tl.where(is_valid, soft_weight, 0.0)
            grad += row_weight[:, None] * (exp_student / student_total[:, None] - exp_teacher / teacher_total[:, None])
    if HAS_HARD_GRAD or HAS_SOFT_GRAD:
        tl.store(grad_pointer + column, grad.to(grad_pointer.dtype.element_ty), mask=in_range[:, None] & is_class)
    return hard, soft


@triton.jit
def _kl_divergence(student, teacher, exp_student, exp_teacher, student_total, teacher_total):
    """KL(p || q), [rows]; logits are divided by T, the exponentials and their totals not normalised.

    KL = m + log r with d = teacher - student, m = sum p d, r = student_total / teacher_total. At a high temperature
    both distributions are nearly flat, so m and log r almost cancel, and T^2 magnifies the rounding error. So a small
    KL is computed as log1p(u) without cancellation: u = sum p (exp(m - d) - 1 - (m - d)), plus exp(m) q for classes
    with p = 0.
    """
    has_mass = exp_teacher > 0  # 0 * log 0 = 0
    p = exp_teacher / teacher_total[:, None]
    d = tl.where(has_mass, teacher - student, 0.0)
    m = tl.sum(p * d, 1)
    x = m[:, None] - d
    series = x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040))))))
    excess = tl.where(tl.abs(x) < 0.25, series, tl.exp2(x * LOG2_E) - 1 - x)
    without_mass = exp_student * (tl.exp2(m * LOG2_E) / teacher_total)[:, None]
    u = tl.sum(tl.where(has_mass, p * excess, without_mass), 1)
    z = u / (2 + u)  # log1p(u) = 2 atanh(z)
    z2 = z * z
    small = 2 * z * (1 + z2 * (1 / 3 + z2 * (1 / 5 + z2 * (1 / 7))))
    return tl.where(u < 0.25, small, m + tl.log2(student_total / teacher_total) * LN_2)


@triton.jit
def _hidden_vectors(
    student_pointer,  # [vectors, 1]
    teacher_pointer,  # [vectors, 1]
    grad_pointer,  # [vectors, 1]
    in_range,
    is_valid,
    weight,
    H: tl.constexpr,
    H_PADDED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_GRAD: tl.constexpr,
):
    """Squared distances of student and teacher vectors, [vectors]; stores the gradient. Padding is not read."""
    column = tl.arange(0, H_PADDED)[None, :]
    is_loaded = is_valid[:, None] & (column < H)
    student = tl.load(student_pointer + column, mask=is_loaded, other=0.0).to(tl.float32)
    teacher = tl.load(teacher_pointer + column, mask=is_loaded, other=0.0).to(tl.float32)
    if NORMALIZE:
        student_norm = tl.sqrt(tl.sum(student * student, 1))
        inverse_norm = 1.0 / tl.maximum(student_norm, 1e-12)
        unit = student * inverse_norm[:, None]
        difference = unit - teacher * (1.0 / tl.maximum(tl.sqrt(tl.sum(teacher * teacher, 1)), 1e-12))[:, None]
        # d/ds of |s/|s| - t|^2 / 2 is (d - u (u.d)) / |s|; below eps the clamped norm is a constant
        along = tl.where(student_norm > 1e-12, tl.sum(unit * difference, 1), 0.0)
        grad = (difference - unit * along[:, None]) * inverse_norm[:, None]
    else:
        difference = student - teacher
        grad = difference
    if HAS_GRAD:
        grad *= 2 * weight
        tl.store(grad_pointer + column, grad.to(grad_pointer.dtype.element_ty), mask=in_range[:, None] & (column < H))
    return tl.sum(difference * difference, 1)


@triton.jit
def _pick(pointers, index, COUNT: tl.constexpr):
    """Element `index` of a tuple of pointers, by a chain of selects, which keeps the alignment known."""
    chosen = pointers[0]
    for i in tl.static_range(1, COUNT):
        chosen = tl.where(index == i, pointers[i], chosen)
    return chosen


# -- Sums, and the upstream gradient -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_logit_partials", "num_hidden_partials"])
def finish_kernel(
    PARTIALS,  # [2 * num_logit_partials + num_hidden_partials]: (hard, soft)..., hidden...
    TOTAL,  # out: []
    HARD,  # out: []
    SOFT,  # out: []
    HIDDEN,  # out: []
    ROW_DIVISOR,
    HARD_DIVISOR,
    VECTOR_DIVISOR,
    num_logit_partials,
    num_hidden_partials,
    soft_factor,  # T^2 (/ C)
    hidden_factor,  # 1 / (K * H)
    hard_weight,
    soft_weight,
    hidden_weight,
    ROW_DIVISOR_ON_DEVICE: tl.constexpr,
    HARD_DIVISOR_ON_DEVICE: tl.constexpr,
    VECTOR_DIVISOR_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Means of the three terms and their weighted sum, summed in a fixed order."""
    lane = tl.arange(0, BLOCK)
    hard = tl.zeros([BLOCK], tl.float32)
    soft = tl.zeros([BLOCK], tl.float32)
    hidden = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_logit_partials, BLOCK):
        partial = start + lane
        hard += tl.load(PARTIALS + partial * 2, mask=partial < num_logit_partials, other=0.0)
        soft += tl.load(PARTIALS + partial * 2 + 1, mask=partial < num_logit_partials, other=0.0)
    for start in range(0, num_hidden_partials, BLOCK):
        partial = start + lane
        is_in = partial < num_hidden_partials
        hidden += tl.load(PARTIALS + num_logit_partials * 2 + partial, mask=is_in, other=0.0)
    num_rows = tl.maximum(_read_scalar(ROW_DIVISOR, ROW_DIVISOR_ON_DEVICE), 1.0)
    num_vectors = tl.maximum(_read_scalar(VECTOR_DIVISOR, VECTOR_DIVISOR_ON_DEVICE), 1.0)
    hard_divisor = num_rows
    if HARD_DIVISOR is not None:
        hard_divisor = _read_scalar(HARD_DIVISOR, HARD_DIVISOR_ON_DEVICE)
        hard_divisor = tl.where(hard_divisor > 0, hard_divisor, 1.0)  # all weights are 0 if it is 0
    hard_mean = tl.sum(hard, 0) / hard_divisor
    soft_mean = tl.sum(soft, 0) * soft_factor / num_rows
    hidden_mean = tl.sum(hidden, 0) * hidden_factor / num_vectors
    # terms of weight 0 are skipped: the loss of a masked class is inf, and 0 * inf is NaN
    total = tl.where(hard_weight != 0, hard_weight * hard_mean, 0.0)
    total += tl.where(soft_weight != 0, soft_weight * soft_mean, 0.0)
    total += tl.where(hidden_weight != 0, hidden_weight * hidden_mean, 0.0)
    tl.store(TOTAL, total)
    tl.store(HARD, hard_mean)
    tl.store(SOFT, soft_mean)
    tl.store(HIDDEN, hidden_mean)


@triton.jit(do_not_specialize=["num_first_programs", "first_size", "second_size"])
def rescale_kernel(
    FIRST,  # in and out: storage of a gradient
    SECOND,  # in and out: storage of a gradient
    GRAD_TOTAL,  # []: upstream gradient
    GRAD_SCALE,  # factor of the gradients, a number or a pointer to one
    num_first_programs,
    first_size,
    second_size,
    GRAD_SCALE_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply both gradients by grad_total / grad_scale, unless that is 1 up to rounding.

    The branch is on the device, so the host does not synchronise and a CUDA graph can replay either branch.
    """
    ratio = tl.load(GRAD_TOTAL).to(tl.float32) / _read_scalar(GRAD_SCALE, GRAD_SCALE_ON_DEVICE)
    if not (tl.abs(ratio - 1.0) <= 2.4e-7):  # two ulps of fp32; NaN takes this branch
        program = tl.program_id(0)
        if program < num_first_programs:
            _multiply(FIRST, first_size, ratio, program, num_first_programs, BLOCK)
        else:
            others = tl.num_programs(0) - num_first_programs
            _multiply(SECOND, second_size, ratio, program - num_first_programs, others, BLOCK)


@triton.jit
def _multiply(TENSOR, size, factor, program, num_programs, BLOCK: tl.constexpr):
    """Multiply this program's blocks of a tensor in place."""
    for start in range(program.to(tl.int64) * BLOCK, size, num_programs.to(tl.int64) * BLOCK):
        offset = start + tl.arange(0, BLOCK)
        value = tl.load(TENSOR + offset, mask=offset < size, other=0.0).to(tl.float32) * factor
        tl.store(TENSOR + offset, value.to(TENSOR.dtype.element_ty), mask=offset < size)


# -- Counts; no stage of training launches this: it passes the counts of the global batch ------------------------------


@triton.jit
def count_kernel(
    LABELS,  # [N]
    MASK,  # [B, S], contiguous, 0 at padding
    COUNTS,  # out: [2], rows and tokens that count
    num_rows,
    num_tokens,  # B * S
    ignore_index,
    COUNTS_ROWS: tl.constexpr,
    COUNTS_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Number of labels that are not ignored, and of tokens that are not padding."""
    lanes = tl.arange(0, BLOCK)
    if COUNTS_ROWS:
        count = tl.zeros([BLOCK], tl.int32)
        for start in range(0, num_rows, BLOCK):
            label = tl.load(LABELS + start + lanes, mask=start + lanes < num_rows, other=ignore_index)
            count += (label != ignore_index).to(tl.int32)
        tl.store(COUNTS, tl.sum(count, 0).to(tl.float32))
    if COUNTS_TOKENS:
        count = tl.zeros([BLOCK], tl.int32)
        for start in range(0, num_tokens, BLOCK):
            count += (tl.load(MASK + start + lanes, mask=start + lanes < num_tokens, other=0) != 0).to(tl.int32)
        tl.store(COUNTS + 1, tl.sum(count, 0).to(tl.float32))
