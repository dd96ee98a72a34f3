"""The fused loss in Triton, the backend for NVIDIA and AMD GPUs: the launches of its kernels.

Nothing here synchronises with the device, so a step can be captured in a CUDA graph. In training, which passes the
counts of the global batch, a step launches two kernels forward and one backward, all in `triton_kernels.py`.

Shape suffixes as in `reference.py`.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
from torch import Tensor

from peakd_ds.kernels import triton_kernels, triton_streaming
from peakd_ds.kernels.fused import FEW_CLASSES, LossAndGrads, LossInputs

LOGIT_TILE = 256
"""Logits per program of `fused_kernel`: 8 per thread."""
VECTOR_TILE = 1024
"""Elements of hidden states per warp of `fused_kernel`: 32 per thread."""
WARP_SIZE = 64 if torch.version.hip else 32
_BLOCK = 1024
_RESCALE_PROGRAMS = 1056  # several per multiprocessor, on the largest GPU


def compute(inputs: LossInputs, needs_grad_logits: bool, needs_grad_hidden: bool) -> LossAndGrads:
    """Loss, and the gradients that are needed; see `peakd_ds.kernels.fused.Backend`."""
    inputs = _with_layout(inputs)
    student_NC, teacher_NC = inputs.student_logits_NC, inputs.teacher_logits_NC
    num_rows, num_classes = student_NC.shape
    num_pairs = len(inputs.student_hidden_BSH)
    first = inputs.student_hidden_BSH[0] if num_pairs else None
    hard_weight = 1 - inputs.alpha if inputs.has_labels else 0.0
    soft_weight = inputs.alpha * inputs.soft_grad_factor if teacher_NC is not None else 0.0
    needs_grad_logits = needs_grad_logits and (hard_weight != 0 or soft_weight != 0)
    needs_grad_hidden = needs_grad_hidden and inputs.beta > 0
    is_streamed = num_classes > FEW_CLASSES

    rows_per_program = 1 if is_streamed else LOGIT_TILE // triton.next_power_of_2(num_classes)
    num_logit_programs = 0 if not inputs.has_labels and teacher_NC is None else triton.cdiv(num_rows, rows_per_program)
    padded_size = triton.next_power_of_2(first.shape[-1]) if first is not None else 1
    vectors_per_program = max(1, VECTOR_TILE // padded_size)
    num_vectors = first.shape[:-1].numel() if first is not None else 0
    num_hidden_programs = triton.cdiv(num_vectors, vectors_per_program) * num_pairs

    def scalar() -> Tensor:
        return torch.empty((), dtype=torch.float32, device=student_NC.device)

    total, hard, soft, hidden = scalar(), scalar(), scalar(), scalar()  # own storages: callers may write in place
    num_partials = 2 * num_logit_programs + num_hidden_programs
    partials = torch.empty(num_partials, dtype=torch.float32, device=student_NC.device)
    grad_logits_NC = _empty_grad_logits(student_NC) if needs_grad_logits else None
    grad_hidden_KBSH: Tensor | None = None
    if needs_grad_hidden and first is not None:
        grad_hidden_KBSH = torch.empty((num_pairs, *first.shape), dtype=first.dtype, device=first.device)

    with _current_device(student_NC.device):
        row_divisor, hard_divisor, vector_divisor = _divisors(inputs)
        flags = dict(
            HAS_LABELS=inputs.has_labels,
            HAS_TEACHER=teacher_NC is not None,
            HAS_HARD_GRAD=grad_logits_NC is not None and hard_weight != 0,
            HAS_SOFT_GRAD=grad_logits_NC is not None and soft_weight != 0,
            ROW_DIVISOR_ON_DEVICE=isinstance(row_divisor, Tensor),
            HARD_DIVISOR_ON_DEVICE=isinstance(hard_divisor, Tensor),
            GRAD_SCALE_ON_DEVICE=isinstance(inputs.grad_scale, Tensor),
        )
        if is_streamed and num_logit_programs:
            launch = _launch_multi_label if inputs.multi_label else _launch_stream
            launch(inputs, grad_logits_NC, partials, row_divisor, hard_divisor, hard_weight, soft_weight, flags)
        num_fused_logit_programs = 0 if is_streamed else num_logit_programs
        if num_fused_logit_programs + num_hidden_programs:
            tokens_per_sample, hidden_strides = _vector_layout(inputs)
            alignment = math.gcd(16, *hidden_strides)  # each vector's offset is a multiple of this
            triton_kernels.fused_kernel[(num_fused_logit_programs + num_hidden_programs,)](
                student_NC,
                _or_placeholder(teacher_NC, student_NC),
                _labels_or_placeholder(inputs),
                inputs.label_weights_N,
                _or_placeholder(grad_logits_NC, student_NC),
                inputs.student_hidden_BSH or (student_NC,),
                inputs.teacher_hidden_BSH or (student_NC,),
                _or_placeholder(inputs.attention_mask_BS, student_NC),
                _or_placeholder(grad_hidden_KBSH, student_NC),
                partials[2 * num_logit_programs :] if is_streamed else partials,
                row_divisor,
                hard_divisor,
                vector_divisor,
                inputs.grad_scale,
                num_rows,
                num_classes,
                student_NC.stride(0),
                _or_placeholder(teacher_NC, student_NC).stride(0),
                inputs.ignore_index,
                num_fused_logit_programs,
                num_hidden_programs,
                num_vectors,
                tokens_per_sample,
                *(stride // alignment for stride in hidden_strides),
                1 / inputs.temperature,
                hard_weight,
                soft_weight,
                inputs.beta * inputs.hidden_factor,
                ROWS_PER_PROGRAM=rows_per_program,
                CLASSES_PADDED=1 if is_streamed else triton.next_power_of_2(num_classes),
                VECTORS_PER_PROGRAM=vectors_per_program,
                H=first.shape[-1] if first is not None else 1,
                H_PADDED=padded_size,
                NUM_PAIRS=max(1, num_pairs),
                ALIGNMENT=alignment,
                HAS_MASK=inputs.attention_mask_BS is not None,
                IS_REGRESSION=inputs.is_regression,
                MULTI_LABEL=inputs.multi_label,
                NORMALIZE=inputs.normalize,
                HAS_HIDDEN_GRAD=grad_hidden_KBSH is not None,
                VECTOR_DIVISOR_ON_DEVICE=isinstance(vector_divisor, Tensor),
                **flags,
                num_warps=max(1, padded_size // VECTOR_TILE),
            )
        triton_kernels.finish_kernel[(1,)](
            partials,
            total,
            hard,
            soft,
            hidden,
            row_divisor,
            hard_divisor,
            vector_divisor,
            num_logit_programs,
            num_hidden_programs,
            inputs.soft_factor,
            inputs.hidden_factor,
            1 - inputs.alpha,
            inputs.alpha,
            inputs.beta,
            ROW_DIVISOR_ON_DEVICE=isinstance(row_divisor, Tensor),
            HARD_DIVISOR_ON_DEVICE=isinstance(hard_divisor, Tensor),
            VECTOR_DIVISOR_ON_DEVICE=isinstance(vector_divisor, Tensor),
            BLOCK=_BLOCK,
        )
    grad_hidden = () if grad_hidden_KBSH is None else (grad_hidden_KBSH,)
    return LossAndGrads(total, (hard, soft, hidden), grad_logits_NC, grad_hidden)


def rescale(grads: Sequence[Tensor], grad_total: Tensor, grad_scale: float | Tensor) -> None:
    """Multiply one or two gradients in place by grad_total / grad_scale; see `peakd_ds.kernels.fused.Backend`.

    One launch; the device decides whether there is anything to do.
    """
    storages = [_storage(grad) for grad in grads if grad.numel()]
    if not storages:
        return
    sizes = [storage.untyped_storage().nbytes() // storage.itemsize for storage in storages]
    programs = [min(triton.cdiv(size, _BLOCK), _RESCALE_PROGRAMS) for size in sizes]
    with _current_device(grad_total.device):
        triton_kernels.rescale_kernel[(sum(programs),)](
            storages[0],
            storages[-1],
            grad_total,
            grad_scale,
            programs[0],
            sizes[0],
            sizes[-1],
            GRAD_SCALE_ON_DEVICE=isinstance(grad_scale, Tensor),
            BLOCK=_BLOCK,
        )


def _divisors(inputs: LossInputs) -> tuple[float | Tensor, float | Tensor | None, float | Tensor]:
    """Divisors of rows, of weighted hard losses and of vectors; the second is None without weights and divisor.

    They are numbers if the host knows them, else tensors that the device computes.
    """
    rows, hard, vectors = inputs.row_divisor, inputs.hard_divisor, inputs.vector_divisor
    if rows is None or vectors is None:
        student_NC, mask_BS = inputs.student_logits_NC, inputs.attention_mask_BS
        counts = torch.empty(2, dtype=torch.float32, device=student_NC.device)
        triton_kernels.count_kernel[(1,)](
            _or_placeholder(inputs.labels_N, student_NC),
            _or_placeholder(mask_BS, student_NC),
            counts,
            len(student_NC),
            mask_BS.numel() if mask_BS is not None else 0,
            inputs.ignore_index,
            COUNTS_ROWS=rows is None,
            COUNTS_TOKENS=vectors is None,
            BLOCK=_BLOCK,
        )
        rows = counts[0] if rows is None else rows
        vectors = counts[1] if vectors is None else vectors
    return _as_scalar(rows), None if hard is None else _as_scalar(hard), _as_scalar(vectors)


def _as_scalar(count: float | Tensor) -> float | Tensor:
    """A count as a kernel argument: a float, since for the int 1 Triton would compile a separate kernel."""
    return count if isinstance(count, Tensor) else float(count)


def _with_layout(inputs: LossInputs) -> LossInputs:
    """The inputs in the layout that the kernels expect: contiguous in C or H, and the same strides for all pairs."""

    def contiguous(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.contiguous()

    def with_adjacent_columns(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()

    def with_equal_strides(states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if all(state.stride() == states[0].stride() and state.stride(-1) == 1 for state in states):
            return states
        return tuple(state.contiguous() for state in states)

    return replace(
        inputs,
        student_logits_NC=with_adjacent_columns(inputs.student_logits_NC),
        teacher_logits_NC=with_adjacent_columns(inputs.teacher_logits_NC),
        labels_N=contiguous(inputs.labels_N),
        labels_NC=contiguous(inputs.labels_NC),
        label_weights_N=contiguous(inputs.label_weights_N),
        attention_mask_BS=contiguous(inputs.attention_mask_BS),
        student_hidden_BSH=with_equal_strides(inputs.student_hidden_BSH),
        teacher_hidden_BSH=with_equal_strides(inputs.teacher_hidden_BSH),
    )


def _vector_layout(inputs: LossInputs) -> tuple[int, tuple[int, int, int, int]]:
    """Tokens per sample, and the strides over samples and tokens: student's, then teacher's."""
    if not inputs.student_hidden_BSH:
        return 1, (0, 0, 0, 0)
    student, teacher = inputs.student_hidden_BSH[0], inputs.teacher_hidden_BSH[0]
    if student.ndim == 2:
        return 1, (student.stride(0), 0, teacher.stride(0), 0)
    return student.shape[1], (*student.stride()[:2], *teacher.stride()[:2])


def _storage(tensor: Tensor) -> Tensor:
    """The first element of the tensor's storage, whose address is aligned even if the tensor's is not."""
    return tensor.as_strided((1,), (1,), 0)


def _or_placeholder(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    """The tensor, or a placeholder: kernels need a pointer for each argument, even if they do not read it."""
    return placeholder if tensor is None else tensor


def _labels_or_placeholder(inputs: LossInputs) -> Tensor:
    """Labels of either shape, [N] or [N, C], for kernels that know which it is."""
    labels = inputs.labels_NC if inputs.multi_label else inputs.labels_N
    return _or_placeholder(labels, inputs.student_logits_NC)


def _current_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Make a GPU the current device, on which Triton launches. Its interpreter runs on the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# -- More than 256 classes, which no stage of training has -------------------------------------------------------------


def stream_tile(num_classes: int, itemsize: int, is_aligned: bool) -> tuple[int, int, int]:
    """(LANES, WIDTH, num_warps) of `stream_kernel` for C classes of `itemsize` bytes.

    A lane loads 16 bytes at a time, and a thread has one lane. Without common alignment a lane loads single elements,
    and a thread has four lanes.
    """
    if not is_aligned:
        return 1024, 1, 256 // WARP_SIZE
    width = 16 // itemsize
    lanes = min(256, triton.next_power_of_2(triton.cdiv(num_classes, width)))
    return lanes, width, max(1, lanes // WARP_SIZE)


def _launch_stream(
    inputs: LossInputs,
    grad_logits_NC: Tensor | None,
    partials: Tensor,
    row_divisor: float | Tensor,
    hard_divisor: float | Tensor | None,
    hard_weight: float,
    soft_weight: float,
    flags: dict[str, bool],
) -> None:
    student_NC = inputs.student_logits_NC
    teacher_NC = _or_placeholder(inputs.teacher_logits_NC, student_NC)
    grad_NC = _or_placeholder(grad_logits_NC, student_NC)
    width = 16 // student_NC.itemsize
    is_aligned = all(
        tensor.untyped_storage().data_ptr() % 16 == 0 for tensor in (student_NC, teacher_NC, grad_NC)
    ) and all(
        (tensor.storage_offset() - student_NC.storage_offset()) % width == 0
        and (tensor.stride(0) - student_NC.stride(0)) % width == 0
        for tensor in (teacher_NC, grad_NC)
    )
    lanes, width, num_warps = stream_tile(inputs.num_classes, student_NC.itemsize, is_aligned)
    has_power = inputs.temperature in triton_streaming.INTEGER_POWERS
    triton_streaming.stream_kernel[(len(student_NC),)](
        _storage(student_NC),
        _storage(teacher_NC),
        _labels_or_placeholder(inputs),
        inputs.label_weights_N,
        _storage(grad_NC),
        partials,
        row_divisor,
        hard_divisor,
        inputs.grad_scale,
        inputs.num_classes,
        student_NC.storage_offset(),
        teacher_NC.storage_offset(),
        grad_NC.storage_offset(),
        student_NC.stride(0),
        teacher_NC.stride(0),
        grad_NC.stride(0),
        inputs.ignore_index,
        1 / inputs.temperature,
        hard_weight,
        soft_weight,
        LANES=lanes,
        WIDTH=width,
        IS_ALIGNED=is_aligned,
        POWER=int(inputs.temperature) if has_power else 0,
        IS_PRECISE=inputs.needs_precise_kl,
        **flags,
        num_warps=num_warps,
    )


def _launch_multi_label(
    inputs: LossInputs,
    grad_logits_NC: Tensor | None,
    partials: Tensor,
    row_divisor: float | Tensor,
    hard_divisor: float | Tensor | None,
    hard_weight: float,
    soft_weight: float,
    flags: dict[str, bool],
) -> None:
    student_NC = inputs.student_logits_NC
    teacher_NC = _or_placeholder(inputs.teacher_logits_NC, student_NC)
    grad_NC = _or_placeholder(grad_logits_NC, student_NC)
    triton_streaming.multi_label_kernel[(len(student_NC),)](
        student_NC,
        teacher_NC,
        _labels_or_placeholder(inputs),
        inputs.label_weights_N,
        grad_NC,
        partials,
        row_divisor,
        hard_divisor,
        inputs.grad_scale,
        inputs.num_classes,
        student_NC.stride(0),
        teacher_NC.stride(0),
        grad_NC.stride(0),
        1 / inputs.temperature,
        hard_weight,
        soft_weight,
        BLOCK=_BLOCK,
        **flags,
    )


def _empty_grad_logits(student_NC: Tensor) -> Tensor:
    """An uninitialised gradient, [N, C].

    With more than 256 classes its rows have the same misalignment as the student's, with up to 15 bytes of padding
    between two rows.
    """
    num_rows, num_classes = student_NC.shape
    if num_classes <= FEW_CLASSES:
        return torch.empty((num_rows, num_classes), dtype=student_NC.dtype, device=student_NC.device)
    width = 16 // student_NC.itemsize
    start = student_NC.storage_offset() % width
    stride = num_classes + (student_NC.stride(0) - num_classes) % width
    storage = torch.empty(start + num_rows * stride, dtype=student_NC.dtype, device=student_NC.device)
    return storage.as_strided((num_rows, num_classes), (stride, 1), start)
