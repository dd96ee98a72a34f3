"""PTP labels against an explicit loop over samples."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from peakd_ds.ptp import NUM_PTP_LABELS, PTP_LABEL_NAMES, ptp_labels, resolve_thresholds, summarize

INF = math.inf


def judge_by_loop(logits, labels):
    """(confidence, is_correct) of each sample, in Python floats."""
    judged = []
    for row, label in zip(logits, labels, strict=True):
        largest = max(row)
        confidence = 1 / sum(math.exp(value - largest) for value in row)
        judged.append((confidence, row.index(largest) == label))
    return judged


def lower_median_by_loop(values):
    return sorted(values)[(len(values) - 1) // 2] if values else 0.5


def ptp_by_loop(logits, labels, t_correct, t_wrong):
    judged = judge_by_loop(logits, labels)
    if t_correct == "median":
        t_correct = lower_median_by_loop([confidence for confidence, correct in judged if correct])
    if t_wrong == "median":
        t_wrong = lower_median_by_loop([confidence for confidence, correct in judged if not correct])
    result = []
    for confidence, correct in judged:
        if correct:
            result.append(0 if confidence > t_correct else 1)
        else:
            result.append(2 if confidence > t_wrong else 3)
    return result


@st.composite
def predictions(draw):
    num_classes = draw(st.sampled_from([2, 3, 5]))
    num_samples = draw(st.integers(0, 12))
    logit = st.floats(-8, 8, allow_nan=False, width=32)
    row = st.lists(logit, min_size=num_classes, max_size=num_classes)
    logits = draw(st.lists(row, min_size=num_samples, max_size=num_samples))
    label = st.integers(0, num_classes - 1)
    labels = draw(st.lists(label, min_size=num_samples, max_size=num_samples))
    return num_classes, logits, labels


threshold = st.one_of(st.just("median"), st.floats(0, 1))


@settings(deadline=None, max_examples=150)
@given(predictions(), threshold, threshold)
def test_matches_the_loop(drawn, t_correct, t_wrong):
    num_classes, logits, labels = drawn
    # Two implementations of exp may disagree in the last bit, so near-ties are left to the exact tests below.
    points = [confidence for confidence, _ in judge_by_loop(logits, labels)]
    points += [t for t in (t_correct, t_wrong) if t != "median"]
    points.sort()
    assume(all(high - low > 1e-12 for low, high in itertools.pairwise(points)))

    logits_NC = torch.tensor(logits, dtype=torch.float32).reshape(-1, num_classes)
    labels_N = torch.tensor(labels, dtype=torch.int64)
    result = ptp_labels(logits_NC, labels_N, t_correct, t_wrong)
    assert result.dtype == torch.int64
    assert result.tolist() == ptp_by_loop(logits, labels, t_correct, t_wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_four_labels(dtype):
    logits = [[4.0, 0.0], [0.5, 0.0], [0.0, 3.0], [0.0, 0.25]]
    labels = torch.zeros(4, dtype=torch.int64)
    result = ptp_labels(torch.tensor(logits, dtype=dtype), labels, 0.9, 0.8)
    assert result.tolist() == [0, 1, 2, 3] == ptp_by_loop(logits, [0, 0, 0, 0], 0.9, 0.8)


@pytest.mark.parametrize(("row", "confidence"), [([3.0, 3.0], 0.5), ([1.0] * 4, 0.25), ([0.0, -INF], 1.0)])
def test_at_the_threshold_is_not_confident(row, confidence):
    logits = torch.tensor([row, row])
    labels = torch.tensor([0, 1])  # the first of equal logits is the prediction: right, then wrong
    below = math.nextafter(confidence, 0)
    assert ptp_labels(logits, labels, confidence, confidence).tolist() == [1, 3]
    assert ptp_labels(logits, labels, below, below).tolist() == [0, 2]


def test_threshold_limits_are_allowed():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    labels = torch.tensor([0, 0])
    assert ptp_labels(logits, labels, 0, 1).tolist() == [0, 3]
    assert ptp_labels(logits, labels, 1, 0).tolist() == [1, 2]


def test_confidence_is_not_rounded_to_the_logits_dtype():
    # 1 / (1 + exp(-4)) = 0.98201: in bf16 it would round to 0.98047 and 0.9815 to the same number
    logits = torch.tensor([[4.0, 0.0]], dtype=torch.bfloat16)
    assert ptp_labels(logits, torch.tensor([0]), 0.9815, 0.5).tolist() == [0]
    assert ptp_labels(logits, torch.tensor([0]), 0.9825, 0.5).tolist() == [1]


def gap_logits(gaps):
    """Two-class logits that predict class 0, with a confidence that grows with the gap."""
    return torch.tensor([[gap, 0.0] for gap in gaps], dtype=torch.float64)


@pytest.mark.parametrize(
    ("gaps", "median_gap"),
    [([3, 1, 2], 2), ([4, 1, 3, 2], 2), ([2, 1], 1), ([5], 5), ([1, 1, 1, 9], 1)],
)
def test_median_is_the_lower_one(gaps, median_gap):
    right = torch.zeros(len(gaps), dtype=torch.int64)
    expected = pytest.approx(1 / (1 + math.exp(-median_gap)), abs=1e-15)
    assert resolve_thresholds(gap_logits(gaps), right, "median", 0.6) == (expected, 0.6)
    assert resolve_thresholds(gap_logits(gaps), 1 - right, 0.8, "median") == (0.8, expected)
    # the median sample itself is not above the median
    num_confident = sum(gap > median_gap for gap in gaps)
    assert ptp_labels(gap_logits(gaps), right, "median", 0.5).tolist().count(0) == num_confident
    assert ptp_labels(gap_logits(gaps), 1 - right, 0.5, "median").tolist().count(2) == num_confident


def test_medians_of_right_and_wrong_are_separate():
    logits = gap_logits([1, 2, 3, 4, 5, 6])
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    t_correct, t_wrong = resolve_thresholds(logits, labels, "median", "median")
    assert (t_correct, t_wrong) == pytest.approx((1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-4))))
    assert ptp_labels(logits, labels, "median", "median").tolist() == [1, 3, 1, 3, 0, 2]
    assert ptp_labels(logits, labels, t_correct, t_wrong).tolist() == [1, 3, 1, 3, 0, 2]


def test_empty_classes():
    logits, right = gap_logits([1, 2, 3]), torch.zeros(3, dtype=torch.int64)
    assert resolve_thresholds(logits, right, "median", "median")[1] == 0.5
    assert resolve_thresholds(logits, 1 - right, "median", "median")[0] == 0.5
    none = torch.zeros(0, dtype=torch.int64)
    assert resolve_thresholds(torch.zeros(0, 2), none, "median", "median") == (0.5, 0.5)
    assert ptp_labels(torch.zeros(0, 2), none, "median", 0.5).shape == (0,)


def test_masked_classes_and_large_logits():
    logits = torch.tensor([[1e4, -INF, 1e4 - 1], [0.0, -INF, -INF], [-INF, 3e38, -3e38]])
    assert ptp_labels(logits, torch.tensor([0, 1, 1]), 0.7, 0.7).tolist() == [0, 2, 0]
    assert ptp_labels(logits, torch.tensor([0, 1, 1]), 0.74, 0.7).tolist() == [1, 2, 0]


def test_prediction_is_the_largest_logit_even_where_probabilities_round_to_equal():
    logits = torch.tensor([[-1e-38, 0.0], [0.0, -1e-38]])
    assert ptp_labels(logits, torch.tensor([1, 1]), 0.4, 0.4).tolist() == [0, 2]


def test_no_gradient_reaches_the_teacher():
    logits = torch.zeros(2, 2, requires_grad=True)
    assert not ptp_labels(logits, torch.tensor([0, 1]), "median", 0.5).requires_grad


def test_summarize():
    assert NUM_PTP_LABELS == 4
    assert summarize(torch.tensor([0, 3, 3, 1, 0, 0])) == dict(zip(PTP_LABEL_NAMES, (3, 1, 0, 2), strict=True))
    assert summarize(torch.zeros(0, dtype=torch.int64)) == dict.fromkeys(PTP_LABEL_NAMES, 0)
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=f"run from {min(wrong, 0)} to {max(wrong, 0)}, not from 0 to 3"):
            summarize(torch.tensor([0, wrong]))


TWO = torch.zeros(2, 2)
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("logits", "labels", "t_correct", "t_wrong", "message"),
    [
        (torch.zeros(2, 1), LABELS, 0.8, 0.6, r"\[2, 1\].*C >= 2.*regression.*without the PTP stage"),
        (torch.zeros(2), LABELS, 0.8, 0.6, r"logits \[2\]"),
        (torch.zeros(3, 2), LABELS, 0.8, 0.6, r"\[3, 2\], labels \[2\].*pass labels \[3\]"),
        (TWO, LABELS[:, None], 0.8, 0.6, r"labels \[2, 1\]"),
        (TWO, LABELS.float(), 0.8, 0.6, "float32, not class ids"),
        (TWO, torch.tensor([0, 2]), 0.8, 0.6, "label 2 is not a class id from 0 to 1"),
        (TWO, torch.tensor([-1, 0]), 0.8, 0.6, "label -1 is not.*labelled training split"),
        (TWO, LABELS, 1.01, 0.6, r"t_correct 1.01 is neither a number in \[0, 1\] nor \"median\""),
        (TWO, LABELS, 0.8, -0.1, "t_wrong -0.1"),
        (TWO, LABELS, 0.8, math.nan, "t_wrong nan"),
        (TWO, LABELS, "mean", 0.6, "t_correct 'mean'"),
        (TWO, LABELS, "0.8", 0.6, "t_correct '0.8'"),
        (torch.tensor([[math.nan, 0], [0, 1]]), LABELS, 0.8, 0.6, r"NaN or \+inf"),
        (torch.tensor([[INF, 0], [0, 1]]), LABELS, "median", 0.6, r"NaN or \+inf"),
        (torch.tensor([[-INF, -INF], [0, 1]]), LABELS, "median", 0.6, "a row of logits"),
    ],
)
def test_errors(logits, labels, t_correct, t_wrong, message):
    with pytest.raises(ValueError, match=message):
        resolve_thresholds(logits, labels, t_correct, t_wrong)
    with pytest.raises(ValueError, match=message):
        ptp_labels(logits, labels, t_correct, t_wrong)
