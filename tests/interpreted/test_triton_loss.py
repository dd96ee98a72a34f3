"""Values and gradients of the Triton loss, in the interpreter, against the float64 reference."""

import interpreter  # noqa: F401, I001 - first: patches Triton's interpreter, or skips

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loss_checks import SETTINGS, Batch, assert_matches_reference, make_batch

from peakd_ds.kernels import distillation_loss

INF = math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = {1: 9, 2: 33, 3: 7, 5: 70, 41: 11, 1024: 3, 1025: 3, 30522: 3, 32768: 2}
"""Number of rows by number of classes: the interpreter's time grows with the rows, not with their width."""


def expected_upstream(dtype: torch.dtype) -> dict:
    """Scales for fp16, whose gradients would vanish without them, as in training."""
    return {"upstream": 1024.0, "grad_scale": 1024.0} if dtype is torch.float16 else {}


# --- values and gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_classes", ROWS)
@pytest.mark.parametrize("temperature", [1.0, 3.3, 10.0])
def test_logits(dtype, num_classes, temperature):
    batch = make_batch(ROWS[num_classes], num_classes, dtype, ignored=0.3)
    if num_classes > 1:
        batch.labels[:2] = torch.tensor([num_classes - 1, 0])  # the ends of a row
    assert_matches_reference(batch, temperature=temperature, **expected_upstream(dtype))


@pytest.mark.parametrize("temperature", [0.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 16.0, 20.0, 25.0])
@pytest.mark.parametrize("num_classes", [7, 1500])
def test_temperatures(temperature, num_classes):
    assert_matches_reference(make_batch(4, num_classes), temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_pairs", [0, 1, 5, 24])
@pytest.mark.parametrize("hidden", [(48,), (4, 48)], ids=["cls", "tokens"])
@pytest.mark.parametrize("normalize", [True, False])
def test_hidden_states(dtype, num_pairs, hidden, normalize):
    batch = make_batch(5, 3, dtype, num_pairs=num_pairs, hidden=hidden)
    assert_matches_reference(batch, normalize=normalize, **expected_upstream(dtype))


@pytest.mark.parametrize("size", [1, 3, 128, 312, 384, 768, 1024, 1500])
def test_hidden_sizes(size):
    batch = make_batch(3, 2, num_pairs=2, hidden=(2, size))
    assert_matches_reference(batch, normalize=False)
    if size > 1:  # a unit vector of size 1 has no gradient, only rounding errors
        assert_matches_reference(batch)


@pytest.mark.parametrize("num_classes", [1, 3, 1500])
@pytest.mark.parametrize("hidden", [(32,), (3, 32)], ids=["cls", "tokens"])
@pytest.mark.parametrize("upstream", [0.37, 65536.0])
@pytest.mark.parametrize("grad_scale", [None, 65536.0, torch.tensor(65536.0)], ids=["none", "number", "tensor"])
def test_upstream_gradients(num_classes, hidden, upstream, grad_scale):
    batch = make_batch(4, num_classes, num_pairs=2, hidden=hidden)
    assert_matches_reference(batch, upstream=upstream, grad_scale=grad_scale)


@pytest.mark.parametrize("num_classes", [2, 1500])
@pytest.mark.parametrize("hidden", [(32,), (3, 32)], ids=["cls", "tokens"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_counts_of_the_global_batch(num_classes, hidden, as_tensor):
    counts = {"num_items": 11, "num_tokens": 29}
    if as_tensor:
        counts = {name: torch.tensor(count) for name, count in counts.items()}
    batch = make_batch(4, num_classes, num_pairs=2, hidden=hidden, ignored=0.3)
    assert_matches_reference(batch, **counts)


@pytest.mark.parametrize("num_classes", [1, 5, 1500])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("beta", [0.0, 3.0])
@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
def test_weights_and_reductions(num_classes, alpha, beta, reduction):
    batch = make_batch(4, num_classes, num_pairs=1, ignored=0.3)
    assert_matches_reference(batch, alpha=alpha, beta=beta, reduction=reduction)


@pytest.mark.parametrize("num_classes", [1, 3, 1500])
def test_missing_parts(num_classes):
    whole = make_batch(4, num_classes, num_pairs=2)
    assert_matches_reference(Batch(whole.student_logits, whole.teacher_logits, None))
    assert_matches_reference(Batch(whole.student_logits, None, whole.labels), alpha=0.0)
    assert_matches_reference(
        Batch(whole.student_logits, None, None, whole.student_hidden, whole.teacher_hidden), alpha=0
    )


@pytest.mark.parametrize("num_classes", [5, 1500])
def test_other_ignore_index_and_label_dtypes(num_classes):
    batch = make_batch(5, num_classes)
    batch.labels = torch.tensor([0, 2, 1, 2, 1])
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        batch.labels = batch.labels.to(dtype)
        assert_matches_reference(batch, ignore_index=2)


def test_dtypes_of_student_and_teacher_may_differ():
    for num_classes in (3, 1500):
        for student, teacher in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
            assert_matches_reference(make_batch(3, num_classes, student, teacher_dtype=teacher, num_pairs=2))


@given(
    num_rows=st.integers(1, 6),
    num_classes=st.one_of(st.integers(1, 300), st.integers(1024, 2100)),
    num_pairs=st.integers(0, 3),
    hidden=st.one_of(st.tuples(st.integers(3, 70)), st.tuples(st.integers(1, 5), st.integers(3, 70))),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    temperature=st.sampled_from([1.0, 2.0, 7.7, 10.0]),
    ignored=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_drawn_shapes(num_rows, num_classes, num_pairs, hidden, dtype, temperature, ignored, seed):
    options = {"num_pairs": num_pairs, "hidden": hidden, "ignored": ignored, "seed": seed}
    assert_matches_reference(make_batch(num_rows, num_classes, dtype, **options), temperature=temperature)


# --- layouts


def in_storage(tensor: torch.Tensor, stride: int, offset: int) -> torch.Tensor:
    """A copy [N, C] at an offset and row stride in a larger storage, which is NaN elsewhere."""
    storage = torch.full((offset + len(tensor) * stride + 16,), math.nan, dtype=tensor.dtype)
    view = storage.as_strided(tensor.shape, (stride, 1), offset)
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("student", [(1501, 0), (1504, 3), (1507, 8)])
@pytest.mark.parametrize("teacher", [(1501, 0), (1504, 3), (1509, 5)])
@pytest.mark.parametrize("num_classes", [1501, 300])
def test_rows_anywhere(dtype, student, teacher, num_classes):
    """Of the same alignment or not, at odd strides and offsets: nothing outside the rows is read or written."""
    batch = make_batch(4, num_classes, dtype, ignored=0.3)
    batch.labels[0] = num_classes - 1
    batch.student_logits = in_storage(batch.student_logits.detach(), *student).requires_grad_()
    batch.teacher_logits = in_storage(batch.teacher_logits, *teacher)
    assert_matches_reference(batch)


def test_columns_that_are_not_neighbours():
    for num_classes in (3, 1500):
        batch = make_batch(4, num_classes)
        batch.student_logits = batch.student_logits.detach().T.contiguous().T.requires_grad_()
        batch.teacher_logits = batch.teacher_logits.repeat_interleave(2, dim=1)[:, ::2]
        batch.labels = batch.labels.repeat_interleave(2)[::2]
        assert_matches_reference(batch)


def test_one_row_expanded():
    for num_classes in (3, 1500):
        batch = make_batch(4, num_classes)
        batch.teacher_logits = batch.teacher_logits[:1].expand(4, -1)
        assert_matches_reference(batch)


@pytest.mark.parametrize("size", [48, 51])
def test_cls_vectors_as_slices_of_states(size):
    whole = make_batch(4, 3, num_pairs=3, hidden=(5, size))
    batch = Batch(whole.student_logits, whole.teacher_logits, whole.labels)
    batch.student_hidden = [state.detach()[:, 0].requires_grad_() for state in whole.student_hidden]
    batch.teacher_hidden = [state[:, 0] for state in whole.teacher_hidden]
    assert_matches_reference(batch)


def test_hidden_states_of_different_strides():
    batch = make_batch(4, 3, num_pairs=2, hidden=(5, 48))
    batch.student_hidden[1] = batch.student_hidden[1].detach().transpose(0, 1).contiguous().transpose(0, 1)
    batch.student_hidden[1].requires_grad_()
    batch.teacher_hidden[0] = batch.teacher_hidden[0].repeat(1, 1, 2)[:, :, :48]
    assert_matches_reference(batch)


def test_masks_of_any_dtype_and_stride():
    batch = make_batch(4, 3, num_pairs=2, hidden=(5, 48))
    for dtype in (torch.bool, torch.int32, torch.float32):
        mask = batch.attention_mask.to(dtype)
        for layout in (mask, mask.T.contiguous().T, mask.repeat_interleave(2, dim=1)[:, ::2]):
            batch.attention_mask = layout
            assert_matches_reference(batch)


# --- nothing, and extremes


@pytest.mark.parametrize("num_classes", [1, 3, 1500])
@pytest.mark.parametrize("hidden", [(32,), (3, 32)], ids=["cls", "tokens"])
def test_nothing_counts(num_classes, hidden):
    batch = make_batch(3, num_classes, num_pairs=2, hidden=hidden)
    batch.labels[:] = -100
    if batch.attention_mask is not None:
        batch.attention_mask[:] = 0
    assert_matches_reference(batch)
    assert_matches_reference(make_batch(0, num_classes, num_pairs=2, hidden=hidden))


@pytest.mark.parametrize("num_classes", [1, 3, 1500])
@pytest.mark.parametrize("filler", [math.nan, INF, -INF])
def test_values_in_ignored_rows_and_padding_have_no_effect(num_classes, filler):
    batch = make_batch(3, num_classes, num_pairs=1, hidden=(4, 32))
    batch.labels[2] = -100
    batch.attention_mask[:] = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1]])
    clean = batch.loss(**SETTINGS, backend="triton")
    clean_gradients = torch.autograd.grad(clean.total, batch.leaves)
    with torch.no_grad():
        for logits in (batch.student_logits, batch.teacher_logits):
            logits[2] = filler
        for state in (*batch.student_hidden, *batch.teacher_hidden):
            state[0, 3] = state[1, 1] = filler
    loss = batch.loss(**SETTINGS, backend="triton")
    assert [term.item() for term in loss] == [term.item() for term in clean]
    for gradient, clean_gradient in zip(torch.autograd.grad(loss.total, batch.leaves), clean_gradients, strict=True):
        assert torch.equal(gradient, clean_gradient)


@pytest.mark.parametrize("num_classes", [3, 1500])
@pytest.mark.parametrize("temperature", [1.0, 3.3, 10.0])
def test_extreme_logits(num_classes, temperature):
    batch = make_batch(6, num_classes)
    with torch.no_grad():
        for logits in (batch.student_logits, batch.teacher_logits):
            logits[0] *= 1e4
            logits[1] += 1e4  # close to each other, far from 0
            logits[2, 1:] = -INF  # all mass on one class
        for filler, row in ((-INF, 3), (-1e30, 4), (torch.finfo(torch.float32).min, 5)):  # masked classes
            batch.student_logits[row, 1] = batch.teacher_logits[row, 1] = filler
            batch.student_logits[row, 64:] = batch.teacher_logits[row, 64:] = filler
            batch.teacher_logits[row, 2] = filler
    batch.labels[:] = torch.tensor([0, 0, 0, 2, 2, 2])
    assert_matches_reference(batch, temperature=temperature)


@pytest.mark.parametrize("num_classes", [3, 1500])
def test_infinite_terms(num_classes):
    """inf, not NaN: the hard loss of a masked label, and the KL of a class where only the teacher has mass."""
    batch = make_batch(2, num_classes)
    with torch.no_grad():
        batch.student_logits[0, 1] = batch.teacher_logits[0, 1] = -INF
    batch.labels[:] = torch.tensor([1, 0])
    assert_matches_reference(batch)
    loss = batch.loss(**SETTINGS | {"alpha": 1.0}, backend="triton")
    assert loss.hard == INF and loss.total == loss.soft and 0 < loss.soft < INF
    with torch.no_grad():
        batch.teacher_logits[0, 1] = 0.0
    assert batch.loss(**SETTINGS, backend="triton").soft == INF


@pytest.mark.parametrize("num_classes", [3, 1500])
def test_nan_reaches_the_loss(num_classes):
    for name in ("student_logits", "teacher_logits"):
        batch = make_batch(3, num_classes)
        with torch.no_grad():
            getattr(batch, name)[1, 1] = math.nan
        assert batch.loss(**SETTINGS, backend="triton").total.isnan()


@pytest.mark.parametrize("num_classes", [3, 1500])
@pytest.mark.parametrize("label", [-1, "C", 2**40])
def test_class_id_out_of_range_is_nan(num_classes, label):
    batch = make_batch(3, num_classes)
    batch.labels[1] = num_classes if label == "C" else label
    loss = batch.loss(**SETTINGS, backend="triton")
    assert loss.hard.isnan() and loss.total.isnan()
    (gradient,) = torch.autograd.grad(loss.total, batch.student_logits)
    assert gradient[1].isnan().all() and gradient[[0, 2]].isfinite().all()


def test_same_models_have_no_soft_or_hidden_loss():
    for num_classes in (3, 1500):
        batch = make_batch(4, num_classes, num_pairs=2)
        batch.teacher_logits = batch.student_logits.detach().clone()
        batch.teacher_hidden = [state.detach().clone() for state in batch.student_hidden]
        loss = batch.loss(**SETTINGS | {"alpha": 1.0}, backend="triton")
        assert abs(loss.soft.item()) < 1e-6 and loss.hidden == 0


def test_zero_vectors():
    batch = make_batch(2, 2, num_pairs=1)
    with torch.no_grad():
        batch.student_hidden[0][0] = 0
        batch.teacher_hidden[0][1] = 0
    assert_matches_reference(batch)


# --- autograd


def test_fp16_gradients_vanish_unless_scaled_before_they_are_rounded():
    batch = make_batch(4, 30522, torch.float16, spread=0.1)

    def share_of_zeros(grad_scale: float | None) -> float:
        loss = batch.loss(**SETTINGS | {"alpha": 0.0}, num_items=4096, grad_scale=grad_scale, backend="triton")
        (gradient,) = torch.autograd.grad(loss.total * 65536.0, batch.student_logits)
        return (gradient == 0).float().mean().item()

    assert share_of_zeros(None) > 0.9
    assert share_of_zeros(65536.0) < 0.05


def test_is_bitwise_reproducible():
    for num_classes in (3, 1500):
        batch = make_batch(40, num_classes, torch.bfloat16, num_pairs=3, hidden=(4, 32))
        losses = [batch.loss(**SETTINGS, backend="triton") for _ in range(2)]
        gradients = [torch.autograd.grad(loss.total, batch.leaves) for loss in losses]
        assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_teacher_gets_no_gradient():
    batch = make_batch(3, 2, num_pairs=2)
    teacher = [batch.teacher_logits.requires_grad_(), *(state.requires_grad_() for state in batch.teacher_hidden)]
    batch.loss(**SETTINGS, backend="triton").total.backward()
    assert all(tensor.grad is None for tensor in teacher)
    assert all(leaf.grad.abs().sum() > 0 for leaf in batch.leaves)


def test_only_what_needs_a_gradient_gets_one():
    batch = make_batch(3, 2, num_pairs=2)
    batch.student_logits.requires_grad_(False)
    batch.student_hidden[0].requires_grad_(False)
    batch.loss(**SETTINGS, backend="triton").total.backward()
    assert batch.student_logits.grad is None and batch.student_hidden[0].grad is None
    assert batch.student_hidden[1].grad is not None


def test_fp64_raises():
    with pytest.raises(ValueError, match="computes in fp32, and a tensor is fp64; use backend 'torch'"):
        make_batch(3, 2, torch.float64).loss(**SETTINGS, backend="triton")


def test_all_inputs_zero():
    logits = torch.zeros(2, 3)
    loss = distillation_loss(logits, logits, None, [], [], **SETTINGS, backend="triton")
    assert loss.total == 0 and not loss.total.requires_grad
