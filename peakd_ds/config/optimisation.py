"""Settings of the optimizer, epochs and batches."""

from dataclasses import dataclass

from peakd_ds.config.setting import Range, setting

EPOCHS = Range(1, 100_000)
BATCH = Range(1, 1_000_000)
EVAL_BATCH_FACTOR = 4
"""A forward pass without gradients has this many times the rows of a training micro-batch."""


@dataclass(frozen=True)
class OptimisationSettings:
    """Epochs, batches and AdamW."""

    teacher_epochs: int = setting(
        3,
        "passes over the training rows in the teacher stage",
        unit="epochs",
        range=EPOCHS,
    )
    ptp_epochs: int = setting(
        4,
        "passes over the training rows in the ptp stage",
        unit="epochs",
        range=EPOCHS,
    )
    distill_epochs: int = setting(
        6,
        "passes over the training rows in the distill stage",
        unit="epochs",
        range=EPOCHS,
    )
    epochs: int | None = setting(
        None,
        "sets --teacher_epochs, --ptp_epochs and --distill_epochs together",
        unit="epochs",
        range=EPOCHS,
        shown_default="each its own",
    )
    lr: float = setting(2e-5, "peak learning rate of AdamW", range=Range(0, 100, is_open=True))
    warmup_ratio: float = setting(
        0.1,
        "share of a stage's steps in which the learning rate rises linearly; it then falls linearly to 0",
        range=Range(0, 1),
    )
    weight_decay: float = setting(0.01, "AdamW weight decay; biases and LayerNorms have none", range=Range(0, 100))
    max_grad_norm: float = setting(
        1.0, "clip the global gradient norm to this; 0 does not clip", range=Range(0, 1_000_000_000)
    )
    dropout: float | None = setting(
        None,
        "dropout probability of hidden states, attention and head",
        range=Range(0, 0.99),
        shown_default="the encoder's own",
    )
    global_batch_size: int = setting(32, "samples per optimizer step over all ranks", unit="samples", range=BATCH)
    micro_batch_size: int = setting(
        32,
        f"most samples per rank in a training pass; without gradients {EVAL_BATCH_FACTOR} times as many, but "
        "the same with --hidden_loss tokens; accumulation follows",
        unit="samples",
        range=BATCH,
        is_neutral=True,
    )
    seed: int = setting(
        42,
        "seeds data order, new weights and dropout; dropout masks also depend on the number of ranks",
        range=Range(0, 2**32 - 1),
    )
    early_stopping_patience: int = setting(
        0,
        "stop a stage after this many epochs without a better score; 0: never",
        unit="epochs",
        range=Range(0, EPOCHS.high),
    )

    def epochs_of(self, stage: str) -> int:
        """Passes over the training rows in `stage`."""
        return (
            self.epochs
            or {"teacher": self.teacher_epochs, "ptp": self.ptp_epochs, "distill": self.distill_epochs}[stage]
        )
