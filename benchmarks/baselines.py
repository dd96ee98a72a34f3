"""The systems that ours is compared with, each written as its users would write it today.

    python benchmarks/baselines.py hf_trainer JOB.json RESULT.json

All train the same student (peakd_ds.sps on padded rows, with torch's dropout, from the same encoder) from the same
teacher on the same loss, with the recipe of cases.py, evaluate on dev after each epoch and keep the best weights. Each
is timed from the moment when the tokenised rows are in memory, so with loading its models, to the end of the last
epoch's evaluation with the best weights saved. What helps a system and costs its user a line is done: fused AdamW,
teachers in bf16 without gradients, no hidden states in evaluation.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
import transformers
from cases import (
    ALPHA,
    BATCH_SIZE,
    BETA,
    DROPOUT,
    LR,
    MAX_GRAD_NORM,
    MAX_SEQ_LENGTH,
    TEMPERATURE,
    WARMUP_RATIO,
    WEIGHT_DECAY,
    Job,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from peakd_ds.config import RunConfig
from peakd_ds.data.reading import load_splits
from peakd_ds.data.tasks import get_task
from peakd_ds.model.build import build_student, task_head
from peakd_ds.model.contract import find_encoder

Batch = dict[str, Tensor]


@dataclass
class Outcome:
    """What a system tells of its run. It is made when the clock starts."""

    began: float = field(default_factory=lambda: time.perf_counter())
    dev_score: float | None = None
    """Best accuracy on dev; None where too few steps were made to have one."""
    steps: int = 0
    positions: int = 0
    """Tokens and padding that the student was trained on."""
    tokens: int = 0
    """Tokens among them."""
    seconds: float | None = None
    """Set by the system itself only where it is scaled up from fewer steps."""
    extrapolated_from_steps: int | None = None


# -- The same for all --------------------------------------------------------------------------------------------------


def distillation_loss(
    logits: Tensor, hidden: Sequence[Tensor], teacher_logits: Tensor, teacher_hidden: Sequence[Tensor], labels: Tensor
) -> Tensor:
    """(1 - alpha) CE + alpha T^2 KL + beta * squared error of normalised [CLS] vectors [B, H], mean over the pairs."""
    logits, teacher_logits = logits.float(), teacher_logits.float()
    hard = F.cross_entropy(logits, labels)
    soft = F.kl_div(
        F.log_softmax(logits / TEMPERATURE, -1), F.softmax(teacher_logits / TEMPERATURE, -1), reduction="batchmean"
    )
    student_cls = F.normalize(torch.stack(list(hidden)).float(), dim=-1)
    teacher_cls = F.normalize(torch.stack(list(teacher_hidden)).float(), dim=-1)
    return (1 - ALPHA) * hard + ALPHA * TEMPERATURE**2 * soft + BETA * F.mse_loss(student_cls, teacher_cls)


def load_data(job: Job) -> tuple[datasets.Dataset, datasets.Dataset, Any]:
    """Tokenised training and dev rows, in memory, and the tokenizer."""
    task, tokenizer = get_task(job.task), AutoTokenizer.from_pretrained(job.encoder)
    datasets.disable_progress_bars()

    def encode(rows: dict[str, list]) -> dict[str, list]:
        texts = [rows[name] for name in task.text_columns]
        encoded = tokenizer(*texts, truncation=True, max_length=MAX_SEQ_LENGTH, return_token_type_ids=True)
        return {**encoded, "labels": rows["label"]}

    splits = load_splits(task, job.data_dir)
    train, dev = (
        splits[name].map(encode, batched=True, remove_columns=splits[name].column_names, keep_in_memory=True)
        for name in ("train", task.eval_splits[0])
    )
    return train, dev, tokenizer


def load_models(job: Job, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The frozen teacher in `dtype` and a new student in fp32."""
    teacher = AutoModelForSequenceClassification.from_pretrained(job.teacher, dtype=dtype).eval().requires_grad_(False)
    torch.manual_seed(job.seed)
    settings = RunConfig(num_hidden_layers=job.num_stored_layers, dropout=DROPOUT)
    student = build_student(settings, find_encoder(job.encoder, "encoder"), task_head(get_task(job.task)))
    for name, module in list(student.named_modules()):  # ours has a dropout of its own on CPUs, others have torch's
        if isinstance(module, nn.Dropout):
            student.set_submodule(name, nn.Dropout(module.p))
    return teacher, student


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """As in BERT's own recipe: biases and LayerNorms are not decayed."""
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]


def cls_of(hidden_states: Sequence[Tensor], layers: Sequence[int]) -> list[Tensor]:
    return [hidden_states[layer][:, 0] for layer in layers]


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterator[Batch] | DataLoader) -> float:
    """Share of right classes; leaves the model in evaluation mode."""
    model.eval()
    right = total = 0
    for batch in batches:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        right += (model(**inputs).logits.argmax(-1) == batch["labels"]).sum().item()
        total += len(batch["labels"])
    return right / total


# -- The recipe as published -------------------------------------------------------------------------------------------


def published_recipe(job: Job) -> Outcome:
    """What the code of Pea-KD and Patient KD does: fp32, every row padded to 128, the teacher's logits and [CLS]
    vectors of all rows first, then a plain loop; here with shuffled rows, SDPA attention and a current, fused AdamW."""
    train, dev, tokenizer = load_data(job)
    padded_train, padded_dev = (_padded(rows, tokenizer) for rows in (train, dev))
    outcome = Outcome()
    teacher, student = load_models(job, torch.float32)
    student_layers, teacher_layers = zip(*job.pairs, strict=True)
    num_rows, steps_per_epoch = len(train), math.ceil(len(train) / BATCH_SIZE)
    optimizer = torch.optim.AdamW(decay_groups(student), lr=LR, fused=True)
    scheduler = _schedule(optimizer, steps_per_epoch * job.epochs)
    loaded = time.perf_counter()

    answers = []
    with torch.no_grad():
        for batch in _slices(padded_train, torch.arange(num_rows)):
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            output = teacher(**inputs, output_hidden_states=True)
            answers.append((output.logits, torch.stack(cls_of(output.hidden_states, teacher_layers), 1)))
            if job.max_steps is not None and len(answers) == job.max_steps:
                break
    teacher_logits, teacher_cls = (torch.cat(parts) for parts in zip(*answers, strict=True))
    asked = time.perf_counter()

    evaluation_s = 0.0
    for _ in range(job.epochs):
        for batch_rows in torch.randperm(len(teacher_logits)).split(BATCH_SIZE):
            student.train()
            batch = {name: tensor[batch_rows] for name, tensor in padded_train.items()}
            labels = batch.pop("labels")
            output = student(**batch, output_hidden_states=True)
            loss = distillation_loss(
                output.logits,
                cls_of(output.hidden_states, student_layers),
                teacher_logits[batch_rows],
                teacher_cls[batch_rows].unbind(1),
                labels,
            )
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            outcome.steps += 1
            if outcome.steps == 1:
                warmed_up = time.perf_counter()
            outcome.positions += batch["input_ids"].numel()
            outcome.tokens += int(batch["attention_mask"].sum())
        before = time.perf_counter()
        score = accuracy(student, _slices(padded_dev, torch.arange(len(dev))))
        if outcome.dev_score is None or score > outcome.dev_score:
            outcome.dev_score = score
            torch.save(student.state_dict(), Path(job.folder) / "best.pt")
        evaluation_s += time.perf_counter() - before
        if job.max_steps is not None:  # the rows asked about are one short epoch
            ended = time.perf_counter()
            asking_s = (asked - loaded) / len(answers) * steps_per_epoch
            first_s = warmed_up - asked  # what the first step makes is made once
            step_s = (ended - warmed_up - evaluation_s) / (outcome.steps - 1) if outcome.steps > 1 else first_s
            steps_s = first_s + step_s * (job.epochs * steps_per_epoch - 1)
            outcome.seconds = loaded - outcome.began + asking_s + steps_s + job.epochs * evaluation_s
            outcome.extrapolated_from_steps, outcome.dev_score = outcome.steps, None
            break
    return outcome


def _padded(rows: datasets.Dataset, tokenizer: Any) -> Batch:
    columns = tokenizer.pad(rows[:], padding="max_length", max_length=MAX_SEQ_LENGTH, return_tensors="pt")
    return dict(columns)


def _slices(columns: Batch, rows: Tensor) -> Iterator[Batch]:
    for part in rows.split(BATCH_SIZE):
        yield {name: tensor[part] for name, tensor in columns.items()}


def _schedule(optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
    return get_linear_schedule_with_warmup(optimizer, round(WARMUP_RATIO * num_steps), num_steps)


# -- Hugging Face Trainer ----------------------------------------------------------------------------------------------


class DistillationTrainer(Trainer):
    """Trainer with the loss overridden, the teacher run beside the student."""

    def __init__(self, teacher: nn.Module, pairs: Sequence[tuple[int, int]], outcome: Outcome, **arguments: Any):
        super().__init__(**arguments)
        self.teacher, self.outcome = teacher, outcome
        self.student_layers, self.teacher_layers = zip(*pairs, strict=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        if not model.training:  # an evaluation asks neither for the teacher nor for hidden states
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        outputs = model(**inputs, output_hidden_states=True)
        with torch.no_grad():
            answer = self.teacher(**inputs, output_hidden_states=True)
        loss = distillation_loss(
            outputs.logits,
            cls_of(outputs.hidden_states, self.student_layers),
            answer.logits,
            cls_of(answer.hidden_states, self.teacher_layers),
            labels,
        )
        self.outcome.steps += 1
        self.outcome.positions += inputs["input_ids"].numel()
        self.outcome.tokens += int(inputs["attention_mask"].sum())
        return (loss, outputs) if return_outputs else loss


def hf_trainer(job: Job) -> Outcome:
    """What most people do: dynamic padding, rows grouped by length, bf16 autocast where bf16 is fast."""
    train, dev, tokenizer = load_data(job)
    outcome = Outcome()
    teacher, student = load_models(job, torch.bfloat16 if job.bf16 else torch.float32)
    num_steps = math.ceil(len(train) / BATCH_SIZE) * job.epochs
    arguments = TrainingArguments(
        output_dir=job.folder,
        use_cpu=True,
        bf16=job.bf16,
        num_train_epochs=job.epochs,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=BATCH_SIZE,
        train_sampling_strategy="group_by_length",
        learning_rate=LR,
        lr_scheduler_type="linear",
        warmup_steps=round(WARMUP_RATIO * num_steps),
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        optim="adamw_torch_fused",
        eval_strategy="epoch",
        save_strategy="best",
        save_only_model=True,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        greater_is_better=True,
        report_to="none",
        disable_tqdm=True,
        seed=job.seed,
    )
    trainer = DistillationTrainer(
        teacher,
        job.pairs,
        outcome,
        model=student,
        args=arguments,
        train_dataset=train,
        eval_dataset=dev,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.train()
    outcome.dev_score = trainer.state.best_metric
    return outcome


# -- TextBrewer --------------------------------------------------------------------------------------------------------


def textbrewer(job: Job) -> Outcome:
    """GeneralDistiller with a pkd match for each layer pair, as its README has it; it writes weights after each epoch.

    Its cross-entropy is KL plus a constant and has no T^2, and its pkd loss sums over H: both go into the weights. bf16
    it has none of its own (fp16 needs apex), so the forward passes are put under autocast.
    """
    from textbrewer import GeneralDistiller, TrainingConfig

    train, dev, tokenizer = load_data(job)
    outcome = Outcome()
    teacher, student = load_models(job, torch.bfloat16 if job.bf16 else torch.float32)
    # around each forward pass: around the whole training, autocast would keep its bf16 copies of the first weights
    student.forward = torch.autocast("cpu", torch.bfloat16, enabled=job.bf16)(student.forward)
    collate = DataCollatorWithPadding(tokenizer)

    def collate_for_both(rows: list[dict]) -> dict[str, Batch]:
        batch = dict(collate(rows))
        outcome.steps += 1
        outcome.positions += batch["input_ids"].numel()
        outcome.tokens += int(batch["attention_mask"].sum())
        return {"teacher": {name: batch[name] for name in batch if name != "labels"}, "student": batch}

    lengths = [len(ids) for ids in train["input_ids"]]
    torch.manual_seed(job.seed)
    train_batches = DataLoader(
        train,
        BATCH_SIZE,
        sampler=LengthGroupedSampler(BATCH_SIZE, lengths=lengths),
        collate_fn=collate_for_both,
    )
    dev_batches = DataLoader(dev, BATCH_SIZE, collate_fn=lambda rows: dict(collate(rows)))

    def evaluate(model: nn.Module, step: int) -> None:
        score = accuracy(model, dev_batches)
        outcome.dev_score = max(score, outcome.dev_score or 0.0)

    distiller = GeneralDistiller(
        TrainingConfig(output_dir=job.folder, log_dir=None, device="cpu"),
        textbrewer_settings(job.pairs, student.config.hidden_size),
        teacher,
        student,
        adaptor_of_teacher,
        adaptor_of_student,
    )
    num_steps = len(train_batches) * job.epochs
    with distiller:
        distiller.train(
            torch.optim.AdamW(decay_groups(student), lr=LR, fused=True),
            train_batches,
            num_epochs=job.epochs,
            scheduler_class=get_linear_schedule_with_warmup,
            scheduler_args={"num_warmup_steps": round(WARMUP_RATIO * num_steps), "num_training_steps": num_steps},
            max_grad_norm=MAX_GRAD_NORM,
            callback=evaluate,
            output_hidden_states=True,
        )
    return outcome


def textbrewer_settings(pairs: Sequence[tuple[int, int]], hidden_size: int) -> Any:
    from textbrewer import DistillationConfig

    weight = BETA / (len(pairs) * hidden_size)
    return DistillationConfig(
        temperature=TEMPERATURE,
        hard_label_weight=1 - ALPHA,
        kd_loss_type="ce",
        kd_loss_weight=ALPHA * TEMPERATURE**2,
        intermediate_matches=[
            {"layer_T": j, "layer_S": i, "feature": "hidden", "loss": "pkd", "weight": weight} for i, j in pairs
        ],
    )


def adaptor_of_teacher(batch: Batch, outputs: Any) -> dict[str, Any]:
    return {"logits": outputs.logits.float(), "hidden": [states[:, 0].float() for states in outputs.hidden_states]}


def adaptor_of_student(batch: Batch, outputs: Any) -> dict[str, Any]:
    hard = F.cross_entropy(outputs.logits.float(), batch["labels"])
    return adaptor_of_teacher(batch, outputs) | {"losses": hard}


# -- A process for each run --------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, Callable[[Job], Outcome]] = {
    "published_recipe": published_recipe,
    "hf_trainer": hf_trainer,
    "textbrewer": textbrewer,
}


def main() -> None:
    system, job_file, result_file = sys.argv[1:]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    outcome = FUNCTIONS[system](Job.read(Path(job_file)))
    seconds = time.perf_counter() - outcome.began if outcome.seconds is None else outcome.seconds
    result = {
        "seconds": seconds,
        "dev_score": outcome.dev_score,
        "steps": outcome.steps,
        "padding_share": 1 - outcome.tokens / outcome.positions,
        "extrapolated_from_steps": outcome.extrapolated_from_steps,
    }
    Path(result_file).write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
