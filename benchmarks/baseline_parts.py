"""What the systems of baselines.py share: data, models, loss, accuracy, and the record of a run."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cases as recipe
import datasets
import torch
import torch.nn.functional as F
from cases import Job
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from peakd_ds.config import RunConfig
from peakd_ds.data.reading import load_splits
from peakd_ds.data.tasks import get_task
from peakd_ds.model.build import build_student, task_head
from peakd_ds.model.contract import find_encoder
from peakd_ds.sps import SPSBertForSequenceClassification

Batch = dict[str, Tensor]


@dataclass
class Outcome:
    """The measurements of a run. Its creation starts the clock."""

    began: float = field(default_factory=lambda: time.perf_counter())
    dev_score: float | None = None
    """Best accuracy on dev; None if the run stopped early."""
    steps: int = 0
    positions: int = 0
    """Positions that the student was trained on: tokens and padding."""
    tokens: int = 0
    """Tokens that the student was trained on."""
    seconds: float | None = None
    """Set only if it is scaled up from fewer steps; else the caller stops the clock."""
    extrapolated_from_steps: int | None = None


def distillation_loss(
    logits: Tensor, hidden: Sequence[Tensor], teacher_logits: Tensor, teacher_hidden: Sequence[Tensor], labels: Tensor
) -> Tensor:
    """(1 - alpha) CE + alpha T^2 KL + beta MSE, the last between normalised [CLS] vectors, as a mean over the pairs.

    Args:
        logits: float [B, C], as are `teacher_logits`.
        hidden: [CLS] vectors [B, H] of each matched student layer; `teacher_hidden` of each matched teacher layer.
        labels: int64 [B].
    """
    logits, teacher_logits = logits.float(), teacher_logits.float()
    hard = F.cross_entropy(logits, labels)
    soft = F.kl_div(
        F.log_softmax(logits / recipe.TEMPERATURE, -1),
        F.softmax(teacher_logits / recipe.TEMPERATURE, -1),
        reduction="batchmean",
    )
    student_cls = F.normalize(torch.stack(list(hidden)).float(), dim=-1)
    teacher_cls = F.normalize(torch.stack(list(teacher_hidden)).float(), dim=-1)
    return (
        (1 - recipe.ALPHA) * hard
        + recipe.ALPHA * recipe.TEMPERATURE**2 * soft
        + recipe.BETA * F.mse_loss(student_cls, teacher_cls)
    )


def load_data(job: Job) -> tuple[datasets.Dataset, datasets.Dataset, PreTrainedTokenizerBase]:
    """Tokenised training and dev rows in memory, and the tokenizer."""
    task, tokenizer = get_task(job.task), AutoTokenizer.from_pretrained(job.encoder)
    datasets.disable_progress_bars()

    def encode(rows: dict[str, list]) -> dict[str, list]:
        texts = [rows[name] for name in task.text_columns]
        encoded = tokenizer(*texts, truncation=True, max_length=recipe.MAX_SEQ_LENGTH, return_token_type_ids=True)
        return {**encoded, "labels": rows["label"]}

    splits = load_splits(task, job.data_dir)
    train, dev = (
        splits[name].map(encode, batched=True, remove_columns=splits[name].column_names, keep_in_memory=True)
        for name in ("train", task.eval_splits[0])
    )
    return train, dev, tokenizer


def load_models(job: Job, dtype: torch.dtype) -> tuple[PreTrainedModel, SPSBertForSequenceClassification]:
    """The frozen teacher in `dtype` and a new student in fp32."""
    teacher = AutoModelForSequenceClassification.from_pretrained(job.teacher, dtype=dtype).eval().requires_grad_(False)
    torch.manual_seed(job.seed)
    settings = RunConfig(num_hidden_layers=job.num_stored_layers, dropout=recipe.DROPOUT)
    student = build_student(settings, find_encoder(job.encoder, "encoder"), task_head(get_task(job.task)))
    for name, module in list(student.named_modules()):  # torch's dropout, not ours for CPUs
        if isinstance(module, nn.Dropout):
            student.set_submodule(name, nn.Dropout(module.p))
    return teacher, student


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups of AdamW as in BERT's recipe: biases and LayerNorms have no weight decay."""
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": recipe.WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]


def cls_of(hidden_states: Sequence[Tensor], layers: Sequence[int]) -> list[Tensor]:
    """The [CLS] vectors [B, H] of the given layers, from hidden states [B, S, H]."""
    return [hidden_states[layer][:, 0] for layer in layers]


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterator[Batch] | DataLoader) -> float:
    """Share of rows that are classified correctly; leaves the model in evaluation mode."""
    model.eval()
    right = total = 0
    for batch in batches:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        right += (model(**inputs).logits.argmax(-1) == batch["labels"]).sum().item()
        total += len(batch["labels"])
    return right / total
