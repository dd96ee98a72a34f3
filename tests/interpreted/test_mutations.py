"""Do the tests notice a bug? Each mutation is one that a hand could make in the kernels' source."""

import interpreter  # noqa: F401, I001 - first: mends Triton's interpreter, or skips

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from loss_checks import assert_matches_reference, make_batch

MUTATIONS = {
    "T is lost in a row's exponent": (
        "    soft = tl.exp2(tl.fma(x, scale, -soft_reference))",
        "    soft = tl.exp2(tl.fma(x, LOG2_E, -soft_reference))",
    ),
    "the label's 1 is lost from the gradient": (
        "label_grad = label_exp * hard_factor - row_weight",
        "label_grad = label_exp * hard_factor",
    ),
    "the label's 1 is lost from the gradient, few classes": (
        "row_weight[:, None] * (exp_student / total[:, None] - is_label.to(tl.float32))",
        "row_weight[:, None] * (exp_student / total[:, None])",
    ),
    "the last column is lost": ("end_column < num_classes)", "end_column < num_classes - 1)"),
    "the first columns are lost": (
        "tl.where(end < WIDTH, end < num_head,",
        "tl.where(end < WIDTH, end < num_head - 1,",
    ),
    "the last vector of a row is lost": (
        "        is_in = (vector < num_vectors)[:, None]\n            student = tl.load",
        "        is_in = (vector < num_vectors - 1)[:, None]\n            student = tl.load",
    ),
    "a running sum keeps its old reference": (
        "hard_sum = hard_sum * hard_shrink + tl.sum(exp_hard, 1)",
        "hard_sum = hard_sum + tl.sum(exp_hard, 1)",
    ),
    "lanes are added up without a common reference": (
        "tl.sum(teacher_sum * tl.exp2(teacher_ref - teacher_max), 0)",
        "tl.sum(teacher_sum, 0)",
    ),
    "a power is off": ("    if N == 10:\n        return x8 * x2", "    if N == 10:\n        return x8 * x"),
    "KL is the wrong way round": (
        "exp_teacher * ((teacher_log2 - student_log2) + shift)",
        "exp_soft * ((teacher_log2 - student_log2) + shift)",
    ),
    "the normalisation's own gradient is lost": (
        "grad = (difference - unit * along[:, None]) * inverse_norm[:, None]",
        "grad = difference * inverse_norm[:, None]",
    ),
    "padding is read": (
        "is_token = has_vector & (mask != 0)",
        "is_token = has_vector",
    ),
    "a pair is compared with another's teacher": (
        "_pick(TEACHER_HIDDEN, pair, NUM_PAIRS)",
        "_pick(TEACHER_HIDDEN, NUM_PAIRS - 1 - pair, NUM_PAIRS)",
    ),
    "ignored rows count": ("kept += (label != ignore_index).to(tl.int32)", "kept += (label == label).to(tl.int32)"),
    "the upstream gradient is lost": (
        "ratio = tl.load(UPSTREAM).to(tl.float32) / _read_scalar(GRAD_SCALE, SCALE_ON_DEVICE)",
        "ratio = tl.load(UPSTREAM).to(tl.float32) * 0 + 1",
    ),
    "only one of the gradients is rescaled": (
        "_multiply(SECOND, second_size, ratio,",
        "_multiply(SECOND, second_size * 0, ratio,",
    ),
    "partial sums past the first block are lost": (
        "for start in range(0, num_logit_partials, BLOCK):",
        "for start in range(0, 1, BLOCK):",
    ),
    "a regression's factor 2 is lost": ("grad += 2 * soft_weight * error", "grad += soft_weight * error"),
}


def _few_classes() -> None:
    assert_matches_reference(make_batch(7, 3, num_pairs=2, hidden=(3, 40), ignored=0.3), upstream=0.37)


def _many_classes() -> None:
    batch = make_batch(3, 1501, ignored=0.3)
    batch.labels[0] = 1500
    assert_matches_reference(batch, upstream=0.37)
    assert_matches_reference(make_batch(3, 20000), temperature=3.3)  # several turns of the loop


def _regression() -> None:
    assert_matches_reference(make_batch(5, 1, ignored=0.3))


def _many_rows() -> None:
    assert_matches_reference(make_batch(40, 257, ignored=0.3))


CHECKS: list[Callable[[], None]] = [_few_classes, _many_classes, _regression, _many_rows]


@pytest.fixture
def device_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], None]:
    """Replaces a piece of the kernels' source, which must be there once, for one test."""
    from peakd_ds.kernels import triton_backend, triton_kernels

    source = Path(triton_kernels.__file__).read_text()

    def mutate(old: str, new: str) -> None:
        assert source.count(old) >= 1, "the mutation no longer fits the source"
        file = tmp_path / "mutated_kernels.py"
        file.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location("mutated_kernels", file)
        assert spec is not None and spec.loader is not None
        module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(triton_backend, "device_code", module)
        monkeypatch.setattr(triton_backend, "_BLOCK", 16)  # several turns of every loop over small tensors

    return mutate


def _finds_a_fault(check: Callable[[], None]) -> bool:
    try:
        check()
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_seeded_bug_is_noticed(name: str, device_code: Callable[[str, str], None]) -> None:
    device_code(*MUTATIONS[name])
    assert any(_finds_a_fault(check) for check in CHECKS)


def test_without_a_bug_nothing_is_noticed(device_code: Callable[[str, str], None]) -> None:
    device_code("LOG2_E = tl.constexpr", "LOG2_E = tl.constexpr")
    torch.manual_seed(0)
    assert not any(_finds_a_fault(check) for check in CHECKS)
