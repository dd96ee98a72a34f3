"""Pretraining with Teacher's Predictions (PTP): four classes from whether the teacher is right and confident.

The student is first trained to predict these classes, then its 4-class head is dropped (Pea-KD, Cho & Kang 2022,
arXiv 2009.14822; class numbers and thresholds as in its published code).

N samples of the training set, C task classes.
"""

import torch
from torch import Tensor

PTP_LABEL_NAMES = (
    "confidently_correct",
    "unconfidently_correct",
    "confidently_wrong",
    "unconfidently_wrong",
)
NUM_PTP_LABELS = len(PTP_LABEL_NAMES)

Threshold = float | str
"""A probability, or "median"."""


def ptp_labels(teacher_logits: Tensor, labels: Tensor, t_correct: Threshold, t_wrong: Threshold) -> Tensor:
    """PTP class of each sample: 2 if the teacher is wrong, plus 1 if it is not confident.

    Confidence is the largest softmax probability, at temperature 1 and in fp64. The teacher is confident above the
    threshold, not at it.

    Args:
        teacher_logits: [N, C] of the frozen teacher in eval mode, C >= 2.
        labels: [N] gold class ids.
        t_correct: threshold for samples the teacher predicts correctly, in [0, 1], or "median" of the N
            given samples, as in `resolve_thresholds`.
        t_wrong: threshold for samples it predicts wrongly.

    Returns:
        int64 [N], on the device of the logits; `PTP_LABEL_NAMES` names the values.

    Raises:
        ValueError: as `resolve_thresholds`.
    """
    t_correct, t_wrong = resolve_thresholds(teacher_logits, labels, t_correct, t_wrong)
    confidence_N, is_correct_N = _judge(teacher_logits, labels)
    is_confident_N = torch.where(is_correct_N, confidence_N > t_correct, confidence_N > t_wrong)
    return 2 * (~is_correct_N).long() + (~is_confident_N).long()


def resolve_thresholds(
    teacher_logits: Tensor, labels: Tensor, t_correct: Threshold, t_wrong: Threshold
) -> tuple[float, float]:
    """(t_correct, t_wrong) as numbers, "median" resolved over the given samples: the whole training set.

    The median is over the confidences of correctly, or wrongly, predicted samples: the lower of the middle two for
    an even number of them, 0.5 for none.

    Raises:
        ValueError: a threshold is neither in [0, 1] nor "median"; the logits are not [N, C] with C >= 2 (PTP
            is not defined for regression) or have no softmax; the labels are not N class ids below C.
    """
    confidence_N, is_correct_N = _judge(teacher_logits, labels)
    return (
        _resolve("t_correct", t_correct, confidence_N[is_correct_N]),
        _resolve("t_wrong", t_wrong, confidence_N[~is_correct_N]),
    )


def summarize(labels: Tensor) -> dict[str, int]:
    """Number of samples of each PTP class, by name.

    Raises:
        ValueError: a label is none of the PTP classes.
    """
    counts = {name: int((labels == i).sum()) for i, name in enumerate(PTP_LABEL_NAMES)}
    if sum(counts.values()) != labels.numel():
        raise ValueError(
            f"PTP labels run from {labels.min()} to {labels.max()}, not from 0 to {NUM_PTP_LABELS - 1}; "
            f"pass the labels that ptp_labels returned, not the task's"
        )
    return counts


UNBALANCED = 0.8
"""Share of the samples in one class above which PTP has little to teach."""


def why_unbalanced(counts: dict[str, int]) -> str:
    """Why the four classes teach little, from their counts; "" if they do not."""
    total, largest = sum(counts.values()), max(counts, key=lambda name: counts[name])
    if counts[largest] > UNBALANCED * total:
        return f"{counts[largest] / total:.0%} of the rows are {largest}"
    empty = next((name for name in counts if name.startswith("confidently") and not counts[name]), None)
    return f"no row is {empty}" if empty else ""


def _judge(teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence (fp64 [N]) and correctness (bool [N]) of the teacher's predictions."""
    shapes = f"teacher_logits {list(teacher_logits.shape)}, labels {list(labels.shape)}"
    if teacher_logits.ndim != 2 or teacher_logits.shape[1] < 2:
        raise ValueError(
            f"{shapes}: PTP needs logits [N, C] with C >= 2 classes; a regression task (stsb) has none, "
            f"so train its student without the PTP stage"
        )
    num_samples, num_classes = teacher_logits.shape
    if labels.shape != (num_samples,):
        raise ValueError(f"{shapes}: there must be one label per row of logits; pass labels [{num_samples}]")
    if labels.is_floating_point():
        raise ValueError(f"labels are {labels.dtype}, not class ids; pass integer labels")
    if num_samples and not 0 <= labels.min() <= labels.max() < num_classes:
        wrong = labels[(labels < 0) | (labels >= num_classes)][0]
        raise ValueError(
            f"label {wrong} is not a class id from 0 to {num_classes - 1}; PTP labels are made from the "
            f"labelled training split"
        )
    # fp64: in fp32 a sample at the threshold could change its class between CPU and GPU.
    confidence_N = teacher_logits.detach().double().softmax(dim=1).amax(dim=1)
    if confidence_N.isnan().any():
        raise ValueError(f"{shapes}: a row of logits holds NaN or +inf; check the teacher's checkpoint")
    # Not the argmax of the softmax: rounding can make probabilities equal whose logits differ.
    return confidence_N, teacher_logits.argmax(dim=1) == labels


def _resolve(name: str, threshold: Threshold, confidence: Tensor) -> float:
    """`threshold`, or for "median" the lower median of `confidence` [any number]."""
    if threshold == "median":
        return confidence.median().item() if len(confidence) else 0.5  # Tensor.median is the lower one
    if isinstance(threshold, str) or not 0 <= threshold <= 1:
        raise ValueError(f'{name} {threshold!r} is neither a number in [0, 1] nor "median"; RTE uses 0.8 and 0.6')
    return float(threshold)
