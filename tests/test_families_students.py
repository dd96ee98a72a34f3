"""Students of every family in training: engines against plain PyTorch, embedding tables, resuming, sharded rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_families_runs import run_all
from test_resume import assert_same_curve, run_until_saved
from test_shard import as_nodes, without_launcher
from test_vocabulary import run as run_with_table
from tiny_families import save_family
from torch import Tensor, nn
from transformers import AutoTokenizer

from peakd_ds.command_line import parse
from peakd_ds.config import RunConfig
from peakd_ds.data.tasks import get_task
from peakd_ds.engine import engines
from peakd_ds.engine.state import read_full
from peakd_ds.families import STUDENTS
from peakd_ds.model import contract
from peakd_ds.model.build import MatchedStudent, build_student, task_head
from peakd_ds.packed.packing import pack
from peakd_ds.packed.rows import padded_inputs
from peakd_ds.programs import scripts, shard
from peakd_ds.ranks import dist

TASK = get_task("rte")


@pytest.fixture(scope="module")
def encoder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`encoder_of(model_type)` gives the folder of a random encoder."""
    folder = tmp_path_factory.mktemp("encoders")

    def made(model_type: str) -> Path:
        target = folder / model_type
        return target if target.exists() else save_family(target, model_type)

    return made


# -- Engines -----------------------------------------------------------------------------------------------------------

PAIRS = ((1, 1), (2, 2), (3, 3))
NUM_STEPS, MICRO, ACCUM, WORLD = 4, 4, 2, 2
GLOBAL = MICRO * ACCUM * WORLD
MAX_NORM = 0.2
ENGINE_WORDS = f"--task rte --num_hidden_layers 2 --dropout 0 --lr 1e-3 --weight_decay 0.1 --max_grad_norm {MAX_NORM}"
STAGES = {1: {"stage": 1}, 3: {"stage": 3, "stage3_param_persistence_threshold": 0}}  # else tiny weights stay whole


def rows_of(step: int, vocab_size: int) -> list[np.ndarray]:
    """Token ids of the rows of a global batch."""
    generator = np.random.default_rng(step)
    return [generator.integers(5, vocab_size, size=generator.integers(3, 20)) for _ in range(GLOBAL)]


def inputs_of(rows: list[np.ndarray]) -> dict[str, Any]:
    return pack(rows, [(np.arange(len(row)) > len(row) // 2).astype(np.int64) for row in rows])


def loss_of(logits: Tensor, hidden: list[Tensor], first: int, step: int) -> Tensor:
    """Cross entropy, and the distance of states from random ones: the rows' share of the global batch's mean."""
    labels = torch.arange(first, first + len(logits)) % 2
    loss = F.cross_entropy(logits, labels, reduction="sum")
    for layer, states in enumerate(hidden):
        targets = torch.randn(GLOBAL, states.shape[1], generator=torch.Generator().manual_seed(100 * step + layer))
        loss = loss + 10 * (F.normalize(states, dim=-1) - targets[first : first + len(states)]).square().sum()
    return loss / GLOBAL


def new_student(config: RunConfig) -> MatchedStudent:
    """The same on every call and rank."""
    torch.manual_seed(5)
    student = build_student(config, contract.find_encoder(config.teacher, "teacher"), task_head(TASK))
    return MatchedStudent(student, PAIRS, 32, "cls")


def trained_by_engine(config: RunConfig, stage: int) -> dict[str, Tensor]:
    engine = engines.training_engine(
        new_student(config), config, {"zero_optimization": STAGES[stage]}, NUM_STEPS, "distill"
    )
    vocab_size = engine.module.student.config.vocab_size
    engine.train()
    for step in range(NUM_STEPS):
        rows = rows_of(step, vocab_size)
        for number in range(ACCUM):
            first = (number * WORLD + dist.rank()) * MICRO
            logits, hidden = engine(**inputs_of(rows[first : first + MICRO]))
            engine.backward(loss_of(logits, hidden, first, step) * engines.undo_averaging(engine))
            engine.step()
    if stage == 3:
        assert all(parameter.numel() == 0 for parameter in engine.module.parameters()), "weights are in parts"
    trained = {name: read_full(engine, p, None).clone() for name, p in engine.module.named_parameters()}
    engine.destroy()
    return trained


def trained_plainly(config: RunConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(first, last) weights: padded rows of the whole batch, no engine, AdamW with linear decay and clipping."""
    module = new_student(config).train()
    student, parameters = module.student, dict(module.named_parameters())
    first = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    has_decay = [parameter for parameter in parameters.values() if parameter.dim() > 1]
    has_none = [parameter for parameter in parameters.values() if parameter.dim() <= 1]
    groups = [{"params": has_decay, "weight_decay": 0.1}, {"params": has_none, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    warmup = round(config.warmup_ratio * NUM_STEPS)
    for step in range(NUM_STEPS):
        share = step / warmup if step < warmup else (NUM_STEPS - step) / (NUM_STEPS - warmup)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * share
        padded = padded_inputs(student.config, inputs_of(rows_of(step, student.config.vocab_size)))
        output = student(**padded, output_hidden_states=True)
        hidden = [output.hidden_states[layer][:, 0] for layer, _ in PAIRS]
        optimizer.zero_grad()
        loss_of(output.logits, hidden, 0, step).backward()
        norm = nn.utils.clip_grad_norm_(list(parameters.values()), MAX_NORM)
        assert norm > 2 * MAX_NORM, "clipping should act"
        optimizer.step()
    return first, {name: parameter.detach() for name, parameter in parameters.items()}


def differences(argvs: list[list[str]]) -> list[dict[int, tuple[float, float, str]]]:
    """Runs on every rank. For each run and ZeRO stage: the largest error of a tensor, relative to its size and to how
    far training has moved it, and that tensor's name."""
    found = []
    for argv in argvs:
        config = parse(argv)
        first, last = trained_plainly(config)
        errors = {}
        for stage in STAGES:
            ours = trained_by_engine(config, stage)
            assert ours.keys() == last.keys()
            errors[stage] = max(
                (
                    ((ours[name] - weight).norm() / (weight - first[name]).norm().clamp(min=1e-9)).item(),
                    ((ours[name] - weight).norm() / weight.norm().clamp(min=1e-9)).item(),
                    name,
                )
                for name, weight in last.items()
            )
        found.append(errors)
    return found


def test_engines_equal_plain_pytorch(two_ranks, encoder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """AdamW, accumulation, clipping and the schedule, at ZeRO 1 and 3, over a few steps."""
    batch = f"--global_batch_size {GLOBAL} --micro_batch_size {MICRO}"
    argvs = [
        [*ENGINE_WORDS.split(), *batch.split(), "--teacher", str(encoder_of(name)), "--run_dir", str(tmp_path / name)]
        for name in STUDENTS
    ]
    for found in two_ranks.run(differences, argvs):
        for model_type, errors in zip(STUDENTS, found, strict=True):
            print(model_type, errors)
