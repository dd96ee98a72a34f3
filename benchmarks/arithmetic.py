"""What matrix products a distillation takes, system by system: the least that each can cost at one rate."""

from collections.abc import Sequence

from cases import EPOCHS, MAX_SEQ_LENGTH
from transformers import PretrainedConfig


def forward_flops(config: PretrainedConfig, num_layers: int, lengths: Sequence[float], is_last_whole: bool) -> float:
    """Multiplications and additions of a classifier's forward pass over rows of so many tokens.

    Args:
        num_layers: Layers that run; a shared one counts as often as it runs.
        is_last_whole: Whether the last layer computes all tokens. It needs keys and values of all, all else of [CLS].
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    projection, feed_forward = 2 * hidden * hidden, 4 * hidden * inner  # a token's
    total = 0.0
    for length in lengths:
        attention = 4 * length * hidden  # a query's scores and weighted values
        layer = length * (4 * projection + feed_forward + attention)
        last = layer if is_last_whole else 2 * length * projection + 2 * projection + feed_forward + attention
        total += (num_layers - 1) * layer + last
        total += projection + 2 * hidden * config.num_labels  # pooler and classifier
    return total


def step_flops(config: PretrainedConfig, num_layers: int, lengths: Sequence[float], is_last_whole: bool) -> float:
    """Forward and backward pass: two products for each of the forward pass, since the embeddings are trained, so that
    every input needs its gradient too."""
    return 3 * forward_flops(config, num_layers, lengths, is_last_whole)


def run_flops(
    system: str,
    teacher: PretrainedConfig,
    student: PretrainedConfig,
    student_depth: int,
    lengths: Sequence[int],
    padding_share: float,
) -> float:
    """A whole run of a system of cases.py, evaluation left out.

    Ours computes no padding and ends in [CLS]; the others compute what they pad to, and every token of the last layers.
    The published recipe and our cache ask the teacher once, the others in each epoch.

    Args:
        lengths: Tokens of each training row.
        padding_share: Of all tokens that the system computes.
    """
    is_ours = system.startswith("ours")
    if system == "published_recipe":
        computed: list[float] = [MAX_SEQ_LENGTH] * len(lengths)
    else:
        computed = [length if is_ours else length / (1 - padding_share) for length in lengths]
    asked = 1 if system in ("ours_cached", "published_recipe") else EPOCHS
    answers = forward_flops(teacher, teacher.num_hidden_layers, computed, not is_ours)
    return asked * answers + EPOCHS * step_flops(student, student_depth, computed, not is_ours)
