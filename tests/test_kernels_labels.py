"""Weights of labels, their divisor, and labels of several classes: each backend against plain PyTorch in float64.

Runs on the CPU backends, and through tests/interpreted on Triton's.
"""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, kl_divergence

from peakd_ds.kernels import DistillationLossModule, distillation_loss

IS_TRITON = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if IS_TRITON else ["reference", "torch"]
INF = math.inf
T, ALPHA = 3.0, 0.25
SETTINGS = {"temperature": T, "alpha": ALPHA, "beta": 0.0}
WEIGHTS = torch.tensor([0.5, 0.0, 2.0, 1.25, 0.0, 0.75])
KINDS = [("scores", 1), ("classes", 3), ("classes", 300), ("multi_label", 1), ("multi_label", 3), ("multi_label", 1500)]


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


def make(kind: str, num_classes: int, num_rows: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student's logits, a leaf, teacher's logits, and labels."""
    generator = torch.Generator().manual_seed(num_classes)
    student, teacher = (torch.randn(num_rows, num_classes, generator=generator) * 3 for _ in range(2))
    if kind == "multi_label":
        labels = torch.randint(2, (num_rows, num_classes), generator=generator)
    elif kind == "scores":
        labels = torch.randn(num_rows, generator=generator)
    else:
        labels = torch.randint(num_classes, (num_rows,), generator=generator)
    return student.requires_grad_(), teacher, labels


def plain_terms(kind, student, teacher, labels, weights, divisor, reduction="batchmean"):
    """hard, soft by PyTorch's own functions."""
    if kind == "multi_label":
        hard_N = F.binary_cross_entropy_with_logits(student, labels.double(), reduction="none").mean(1)
        p, q = (Bernoulli(logits=logits / T) for logits in (teacher, student))
        soft_N = T**2 * kl_divergence(p, q).sum(1)
    elif kind == "scores":
        hard_N = F.mse_loss(student[:, 0], labels.double(), reduction="none")
        soft_N = F.mse_loss(student, teacher, reduction="none").sum(1)
    else:
        hard_N = F.cross_entropy(student, labels, reduction="none")
        logs = [(logits / T).log_softmax(1) for logits in (student, teacher)]
        soft_N = T**2 * F.kl_div(*logs, log_target=True, reduction="none").sum(1)
    soft = soft_N.mean() / (student.shape[1] if reduction == "mean" else 1)
    return (hard_N * weights).sum() / divisor, soft


def assert_close(ours, exact) -> None:
    """Equal but for the rounding of fp32; gradients as vectors."""
    ours, exact = ours.detach().double(), exact.detach().double()
    assert (ours - exact).norm() <= 2e-6 * max(1.0, exact.norm().item())


@pytest.mark.parametrize(("kind", "num_classes"), KINDS)
@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("divisor", [None, 0.8, torch.tensor(7.5, dtype=torch.float64)], ids=["none", "0.8", "tensor"])
def test_values_and_gradients(backend, kind, num_classes, weighted, divisor):
    student, teacher, labels = make(kind, num_classes)
    reduction = "mean" if weighted else "batchmean"
    loss = distillation_loss(
        student,
        teacher,
        labels,
        [],
        [],
        **SETTINGS,
        label_weights=WEIGHTS if weighted else None,
        label_divisor=divisor,
        multi_label=kind == "multi_label",
        reduction=reduction,
        backend=backend,
    )
    (grad,) = torch.autograd.grad(loss.total * 0.37, student)
    weights = WEIGHTS.double() if weighted else torch.ones(6, dtype=torch.float64)
    exact_student = student.detach().double().requires_grad_()
    used = weights.sum() if divisor is None else divisor
    hard, soft = plain_terms(kind, exact_student, teacher.double(), labels, weights, used, reduction)
    total = (1 - ALPHA) * hard + ALPHA * soft
    (exact_grad,) = torch.autograd.grad(total * 0.37, exact_student)
    for ours, exact in zip((loss.total, loss.hard, loss.soft, grad), (total, hard, soft, exact_grad), strict=True):
        assert_close(ours, exact)


def test_class_weights_as_in_pytorch(backend):
    """Ignored rows have no weight in the divisor either."""
    student, teacher, labels = make("classes", 3)
    labels[3] = -100
    class_weights = torch.tensor([0.2, 1.0, 4.0])
    row_weights = class_weights[labels.clamp(min=0)]
    loss = distillation_loss(student, teacher, labels, [], [], **SETTINGS, label_weights=row_weights, backend=backend)
    assert_close(loss.hard, F.cross_entropy(student.double(), labels, weight=class_weights.double()))


@pytest.mark.parametrize(("kind", "num_classes"), KINDS)
def test_row_of_weight_0_is_in_soft_alone(backend, kind, num_classes):
    """Its cross-entropy is infinite or not a number, and its label no class."""
    student, teacher, labels = make(kind, num_classes)
    is_multi_label = kind == "multi_label"
    settings = {"label_weights": WEIGHTS, "multi_label": is_multi_label, "backend": backend}
    clean = distillation_loss(student, teacher, labels, [], [], **SETTINGS, **settings)
    (clean_grad,) = torch.autograd.grad(clean.total, student)
    labels = labels.float() if is_multi_label else labels.clone()
    labels[1] = math.nan if labels.is_floating_point() else num_classes
    other = distillation_loss(student, teacher, labels, [], [], **SETTINGS, **settings)
    assert [term.item() for term in other] == [term.item() for term in clean]
    assert torch.equal(torch.autograd.grad(other.total, student)[0], clean_grad)

    for filler in (-INF, INF, math.nan):
        if kind == "classes" and filler == -INF:  # the label's class is masked, in both models
            column = int(labels[4])
            rows = student.detach().clone(), teacher.clone()
            rows[0][4, column] = rows[1][4, column] = filler
        else:
            rows = student.detach().clone(), teacher
            rows[0][4] = filler
        leaf = rows[0].requires_grad_()
        loss = distillation_loss(leaf, rows[1], labels, [], [], **SETTINGS | {"alpha": 0.0}, **settings)
        assert loss.total == loss.hard == clean.hard
        (grad,) = torch.autograd.grad(loss.total, leaf)
        assert (grad[4] == 0).all() and grad[0].abs().sum() > 0


@pytest.mark.parametrize(("kind", "num_classes"), KINDS)
def test_without_labelled_rows_hard_is_0(backend, kind, num_classes):
    student, teacher, labels = make(kind, num_classes)
    settings = SETTINGS | {"multi_label": kind == "multi_label", "backend": backend}
    expected = distillation_loss(student, teacher, None, [], [], **settings)
    (expected_grad,) = torch.autograd.grad(expected.total, student)
    for weights, divisor in ((None, 0), (WEIGHTS, torch.tensor(0.0)), (torch.zeros(6), None), (torch.zeros(6), 2.0)):
        loss = distillation_loss(
            student, teacher, labels, [], [], **settings, label_weights=weights, label_divisor=divisor
        )
        assert loss.hard == 0
        assert_close(loss.total, expected.total)
        assert_close(torch.autograd.grad(loss.total, student)[0], expected_grad)


@pytest.mark.parametrize(("kind", "num_classes"), KINDS)
def test_micro_batches_add_up(backend, kind, num_classes):
    """One of them has no labelled row."""
    student, teacher, labels = make(kind, num_classes)
    settings = SETTINGS | {"multi_label": kind == "multi_label", "backend": backend}
    whole = distillation_loss(student, teacher, labels, [], [], **settings, label_weights=WEIGHTS)
    (whole_grad,) = torch.autograd.grad(whole.total, student)
    counts = {"label_divisor": WEIGHTS.sum(), "num_items": 6}
    pieces = [
        distillation_loss(
            student[rows], teacher[rows], labels[rows], [], [], **settings, **counts, label_weights=WEIGHTS[rows]
        )
        for rows in (slice(0, 1), slice(1, 2), slice(2, 6))
    ]
    for part, term in zip(zip(*pieces, strict=True), whole, strict=True):
        assert_close(sum(part), term)
    (grad,) = torch.autograd.grad(sum(piece.total for piece in pieces), student)
    assert_close(grad, whole_grad)


@pytest.mark.parametrize("num_classes", [4, 300])
def test_infinite_logits_of_a_multi_label_task(backend, num_classes):
    """Certain of the label, or as certain as the teacher: no loss; certain of the opposite: an infinite one."""
    student, teacher, labels = make("multi_label", num_classes, num_rows=3)
    with torch.no_grad():
        student[0, :2] = teacher[0, :2] = torch.tensor([-INF, INF])
        teacher[1, :2] = torch.tensor([INF, -INF])
    labels[0, :2] = torch.tensor([0, 1])
    settings = SETTINGS | {"multi_label": True, "backend": backend}
    loss = distillation_loss(student, teacher, labels, [], [], **settings)
    hard_NC = F.binary_cross_entropy_with_logits(student.double(), labels.double(), reduction="none")
    hard_NC[0, :2] = 0
    assert_close(loss.hard, hard_NC.mean())
    soft_NC = kl_divergence(Bernoulli(logits=teacher.double() / T), Bernoulli(logits=student.double() / T))
    soft_NC[0, :2] = 0
    soft_NC[1, :2] = F.softplus(torch.tensor([-1.0, 1.0]) * student.detach()[1, :2].double() / T)
    assert_close(loss.soft, T**2 * soft_NC.sum() / 3)
    (grad,) = torch.autograd.grad(loss.total, student)
    assert grad.isfinite().all() and (grad[0, :2] == 0).all()

    labels[0, 0] = 1
    loss = distillation_loss(student, teacher, labels, [], [], **settings)
    assert loss.hard == INF and loss.soft.isfinite()
    teacher[0, 1] = 0.0
    loss = distillation_loss(student, teacher, labels, [], [], **settings)
    assert loss.soft == INF
    assert torch.autograd.grad(loss.total, student)[0].isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("difference", [1e-3, 0.1, 3.0])
@pytest.mark.parametrize("spread", [0.1, 3.0, 1e4])
def test_soft_loss_of_a_multi_label_task_is_exact(backend, temperature, difference, spread):
    """Each row of a single class: nothing cancels, and no rounding averages out."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(20, 1, generator=generator) * spread
    student = teacher + torch.randn(20, 1, generator=generator) * difference
    settings = {"temperature": temperature, "alpha": 1.0, "beta": 0.0, "multi_label": True}
    for row in range(0, 20, 4):
        pair = student[row : row + 1], teacher[row : row + 1]
        loss = distillation_loss(*pair, None, [], [], **settings, backend=backend)
        exact_pair = [logits.double() / temperature for logits in pair]
        terms = [
            F.logsigmoid(sign * t).exp() * (F.logsigmoid(sign * t) - F.logsigmoid(sign * s))
            for s, t in [exact_pair]
            for sign in (1, -1)
        ]
        exact = temperature**2 * sum(terms).item()
        assert loss.soft.item() == pytest.approx(exact, rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_and_layouts_of_multi_labels_and_weights(backend, dtype):
    student, teacher, labels = make("multi_label", 5)
    settings = SETTINGS | {"multi_label": True, "backend": backend}
    expected = distillation_loss(student, teacher, labels, [], [], **settings, label_weights=WEIGHTS)
    labels = labels.to(dtype).T.contiguous().T
    weights = WEIGHTS.to(torch.bfloat16).repeat_interleave(2)[::2].requires_grad_()
    loss = distillation_loss(student, teacher, labels, [], [], **settings, label_weights=weights)
    assert [term.item() for term in loss] == [term.item() for term in expected]
    loss.total.backward()
    assert weights.grad is None


def test_module_passes_them_on(backend):
    student, teacher, labels = make("multi_label", 3)
    module = DistillationLossModule(**SETTINGS, multi_label=True, backend=backend)
    ours = module(student, teacher, labels, label_weights=WEIGHTS, label_divisor=9.0)
    theirs = distillation_loss(
        *(student, teacher, labels, [], []),
        **SETTINGS,
        multi_label=True,
        label_weights=WEIGHTS,
        label_divisor=9.0,
        backend=backend,
    )
    assert [term.item() for term in ours] == [term.item() for term in theirs]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_weights": torch.ones(5)}, r"label_weights \[5\] do not match student_logits \[6, 3\]; pass \[N\]"),
        ({"label_weights": torch.ones(6, 1)}, r"label_weights \[6, 1\]"),
        ({"label_weights": torch.ones(6, dtype=torch.int64)}, "label_weights are torch.int64; pass bf16"),
        ({"label_weights": torch.ones(6, device="meta")}, "label_weights are on meta"),
        ({"label_weights": torch.ones(6), "labels": None}, "label_weights weigh labels, which are None"),
        ({"label_divisor": -1.0}, "label_divisor -1.0 is not a finite number >= 0"),
        ({"label_divisor": math.nan}, "label_divisor nan"),
        ({"label_divisor": torch.ones(1)}, r"label_divisor has shape \[1\], not \[\]"),
        ({"multi_label": True}, r"labels \[6\] do not match student_logits \[6, 3\]; pass \[N, C\] with multi_label"),
        ({"multi_label": True, "labels": torch.ones(6, 2)}, r"labels \[6, 2\]"),
        ({"labels": torch.ones(6, 3)}, r"labels \[6, 3\] do not match student_logits \[6, 3\]; pass \[N\]"),
    ],
)
def test_errors(backend, change, message):
    student, teacher, labels = make("classes", 3)
    arguments = {"labels": labels} | SETTINGS | change
    with pytest.raises(ValueError, match=message):
        distillation_loss(student, teacher, student_hidden=[], teacher_hidden=[], **arguments, backend=backend)
