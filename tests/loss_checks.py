"""The fused loss beside the float64 reference: batches, and one comparison that every test goes through."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from peakd_ds.kernels import DistillationLoss, distillation_loss

# Relative error of each term, and of each gradient as a whole. T^2 magnifies the rounding of log-probabilities in the
# soft loss of many classes. bf16's gradients are truncated twice (see conftest.py).
TERM_TOLERANCE = 2e-6
ROUNDING = 6e-8
GRADIENT_TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 1.2e-2}
SETTINGS: dict[str, Any] = {"temperature": 10.0, "alpha": 0.7, "beta": 100.0}


@dataclass
class Batch:
    """Inputs of one call; the student's are leaves that require gradients."""

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
        """The same numbers on another device, the student's as leaves there."""

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
    """Random logits [N, C] and states [N, *hidden]; with [S, H] states a mask that pads about a third of them."""
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
    """|value - exact| / |exact| as vectors; absolute where exact is all but 0."""
    return (value.double() - exact).norm().item() / max(exact.norm().item(), 1e-3)


def assert_matches_reference(batch: Batch, upstream: float = 1.0, **settings: Any) -> None:
    """Terms and gradients of a backend, by default Triton's, against float64 autograd on the same numbers."""
    settings = SETTINGS | settings
    backend = settings.pop("backend", "triton")
    soft_rounding = ROUNDING * settings["temperature"] ** 2 if batch.student_logits.shape[1] > 256 else 0.0
    loss = batch.loss(**settings, backend=backend)
    gradients = torch.autograd.grad(loss.total * upstream, batch.leaves, materialize_grads=True)
    exact_batch = batch.in_float64()
    settings.pop("grad_scale", None)
    exact = exact_batch.loss(**settings, backend="reference")
    exact_gradients = torch.autograd.grad(exact.total * upstream, exact_batch.leaves, materialize_grads=True)
    for name, value, wanted in zip(loss._fields, loss, exact, strict=True):
        value, wanted = value.detach(), wanted.detach()
        assert value.dtype == torch.float32 and value.shape == ()
        error = abs(value.item() - wanted.item())
        allowed = TERM_TOLERANCE * max(1.0, abs(wanted.item())) + (soft_rounding if name in ("total", "soft") else 0)
        assert value == wanted or error <= allowed, (name, value, wanted)
    for position, (leaf, value, wanted) in enumerate(zip(batch.leaves, gradients, exact_gradients, strict=True)):
        assert value.dtype == leaf.dtype and value.shape == leaf.shape
        error = relative_error(value, wanted)
        assert error <= GRADIENT_TOLERANCE[leaf.dtype], (f"gradient {position}", error)
