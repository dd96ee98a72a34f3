"""The systems that ours is compared with, each written the way its users would write it today.

    python benchmarks/baselines.py hf_trainer JOB.json RESULT.json

All systems train the same student (peakd_ds.sps on padded rows, with torch's dropout, from the same encoder) with the
same teacher, loss and recipe (cases.py), evaluate it on dev after each epoch and keep the best weights. The clock
starts when the tokenised rows are in memory, before the models are loaded, and stops after the last epoch's evaluation,
when the best weights are saved. Every speed-up that costs a user one line is used: fused AdamW, teachers in bf16
without gradients, no hidden states in evaluation.
"""

import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cases as recipe
import datasets
import torch
import torch.nn.functional as F
import transformers
from baseline_parts import Batch, Outcome, accuracy, cls_of, decay_groups, distillation_loss, load_data, load_models
from cases import Job
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.trainer_pt_utils import LengthGroupedSampler

if TYPE_CHECKING:  # an optional dependency
    from textbrewer import DistillationConfig


# -- The recipe as published -------------------------------------------------------------------------------------------


def published_recipe(job: Job) -> Outcome:
    """The recipe of the published code of Pea-KD and Patient KD, with shuffled rows, SDPA attention and fused AdamW.

    fp32, every row padded to 128; first the teacher's logits and [CLS] vectors of all rows, then a plain loop.
    """
    train, dev, tokenizer = load_data(job)
    padded_train, padded_dev = (_padded(rows, tokenizer) for rows in (train, dev))
    outcome = Outcome()
    teacher, student = load_models(job, torch.float32)
    student_layers, teacher_layers = zip(*job.pairs, strict=True)
    steps_per_epoch = math.ceil(len(train) / recipe.BATCH_SIZE)
    optimizer = torch.optim.AdamW(decay_groups(student), lr=recipe.LR, fused=True)
    scheduler = _schedule(optimizer, steps_per_epoch * job.epochs)
    clock = _RecipeClock(outcome.began, loaded=time.perf_counter())
    teacher_logits, teacher_cls = _teacher_outputs(teacher, padded_train, teacher_layers, job.max_steps)
    clock.teacher_done = time.perf_counter()
    for _ in range(job.epochs):
        for batch_rows in torch.randperm(len(teacher_logits)).split(recipe.BATCH_SIZE):
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
            nn.utils.clip_grad_norm_(student.parameters(), recipe.MAX_GRAD_NORM)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            outcome.steps += 1
            if outcome.steps == 1:
                clock.first_step_done = time.perf_counter()
            outcome.positions += batch["input_ids"].numel()
            outcome.tokens += int(batch["attention_mask"].sum())
        before = time.perf_counter()
        score = accuracy(student, _slices(padded_dev, torch.arange(len(dev))))
        if outcome.dev_score is None or score > outcome.dev_score:
            outcome.dev_score = score
            torch.save(student.state_dict(), Path(job.folder) / "best.pt")
        if job.max_steps is not None:  # the rows with teacher outputs make one short epoch
            clock.ended, clock.evaluation_s = time.perf_counter(), time.perf_counter() - before
            outcome.seconds = clock.scaled_up(outcome.steps, steps_per_epoch, job.epochs)
            outcome.extrapolated_from_steps, outcome.dev_score = outcome.steps, None
            break
    return outcome


@torch.no_grad()
def _teacher_outputs(
    teacher: nn.Module, columns: Batch, layers: Sequence[int], max_batches: int | None
) -> tuple[Tensor, Tensor]:
    """Logits [N, C] and [CLS] vectors [N, K, H] of the K layers, for all rows or those of the first batches."""
    outputs = []
    for batch in itertools.islice(_slices(columns, torch.arange(len(columns["labels"]))), max_batches):
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        output = teacher(**inputs, output_hidden_states=True)
        outputs.append((output.logits, torch.stack(cls_of(output.hidden_states, layers), 1)))
    logits, cls_vectors = zip(*outputs, strict=True)
    return torch.cat(logits), torch.cat(cls_vectors)


@dataclass
class _RecipeClock:
    """Times of the published recipe, of perf_counter [s], to scale up a run of one short epoch."""

    began: float
    loaded: float
    teacher_done: float = 0.0
    first_step_done: float = 0.0
    ended: float = 0.0
    evaluation_s: float = 0.0

    def scaled_up(self, num_steps: int, steps_per_epoch: int, num_epochs: int) -> float:
        """Seconds of the run with all its steps. What the first step sets up is counted once."""
        teacher_s = (self.teacher_done - self.loaded) / num_steps * steps_per_epoch
        first_s = self.first_step_done - self.teacher_done
        step_s = first_s
        if num_steps > 1:
            step_s = (self.ended - self.first_step_done - self.evaluation_s) / (num_steps - 1)
        steps_s = first_s + step_s * (num_epochs * steps_per_epoch - 1)
        return self.loaded - self.began + teacher_s + steps_s + num_epochs * self.evaluation_s


def _padded(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> Batch:
    """All rows, padded to the longest length."""
    columns = tokenizer.pad(rows[:], padding="max_length", max_length=recipe.MAX_SEQ_LENGTH, return_tensors="pt")
    return dict(columns)


def _slices(columns: Batch, rows: Tensor) -> Iterator[Batch]:
    """Batches of the given rows, in this order."""
    for part in rows.split(recipe.BATCH_SIZE):
        yield {name: tensor[part] for name, tensor in columns.items()}


def _schedule(optimizer: torch.optim.Optimizer, num_steps: int) -> LambdaLR:
    return get_linear_schedule_with_warmup(optimizer, round(recipe.WARMUP_RATIO * num_steps), num_steps)


# -- Hugging Face Trainer ----------------------------------------------------------------------------------------------


class DistillationTrainer(Trainer):
    """Trainer whose loss also runs the teacher on the batch."""

    def __init__(self, teacher: nn.Module, pairs: Sequence[tuple[int, int]], outcome: Outcome, **arguments: Any):
        super().__init__(**arguments)
        self.teacher, self.outcome = teacher, outcome
        self.student_layers, self.teacher_layers = zip(*pairs, strict=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        if not model.training:  # evaluation needs neither the teacher nor hidden states
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        outputs = model(**inputs, output_hidden_states=True)
        with torch.no_grad():
            teacher_outputs = self.teacher(**inputs, output_hidden_states=True)
        loss = distillation_loss(
            outputs.logits,
            cls_of(outputs.hidden_states, self.student_layers),
            teacher_outputs.logits,
            cls_of(teacher_outputs.hidden_states, self.teacher_layers),
            labels,
        )
        self.outcome.steps += 1
        self.outcome.positions += inputs["input_ids"].numel()
        self.outcome.tokens += int(inputs["attention_mask"].sum())
        return (loss, outputs) if return_outputs else loss


def hf_trainer(job: Job) -> Outcome:
    """The usual way: dynamic padding, rows grouped by length, bf16 autocast where bf16 is fast."""
    train, dev, tokenizer = load_data(job)
    outcome = Outcome()
    teacher, student = load_models(job, torch.bfloat16 if job.bf16 else torch.float32)
    num_steps = math.ceil(len(train) / recipe.BATCH_SIZE) * job.epochs
    arguments = TrainingArguments(
        output_dir=job.folder,
        use_cpu=True,
        bf16=job.bf16,
        num_train_epochs=job.epochs,
        per_device_train_batch_size=recipe.BATCH_SIZE,
        per_device_eval_batch_size=recipe.BATCH_SIZE,
        train_sampling_strategy="group_by_length",
        learning_rate=recipe.LR,
        lr_scheduler_type="linear",
        warmup_steps=round(recipe.WARMUP_RATIO * num_steps),
        weight_decay=recipe.WEIGHT_DECAY,
        max_grad_norm=recipe.MAX_GRAD_NORM,
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
    """GeneralDistiller with a pkd match for each layer pair, as in its README; it saves the weights after each epoch.

    Its cross-entropy is KL plus a constant without T^2, and its pkd loss sums over H; `textbrewer_settings` corrects
    both by weights. It has no bf16 (and its fp16 needs apex), so the forward passes run under autocast.
    """
    from textbrewer import GeneralDistiller, TrainingConfig

    train, dev, tokenizer = load_data(job)
    outcome = Outcome()
    teacher, student = load_models(job, torch.bfloat16 if job.bf16 else torch.float32)
    # Around each forward pass: around all of training, autocast would keep bf16 copies of the first weights.
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
        recipe.BATCH_SIZE,
        sampler=LengthGroupedSampler(recipe.BATCH_SIZE, lengths=lengths),
        collate_fn=collate_for_both,
    )
    dev_batches = DataLoader(dev, recipe.BATCH_SIZE, collate_fn=lambda rows: dict(collate(rows)))

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
            torch.optim.AdamW(decay_groups(student), lr=recipe.LR, fused=True),
            train_batches,
            num_epochs=job.epochs,
            scheduler_class=get_linear_schedule_with_warmup,
            scheduler_args={
                "num_warmup_steps": round(recipe.WARMUP_RATIO * num_steps),
                "num_training_steps": num_steps,
            },
            max_grad_norm=recipe.MAX_GRAD_NORM,
            callback=evaluate,
            output_hidden_states=True,
        )
    return outcome


def textbrewer_settings(pairs: Sequence[tuple[int, int]], hidden_size: int) -> "DistillationConfig":
    """TextBrewer's loss with weights that make it `distillation_loss` plus a constant."""
    from textbrewer import DistillationConfig

    weight = recipe.BETA / (len(pairs) * hidden_size)
    return DistillationConfig(
        temperature=recipe.TEMPERATURE,
        hard_label_weight=1 - recipe.ALPHA,
        kd_loss_type="ce",
        kd_loss_weight=recipe.ALPHA * recipe.TEMPERATURE**2,
        intermediate_matches=[
            {"layer_T": j, "layer_S": i, "feature": "hidden", "loss": "pkd", "weight": weight} for i, j in pairs
        ],
    )


def adaptor_of_teacher(batch: Batch, outputs: SequenceClassifierOutput) -> dict[str, Any]:
    """What TextBrewer reads from a teacher's outputs."""
    return {"logits": outputs.logits.float(), "hidden": [states[:, 0].float() for states in outputs.hidden_states]}


def adaptor_of_student(batch: Batch, outputs: SequenceClassifierOutput) -> dict[str, Any]:
    """What TextBrewer reads from a student's outputs: also the loss on the labels."""
    hard = F.cross_entropy(outputs.logits.float(), batch["labels"])
    return adaptor_of_teacher(batch, outputs) | {"losses": hard}


# -- The program -------------------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, Callable[[Job], Outcome]] = {
    "published_recipe": published_recipe,
    "hf_trainer": hf_trainer,
    "textbrewer": textbrewer,
}


def main() -> None:
    """Run one system on a job and write its result as JSON."""
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
