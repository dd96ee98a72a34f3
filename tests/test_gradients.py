"""Gradients of the distributed engines against plain PyTorch on the whole global batch, with formulas written out here.

Adam hides a wrong scale of the loss, so the gradients themselves are compared, before the optimizer's step.
"""

import json
from pathlib import Path
from typing import Any

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_grad
from torch.distributions import Bernoulli, kl_divergence
from transformers import BertForSequenceClassification

from peakd_ds import stages
from peakd_ds.command_line import parse
from peakd_ds.data.batches import global_batches
from peakd_ds.data.division import epoch_slots
from peakd_ds.engine import engines
from peakd_ds.packed.packing import padded
from peakd_ds.ranks import dist
from peakd_ds.results.log import RunLog
from peakd_ds.run import open_run

TOLERANCE = 1e-5  # of the gradient's norm, parameter by parameter and as a whole


def distributed_gradients(argv: list[str]) -> tuple[dict[str, np.ndarray], np.ndarray, float]:
    """Runs on every rank: gradients of the distill stage's first small batch, its rows, and the loss on all ranks."""
    config = parse(argv)
    run = open_run(config)
    stage = stages.build_stage("distill", run, RunLog(run.folder))
    engine = engines.training_engine(
        stages.build_module(stage, run), config, run.student_ds_config, num_steps=10, name="distill"
    )
    slots = epoch_slots(len(run.train_rows), config.global_batch_size, config.seed, epoch=0)
    number = next(i for i, batch in enumerate(slots) if (batch < 0).any())  # a last, smaller batch: uneven ranks
    batches = global_batches(run.train, run.train_rows, slots, run.num_accum_steps, first=number)
    batch = next(stage.with_teacher_outputs(batches))
    total = torch.zeros(())
    micro_batches = list(batch.micro_batches)
    for i, micro in enumerate(micro_batches):
        loss, _ = stage.loss(engine, micro, batch, False)
        engine.backward(loss.total * engines.undo_averaging(engine))
        total += loss.total.detach().float()
        if i < len(micro_batches) - 1:
            engine.step()
    gradients = {name: safe_get_full_grad(p).float().numpy().copy() for name, p in engine.module.named_parameters()}
    present = run.train_rows[slots[number][slots[number] >= 0]]
    loss_of_all = dist.all_reduce(total).item()
    engine.destroy()
    return gradients, present, loss_of_all


def plain_gradients(argv: list[str], rows: np.ndarray) -> tuple[dict[str, torch.Tensor], float]:
    """The same on the whole batch at once: padded, no engine, no peakd_ds loss, transformers' own teacher."""
    config = parse(argv)
    run = open_run(config)
    stage = stages.build_stage("distill", run, RunLog(run.folder))
    module = stages.build_module(stage, run).eval()
    batch = run.train.micro_batch(rows)
    inputs = padded(batch.inputs)
    teacher = BertForSequenceClassification.from_pretrained(config.teacher).eval()
    with torch.no_grad():
        answer = teacher(**inputs, output_hidden_states=True)
    output = module.student(**inputs, output_hidden_states=True)
    logits, hidden = output.logits, [output.hidden_states[i] for i, _ in run.pairs]
    if config.hidden_loss == "cls":
        hidden = [states[:, 0] for states in hidden]
    if len(module.projections):
        hidden = [project(states) for project, states in zip(module.projections, hidden, strict=True)]
    labels, t = run.train.labels[rows], config.temperature
    if run.task.is_regression:
        hard = F.mse_loss(logits[:, 0], labels)
        soft = F.mse_loss(logits, answer.logits)
    elif run.task.is_multi_label:
        is_labeled = labels[:, 0] >= 0
        hard = F.binary_cross_entropy_with_logits(logits[is_labeled], labels[is_labeled], reduction="sum")
        hard = hard / max(labels[is_labeled].numel(), 1)
        ours, theirs = (Bernoulli(logits=scores / t) for scores in (logits, answer.logits))
        soft = t**2 * kl_divergence(theirs, ours).sum(1).mean()
    else:
        weight = None
        if config.class_weights == "balanced":
            trained = run.train.labels[run.train_rows]
            weight = 1 / torch.bincount(trained[trained >= 0]).float()  # a common factor cancels
        hard = F.cross_entropy(logits, labels, weight, ignore_index=-1) if (labels >= 0).any() else torch.zeros(())
        soft = t**2 * F.kl_div(
            F.log_softmax(logits / t, -1), F.log_softmax(answer.logits / t, -1), reduction="batchmean", log_target=True
        )
    pairs = list(zip(hidden, (answer.hidden_states[j] for _, j in run.pairs), strict=True))
    if config.hidden_loss == "cls":
        distances = [F.mse_loss(F.normalize(s, dim=-1), F.normalize(h[:, 0], dim=-1)) for s, h in pairs]
    else:
        mask = inputs["attention_mask"].bool()
        distances = [F.mse_loss(s[mask], h[mask]) for s, h in pairs]
    total = (1 - config.alpha) * hard + config.alpha * soft + config.beta * torch.stack(distances).mean()
    total.backward()
    return {name: p.grad for name, p in module.named_parameters()}, total.item()


def check(two_ranks, argv: list[str], tolerance: float = TOLERANCE) -> None:
    answers = two_ranks.run(distributed_gradients, argv)
    (gradients, rows, loss), (_, other_rows, _) = answers
    assert np.array_equal(rows, other_rows)
    expected, expected_loss = plain_gradients(argv, rows)
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert gradients.keys() == expected.keys()
    whole = torch.cat([grad.flatten() for grad in expected.values()]).norm()
    for name, grad in expected.items():
        error = torch.from_numpy(gradients[name]) - grad
        assert error.norm() <= tolerance * max(grad.norm(), 1e-3 * whole), name


@pytest.fixture
def argv(tiny_data: Path, tiny_teacher, tmp_path: Path, single_rank) -> list[str]:
    words = "--num_hidden_layers 2 --dropout 0 --dtype fp32 --no_ptp --stages distill --max_grad_norm 0 --beta 30"
    batch = "--global_batch_size 16 --micro_batch_size 4"  # two ranks accumulate twice
    paths = ["--teacher", str(tiny_teacher("rte")), "--data_dir", str(tiny_data), "--run_dir", str(tmp_path / "run")]
    return ["--task", "rte", *paths, *words.split(), *batch.split(), "--layer_map", "1:1,2:2,3:4"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("hidden_loss", ["cls", "tokens"])
def test_every_zero_stage_gives_plain_gradients(two_ranks, argv: list[str], stage: int, hidden_loss: str) -> None:
    check(two_ranks, [*argv, "--student_ds_config", f"zero{stage}_fp32", "--hidden_loss", hidden_loss])


def test_a_sharded_teacher_gives_plain_gradients(two_ranks, argv: list[str]) -> None:
    check(two_ranks, [*argv, "--teacher_ds_config", "teacher_zero3", "--student_ds_config", "zero2_fp32"])


def test_regression_gives_plain_gradients(two_ranks, argv: list[str], tiny_teacher) -> None:
    check(two_ranks, [*argv, "--task", "stsb", "--teacher", str(tiny_teacher("stsb"))])


def test_projections_get_plain_gradients(two_ranks, argv: list[str], narrow_encoder: Path) -> None:
    check(two_ranks, [*argv, "--student_init", str(narrow_encoder), "--student_ds_config", "zero1_fp32"])


OWN_ROWS = {
    "unlabeled": ("", lambda number: number % 3 > 0),
    "weights": ("--class_weights balanced --alpha 0.2", lambda number: number % 7 > 0),
    "few_labels": (
        "--student_ds_config zero3_fp32 --alpha 0.2",
        lambda number: number % 6 == 0,
    ),  # a micro-batch has none
}


@pytest.mark.parametrize("case", OWN_ROWS)
def test_rows_without_a_label_give_plain_gradients(two_ranks, argv: list[str], classifier_of, tmp_path, case) -> None:
    words, has_label = OWN_ROWS[case]
    rows = conftest.ticket_rows(157, case, has_label)
    # The rarer a class, the more its rows weigh.
    rows += [row | {"text": f"{row['text']} here"} for row in rows if row["label"] == "bug"]
    check(
        two_ranks, [*own_argv(argv, rows, tmp_path), "--teacher", str(classifier_of(*conftest.TICKETS)), *words.split()]
    )


def test_several_labels_give_plain_gradients(two_ranks, argv: list[str], classifier_of, tmp_path: Path) -> None:
    rows = conftest.ticket_rows(157, "several")
    for number, row in enumerate(rows):
        row["label"] = None if number % 5 == 1 else [row["label"], "bug"][: number % 3] if row["label"] != "bug" else []
    check(
        two_ranks, [*own_argv(argv, rows, tmp_path), "--teacher", str(classifier_of(*conftest.TICKETS[:4], "question"))]
    )


def own_argv(argv: list[str], rows: list[dict[str, Any]], folder: Path) -> list[str]:
    """The command line with a file of own rows in place of the task."""
    file = folder / "tickets.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    position = argv.index("--task")
    return [*argv[:position], *argv[position + 2 :], "--train_file", str(file)]


def test_the_check_sees_a_wrong_scale(two_ranks, argv: list[str], tmp_path: Path) -> None:
    """What these tests are for: a factor that Adam would hide."""
    doubled = [*argv, "--beta", "60", "--run_dir", str(tmp_path / "doubled")]
    (gradients, rows, _), _ = two_ranks.run(distributed_gradients, doubled)
    expected, _ = plain_gradients(argv, rows)
    whole = torch.cat([grad.flatten() for grad in expected.values()])
    ours = torch.cat([torch.from_numpy(gradients[name]).flatten() for name in expected])
    assert (ours - whole).norm() > 100 * TOLERANCE * whole.norm()
