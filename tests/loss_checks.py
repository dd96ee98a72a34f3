"""Batches for tests of the loss, and the comparison of a backend with the float64 reference."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from peakd_ds.kernels import DistillationLoss, distillation_loss
from peakd_ds.kernels.fused import FEW_CLASSES, PRECISE_KL_ABOVE

TERM_TOLERANCE = 2e-6
"""Error of a term, relative to the larger of the term and 1."""
PLAIN_KL_ROUNDING = 6e-8
"""Times T^2: further absolute error of the soft loss that is not summed in the precise form."""
GRADIENT_TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 1.2e-2}
"""Relative error of a gradient as a vector. Triton's interpreter truncates bf16 (see interpreted/interpreter.py)."""
SETTINGS: dict[str, Any] = {"temperature": 10.0, "alpha": 0.7, "beta": 100.0}


@dataclass
class Batch:
    """Tensors of one loss; the student's are leaves that require gradients."""

    student_logits: torch.Tensor
    teacher_logits: torch.Tensor | None
    labels: torch.Tensor | None
    student_hidden: list[torch.Tensor] = field(default_factory=list)
    teacher_hidden: list[torch.Tensor] = field(default_factory=list)
    attention_mask: torch.Tensor | None = None

    def loss(self, **settings: Any) -> DistillationLoss:
        return distillation_loss(
            self.student_logits,
            self.teacher_logits,
            self.labels,
            self.student_hidden,
            self.teacher_hidden,
            attention_mask=self.attention_mask,
            **settings,
        )

    def to(self, device: str) -> "Batch":
        """A copy on another device; its student tensors are leaves."""

        def move(tensor: torch.Tensor | None) -> Any:
            return None if tensor is None else tensor.detach().to(device).requires_grad_(tensor.requires_grad)

        return Batch(
            *(move(tensor) for tensor in (self.student_logits, self.teacher_logits, self.labels)),
            [move(state) for state in self.student_hidden],
            [move(state) for state in self.teacher_hidden],
            move(self.attention_mask),
        )

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [self.student_logits, *self.student_hidden]

    def in_float64(self) -> "Batch":
        """A copy in float64; its student tensors are leaves."""

        def leaf(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().double().requires_grad_()

        def exact(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor

        return replace(
            self,
            student_logits=leaf(self.student_logits),
            teacher_logits=exact(self.teacher_logits),
            labels=exact(self.labels),
            student_hidden=[leaf(state) for state in self.student_hidden],
            teacher_hidden=[state.double() for state in self.teacher_hidden],
        )


def make_batch(
    num_rows: int,
    num_classes: int,
    dtype: torch.dtype = torch.float32,
    *,
    teacher_dtype: torch.dtype | None = None,
    num_pairs: int = 0,
    hidden: tuple[int, ...] = (48,),
    ignored: float = 0.0,
    spread: float = 3.0,
    seed: int = 0,
) -> Batch:
    """Random logits [N, C] and hidden states [N, *hidden]; if `hidden` is [S, H], about 30 % of tokens are padding."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    teacher_dtype = teacher_dtype or dtype
    if num_classes == 1:
        labels = draw(num_rows, scale=2, dtype=torch.float32)
    else:
        labels = torch.randint(num_classes, (num_rows,), generator=generator)
    labels[torch.rand(num_rows, generator=generator) < ignored] = -100
    mask = None
    if len(hidden) == 2:
        mask = (torch.rand(num_rows, hidden[0], generator=generator) < 0.7).long()
    return Batch(
        draw(num_rows, num_classes, scale=spread).requires_grad_(),
        draw(num_rows, num_classes, scale=spread, dtype=teacher_dtype),
        labels,
        [draw(num_rows, *hidden).requires_grad_() for _ in range(num_pairs)],
        [draw(num_rows, *hidden, dtype=teacher_dtype) for _ in range(num_pairs)],
        mask,
    )


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """|value - exact| / max(|exact|, 1e-3), as vectors."""
    return (value.double() - exact).norm().item() / max(exact.norm().item(), 1e-3)


def assert_matches_reference(batch: Batch, upstream: float = 1.0, **settings: Any) -> None:
    """Check terms and gradients of a backend, by default Triton's, against the float64 reference on the same inputs."""
    settings = SETTINGS | settings
    backend = settings.pop("backend", "triton")
    temperature, num_classes = settings["temperature"], batch.student_logits.shape[1]
    is_precise = num_classes <= FEW_CLASSES or temperature > PRECISE_KL_ABOVE
    soft_rounding = 0.0 if is_precise else PLAIN_KL_ROUNDING * temperature**2
    loss = batch.loss(**settings, backend=backend)
    gradients = torch.autograd.grad(loss.total * upstream, batch.leaves, materialize_grads=True)
    exact_batch = batch.in_float64()
    settings.pop("grad_scale", None)
    exact = exact_batch.loss(**settings, backend="reference")
    exact_gradients = torch.autograd.grad(exact.total * upstream, exact_batch.leaves, materialize_grads=True)
    for name, value, expected in zip(loss._fields, loss, exact, strict=True):
        value, expected = value.detach(), expected.detach()
        assert value.dtype == torch.float32 and value.shape == ()
        error = abs(value.item() - expected.item())
        allowed = TERM_TOLERANCE * max(1.0, abs(expected.item())) + (soft_rounding if name in ("total", "soft") else 0)
        assert value == expected or error <= allowed, (name, value, expected)
    for position, (leaf, value, expected) in enumerate(zip(batch.leaves, gradients, exact_gradients, strict=True)):
        assert value.dtype == leaf.dtype and value.shape == leaf.shape
        error = relative_error(value, expected)
        assert error <= GRADIENT_TOLERANCE[leaf.dtype], (f"gradient {position}", error)
