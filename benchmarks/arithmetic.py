"""FLOPs of the matrix products in a distillation, system by system."""

from collections.abc import Sequence

from cases import EPOCHS, MAX_SEQ_LENGTH
from transformers import PretrainedConfig


def forward_flops(config: PretrainedConfig, num_layers: int, lengths: Sequence[float], runs_all_tokens: bool) -> float:
    """Multiplications and additions of a classifier's forward pass.

    Args:
        num_layers: Layers that run; a shared layer counts as often as it runs.
        lengths: Tokens of each row.
        runs_all_tokens: Whether the last layer computes all tokens; else it computes keys and values of all tokens and
            the rest only for [CLS].
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    projection, feed_forward = 2 * hidden * hidden, 4 * hidden * inner  # for each token
    total = 0.0
    for length in lengths:
        attention = 4 * length * hidden  # scores and weighted values of one query
        layer = length * (4 * projection + feed_forward + attention)
        last = layer if runs_all_tokens else 2 * length * projection + 2 * projection + feed_forward + attention
        total += (num_layers - 1) * layer + last
        total += projection + 2 * hidden * config.num_labels  # pooler and classifier
    return total


def step_flops(config: PretrainedConfig, num_layers: int, lengths: Sequence[float], runs_all_tokens: bool) -> float:
    """Multiplications and additions of a forward and a backward pass; arguments as `forward_flops`.

    Each product of the forward pass has two in the backward pass: even the first layer's input needs its gradient,
    because the embeddings are trained.
    """
    return 3 * forward_flops(config, num_layers, lengths, runs_all_tokens)


def run_flops(
    system: str,
    teacher: PretrainedConfig,
    student: PretrainedConfig,
    student_depth: int,
    lengths: Sequence[int],
    padding_share: float,
) -> float:
    """Multiplications and additions of a run of a system of cases.py, without evaluation.

    Ours computes no padding, and only [CLS] in the last layers; the others compute their padding and all tokens. The
    published recipe and our cache run the teacher once, the others in every epoch.

    Args:
        student_depth: Layers that the student runs.
        lengths: Tokens of each training row.
        padding_share: Share of padding in all tokens that the system computes.
    """
    is_ours = system.startswith("ours")
    if system == "published_recipe":
        computed: list[float] = [MAX_SEQ_LENGTH] * len(lengths)
    else:
        computed = [length if is_ours else length / (1 - padding_share) for length in lengths]
    num_teacher_passes = 1 if system in ("ours_cached", "published_recipe") else EPOCHS
    teacher_pass = forward_flops(teacher, teacher.num_hidden_layers, computed, not is_ours)
    return num_teacher_passes * teacher_pass + EPOCHS * step_flops(student, student_depth, computed, not is_ours)
