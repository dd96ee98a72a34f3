"""Students of every family in training: engines against plain PyTorch, embedding tables, resuming, sharded rows."""

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
NUM_STEPS, MICRO, ACCUM, WORLD = 3, 4, 2, 2
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


Trained = dict[str, tuple[Tensor, Tensor]]
"""By name, a weight and AdamW's first moment, which shows a wrong scale that the weight hides."""


def trained_by_engine(config: RunConfig, stage: int) -> Trained:
    ds_config = {"zero_optimization": STAGES[stage]}
    engine = engines.training_engine(new_student(config), config, ds_config, NUM_STEPS, "distill")
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
    named = engine.module.named_parameters()
    found = {name: (read_full(engine, p, None).clone(), read_full(engine, p, "exp_avg").clone()) for name, p in named}
    engine.destroy()
    return found


def trained_plainly(config: RunConfig) -> Trained:
    """The same with padded rows of the whole batch, without engine: AdamW, linear decay and clipping of PyTorch."""
    module = new_student(config).train()
    student, parameters = module.student, list(module.parameters())
    has_decay, has_none = ([p for p in parameters if (p.dim() > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": has_decay, "weight_decay": 0.1}, {"params": has_none, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (NUM_STEPS - step) / NUM_STEPS
        padded = padded_inputs(student.config, inputs_of(rows_of(step, student.config.vocab_size)))
        output = student(**padded, output_hidden_states=True)
        hidden = [output.hidden_states[layer][:, 0] for layer, _ in PAIRS]
        optimizer.zero_grad()
        loss_of(output.logits, hidden, 0, step).backward()
        norm = nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        assert norm > 2 * MAX_NORM, "clipping should act"
        optimizer.step()
    zero = torch.zeros(())
    return {
        name: (p.detach(), optimizer.state[p].get("exp_avg", zero) if p in optimizer.state else zero)
        for name, p in module.named_parameters()
    }


def differences(argv: list[str]) -> dict[tuple[int, str], float]:
    """Runs on every rank: by ZeRO stage and kind, the largest relative error of a tensor."""
    config = parse(argv)
    first = {name: parameter.detach() for name, parameter in new_student(config).named_parameters()}
    expected, errors = trained_plainly(config), {}
    for stage in STAGES:
        ours = trained_by_engine(config, stage)
        assert ours.keys() == expected.keys()
        for number, kind in enumerate(("weights", "moments")):
            pairs = [(ours[name][number].flatten(), expected[name][number].flatten()) for name in expected]
            mine, other = map(torch.cat, zip(*pairs, strict=True))
            errors[stage, kind] = relative(mine - other, other)
        changes = [(ours[name][0] - weight, weight - first[name]) for name, (weight, _) in expected.items()]
        errors[stage, "change"] = max(relative(*change) for change in changes)
    return errors


def relative(error: Tensor, size: Tensor) -> float:
    return (error.norm() / size.norm().clamp(min=1e-9)).item()


@pytest.mark.parametrize("model_type", STUDENTS)
def test_engines_equal_plain_pytorch(
    model_type: str, two_ranks, encoder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """AdamW, accumulation, clipping and the schedule, at ZeRO 1 and 3, over a few steps."""
    batch = f"--global_batch_size {GLOBAL} --micro_batch_size {MICRO} --warmup_ratio 0"
    paths = ["--teacher", str(encoder_of(model_type)), "--run_dir", str(tmp_path)]
    # A key's bias starts at 0 and has a gradient near 0, whose rounding Adam enlarges.
    tolerances = {"weights": 2e-6, "moments": 1e-4, "change": 2e-3}
    for errors in two_ranks.run(differences, [*ENGINE_WORDS.split(), *batch.split(), *paths]):
        assert all(error < tolerances[kind] for (_, kind), error in errors.items()), errors


# -- Whole runs --------------------------------------------------------------------------------------------------------

WORDS = "--task rte --num_hidden_layers 2 --epochs 1 --max_seq_length 32 --global_batch_size 16 --micro_batch_size 4"
MORE_WORDS = "--log_steps 1 --save_steps 2 --lr 3e-3 --weight_decay 0.5 --dtype fp32 --layer_map 1:1,2:2,3:3"
TRIMMED = ("roberta", "modernbert", "mpnet")
RESUMED = ("roberta", "modernbert", "deberta-v2")
SHARDED = ("roberta", "mpnet")

ArgvOf = Callable[..., list[str]]


@pytest.fixture(scope="module")
def argv_of(encoder_of: Callable[[str], Path], tiny_data: Path) -> ArgvOf:
    """`argv_of(model_type, run_dir)` gives a command line; teacher and student are of that family."""

    def argv(model_type: str, run_dir: Path, *more: str) -> list[str]:
        paths = ["--teacher", str(encoder_of(model_type)), "--data_dir", str(tiny_data), "--run_dir", str(run_dir)]
        return [*WORDS.split(), *MORE_WORDS.split(), *paths, *more]

    return argv


@pytest.fixture(scope="module")
def whole(argv_of: ArgvOf, two_ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, never stopped, of each family that the tests below need."""
    folder = tmp_path_factory.mktemp("whole")
    two_ranks.run(run_all, [argv_of(name, folder / name) for name in dict.fromkeys((*TRIMMED, *RESUMED))])
    return folder


def run_with_whole_tables(argvs: list[list[str]]) -> None:
    """Runs on every rank."""
    for argv in argvs:
        run_with_table(argv, True)


def test_trimmed_tables_equal_whole_ones(argv_of: ArgvOf, whole: Path, two_ranks, encoder_of, tmp_path: Path) -> None:
    """All stages: losses and saved weights, those of tokens that never occur too."""
    two_ranks.run(run_with_whole_tables, [argv_of(name, tmp_path / name) for name in TRIMMED])
    for model_type in TRIMMED:
        assert_same_curve(whole / model_type, tmp_path / model_type, 1e-4)
        for name in ("teacher", "student"):
            ours, theirs = (load_file(f / model_type / name / "model.safetensors") for f in (whole, tmp_path))
            assert ours.keys() == theirs.keys()
            for key, weight in ours.items():
                torch.testing.assert_close(weight, theirs[key], rtol=1e-4, atol=2e-5)
        table = next(key for key in ours if "word_embeddings" in key or "tok_embeddings" in key)
        best = next((whole / model_type / "checkpoints" / "distill").glob("best-*"))
        num_used = len(load_file(best / "weights.safetensors")[f"student.{table}"])
        assert 10 < num_used < len(ours[table]), "something was left out"
        first = next(v for k, v in load_file(encoder_of(model_type) / "model.safetensors").items() if k in table)
        unused = AutoTokenizer.from_pretrained(encoder_of(model_type)).mask_token_id
        decay = ours[table][unused] / first[unused]
        assert 0.5 < decay.mean() < 0.99 and torch.allclose(decay, decay.mean().expand(32), rtol=1e-4)


def run_until_stops(argvs: list[list[str]], stage: str) -> set[str]:
    """Runs on every rank: each run, cut off at its second step in a stage."""
    return {run_until_saved(argv, stage, 2) for argv in argvs}


def test_stopped_runs_continue(argv_of: ArgvOf, whole: Path, two_ranks, tmp_path: Path) -> None:
    """In the stages of the teacher and of the student."""
    argvs = [argv_of(name, tmp_path / name) for name in RESUMED]
    for stage in ("teacher", "distill"):
        assert two_ranks.run(run_until_stops, argvs, stage) == [{"stopped"}] * 2
    two_ranks.run(run_all, argvs)
    for model_type in RESUMED:
        assert_same_curve(whole / model_type, tmp_path / model_type, 1e-5)


def test_sharded_rows_are_replicated_rows(
    argv_of: ArgvOf, encoder_of, tiny_data: Path, two_ranks, tmp_path: Path
) -> None:
    replicated, sharded = [], []
    for model_type in SHARDED:
        shards, words = tmp_path / f"{model_type}-shards", ["--dropout", "0"]
        made_of = ["--task", "rte", "--teacher", str(encoder_of(model_type)), "--data_dir", str(tiny_data)]
        with without_launcher():
            shard.main(scripts.shard_options([*made_of, "--max_seq_length", "32", "--shard_dir", str(shards)]))
        replicated.append(argv_of(model_type, tmp_path / f"{model_type}-0", *words))
        words += ["--data_placement", "sharded", "--shard_dir", str(shards)]
        sharded.append(argv_of(model_type, tmp_path / f"{model_type}-1", *words, "--scratch_dir", str(tmp_path / "s")))
    two_ranks.run(run_all, replicated)
    two_ranks.run(as_nodes, 2, "", run_all, sharded)
    for model_type in SHARDED:
        assert_same_curve(tmp_path / f"{model_type}-0", tmp_path / f"{model_type}-1", 1e-5)
