"""Values of the distillation loss against float64 loops, its gradients, sums over micro-batches, and errors."""

import ast
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax

from peakd_ds import kernels
from peakd_ds.kernels import DistillationLoss, distillation_loss

INF = math.inf
PEAKD = {"temperature": 10.0, "alpha": 0.7, "beta": 100.0}


@pytest.fixture(params=["reference", "torch"], autouse=True)
def backend(request, monkeypatch):
    """Each test runs on both CPU backends; tests of Triton's are in tests/interpreted."""
    monkeypatch.setattr(kernels, "choose_backend", lambda device_type: (request.param, "set by the test"))
    return request.param


def expected_loss(
    student_logits,
    teacher_logits,
    labels,
    student_hidden=(),
    teacher_hidden=(),
    *,
    temperature,
    alpha,
    beta,
    attention_mask=None,
    normalize=True,
    reduction="batchmean",
    num_items=None,
    num_tokens=None,
):
    """total, hard, soft, hidden, computed row by row and class by class in Python floats."""
    num_rows, num_classes = student_logits.shape
    kept = [n for n in range(num_rows) if labels is None or labels[n] != -100]
    rows = max(1, len(kept) if num_items is None else num_items)

    hard = soft = 0.0
    for n in kept:
        if num_classes == 1:
            hard += 0.0 if labels is None else (student_logits[n, 0] - labels[n]) ** 2
            soft += 0.0 if teacher_logits is None else (student_logits[n, 0] - teacher_logits[n, 0]) ** 2
            continue
        if labels is not None:
            hard -= log_softmax(student_logits[n])[int(labels[n])]
        if teacher_logits is not None:
            log_s = log_softmax(student_logits[n] / temperature)
            log_t = log_softmax(teacher_logits[n] / temperature)
            for c in range(num_classes):
                if log_t[c] > -INF:
                    soft += temperature**2 * math.exp(log_t[c]) * (log_t[c] - log_s[c])
    hard, soft = hard / rows, soft / rows / (num_classes if reduction == "mean" else 1)

    hidden = 0.0
    for student, teacher in zip(student_hidden, teacher_hidden, strict=True):
        vectors = [index for index in np.ndindex(student.shape[:-1])]
        given = num_items
        if student.ndim == 3:
            given = num_tokens
            if attention_mask is not None:
                vectors = [index for index in vectors if attention_mask[index]]
        count = max(1, len(vectors) if given is None else given)
        for index in vectors:
            s, t = student[index], teacher[index]
            if normalize:
                s, t = s / max(math.sqrt(sum(s**2)), 1e-12), t / max(math.sqrt(sum(t**2)), 1e-12)
            hidden += sum((s - t) ** 2) / len(s) / count / len(student_hidden)

    total = (1 - alpha) * hard + alpha * soft + beta * hidden
    return total, hard, soft, hidden


def make_batch(num_rows, num_classes, num_pairs=2, num_tokens=None, hidden=5, dtype=torch.float64, seed=0):
    """Positional arguments of `distillation_loss`; the student's tensors require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    tokens = () if num_tokens is None else (num_tokens,)
    student_logits = draw(num_rows, num_classes, scale=3).requires_grad_()
    student_hidden = [draw(num_rows, *tokens, hidden).requires_grad_() for _ in range(num_pairs)]
    teacher_hidden = [draw(num_rows, *tokens, hidden) for _ in range(num_pairs)]
    if num_classes == 1:
        labels = draw(num_rows, scale=2)
    else:
        labels = torch.randint(num_classes, (num_rows,), generator=generator)
    return student_logits, draw(num_rows, num_classes, scale=3), labels, student_hidden, teacher_hidden


def as_numpy(batch):
    student_logits, teacher_logits, labels, student_hidden, teacher_hidden = batch
    return (
        student_logits.detach().double().numpy(),
        None if teacher_logits is None else teacher_logits.double().numpy(),
        None if labels is None else labels.double().numpy(),
        [state.detach().double().numpy() for state in student_hidden],
        [state.double().numpy() for state in teacher_hidden],
    )


def assert_terms(loss, expected, rtol=1e-12, atol=1e-12):
    actual = [term.item() for term in loss]
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def gradients(loss, batch):
    """Gradients of `total` with respect to the student's logits and hidden states."""
    leaves = [batch[0], *batch[3]]
    return torch.autograd.grad(loss.total, leaves, materialize_grads=True)


# --- values


def test_by_hand():
    # T = 2: teacher (3/4, 1/4), student (1/2, 1/2); [CLS] (0.6, 0.8) against (0.8, 0.6)
    loss = distillation_loss(
        torch.tensor([[0.0, 0.0]], dtype=torch.float64),
        torch.tensor([[2 * math.log(3), 0.0]], dtype=torch.float64),
        torch.tensor([1]),
        [torch.tensor([[3.0, 4.0]], dtype=torch.float64)],
        [torch.tensor([[8.0, 6.0]], dtype=torch.float64)],
        temperature=2.0,
        alpha=0.25,
        beta=10.0,
    )
    hard, soft, hidden = math.log(2), 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)), 0.04
    assert_terms(loss, (0.75 * hard + 0.25 * soft + 10 * hidden, hard, soft, hidden))


@pytest.mark.parametrize(("num_rows", "num_classes"), [(1, 2), (4, 2), (5, 3), (3, 5), (7, 1), (6, 41)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 10.0])
@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
@pytest.mark.parametrize("normalize", [True, False])
def test_cls_loss_matches_the_loop(num_rows, num_classes, temperature, reduction, normalize):
    batch = make_batch(num_rows, num_classes)
    options = PEAKD | {"temperature": temperature, "reduction": reduction, "normalize": normalize}
    assert_terms(distillation_loss(*batch, **options), expected_loss(*as_numpy(batch), **options))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_token_loss_matches_the_loop(normalize, mask_dtype):
    batch = make_batch(3, 3, num_pairs=3, num_tokens=4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0]])
    expected = expected_loss(*as_numpy(batch), **PEAKD, attention_mask=mask.numpy(), normalize=normalize)
    loss = distillation_loss(*batch, **PEAKD, attention_mask=mask.to(mask_dtype), normalize=normalize)
    assert_terms(loss, expected)


def test_tokens_without_mask_all_count():
    batch = make_batch(3, 2, num_tokens=4)
    loss = distillation_loss(*batch, **PEAKD)
    assert_terms(loss, expected_loss(*as_numpy(batch), **PEAKD))
    assert_terms(distillation_loss(*batch, **PEAKD, attention_mask=torch.ones(3, 4)), [x.item() for x in loss])


def test_mask_is_ignored_with_cls_states():
    batch = make_batch(3, 2)
    masked = distillation_loss(*batch, **PEAKD, attention_mask=torch.tensor([[1, 0], [0, 0], [1, 1]]))
    assert_terms(masked, expected_loss(*as_numpy(batch), **PEAKD))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("beta", [0.0, 7.0])
def test_all_terms_are_reported_whatever_their_weight(alpha, beta):
    batch = make_batch(4, 3)
    options = {"temperature": 3.0, "alpha": alpha, "beta": beta}
    loss = distillation_loss(*batch, **options)
    assert isinstance(loss, DistillationLoss)
    assert_terms(loss, expected_loss(*as_numpy(batch), **options))
    assert loss.hard > 0 and loss.soft > 0 and loss.hidden > 0
    assert loss.total.requires_grad
    assert not any(term.requires_grad for term in loss[1:])
    assert all(term.shape == () and term.dtype == torch.float64 for term in loss)


def test_soft_loss_is_pytorchs_kl_div_times_temperature_squared():
    student, teacher, labels, *_ = make_batch(6, 3)
    kl_NC = F.kl_div((student / 10).log_softmax(1), (teacher / 10).softmax(1), reduction="none")
    for reduction, kl in (("batchmean", kl_NC.sum() / 6), ("mean", kl_NC.mean())):
        loss = distillation_loss(student, teacher, labels, [], [], **PEAKD, reduction=reduction)
        assert loss.soft.item() == pytest.approx(100 * kl.item(), rel=1e-12)


def test_missing_parts_are_zero():
    student, teacher, labels, student_hidden, teacher_hidden = make_batch(4, 3)
    no_labels = (student, teacher, None, student_hidden, teacher_hidden)
    assert_terms(distillation_loss(*no_labels, **PEAKD), expected_loss(*as_numpy(no_labels), **PEAKD))
    no_hidden = (student, teacher, labels, [], [])
    assert_terms(distillation_loss(*no_hidden, **PEAKD), expected_loss(*as_numpy(no_hidden), **PEAKD))
    no_teacher = (student, None, labels, student_hidden, teacher_hidden)
    options = PEAKD | {"alpha": 0.0}
    loss = distillation_loss(*no_teacher, **options)
    assert_terms(loss, expected_loss(*as_numpy(no_teacher), **options))
    assert loss.soft == 0 and loss.hard > 0
    only_labels = distillation_loss(student, None, labels, [], [], **options)
    assert only_labels.total.item() == pytest.approx(F.cross_entropy(student, labels).item())


# --- gradients


@pytest.mark.parametrize(
    ("num_classes", "num_tokens", "normalize"),
    [(2, None, True), (3, 3, True), (5, None, False), (1, 3, False)],
)
def test_gradcheck(num_classes, num_tokens, normalize):
    student, teacher, labels, student_hidden, teacher_hidden = make_batch(4, num_classes, num_tokens=num_tokens)
    labels[1] = -100
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]])

    def total(student, *student_hidden):
        batch = (student, teacher, labels, student_hidden, teacher_hidden)
        options = PEAKD | {"temperature": 2.5, "attention_mask": mask, "normalize": normalize}
        return distillation_loss(*batch, **options, backend="reference").total

    assert torch.autograd.gradcheck(total, (student, *student_hidden))


def test_logit_gradient_in_closed_form_under_an_upstream_gradient():
    student, teacher, labels, *_ = make_batch(5, 3)
    loss = distillation_loss(student, teacher, labels, [], [], temperature=4.0, alpha=0.6, beta=0.0)
    (loss.total * 0.37).backward()
    hard = student.detach().softmax(1) - F.one_hot(labels, 3)
    soft = 4.0 * ((student.detach() / 4).softmax(1) - (teacher / 4).softmax(1))
    torch.testing.assert_close(student.grad, 0.37 * (0.4 * hard + 0.6 * soft) / 5, rtol=1e-12, atol=1e-14)


def test_grad_scale_has_no_effect():
    batch = make_batch(3, 3)
    plain = distillation_loss(*batch, **PEAKD)
    scaled = distillation_loss(*batch, **PEAKD, grad_scale=torch.tensor(1024.0))
    assert_terms(scaled, [term.item() for term in plain], rtol=0, atol=0)
    for a, b in zip(gradients(plain, batch), gradients(scaled, batch), strict=True):
        assert torch.equal(a, b)


def test_teacher_gets_no_gradient():
    batch = make_batch(3, 2)
    teacher = [batch[1].requires_grad_(), *(state.requires_grad_() for state in batch[4])]
    distillation_loss(*batch, **PEAKD).total.backward()
    assert all(tensor.grad is None for tensor in teacher)
    assert all(tensor.grad.abs().sum() > 0 for tensor in (batch[0], *batch[3]))


# --- micro-batches and ranks


@pytest.mark.parametrize("num_tokens", [None, 4])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("num_classes", [1, 3])
def test_uneven_micro_batches_add_up_to_the_global_mean(num_tokens, as_tensor, num_classes):
    batch = make_batch(9, num_classes, num_tokens=num_tokens)
    labels, mask = batch[2], torch.ones(9, 4, dtype=torch.int64)
    counts = {"num_items": 9}
    if num_tokens is not None:  # with [B, H] states one count serves labels and states alike
        labels[torch.tensor([0, 1, 2, 7])] = -100  # all of the first micro-batch
        mask = (torch.arange(4) < torch.tensor([4, 1, 2, 3, 4, 2, 1, 1, 3])[:, None]).long()
        counts = {"num_items": 5, "num_tokens": 21}
    if as_tensor:
        counts = {name: torch.tensor(count) for name, count in counts.items()}
    whole = distillation_loss(*batch, **PEAKD, attention_mask=mask)

    pieces = []
    for rows in (slice(0, 3), slice(3, 4), slice(4, 9)):
        states = [[state[rows] for state in states] for states in batch[3:]]
        piece = (batch[0][rows], batch[1][rows], labels[rows], *states)
        pieces.append(distillation_loss(*piece, **PEAKD, attention_mask=mask[rows], **counts))
    summed = DistillationLoss(*(torch.stack(terms).sum() for terms in zip(*pieces, strict=True)))

    assert_terms(summed, [term.item() for term in whole])
    assert_terms(summed, expected_loss(*as_numpy(batch), **PEAKD, attention_mask=mask.numpy()))
    for part, total in zip(gradients(summed, batch), gradients(whole, batch), strict=True):
        torch.testing.assert_close(part, total, rtol=1e-12, atol=1e-14)


def test_given_counts_replace_the_local_ones():
    batch = make_batch(4, 3)
    batch[2][0] = -100
    expected = expected_loss(*as_numpy(batch), **PEAKD, num_items=10)
    assert_terms(distillation_loss(*batch, **PEAKD, num_items=10, num_tokens=999), expected)
    batch = make_batch(4, 3, num_tokens=2)
    expected = expected_loss(*as_numpy(batch), **PEAKD, num_items=10, num_tokens=50)
    assert_terms(distillation_loss(*batch, **PEAKD, num_items=10, num_tokens=50), expected)


# --- ignored rows, padding, nothing at all


@pytest.mark.parametrize("num_classes", [1, 3])
def test_ignored_rows_count_in_hidden_only(num_classes):
    batch = make_batch(5, num_classes)
    full = distillation_loss(*batch, **PEAKD)
    batch[2][torch.tensor([1, 4])] = -100
    loss = distillation_loss(*batch, **PEAKD)
    kept = torch.tensor([0, 2, 3])
    without = distillation_loss(batch[0][kept], batch[1][kept], batch[2][kept], [], [], **PEAKD)
    assert_terms(loss[1:3], [term.item() for term in without[1:3]])
    assert loss.hidden == full.hidden
    assert_terms(loss, expected_loss(*as_numpy(batch), **PEAKD))
    grad_logits, *grad_hidden = gradients(loss, batch)
    assert (grad_logits[[1, 4]] == 0).all() and (grad_logits[kept] != 0).all()
    assert all((grad != 0).all() for grad in grad_hidden)


def test_another_ignore_index():
    student, teacher, labels, *_ = make_batch(5, 3)
    labels[:] = torch.tensor([0, 2, 1, 2, 1])
    loss = distillation_loss(student, teacher, labels, [], [], **PEAKD, ignore_index=2)
    kept = torch.tensor([0, 2, 4])
    expected = expected_loss(*as_numpy((student[kept], teacher[kept], labels[kept], [], [])), **PEAKD)
    assert_terms(loss, expected)


@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("filler", [math.nan, INF, -INF])
def test_values_in_ignored_rows_and_padding_have_no_effect(num_classes, filler):
    batch = make_batch(3, num_classes, num_tokens=2)
    batch[2][2] = -100
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]])
    clean = distillation_loss(*batch, **PEAKD, attention_mask=mask)
    clean_grads = gradients(clean, batch)
    with torch.no_grad():
        for logits in batch[:2]:
            logits[2] = filler
        for state in (*batch[3], *batch[4]):
            state[1, 1] = filler
    loss = distillation_loss(*batch, **PEAKD, attention_mask=mask)
    assert_terms(loss, [term.item() for term in clean], rtol=0, atol=0)
    for grad, clean_grad in zip(gradients(loss, batch), clean_grads, strict=True):
        assert torch.equal(grad, clean_grad)


@pytest.mark.parametrize("num_classes", [1, 2])
def test_everything_ignored_and_padded(num_classes):
    batch = make_batch(3, num_classes, num_tokens=2)
    batch[2][:] = -100
    loss = distillation_loss(*batch, **PEAKD, attention_mask=torch.zeros(3, 2))
    assert_terms(loss, (0, 0, 0, 0), atol=0)
    assert all((grad == 0).all() for grad in gradients(loss, batch))


@pytest.mark.parametrize("num_classes", [1, 2])
@pytest.mark.parametrize("num_tokens", [None, 0, 3])
@pytest.mark.parametrize("num_items", [None, 0, 8])
def test_empty_batch(num_classes, num_tokens, num_items):
    batch = make_batch(0, num_classes, num_tokens=num_tokens)
    loss = distillation_loss(*batch, **PEAKD, num_items=num_items, num_tokens=num_items)
    assert_terms(loss, (0, 0, 0, 0), atol=0)
    assert [grad.shape for grad in gradients(loss, batch)] == [batch[0].shape, *(s.shape for s in batch[3])]


# --- extreme values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masked_classes_count_as_absent(dtype):
    student, teacher, labels, *_ = make_batch(4, 3, dtype=dtype)
    loss = distillation_loss(student, teacher, labels, [], [], **PEAKD)
    (grad,) = torch.autograd.grad(loss.total, student)
    masked = torch.full((4, 1), -INF, dtype=dtype)
    student_masked = torch.cat([student.detach(), masked], 1).requires_grad_()
    teacher_masked = torch.cat([teacher, masked], 1)
    with_mask = distillation_loss(student_masked, teacher_masked, labels, [], [], **PEAKD)
    assert_terms(with_mask, [term.item() for term in loss], rtol=1e-6)
    (grad_masked,) = torch.autograd.grad(with_mask.total, student_masked)
    torch.testing.assert_close(grad_masked[:, :3], grad)
    assert (grad_masked[:, 3] == 0).all()


def test_class_masked_in_the_teacher_only():
    student = torch.tensor([[0.3, -1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    batch = (student, torch.tensor([[1.0, -INF, 0.0]], dtype=torch.float64), torch.tensor([0]), [], [])
    loss = distillation_loss(*batch, **PEAKD)
    assert_terms(loss, expected_loss(*as_numpy(batch), **PEAKD))
    (grad,) = torch.autograd.grad(loss.total, student)
    hard = student.detach().softmax(1) - torch.tensor([[1, 0, 0]])
    soft = 10 * ((student.detach() / 10).softmax(1) - (batch[1] / 10).softmax(1))
    torch.testing.assert_close(grad, 0.3 * hard + 0.7 * soft)


def test_infinite_hard_loss_of_weight_zero_is_not_in_the_total():
    logits = torch.tensor([[0.0, 1.0, -INF]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0, -INF]], dtype=torch.float64)
    loss = distillation_loss(logits, teacher, torch.tensor([2]), [], [], temperature=1.0, alpha=1.0, beta=0.0)
    assert loss.hard == INF and loss.total == loss.soft and 0 < loss.soft < INF
    (grad,) = torch.autograd.grad(loss.total, logits)
    torch.testing.assert_close(grad, logits.detach().softmax(1) - teacher.softmax(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 3.0, 10.0])
def test_large_logits(dtype, temperature):
    student = torch.tensor([[1e4, 9984.0, -1e4], [-1e4, 1e4, 0], [3, 1, 2]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[1e4, 9984.0, 1e4], [1e4, -1e4, 0], [-1e4, 1e4, 0]], dtype=dtype)
    batch = (student, teacher, torch.tensor([0, 0, 1]), [], [])
    options = PEAKD | {"temperature": temperature}
    loss = distillation_loss(*batch, **options)
    assert_terms(loss, expected_loss(*as_numpy(batch), **options), rtol=1e-6)
    (grad,) = torch.autograd.grad(loss.total, student)
    assert grad.isfinite().all()


def test_close_large_logits_keep_their_difference_in_fp32():
    student = torch.tensor([[10000.0, 9999.0]])
    teacher = torch.tensor([[9999.0, 10000.0]])
    batch = (student, teacher, torch.tensor([1]), [], [])
    options = PEAKD | {"temperature": 3.0}
    assert_terms(distillation_loss(*batch, **options), expected_loss(*as_numpy(batch), **options), rtol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_mass_on_one_class(dtype):
    student = torch.tensor([[0.5, -0.5, 0.0]], dtype=dtype, requires_grad=True)
    for teacher in ([[1e4, 0, 0]], [[0, -INF, -INF]]):
        batch = (student, torch.tensor(teacher, dtype=dtype), torch.tensor([0]), [], [])
        loss = distillation_loss(*batch, temperature=1.0, alpha=0.5, beta=0.0)
        assert loss.soft.item() == pytest.approx(loss.hard.item(), rel=1e-6)  # KL to a one-hot is cross-entropy
        (grad,) = torch.autograd.grad(loss.total, student)
        torch.testing.assert_close(grad, student.detach().softmax(1) - torch.tensor([[1.0, 0, 0]], dtype=dtype))


def test_same_models_have_no_soft_or_hidden_loss():
    student, _, labels, student_hidden, _ = make_batch(4, 3, dtype=torch.float32)
    same = (student, student.detach(), labels, student_hidden, [state.detach() for state in student_hidden])
    loss = distillation_loss(*same, **PEAKD | {"alpha": 1.0})
    assert loss.soft == 0 and loss.hidden == 0
    assert all(grad.abs().max() < 1e-6 for grad in gradients(loss, same))


def test_zero_hidden_vectors():
    batch = make_batch(2, 2, num_pairs=1)
    with torch.no_grad():
        batch[3][0][0] = 0
        batch[4][0][1] = 0
    loss = distillation_loss(*batch, **PEAKD)
    assert_terms(loss, expected_loss(*as_numpy(batch), **PEAKD))
    assert loss.hidden.item() == pytest.approx(1 / 5)  # a unit vector against zero, H = 5
    assert all(grad.isfinite().all() for grad in gradients(loss, batch))


# --- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_tokens", [None, 3])
@pytest.mark.parametrize("num_classes", [1, 3])
def test_low_precision_matches_fp64_on_the_same_numbers(dtype, num_tokens, num_classes):
    batch = make_batch(6, num_classes, num_tokens=num_tokens, hidden=64, dtype=dtype)
    exact = (
        batch[0].detach().double().requires_grad_(),
        batch[1].double(),
        batch[2].double() if num_classes == 1 else batch[2],
        [state.detach().double().requires_grad_() for state in batch[3]],
        [state.double() for state in batch[4]],
    )
    loss, exact_loss = distillation_loss(*batch, **PEAKD), distillation_loss(*exact, **PEAKD)
    assert all(term.dtype == torch.float32 for term in loss)
    assert_terms(loss, [term.item() for term in exact_loss], rtol=2e-5)
    # computed in fp32; only the returned gradient is rounded to the input's dtype
    for grad, exact_grad in zip(gradients(loss, batch), gradients(exact_loss, exact), strict=True):
        assert grad.dtype == dtype
        rtol = max(torch.finfo(dtype).eps, 1e-5)
        torch.testing.assert_close(grad.double(), exact_grad, rtol=rtol, atol=1e-7)


def test_dtypes_mix():
    student, teacher, labels, student_hidden, teacher_hidden = make_batch(4, 3, dtype=torch.bfloat16)
    mixed = (student, teacher.float(), labels.int(), student_hidden, [s.half() for s in teacher_hidden])
    loss = distillation_loss(*mixed, **PEAKD)
    assert loss.total.dtype == torch.float32
    assert_terms(loss, expected_loss(*as_numpy(mixed), **PEAKD), rtol=2e-5)
    one_double = (student, teacher, labels, student_hidden, [s.double() for s in teacher_hidden])
    loss = distillation_loss(*one_double, **PEAKD)
    assert loss.total.dtype == torch.float64
    assert_terms(loss, expected_loss(*as_numpy(one_double), **PEAKD))


def test_integer_scores_of_a_regression():
    student, teacher, *_ = make_batch(3, 1)
    batch = (student, teacher, torch.tensor([0, 5, 2]), [], [])
    assert_terms(distillation_loss(*batch, **PEAKD), expected_loss(*as_numpy(batch), **PEAKD))


# --- errors and imports

LOGITS, LABELS = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
CLS, TOKENS = torch.zeros(4, 6), torch.zeros(4, 2, 6)
VALID = {
    "student_logits": LOGITS,
    "teacher_logits": LOGITS,
    "labels": LABELS,
    "student_hidden": [CLS, CLS],
    "teacher_hidden": [CLS, CLS],
    **PEAKD,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"teacher_logits": torch.zeros(4, 2)},
            r"student_logits \[4, 3\] and teacher_logits \[4, 2\] differ",
        ),
        ({"teacher_logits": torch.zeros(3, 3)}, r"\[4, 3\] and teacher_logits \[3, 3\]"),
        ({"teacher_logits": None}, r"alpha 0.7 needs teacher_logits.*set alpha to 0"),
        ({"student_logits": torch.zeros(4)}, r"student_logits have shape \[4\]; pass \[N, C\]"),
        ({"student_logits": torch.zeros(4, 0)}, r"\[4, 0\]; pass \[N, C\] with C >= 1"),
        ({"student_logits": LOGITS.long()}, "student_logits are torch.int64; pass bf16"),
        ({"teacher_logits": LOGITS.int()}, "teacher_logits are torch.int32"),
        ({"teacher_logits": LOGITS.to("meta")}, "teacher_logits are on meta, student_logits on cpu"),
        ({"labels": LABELS[:3]}, r"labels \[3\] do not match student_logits \[4, 3\]"),
        ({"labels": LABELS[:, None]}, r"labels \[4, 1\]"),
        ({"labels": LABELS.float()}, r"labels are torch.float32 but student_logits \[4, 3\] have classes"),
        ({"labels": LABELS.to("meta")}, "labels are on meta"),
        ({"teacher_hidden": [CLS]}, "2 student_hidden and 1 teacher_hidden states differ in number"),
        (
            {"teacher_hidden": [CLS, CLS[:, :5]]},
            r"hidden\[1\] \[4, 6\] and teacher_hidden\[1\] \[4, 5\] differ",
        ),
        ({"teacher_hidden": [TOKENS, TOKENS]}, r"\[4, 6\] and teacher_hidden\[0\] \[4, 2, 6\] differ"),
        (
            {"student_hidden": [CLS, TOKENS], "teacher_hidden": [CLS, TOKENS]},
            "not shaped like the first pair",
        ),
        ({"student_hidden": [CLS[0]], "teacher_hidden": [CLS[0]]}, r"\[6\] are not \[B, H\] or \[B, S, H\]"),
        ({"teacher_hidden": [CLS, CLS.bool()]}, r"teacher_hidden\[1\] are torch.bool"),
        ({"student_hidden": [CLS, CLS.to("meta")]}, r"student_hidden\[1\] are on meta"),
        (
            {"student_hidden": [TOKENS], "teacher_hidden": [TOKENS], "attention_mask": torch.ones(4, 3)},
            r"attention_mask \[4, 3\] does not match hidden states \[4, 2, 6\]; pass \[B, S\]",
        ),
        (
            {
                "student_hidden": [TOKENS],
                "teacher_hidden": [TOKENS],
                "attention_mask": torch.ones(4, 2, device="meta"),
            },
            "attention_mask are on meta",
        ),
        ({"temperature": 0.0}, "temperature 0.0 is not a finite number above 0"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": INF}, "temperature inf"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"alpha": 1.5}, r"alpha 1.5 is not in \[0, 1\]"),
        ({"alpha": -0.1}, "alpha -0.1"),
        ({"alpha": math.nan}, "alpha nan"),
        ({"beta": -1.0}, "beta -1.0 is not a finite number >= 0"),
        ({"beta": INF}, "beta inf"),
        ({"reduction": "sum"}, "reduction 'sum' is unknown; use 'batchmean' or 'mean'"),
        ({"num_items": -1}, "num_items -1 is negative"),
        ({"num_tokens": torch.ones(2)}, r"num_tokens has shape \[2\], not \[\]"),
        ({"teacher_hidden": [CLS, CLS.half()]}, r"teacher_hidden\[1\] \[4, 6\] are torch.float16.*use one dtype"),
        ({"grad_scale": 0.0}, "grad_scale 0.0 is not a finite number above 0"),
        ({"grad_scale": torch.ones(2)}, r"grad_scale has shape \[2\], not \[\]"),
        ({"backend": "triton"}, "backend 'triton' needs a GPU, and the tensors are on cpu; use backend 'torch'"),
        ({"backend": "cuda"}, "backend 'cuda' is unknown; use one of auto, triton, torch, reference"),
    ],
)
def test_errors(change, message):
    assert distillation_loss(**VALID).total.isfinite()
    with pytest.raises(ValueError, match=message):
        distillation_loss(**VALID | change)


@pytest.mark.parametrize(("label", "ignore_index"), [(3, -100), (-1, -100), (-100, 2)])
def test_class_id_out_of_range_raises(label, ignore_index):
    labels = torch.tensor([0, label, 1, 0])
    with pytest.raises(IndexError, match="out of bounds"):
        distillation_loss(LOGITS, LOGITS, labels, [], [], **PEAKD, ignore_index=ignore_index)


def test_auto_matches_the_reference():
    batch = make_batch(4, 3)
    reference = distillation_loss(*batch, **PEAKD, backend="reference")
    assert_terms(distillation_loss(*batch, **PEAKD, backend="auto"), [term.item() for term in reference], rtol=0)


def test_kernels_import_nothing_else_of_the_package():
    for file in Path(kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):  # imports inside functions too
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, file
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert all(f"{name}.".startswith("peakd_ds.kernels.") for name in names if "peakd_ds" in name), file


def test_imports_and_runs_without_triton():
    code = (
        "import sys, torch\n"
        "sys.modules['triton'] = None\n"  # makes imports of triton fail
        "from peakd_ds.kernels import distillation_loss\n"
        "z = torch.zeros(1, 2)\n"
        "print(distillation_loss(z, z, None, [], [], temperature=1.0, alpha=1.0, beta=0.0).total.item())\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "0.0"
