"""The fused loss in Triton, for NVIDIA and AMD GPUs: launches of the kernels in `triton_kernels.py`.

Nothing here waits for the device, so a step can be captured in a CUDA graph. With the counts of the global batch given,
as training gives them, a GLUE step is two launches forward and one backward.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from peakd_ds.kernels import triton_kernels as device_code
from peakd_ds.kernels.fused import Computed, LossCall

FEW_CLASSES = 256
"""Up to so many classes, a row fits the registers of one warp."""
LOGIT_TILE = 256
"""Elements of logits that a program of `fused_kernel` holds: 8 a thread."""
VECTOR_TILE = 1024
"""Elements of a hidden state that a warp of `fused_kernel` holds: 32 a thread."""
WARP_SIZE = 64 if torch.version.hip else 32
_BLOCK = 1024
_RESCALE_PROGRAMS = 1056  # enough for every multiprocessor of the largest GPU, several times


def compute(call: LossCall, logits_grad: bool, hidden_grad: bool) -> Computed:
    """See `peakd_ds.kernels.fused`."""
    call = _laid_out(call)
    student, teacher, labels = call.student_logits, call.teacher_logits, call.labels
    num_rows, num_classes = student.shape
    num_pairs = len(call.student_hidden)
    first = call.student_hidden[0] if num_pairs else None
    hard_weight = 1 - call.alpha if labels is not None else 0.0
    soft_weight = call.alpha * call.soft_grad_factor if teacher is not None else 0.0
    logits_grad = logits_grad and (hard_weight != 0 or soft_weight != 0)
    hidden_grad = hidden_grad and call.beta > 0
    is_streamed = num_classes > FEW_CLASSES

    rows_per_program = 1 if is_streamed else LOGIT_TILE // triton.next_power_of_2(num_classes)
    num_logit_programs = 0 if labels is None and teacher is None else triton.cdiv(num_rows, rows_per_program)
    padded_size = triton.next_power_of_2(first.shape[-1]) if first is not None else 1
    vectors_per_program = max(1, VECTOR_TILE // padded_size)
    num_vectors = first.shape[:-1].numel() if first is not None else 0
    num_hidden_programs = triton.cdiv(num_vectors, vectors_per_program) * num_pairs

    def scalar() -> Tensor:
        return torch.empty((), dtype=torch.float32, device=student.device)

    total, hard, soft, hidden = scalar(), scalar(), scalar(), scalar()  # each may be written to in place
    partials = torch.empty(2 * num_logit_programs + num_hidden_programs, dtype=torch.float32, device=student.device)
    grad = _gradient_like(student) if logits_grad else None
    hidden_gradient = None
    if hidden_grad and first is not None:
        hidden_gradient = torch.empty((num_pairs, *first.shape), dtype=first.dtype, device=first.device)

    with _on(student.device):
        rows, vectors = _counts(call)
        common = dict(
            HAS_LABELS=labels is not None,
            HAS_TEACHER=teacher is not None,
            HARD_GRAD=grad is not None and hard_weight != 0,
            SOFT_GRAD=grad is not None and soft_weight != 0,
            ROWS_ON_DEVICE=isinstance(rows, Tensor),
            SCALE_ON_DEVICE=isinstance(call.grad_scale, Tensor),
        )
        if is_streamed and num_logit_programs:
            _stream(call, grad, partials, rows, hard_weight, soft_weight, common)
        num_fused_logit_programs = 0 if is_streamed else num_logit_programs
        if num_fused_logit_programs + num_hidden_programs:
            tokens_per_sample, hidden_strides = _vector_layout(call)
            alignment = math.gcd(16, *hidden_strides)  # elements: what every vector begins at a multiple of
            device_code.fused_kernel[(num_fused_logit_programs + num_hidden_programs,)](
                student,
                _or(teacher, student),
                _or(labels, student),
                _or(grad, student),
                call.student_hidden or (student,),
                call.teacher_hidden or (student,),
                _or(call.attention_mask, student),
                _or(hidden_gradient, student),
                partials[2 * num_logit_programs :] if is_streamed else partials,
                rows,
                vectors,
                call.grad_scale,
                num_rows,
                num_classes,
                student.stride(0),
                _or(teacher, student).stride(0),
                call.ignore_index,
                num_fused_logit_programs,
                num_hidden_programs,
                num_vectors,
                tokens_per_sample,
                *(stride // alignment for stride in hidden_strides),
                1 / call.temperature,
                hard_weight,
                soft_weight,
                call.beta * call.hidden_factor,
                ROWS_PER_PROGRAM=rows_per_program,
                CLASSES_PADDED=1 if is_streamed else triton.next_power_of_2(num_classes),
                VECTORS_PER_PROGRAM=vectors_per_program,
                H=first.shape[-1] if first is not None else 1,
                H_PADDED=padded_size,
                NUM_PAIRS=max(1, num_pairs),
                ALIGNMENT=alignment,
                HAS_MASK=call.attention_mask is not None,
                IS_REGRESSION=call.is_regression,
                NORMALIZE=call.normalize,
                HIDDEN_HAS_GRAD=hidden_gradient is not None,
                VECTORS_ON_DEVICE=isinstance(vectors, Tensor),
                **common,
                num_warps=max(1, padded_size // VECTOR_TILE),
            )
        device_code.finish_kernel[(1,)](
            partials,
            total,
            hard,
            soft,
            hidden,
            rows,
            vectors,
            num_logit_programs,
            num_hidden_programs,
            call.soft_factor,
            call.hidden_factor,
            1 - call.alpha,
            call.alpha,
            call.beta,
            ROWS_ON_DEVICE=isinstance(rows, Tensor),
            VECTORS_ON_DEVICE=isinstance(vectors, Tensor),
            BLOCK=_BLOCK,
        )
    return Computed(total, (hard, soft, hidden), grad, () if hidden_gradient is None else (hidden_gradient,))


def rescale(gradients: Sequence[Tensor], upstream: Tensor, grad_scale: float | Tensor) -> None:
    """See `peakd_ds.kernels.fused`; the device decides whether there is anything to do. At most two, in one launch."""
    given = [gradient for gradient in gradients if gradient.numel()]
    if not given:
        return
    storages = [_storage(gradient) for gradient in given]
    sizes = [storage.untyped_storage().nbytes() // storage.itemsize for storage in storages]
    programs = [min(triton.cdiv(size, _BLOCK), _RESCALE_PROGRAMS) for size in sizes]
    with _on(upstream.device):
        device_code.rescale_kernel[(sum(programs),)](
            storages[0],
            storages[-1],
            upstream,
            grad_scale,
            programs[0],
            sizes[0],
            sizes[-1],
            SCALE_ON_DEVICE=isinstance(grad_scale, Tensor),
            BLOCK=_BLOCK,
        )


def stream_tile(num_classes: int, itemsize: int, is_aligned: bool) -> tuple[int, int, int]:
    """(LANES, WIDTH, num_warps) of `stream_kernel` for C classes of `itemsize` bytes.

    A lane loads 16 bytes at a time, and a thread holds one lane; without common alignment a lane loads single
    elements, and a thread holds four.
    """
    if not is_aligned:
        return 1024, 1, 256 // WARP_SIZE
    width = 16 // itemsize
    lanes = min(256, triton.next_power_of_2(triton.cdiv(num_classes, width)))
    return lanes, width, max(1, lanes // WARP_SIZE)


def _stream(
    call: LossCall,
    grad: Tensor | None,
    partials: Tensor,
    rows: float | Tensor,
    hard_weight: float,
    soft_weight: float,
    common: dict[str, bool],
) -> None:
    student = call.student_logits
    teacher, grad = _or(call.teacher_logits, student), _or(grad, student)
    width = 16 // student.itemsize
    is_aligned = all(tensor.untyped_storage().data_ptr() % 16 == 0 for tensor in (student, teacher, grad)) and all(
        (tensor.storage_offset() - student.storage_offset()) % width == 0
        and (tensor.stride(0) - student.stride(0)) % width == 0
        for tensor in (teacher, grad)
    )
    lanes, width, num_warps = stream_tile(call.num_classes, student.itemsize, is_aligned)
    device_code.stream_kernel[(len(student),)](
        _storage(student),
        _storage(teacher),
        _or(call.labels, student),
        _storage(grad),
        partials,
        rows,
        call.grad_scale,
        call.num_classes,
        student.storage_offset(),
        teacher.storage_offset(),
        grad.storage_offset(),
        student.stride(0),
        teacher.stride(0),
        grad.stride(0),
        call.ignore_index,
        1 / call.temperature,
        hard_weight,
        soft_weight,
        LANES=lanes,
        WIDTH=width,
        IS_ALIGNED=is_aligned,
        POWER=int(call.temperature) if call.temperature in device_code.INTEGER_POWERS else 0,
        **common,
        num_warps=num_warps,
    )


def _counts(call: LossCall) -> tuple[float | Tensor, float | Tensor]:
    """Rows and vectors to divide by: numbers where the host knows them, else tensors that the device fills."""
    rows, vectors = call.rows_given, call.vectors_given
    if rows is None or vectors is None:
        student, mask = call.student_logits, call.attention_mask
        counts = torch.empty(2, dtype=torch.float32, device=student.device)
        device_code.count_kernel[(1,)](
            _or(call.labels, student),
            _or(mask, student),
            counts,
            len(student),
            mask.numel() if mask is not None else 0,
            call.ignore_index,
            COUNTS_ROWS=rows is None,
            COUNTS_TOKENS=vectors is None,
            BLOCK=_BLOCK,
        )
        rows = counts[0] if rows is None else rows
        vectors = counts[1] if vectors is None else vectors
    return _as_argument(rows), _as_argument(vectors)


def _as_argument(count: int | Tensor | None) -> float | Tensor:
    """A float, since Triton compiles a kernel of its own for the int 1."""
    assert count is not None
    return count if isinstance(count, Tensor) else float(count)


def _laid_out(call: LossCall) -> LossCall:
    """The same call with what the kernels take for granted: rows of neighbouring elements, one layout for all pairs."""

    def rows_of(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()

    def alike(states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if all(state.stride() == states[0].stride() for state in states) and states[0].stride(-1) == 1:
            return states
        return tuple(state.contiguous() for state in states)

    labels = call.labels
    if labels is not None:
        if not call.is_regression and labels.dtype not in (torch.int64, torch.int32):
            labels = labels.long()
        labels = labels.contiguous()
    return replace(
        call,
        student_logits=rows_of(call.student_logits),
        teacher_logits=rows_of(call.teacher_logits),
        labels=labels,
        attention_mask=None if call.attention_mask is None else call.attention_mask.contiguous(),
        student_hidden=alike(call.student_hidden) if call.student_hidden else (),
        teacher_hidden=alike(call.teacher_hidden) if call.teacher_hidden else (),
    )


def _vector_layout(call: LossCall) -> tuple[int, tuple[int, int, int, int]]:
    """Tokens per sample, and the strides over samples and tokens of student and teacher states."""
    if not call.student_hidden:
        return 1, (0, 0, 0, 0)
    student, teacher = call.student_hidden[0], call.teacher_hidden[0]
    if student.ndim == 2:
        return 1, (student.stride(0), 0, teacher.stride(0), 0)
    return student.shape[1], (*student.stride()[:2], *teacher.stride()[:2])


def _gradient_like(student: Tensor) -> Tensor:
    """An empty [N, C] whose rows are misaligned as the student's, with at most 15 bytes between two."""
    num_rows, num_classes = student.shape
    if num_classes <= FEW_CLASSES:
        return torch.empty((num_rows, num_classes), dtype=student.dtype, device=student.device)
    width = 16 // student.itemsize
    start = student.storage_offset() % width
    stride = num_classes + (student.stride(0) - num_classes) % width
    storage = torch.empty(start + num_rows * stride, dtype=student.dtype, device=student.device)
    return storage.as_strided((num_rows, num_classes), (stride, 1), start)


def _storage(tensor: Tensor) -> Tensor:
    """The first element of the tensor's storage, whose address is aligned wherever a view of it begins."""
    return tensor.as_strided((1,), (1,), 0)


def _or(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    """A kernel wants a pointer for every argument, also for one that it does not read."""
    return placeholder if tensor is None else tensor


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whichever its arguments are on. Its interpreter runs on the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
