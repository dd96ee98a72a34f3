"""Label dtypes and high temperatures: each backend against float64 sums written out here, without the reference.

Runs on the CPU backends, and through tests/interpreted on Triton's.
"""

import math
import os
from dataclasses import dataclass

import pytest
import torch

from peakd_ds.kernels import distillation_loss

IS_TRITON = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if IS_TRITON else ["reference", "torch"]
ALPHA = 0.25


@dataclass
class Exact:
    """Loss and gradient of a few rows in Python floats."""

    hard: float
    soft: float
    grad_logits: list[list[float]]


def exact_loss(
    student: list[list[float]],
    teacher: list[list[float]],
    labels: list[float],
    temperature: float,
    ignore_index: int = -100,
) -> Exact:
    """Cross-entropy and T^2 KL with class ids, squared errors with scores (C = 1), and the gradient of ALPHA's mix."""
    valid = [row for row, label in enumerate(labels) if label != ignore_index]
    num_classes = len(student[0])
    hard = soft = 0.0
    grad = [[0.0] * num_classes for _ in labels]
    for row in valid:
        s, t, label = student[row], teacher[row], labels[row]
        if num_classes == 1:
            hard += (s[0] - label) ** 2
            soft += (s[0] - t[0]) ** 2
            grad[row][0] = 2 * ((1 - ALPHA) * (s[0] - label) + ALPHA * (s[0] - t[0])) / len(valid)
            continue
        log_p, log_q = log_softmax(t, temperature), log_softmax(s, temperature)
        log_hard = log_softmax(s, 1.0)
        hard -= log_hard[int(label)]
        soft += temperature**2 * math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
        for c in range(num_classes):
            grad_hard = math.exp(log_hard[c]) - (c == label)
            grad_soft = temperature * (math.exp(log_q[c]) - math.exp(log_p[c]))
            grad[row][c] = ((1 - ALPHA) * grad_hard + ALPHA * grad_soft) / len(valid)
    return Exact(hard / len(valid), soft / len(valid), grad)


def log_softmax(logits: list[float], temperature: float) -> list[float]:
    scaled = [(x - max(logits)) / temperature for x in logits]
    log_sum = math.log(math.fsum(math.exp(x) for x in scaled))
    return [x - log_sum for x in scaled]


def random_logits(num_rows: int, num_classes: int, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(num_rows, num_classes, generator=generator) * spread for _ in range(2))
    return student.requires_grad_(), teacher


def check(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    backend: str,
    temperature: float = 2.0,
    rtol: float = 2e-6,
    grad_rtol: float = 2e-6,
    **settings: int,
) -> None:
    exact = exact_loss(student.tolist(), teacher.tolist(), labels.tolist(), temperature, **settings)
    loss = distillation_loss(
        student, teacher, labels, [], [], temperature=temperature, alpha=ALPHA, beta=0.0, backend=backend, **settings
    )
    assert loss.hard.item() == pytest.approx(exact.hard, rel=rtol)
    assert loss.soft.item() == pytest.approx(exact.soft, rel=rtol)
    assert loss.total.item() == pytest.approx((1 - ALPHA) * exact.hard + ALPHA * exact.soft, rel=rtol)
    (grad,) = torch.autograd.grad(loss.total, student)
    exact_grad = torch.tensor(exact.grad_logits, dtype=torch.float64)
    assert (grad.double() - exact_grad).norm() <= grad_rtol * exact_grad.norm()


# --- labels


@pytest.mark.parametrize("backend", BACKENDS)
def test_uint8_label_156_is_a_class(backend):
    """In uint8, ignore_index -100 would be 156."""
    check(*random_logits(3, 200), torch.tensor([156, 3, 199], dtype=torch.uint8), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("num_classes", [3, 200, 256, 300])
def test_label_dtypes(backend, dtype, num_classes):
    """Classes up to the largest of the dtype, and an ignored row if the dtype has negative numbers."""
    largest = min(num_classes - 1, torch.iinfo(dtype).max)
    ignored = -100 if torch.iinfo(dtype).min < 0 else 1
    check(*random_logits(4, num_classes), torch.tensor([0, largest, ignored, 2], dtype=dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_classes", [1, 200, 300])
def test_ignore_index_in_a_narrow_dtype(backend, num_classes):
    labels = torch.tensor([255, 3, 156, 2], dtype=torch.uint8)
    check(*random_logits(4, num_classes), labels, backend, ignore_index=255)


@pytest.mark.parametrize("backend", BACKENDS)
def test_integer_scores(backend):
    check(*random_logits(4, 1), torch.tensor([156, 3, 0, 255], dtype=torch.uint8), backend)
    check(*random_logits(4, 1), torch.tensor([-100, 3, 0, 127], dtype=torch.int8), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_in_half_precision(backend):
    """In bf16, ignore_index 257 would be 256."""
    labels = torch.tensor([256.0, -100.0, 0.5], dtype=torch.bfloat16)
    check(*random_logits(3, 1), labels, backend, ignore_index=257)
    check(*random_logits(3, 1), labels, backend)


# --- high temperatures


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_classes", [3, 256, 257, 300, 1000])
@pytest.mark.parametrize("temperature", [25.0, 100.0, 1000.0])
@pytest.mark.parametrize("spread", [3.0, 0.1])
def test_soft_loss_at_a_high_temperature(backend, num_classes, temperature, spread):
    """The error of the loss does not grow with T; the gradient is T times a difference of probabilities."""
    labels = torch.tensor([0, 1, num_classes - 1, -100])
    tolerances = {"rtol": 1e-5, "grad_rtol": 2e-6 + 1.5e-7 * temperature / spread}
    check(*random_logits(4, num_classes, spread), labels, backend, temperature, **tolerances)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_classes", [300, 1000])
def test_soft_loss_of_many_classes_at_temperature_20(backend, num_classes):
    """The documented error of the faster form, up to 2.5e-7 * T^2, on a soft loss of about 9."""
    labels = torch.tensor([0, 1, 2, 3])
    check(*random_logits(4, num_classes), labels, backend, 20.0, rtol=2.5e-7 * 20**2 / 9)
