"""Device code of the fused loss; `triton_backend.py` launches it.

    count_kernel     1 program: rows and tokens that count, where the caller does not know them
    fused_kernel     logits of few classes and all hidden states in one launch, one warp a program, no barrier
    stream_kernel    logits of many classes, one row a program, two passes over it
    finish_kernel    1 program: sums the programs' partial losses in a fixed order
    rescale_kernel   backward: multiplies stored gradients, where the upstream gradient is not the expected one

Every input byte is read once from memory (the second pass of `stream_kernel` comes from cache) and every gradient byte
is written once. There are no atomics, so results repeat bit for bit. Exponentials are taken in base 2, which is what
the hardware has.

Suffixes as in `reference.py`: B batch, S tokens, H hidden size, C classes, N rows of logits, K pairs of hidden states.
Pointers and sizes are in elements.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-16777216.0)
"""-2^24, the lowest reference (log2 of the largest exponential so far): integers are exact up to here. A finite one, so
that x - reference is a number where every logit so far is -inf; what lies below, as fillers like -1e30, is as -inf."""
INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))

INTEGER_POWERS = (1, 2, 3, 4, 5, 6, 8, 10, 16, 20)
"""Temperatures for which exp(x) is had from exp(x / T) by a few multiplications instead of a second exponential."""


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
    """Number of labels that are not ignored, and of tokens that are not padded."""
    lanes = tl.arange(0, BLOCK)
    if COUNTS_ROWS:
        kept = tl.zeros([BLOCK], tl.int32)
        for start in range(0, num_rows, BLOCK):
            label = tl.load(LABELS + start + lanes, mask=start + lanes < num_rows, other=ignore_index)
            kept += (label != ignore_index).to(tl.int32)
        tl.store(COUNTS, tl.sum(kept, 0).to(tl.float32))
    if COUNTS_TOKENS:
        kept = tl.zeros([BLOCK], tl.int32)
        for start in range(0, num_tokens, BLOCK):
            kept += (tl.load(MASK + start + lanes, mask=start + lanes < num_tokens, other=0) != 0).to(tl.int32)
        tl.store(COUNTS + 1, tl.sum(kept, 0).to(tl.float32))


@triton.jit
def _read_scalar(VALUE, IS_POINTER: tl.constexpr):
    """A setting that the host passes by value, or by pointer where only the device knows it."""
    if IS_POINTER:
        value = tl.load(VALUE).to(tl.float32)
    else:
        value = VALUE
    return value


@triton.jit
def _label_is_wrong(label, num_classes):
    """A class id outside [0, C) is never read through: it makes the loss NaN."""
    return (label < 0) | (label >= num_classes)


# -- Few classes, and hidden states ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows", "num_classes", "num_logit_programs", "num_hidden_programs", "num_vectors"])
def fused_kernel(
    STUDENT,  # [N, C] logits
    TEACHER,  # [N, C] logits
    LABELS,  # [N]
    LOGITS_GRAD,  # out: [N, C], contiguous
    STUDENT_HIDDEN,  # K pointers to [B, S, H]
    TEACHER_HIDDEN,  # K pointers to [B, S, H]
    MASK,  # [B, S], contiguous, 0 at padding
    HIDDEN_GRAD,  # out: [K, B, S, H], contiguous
    PARTIALS,  # out: [2 * num_logit_programs + num_hidden_programs]: (hard, soft)..., hidden...
    ROWS,  # rows to divide by, a number or a pointer to one
    VECTORS,  # hidden vectors to divide by, a number or a pointer to one
    GRAD_SCALE,  # factor baked into the gradients, a number or a pointer to one
    num_rows,
    num_classes,
    student_stride,
    teacher_stride,
    ignore_index,
    num_logit_programs,
    num_hidden_programs,
    num_vectors,  # B * S
    tokens_per_sample,  # S; 1 for [CLS] vectors
    student_stride_b,  # these four in units of ALIGNMENT elements: a factor that the compiler can see
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
    NORMALIZE: tl.constexpr,
    HARD_GRAD: tl.constexpr,
    SOFT_GRAD: tl.constexpr,
    HIDDEN_HAS_GRAD: tl.constexpr,
    ROWS_ON_DEVICE: tl.constexpr,
    VECTORS_ON_DEVICE: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr,
):
    """The first `num_logit_programs` programs take rows of logits, the others hidden vectors of one pair each."""
    program = tl.program_id(0)
    if program < num_logit_programs:
        row = program * ROWS_PER_PROGRAM + tl.arange(0, ROWS_PER_PROGRAM)
        in_range = row < num_rows
        kept = in_range
        label = tl.zeros([ROWS_PER_PROGRAM], tl.int64)
        if HAS_LABELS:
            label = tl.load(LABELS + row, mask=in_range, other=ignore_index)
            kept = in_range & (label != ignore_index)
        weight = _read_scalar(GRAD_SCALE, SCALE_ON_DEVICE) / tl.maximum(_read_scalar(ROWS, ROWS_ON_DEVICE), 1.0)
        row = row.to(tl.int64)
        if IS_REGRESSION:
            hard, soft = _regression_rows(
                STUDENT + row * student_stride,
                TEACHER + row * teacher_stride,
                LOGITS_GRAD + row,
                label,
                in_range,
                kept,
                hard_weight * weight,
                soft_weight * weight,
                HAS_LABELS,
                HAS_TEACHER,
                HARD_GRAD,
                SOFT_GRAD,
            )
        else:
            hard, soft = _class_rows(
                STUDENT + (row * student_stride)[:, None],
                TEACHER + (row * teacher_stride)[:, None],
                LOGITS_GRAD + (row * num_classes)[:, None],
                label,
                in_range,
                kept,
                num_classes,
                inverse_temperature,
                hard_weight * weight,
                soft_weight * weight,
                CLASSES_PADDED,
                HAS_LABELS,
                HAS_TEACHER,
                HARD_GRAD,
                SOFT_GRAD,
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
        weight = _read_scalar(GRAD_SCALE, SCALE_ON_DEVICE) / tl.maximum(_read_scalar(VECTORS, VECTORS_ON_DEVICE), 1.0)
        student_offset = (sample * student_stride_b + token * student_stride_s) * ALIGNMENT
        teacher_offset = (sample * teacher_stride_b + token * teacher_stride_s) * ALIGNMENT
        grad_offset = (pair.to(tl.int64) * num_vectors + vector.to(tl.int64)) * H
        squared = _hidden_vectors(
            _pick(STUDENT_HIDDEN, pair, NUM_PAIRS) + student_offset[:, None],
            _pick(TEACHER_HIDDEN, pair, NUM_PAIRS) + teacher_offset[:, None],
            HIDDEN_GRAD + grad_offset[:, None],
            has_vector,
            is_token,
            hidden_weight * weight,
            H,
            H_PADDED,
            NORMALIZE,
            HIDDEN_HAS_GRAD,
        )
        tl.store(PARTIALS + num_logit_programs * 2 + program, tl.sum(squared, 0))


@triton.jit
def _regression_rows(
    student_pointer,
    teacher_pointer,
    grad_pointer,
    label,
    in_range,
    kept,
    hard_weight,
    soft_weight,
    HAS_LABELS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HARD_GRAD: tl.constexpr,
    SOFT_GRAD: tl.constexpr,
):
    """Squared errors of one score against label and teacher, [rows] each."""
    student = tl.load(student_pointer, mask=kept, other=0.0).to(tl.float32)
    hard = tl.zeros_like(student)
    soft = tl.zeros_like(student)
    grad = tl.zeros_like(student)
    if HAS_LABELS:
        error = tl.where(kept, student - label.to(tl.float32), 0.0)
        hard = error * error
        if HARD_GRAD:
            grad += 2 * hard_weight * error
    if HAS_TEACHER:
        error = student - tl.load(teacher_pointer, mask=kept, other=0.0).to(tl.float32)
        soft = error * error
        if SOFT_GRAD:
            grad += 2 * soft_weight * error
    if HARD_GRAD or SOFT_GRAD:
        tl.store(grad_pointer, grad.to(grad_pointer.dtype.element_ty), mask=in_range)
    return hard, soft


@triton.jit
def _class_rows(
    student_pointer,  # [rows, 1]
    teacher_pointer,  # [rows, 1]
    grad_pointer,  # [rows, 1]
    label,
    in_range,
    kept,
    num_classes,
    inverse_temperature,
    hard_weight,
    soft_weight,
    CLASSES_PADDED: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HARD_GRAD: tl.constexpr,
    SOFT_GRAD: tl.constexpr,
):
    """Cross-entropy and KL(teacher / T || student / T), [rows] each; whole rows stay in registers.

    Logits are shifted by their maximum before they are divided by T, which keeps differences of large logits exact.
    """
    column = tl.arange(0, CLASSES_PADDED)[None, :]
    is_class = column < num_classes
    loaded = kept[:, None] & is_class

    student = tl.load(student_pointer + column, mask=loaded, other=0.0).to(tl.float32)
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
        hard = tl.where(_label_is_wrong(label, num_classes), NAN, hard)
        hard = tl.where(kept, hard, 0.0)
        if HARD_GRAD:
            row_weight = tl.where(_label_is_wrong(label, num_classes), NAN, hard_weight)
            row_weight = tl.where(kept, row_weight, 0.0)
            grad += row_weight[:, None] * (exp_student / total[:, None] - is_label.to(tl.float32))
    if HAS_TEACHER:
        teacher = tl.load(teacher_pointer + column, mask=loaded, other=0.0).to(tl.float32)
        teacher = tl.where(is_class, teacher, -INF)
        teacher = (teacher - tl.max(teacher, 1)[:, None]) * inverse_temperature
        student *= inverse_temperature
        exp_student = tl.exp2(student * LOG2_E)
        exp_teacher = tl.exp2(teacher * LOG2_E)
        student_total = tl.sum(exp_student, 1)
        teacher_total = tl.sum(exp_teacher, 1)
        soft = _divergence(student, teacher, exp_student, exp_teacher, student_total, teacher_total)
        soft = tl.where(kept, soft, 0.0)
        if SOFT_GRAD:
            row_weight = tl.where(kept, soft_weight, 0.0)
            grad += row_weight[:, None] * (exp_student / student_total[:, None] - exp_teacher / teacher_total[:, None])
    if HARD_GRAD or SOFT_GRAD:
        tl.store(grad_pointer + column, grad.to(grad_pointer.dtype.element_ty), mask=in_range[:, None] & is_class)
    return hard, soft


@triton.jit
def _divergence(student, teacher, exp_student, exp_teacher, student_total, teacher_total):
    """KL of rows: m + log r, with r = student_total / teacher_total, d = teacher - student and m = mean of d under p.

    At a high temperature both models are nearly flat, m and log r all but cancel, and T^2 magnifies what rounding
    leaves. So where the divergence is small it is taken as log1p(u) of a sum without cancellation,
    u = sum of p (exp(m - d) - 1 - (m - d)), to which classes without a teacher's mass (p = 0) add exp(m) q / p_total.
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
    kept,
    weight,
    H: tl.constexpr,
    H_PADDED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_GRAD: tl.constexpr,
):
    """Squared distance of student and teacher vectors, [vectors]; vectors that are not kept are not read."""
    column = tl.arange(0, H_PADDED)[None, :]
    loaded = kept[:, None] & (column < H)
    student = tl.load(student_pointer + column, mask=loaded, other=0.0).to(tl.float32)
    teacher = tl.load(teacher_pointer + column, mask=loaded, other=0.0).to(tl.float32)
    if NORMALIZE:
        student_norm = tl.sqrt(tl.sum(student * student, 1))
        inverse_norm = 1.0 / tl.maximum(student_norm, 1e-12)
        unit = student * inverse_norm[:, None]
        difference = unit - teacher * (1.0 / tl.maximum(tl.sqrt(tl.sum(teacher * teacher, 1)), 1e-12))[:, None]
        # d/ds of |s/|s| - t|^2 / 2 is (d - u (u.d)) / |s|; below the eps the length is a constant
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
    """Element `index` of a tuple of pointers. A chain of selects keeps the alignment that the compiler knows of."""
    chosen = pointers[0]
    for i in tl.static_range(1, COUNT):
        chosen = tl.where(index == i, pointers[i], chosen)
    return chosen


# -- Many classes ------------------------------------------------------------------------------------------------------


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
    """Integer base-2 references for exp(x / T) and exp(x), given the largest x.

    Integers, so that x * scale - reference is one rounding of a fused multiply-add, and moving a sum to another
    reference multiplies by an exact power of two.
    """
    soft = _reference(maximum, scale)
    if POWER > 0:
        hard = soft * POWER
    else:
        hard = _reference(maximum, LOG2_E)
    return soft, hard


@triton.jit
def _reference(maximum, scale):
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
    """log2 of the second value of `_exponentials`, with the same rounding."""
    if POWER > 0:
        return tl.fma(x, scale, -soft_reference) * POWER
    else:
        return tl.fma(x, LOG2_E, -hard_reference)


@triton.jit(do_not_specialize=["student_start", "teacher_start", "grad_start"])
def stream_kernel(
    STUDENT,  # storage of the [N, C] logits
    TEACHER,  # storage of the [N, C] logits
    LABELS,  # [N]
    GRAD,  # out: storage of the [N, C] gradient
    PARTIALS,  # out: [N, 2]: hard, soft
    ROWS,  # rows to divide by, a number or a pointer to one
    GRAD_SCALE,  # factor baked into the gradient, a number or a pointer to one
    num_classes,
    student_start,  # where row 0 begins
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
    HAS_LABELS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HARD_GRAD: tl.constexpr,
    SOFT_GRAD: tl.constexpr,
    ROWS_ON_DEVICE: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr,
):
    """Cross-entropy and KL of one row: a pass for the statistics, and one backwards for KL sum and gradient.

    A row is cut into [LANES, WIDTH] tiles. Each lane keeps its own running maximum and sums ("online softmax") over
    WIDTH neighbouring columns, which one thread holds, so the loop needs neither shuffles nor barriers. Masks depend
    on the lane alone, so loads are WIDTH wide although C is no multiple of it: where rows of student, teacher and
    gradient are misaligned alike (IS_ALIGNED), a row is entered at its first aligned column, and the few columns
    before it and after the last whole vector, its ragged ends, go through a tile of their own.
    """
    HAS_GRAD: tl.constexpr = HARD_GRAD or SOFT_GRAD
    row = tl.program_id(0).to(tl.int64)
    scale = inverse_temperature * LOG2_E
    kept = row >= 0
    label = row * 0
    if HAS_LABELS:
        label = tl.load(LABELS + row).to(tl.int64)
        kept = label != ignore_index
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
    end = tl.arange(0, 2 * WIDTH)  # columns of the ragged ends: the head's, then the tail's
    end_column = tl.where(end < WIDTH, end, num_head + num_vectors * WIDTH + (end - WIDTH))
    is_end = tl.where(end < WIDTH, end < num_head, end_column < num_classes)
    lane = tl.arange(0, LANES)
    within = tl.arange(0, WIDTH)[None, :]

    if kept:
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

        # -- the ragged ends, and all lanes together
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

        weight = _read_scalar(GRAD_SCALE, SCALE_ON_DEVICE) / tl.maximum(_read_scalar(ROWS, ROWS_ON_DEVICE), 1.0)
        hard = 0.0
        soft = 0.0
        label_grad = 0.0
        label_column = row * 0
        hard_factor = 0.0
        if HAS_LABELS:
            is_wrong = _label_is_wrong(label, num_classes)
            label_column = tl.where(is_wrong, 0, label)
            label_logit = tl.load(STUDENT + student_row + label_column).to(tl.float32)
            log2_label = _log2_hard(label_logit, soft_max, hard_max, scale, POWER)
            hard = tl.where(is_wrong, NAN, (tl.log2(hard_total) - log2_label) * LN_2)
            if HARD_GRAD:
                row_weight = tl.where(is_wrong, NAN, hard_weight * weight)
                hard_factor = row_weight / hard_total
                _, label_exp = _exponentials(label_logit, soft_max, hard_max, scale, POWER)
                label_grad = label_exp * hard_factor - row_weight
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
            # p (log p - log q) is taken from the shifted logits; `shift` accounts for the normalisers
            shift = tl.log2(soft_total / teacher_total)
            end_weighted = end_exp_teacher * ((end_teacher_log2 - end_student_log2) + shift)
            end_weighted = tl.where(end_exp_teacher > 0, end_weighted, 0.0)
            weighted = tl.zeros([LANES], tl.float32)
            if SOFT_GRAD:
                student_factor = soft_weight * weight / soft_total
                teacher_factor = soft_weight * weight / teacher_total
                if HAS_LABELS:
                    label_exp, _ = _exponentials(label_logit, soft_max, hard_max, scale, POWER)
                    teacher_logit = tl.load(TEACHER + teacher_row + label_column).to(tl.float32)
                    label_grad += label_exp * student_factor
                    label_grad -= tl.exp2(tl.fma(teacher_logit, scale, -teacher_max)) * teacher_factor

        # -- second pass, from the end of the row, which is still in the cache
        if HAS_TEACHER or HAS_GRAD:
            num_tiles = tl.cdiv(num_vectors, LANES)
            for tile in range(0, num_tiles):
                vector = (num_tiles - 1 - tile) * LANES + lane
                offset = vector[:, None] * WIDTH + within
                is_in = (vector < num_vectors)[:, None]
                student = tl.load(STUDENT + student_body + offset, mask=is_in, other=-INF).to(tl.float32)
                exp_soft, exp_hard = _exponentials(student, soft_max, hard_max, scale, POWER)
                grad = tl.zeros([LANES, WIDTH], tl.float32)
                if HARD_GRAD:
                    grad = exp_hard * hard_factor
                if HAS_TEACHER:
                    teacher = tl.load(TEACHER + teacher_body + offset, mask=is_in, other=-INF).to(tl.float32)
                    student_log2 = tl.fma(student, scale, -soft_max)
                    teacher_log2 = tl.fma(teacher, scale, -teacher_max)
                    exp_teacher = tl.exp2(teacher_log2)
                    tile_weighted = exp_teacher * ((teacher_log2 - student_log2) + shift)
                    weighted += tl.sum(tl.where(exp_teacher > 0, tile_weighted, 0.0), 1)
                    if SOFT_GRAD:
                        grad += exp_soft * student_factor - exp_teacher * teacher_factor
                if HAS_GRAD:
                    tl.store(GRAD + grad_body + offset, grad.to(GRAD.dtype.element_ty), mask=is_in)
        if HAS_GRAD:
            end_grad = end_exp_hard * hard_factor
            if SOFT_GRAD:
                end_grad += end_exp_soft * student_factor - end_exp_teacher * teacher_factor
            tl.store(GRAD + grad_row + end_column, end_grad.to(GRAD.dtype.element_ty), mask=is_end)
            if HARD_GRAD:  # the label's column once more, in fp32, after every other store of this row
                tl.debug_barrier()
                tl.store(GRAD + grad_row + label_column, label_grad.to(GRAD.dtype.element_ty))
        if HAS_TEACHER:
            soft = (tl.sum(weighted, 0) + tl.sum(end_weighted, 0)) / teacher_total * LN_2
        tl.store(PARTIALS + row * 2, hard)
        tl.store(PARTIALS + row * 2 + 1, soft)
    else:  # an ignored row: nothing is read
        if HAS_GRAD:
            nothing = tl.zeros([LANES, WIDTH], GRAD.dtype.element_ty)
            for start in range(0, num_vectors, LANES):
                vector = start + lane
                offset = vector[:, None] * WIDTH + within
                tl.store(GRAD + grad_body + offset, nothing, mask=(vector < num_vectors)[:, None])
            tl.store(GRAD + grad_row + end_column, tl.zeros([2 * WIDTH], GRAD.dtype.element_ty), mask=is_end)
        tl.store(PARTIALS + row * 2, 0.0)
        tl.store(PARTIALS + row * 2 + 1, 0.0)


# -- Sums, and the upstream gradient -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_logit_partials", "num_hidden_partials"])
def finish_kernel(
    PARTIALS,  # [2 * num_logit_partials + num_hidden_partials]: (hard, soft)..., hidden...
    TOTAL,  # out: []
    HARD,  # out: []
    SOFT,  # out: []
    HIDDEN,  # out: []
    ROWS,
    VECTORS,
    num_logit_partials,
    num_hidden_partials,
    soft_factor,  # T^2 (/ C)
    hidden_factor,  # 1 / (K * H)
    hard_weight,
    soft_weight,
    hidden_weight,
    ROWS_ON_DEVICE: tl.constexpr,
    VECTORS_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Means of the three terms and their weighted sum, in a fixed order."""
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
    num_rows = tl.maximum(_read_scalar(ROWS, ROWS_ON_DEVICE), 1.0)
    num_vectors = tl.maximum(_read_scalar(VECTORS, VECTORS_ON_DEVICE), 1.0)
    hard_mean = tl.sum(hard, 0) / num_rows
    soft_mean = tl.sum(soft, 0) * soft_factor / num_rows
    hidden_mean = tl.sum(hidden, 0) * hidden_factor / num_vectors
    # a term of weight 0 stays out: 0 * inf, the weighted loss of a masked class, would be NaN
    total = tl.where(hard_weight != 0, hard_weight * hard_mean, 0.0)
    total += tl.where(soft_weight != 0, soft_weight * soft_mean, 0.0)
    total += tl.where(hidden_weight != 0, hidden_weight * hidden_mean, 0.0)
    tl.store(TOTAL, total)
    tl.store(HARD, hard_mean)
    tl.store(SOFT, soft_mean)
    tl.store(HIDDEN, hidden_mean)


@triton.jit(do_not_specialize=["num_first_programs", "first_size", "second_size"])
def rescale_kernel(
    FIRST,
    SECOND,
    UPSTREAM,  # []
    GRAD_SCALE,
    num_first_programs,
    first_size,
    second_size,
    SCALE_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply both gradients by upstream / grad_scale, unless that is 1 but for rounding.

    The device decides, so the host does not wait, and a CUDA graph replays the right branch.
    """
    ratio = tl.load(UPSTREAM).to(tl.float32) / _read_scalar(GRAD_SCALE, SCALE_ON_DEVICE)
    if not (tl.abs(ratio - 1.0) <= 2.4e-7):  # two ulps of fp32; a NaN goes on
        program = tl.program_id(0)
        if program < num_first_programs:
            _multiply(FIRST, first_size, ratio, program, num_first_programs, BLOCK)
        else:
            others = tl.num_programs(0) - num_first_programs
            _multiply(SECOND, second_size, ratio, program - num_first_programs, others, BLOCK)


@triton.jit
def _multiply(TENSOR, size, factor, program, num_programs, BLOCK: tl.constexpr):
    for start in range(program.to(tl.int64) * BLOCK, size, num_programs.to(tl.int64) * BLOCK):
        offset = start + tl.arange(0, BLOCK)
        value = tl.load(TENSOR + offset, mask=offset < size, other=0.0).to(tl.float32) * factor
        tl.store(TENSOR + offset, value.to(TENSOR.dtype.element_ty), mask=offset < size)
