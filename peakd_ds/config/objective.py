"""Settings of the losses."""

import argparse
from dataclasses import dataclass

from peakd_ds.config.setting import Range, finite_number, setting, whole_number
from peakd_ds.errors import shown


def _parse_layer_map(text: str) -> str | tuple[tuple[int, int], ...]:
    if text in ("skip", "last"):
        return text
    try:
        pairs = tuple(
            tuple(whole_number(layer) for layer in pair.split(":")) for pair in text.replace(" ", "").split(",")
        )
    except ValueError:
        pairs = ()
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is neither skip, last, nor pairs STUDENT:TEACHER of 1-based layers; "
            "write for example 1:2,2:4"
        )
    return pairs  # type: ignore[return-value]


def _parse_threshold(text: str) -> float | str:
    return text if text == "median" else finite_number(text)


@dataclass(frozen=True)
class ObjectiveSettings:
    """PTP's thresholds, and the terms of distillation: (1 - alpha) * hard + alpha * soft + beta * hidden."""

    ptp: bool = setting(True, "pretrain the student with the teacher's predictions before distilling")
    t_correct: float | str | None = setting(
        None,
        "a right teacher prediction is confident above this probability",
        parse=_parse_threshold,
        range=Range(0, 1, word="median"),
        shown_default="Pea-KD's for its five tasks, not parts of them such as qnli_10k; else median",
    )
    t_wrong: float | str | None = setting(
        None,
        "a wrong teacher prediction is confident above this probability",
        parse=_parse_threshold,
        range=Range(0, 1, word="median"),
        shown_default="Pea-KD's for its five tasks, not parts of them such as qnli_10k; else median",
    )
    temperature: float = setting(
        10.0,
        "softmax temperature T of the soft loss, which is scaled by T^2",
        range=Range(0.01, 1000),
    )
    alpha: float = setting(
        0.7,
        "weight of the soft loss; 1 - alpha weighs the hard loss; 1 where no row has a label",
        range=Range(0, 1),
    )
    beta: float = setting(100.0, "weight of the hidden-state loss", range=Range(0, 1_000_000))
    layer_map: str | tuple[tuple[int, int], ...] = setting(
        "skip",
        "student:teacher layer pairs of the hidden-state loss, 1-based over effective layers",
        parse=_parse_layer_map,
        range="skip, last or pairs like 1:2,2:4",
    )
    hidden_loss: str = setting(
        "cls",
        "compare L2-normalised [CLS] vectors, or all non-padded tokens as they are",
        choices=("cls", "tokens"),
    )
    class_weights: str = setting(
        "none",
        "weights of the classes in the hard loss; balanced: inversely proportional to their counts",
        choices=("none", "balanced"),
    )
    metric: str = setting(
        "",
        "score of your own task that picks the best epoch: accuracy, macro_f1, weighted_f1; for several labels "
        "micro_f1, macro_f1, exact_match; for scores pearson, spearmanr, rmse",
        shown_default="accuracy, micro_f1 or spearmanr",
    )

    def runs_ptp(self, has_classes: bool) -> bool:
        """Whether the student is pretrained with the teacher's predictions, which needs right and wrong classes."""
        return self.ptp and has_classes
