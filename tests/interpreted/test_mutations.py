"""The tests catch bugs: each mutation is a plausible mistake in the source of the kernels."""

import interpreter  # noqa: F401, I001 - first: patches Triton's interpreter, or skips

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from loss_checks import assert_matches_reference, make_batch

MUTATIONS = {
    "T is lost in the exponent": (
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
        "terms = exp_teacher * ((teacher_log2 - student_log2) + shift)",
        "terms = exp_teacher * ((student_log2 - teacher_log2) - shift)",
    ),
    "a term of the precise KL is lost": (
        "q - exp_teacher - exp_teacher * y",
        "q - exp_teacher",
    ),
    "the precise KL is the wrong way round": (
        "tl.abs(y) < 0.25, exp_teacher * series",
        "tl.abs(y) < 0.25, exp_student * series",
    ),
    "the normalisation's own gradient is lost": (
        "grad = (difference - unit * along[:, None]) * inverse_norm[:, None]",
        "grad = difference * inverse_norm[:, None]",
    ),
    "padding is read": (
        "is_token = has_vector & (mask != 0)",
        "is_token = has_vector",
    ),
    "a layer pair has another pair's teacher": (
        "_pick(TEACHER_HIDDEN, pair, NUM_PAIRS)",
        "_pick(TEACHER_HIDDEN, NUM_PAIRS - 1 - pair, NUM_PAIRS)",
    ),
    "ignored rows count": ("count += (label != ignore_index).to(tl.int32)", "count += (label == label).to(tl.int32)"),
    "the upstream gradient is lost": (
        "ratio = tl.load(GRAD_TOTAL).to(tl.float32) / _read_scalar(GRAD_SCALE, GRAD_SCALE_ON_DEVICE)",
        "ratio = tl.load(GRAD_TOTAL).to(tl.float32) * 0 + 1",
    ),
    "only one of the gradients is rescaled": (
        "_multiply(SECOND, second_size, ratio,",
        "_multiply(SECOND, second_size * 0, ratio,",
    ),
    "partial sums past the first block are lost": (
        "for start in range(0, num_logit_partials, BLOCK):",
        "for start in range(0, 1, BLOCK):",
    ),
    "a row's weight is lost from the loss": (
        "hard = tl.where(label_weight != 0, hard * label_weight, 0.0)",
        "hard = tl.where(label_weight != 0, hard, 0.0)",
    ),
    "a row's weight is lost from the gradient": ("row_weight * label_weight, 0.0)", "row_weight, 0.0)"),
    "a row's weight is lost from the gradient, many classes": (
        "weight_of_hard = label_weight * _read_scalar",
        "weight_of_hard = _read_scalar",
    ),
    "the divisor of the hard loss is lost": ("tl.sum(hard, 0) / hard_divisor", "tl.sum(hard, 0) / num_rows"),
    "labels of the second block are those of the first": (
        "LABELS + (row * num_classes + start)",
        "LABELS + (row * num_classes)",
    ),
    "a regression's factor 2 is lost": ("grad += 2 * soft_weight * error", "grad += soft_weight * error"),
}


def _few_classes() -> None:
    assert_matches_reference(make_batch(7, 3, num_pairs=2, hidden=(3, 40), ignored=0.3), upstream=0.37)


def _many_classes() -> None:
    batch = make_batch(3, 1501, ignored=0.3)
    batch.labels[0] = 1500
    assert_matches_reference(batch, upstream=0.37)
    assert_matches_reference(make_batch(3, 20000), temperature=3.3)  # several iterations of the loop


def _high_temperature() -> None:
    batch = make_batch(3, 1501)
    with torch.no_grad():
        batch.teacher_logits[0] *= 20
    assert_matches_reference(batch, temperature=25.0)


def _regression() -> None:
    assert_matches_reference(make_batch(5, 1, ignored=0.3))


def _many_rows() -> None:
    assert_matches_reference(make_batch(40, 257, ignored=0.3))


def _weighted() -> None:
    weights = torch.tensor([0.5, 0.0, 2.0, 1.5])
    for num_classes in (1, 3, 300):
        assert_matches_reference(make_batch(4, num_classes), label_weights=weights, label_divisor=3.0)


def _multi_label() -> None:
    for num_classes in (3, 300):
        batch = make_batch(4, num_classes)
        batch.labels = torch.randint(2, (4, num_classes))
        assert_matches_reference(batch, multi_label=True, label_divisor=3.0)


CHECKS: list[Callable[[], None]] = [
    _few_classes,
    _many_classes,
    _high_temperature,
    _regression,
    _many_rows,
    _weighted,
    _multi_label,
]


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], None]:
    """Replaces a piece of the kernels' source for one test; a piece that is in neither file fails the test."""
    from peakd_ds.kernels import triton_backend, triton_kernels, triton_streaming

    def mutate_source(old: str, new: str) -> None:
        modules = [triton_kernels, triton_streaming]
        sources = [(module, Path(module.__file__).read_text()) for module in modules]
        chosen = [(module, source) for module, source in sources if old in source]
        assert chosen, "the mutation no longer matches the source"
        for module, source in chosen:
            name = module.__name__.rpartition(".")[2]
            file = tmp_path / f"mutated_{name}.py"
            file.write_text(source.replace(old, new))
            spec = importlib.util.spec_from_file_location(file.stem, file)
            assert spec is not None and spec.loader is not None
            mutated: ModuleType = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(mutated)
            monkeypatch.setattr(triton_backend, name, mutated)
        monkeypatch.setattr(triton_backend, "_BLOCK", 16)  # several iterations of each loop over small tensors

    return mutate_source


def _fails(check: Callable[[], None]) -> bool:
    try:
        check()
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(name: str, mutate: Callable[[str, str], None]) -> None:
    mutate(*MUTATIONS[name])
    assert any(_fails(check) for check in CHECKS)


def test_unmutated_source_passes(mutate: Callable[[str, str], None]) -> None:
    mutate("@triton.jit", "@triton.jit")  # both files
    torch.manual_seed(0)
    assert not any(_fails(check) for check in CHECKS)
