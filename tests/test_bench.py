"""The training benchmark compares like with like: every system's loss is ours, and no result is lost or made up."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import arithmetic
import baselines
import bench_rows
import bench_runs
import bench_scaling
import bench_step
import bench_train
import cases
import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification

from peakd_ds.kernels import distillation_loss
from peakd_ds.packed.packing import WIDTH_MULTIPLE, pack
from peakd_ds.sps import SPSBertConfig, SPSBertForSequenceClassification

NUM_ROWS, HIDDEN, PAIRS = 6, 16, ((1, 2), (2, 3))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """On busy cores, threads that wait for each other take longer than models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def outputs() -> dict[str, Any]:
    """Logits and hidden states of all layers, embeddings first, of student and teacher; in fp64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    return {
        "logits": draw(NUM_ROWS, 2, scale=3).requires_grad_(),
        "hidden": [draw(NUM_ROWS, 5, HIDDEN).requires_grad_() for _ in range(3)],
        "teacher_logits": draw(NUM_ROWS, 2, scale=3),
        "teacher_hidden": [draw(NUM_ROWS, 5, HIDDEN) for _ in range(4)],
        "labels": torch.tensor([0, 1, 1, 0, 1, 0]),
    }


def reference(outputs: dict[str, Any]) -> tuple[float, list[torch.Tensor]]:
    loss = distillation_loss(
        outputs["logits"],
        outputs["teacher_logits"],
        outputs["labels"],
        [outputs["hidden"][i][:, 0] for i, _ in PAIRS],
        [outputs["teacher_hidden"][j][:, 0] for _, j in PAIRS],
        temperature=cases.TEMPERATURE,
        alpha=cases.ALPHA,
        beta=cases.BETA,
        backend="reference",
    )
    assert min(loss.hard, loss.soft, cases.BETA * loss.hidden) > 1e-2  # no term is too small to be seen
    return loss.total.item(), gradients(outputs, loss.total)


def gradients(outputs: dict[str, Any], loss: torch.Tensor) -> list[torch.Tensor]:
    leaves = [outputs["logits"], *(outputs["hidden"][i] for i, _ in PAIRS)]
    return list(torch.autograd.grad(loss, leaves))


def assert_gradients_agree(outputs: dict[str, Any], loss: torch.Tensor) -> None:
    _, wanted = reference(outputs)
    for ours, theirs in zip(wanted, gradients(outputs, loss), strict=True):
        assert ours.abs().max() > 1e-4
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)  # the baselines compute in fp32


class Model(torch.nn.Module):
    """Answers with given logits and hidden states."""

    def __init__(self, logits: torch.Tensor, hidden: list[torch.Tensor]):
        super().__init__()
        self.logits, self.hidden = logits, hidden

    def forward(self, output_hidden_states: bool = False, **inputs: torch.Tensor) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        return SequenceClassifierOutput(logits=self.logits, hidden_states=self.hidden if output_hidden_states else None)


def test_loss_of_the_baselines_is_ours(outputs: dict[str, Any]) -> None:
    loss = baselines.distillation_loss(
        outputs["logits"],
        baselines.cls_of(outputs["hidden"], [i for i, _ in PAIRS]),
        outputs["teacher_logits"],
        baselines.cls_of(outputs["teacher_hidden"], [j for _, j in PAIRS]),
        outputs["labels"],
    )
    assert loss.item() == pytest.approx(reference(outputs)[0], rel=1e-5)
    assert_gradients_agree(outputs, loss)


def test_loss_of_the_trainer_is_ours(outputs: dict[str, Any]) -> None:
    trainer = object.__new__(baselines.DistillationTrainer)  # its own constructor needs accelerate
    trainer.teacher, trainer.outcome = Model(outputs["teacher_logits"], outputs["teacher_hidden"]), baselines.Outcome()
    trainer.student_layers, trainer.teacher_layers = zip(*PAIRS, strict=True)
    mask = torch.tensor([[1, 1, 1, 0, 0]] * NUM_ROWS)
    inputs = {"input_ids": mask, "attention_mask": mask, "labels": outputs["labels"]}
    loss = trainer.compute_loss(Model(outputs["logits"], outputs["hidden"]).train(), inputs)
    assert loss.item() == pytest.approx(reference(outputs)[0], rel=1e-5)
    assert_gradients_agree(outputs, loss)
    assert (trainer.outcome.steps, trainer.outcome.tokens, trainer.outcome.positions) == (1, 18, 30)


def test_loss_of_textbrewer_has_our_gradient(outputs: dict[str, Any], tmp_path: Path) -> None:
    textbrewer = pytest.importorskip("textbrewer", reason="pip install '.[bench]'")
    student = Model(outputs["logits"], outputs["hidden"])
    distiller = textbrewer.GeneralDistiller(
        textbrewer.TrainingConfig(output_dir=str(tmp_path), device="cpu"),
        baselines.textbrewer_settings(PAIRS, HIDDEN),
        Model(outputs["teacher_logits"], outputs["teacher_hidden"]),
        student,
        baselines.adaptor_of_teacher,
        baselines.adaptor_of_student,
    )
    ids = torch.zeros(NUM_ROWS, 5, dtype=torch.int64)
    batch = {"teacher": {"input_ids": ids}, "student": {"input_ids": ids, "labels": outputs["labels"]}}
    loss, _ = distiller.train_on_batch(batch, {"output_hidden_states": True})
    assert_gradients_agree(outputs, loss)
    # its cross-entropy with the teacher is KL plus the teacher's entropy
    softened = (outputs["teacher_logits"] / cases.TEMPERATURE).softmax(-1)
    entropy = -(softened * softened.log()).sum(-1).mean().item()
    constant = cases.ALPHA * cases.TEMPERATURE**2 * entropy
    assert loss.item() - constant == pytest.approx(reference(outputs)[0], rel=1e-4)


# -- Whole runs of the baselines ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_job(tiny_data: Path, tiny_teacher, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory):
    def make(**changes: Any) -> cases.Job:
        job = cases.Job(
            task="sst2",
            data_dir=str(tiny_data),
            teacher=str(tiny_teacher("sst2")),
            encoder=str(tiny_encoder),
            num_stored_layers=1,
            pairs=((1, 2),),
            seed=0,
            bf16=False,
            folder=str(tmp_path_factory.mktemp("baseline")),
            epochs=2,
        )
        return replace(job, **changes)

    return make


STEPS_PER_EPOCH = 3  # 90 rows in batches of 32


@pytest.mark.parametrize("system", cases.BASELINES)
def test_baseline_runs_to_its_end(system: str, make_job, monkeypatch: pytest.MonkeyPatch) -> None:
    if system == "hf_trainer":
        pytest.importorskip("accelerate", reason="pip install '.[bench]'")
    if system == "textbrewer":
        pytest.importorskip("textbrewer", reason="pip install '.[bench]'")
    starts = []
    load = baselines.load_models

    def load_and_keep(*arguments: Any) -> Any:
        teacher, student = load(*arguments)
        starts.append((student, {name: tensor.clone() for name, tensor in student.state_dict().items()}))
        return teacher, student

    monkeypatch.setattr(baselines, "load_models", load_and_keep)
    job = make_job()
    outcome = baselines.FUNCTIONS[system](job)
    assert outcome.steps == 2 * STEPS_PER_EPOCH
    assert outcome.extrapolated_from_steps is None and outcome.seconds is None
    assert 0 <= outcome.dev_score <= 1 and (outcome.dev_score * 30) % 1 == pytest.approx(0, abs=1e-6)  # of 30 dev rows
    padded_to = {"published_recipe": 2 * 90 * 128}
    assert outcome.tokens < outcome.positions == padded_to.get(system, outcome.positions)
    assert outcome.positions <= 2 * 90 * 128
    (student, before) = starts[0]
    moved = [name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])]
    assert {"bert.encoder.layer.0.attention.self.query.weight", "classifier.weight"} <= set(moved)
    assert [file for file in Path(job.folder).rglob("*") if file.suffix in (".pt", ".pkl", ".safetensors")]


def test_every_baseline_sees_every_token(make_job) -> None:
    pytest.importorskip("accelerate", reason="pip install '.[bench]'")
    train, _, _ = baselines.load_data(make_job())
    total = sum(len(ids) for ids in train["input_ids"])
    for system in ("published_recipe", "hf_trainer"):
        assert baselines.FUNCTIONS[system](make_job(epochs=1)).tokens == total


def test_a_recipe_that_stops_early_is_scaled_up(make_job, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(baselines.time, "perf_counter", lambda: now[0])
    take = torch.optim.AdamW.step

    def slow_step(self: Any, *arguments: Any, **options: Any) -> Any:
        now[0] += 10.0  # all that takes time here
        return take(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", slow_step)
    outcome = baselines.published_recipe(make_job(epochs=4, max_steps=2))
    assert outcome.steps == outcome.extrapolated_from_steps == 2 and outcome.dev_score is None
    assert outcome.seconds == pytest.approx(10.0 * 4 * STEPS_PER_EPOCH)


# -- Turns and rows ----------------------------------------------------------------------------------------------------


def run_row(seconds: float, **more: Any) -> dict[str, Any]:
    row = {"seconds": seconds, "dev_score": 0.8, "padding_share": 0.1, "peak_memory_mib": 100.0}
    return row | {"extrapolated_from_steps": None} | more


def test_systems_take_turns_and_a_failure_ends_only_its_own() -> None:
    order: list[tuple[str, int]] = []

    def run(system: str, seed: int) -> dict[str, Any]:
        order.append((system, seed))
        if system == "b" and seed == 1:
            raise bench_runs.RunFailed("ValueError: no")
        return run_row(seed)

    runs = bench_train.take_turns(["a", "b", "c"], 3, run, lambda s: 1 if s == "c" else 3, lambda: float("inf"))
    assert order == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("a", 2)]
    assert [row["seconds"] for row in runs["a"]] == [0, 1, 2] and len(runs["c"]) == 1
    assert runs["b"] == "ValueError: no"


def test_nothing_but_the_first_round_is_started_without_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(bench_train.time, "perf_counter", lambda: now[0])

    def run(system: str, seed: int) -> dict[str, Any]:
        now[0] += {"quick": 10, "slow": 100}[system]
        return run_row(1.0)

    runs = bench_train.take_turns(["slow", "quick"], 3, run, lambda system: 3, lambda: 125 - now[0])
    assert (len(runs["slow"]), len(runs["quick"])) == (1, 2)


@pytest.fixture
def prepared(tmp_path: Path, tiny_teacher, tiny_encoder: Path) -> bench_runs.Prepared:
    return bench_runs.Prepared(cases.CASES["mrpc_n1"], tmp_path, tiny_teacher("sst2"), tiny_encoder, (50,) * 100)


def test_row_of_several_runs(prepared: bench_runs.Prepared) -> None:
    row = bench_train.summarize(prepared, "hf_trainer", [run_row(30.0), run_row(10.0), run_row(20.0)], {"commit": "x"})
    assert row["seconds"] == {"median": 20.0, "min": 10.0, "max": 30.0}
    assert (row["dev_score"], row["runs"], row["commit"]) == ([0.8, 0.8, 0.8], 3, "x")
    assert (row["samples_per_s"], row["tokens_per_s"]) == (cases.EPOCHS * 5, cases.EPOCHS * 250)
    assert "extrapolated_from_steps" not in row
    scaled = [run_row(9.0, extrapolated_from_steps=8, dev_score=None)]
    row = bench_train.summarize(prepared, "published_recipe", scaled, {})
    assert (row["extrapolated_from_steps"], row["dev_score"]) == (8, [])
    wide = replace(prepared, case=cases.CASES["wide_n3"])
    assert bench_train.summarize(wide, "hf_trainer", [run_row(9.0)], {})["dev_score"] == []  # random weights


def test_saving_one_case_keeps_the_others(prepared: bench_runs.Prepared, tmp_path: Path) -> None:
    out, facts = tmp_path / "out", {"machine": "m", "versions": {"torch": "1"}, "commit": "c"}
    rows = [
        bench_train.summarize(replace(prepared, case=cases.CASES[case]), system, runs, {"commit": "old"})
        for case, system, runs in (
            ("sst2_n1", "ours_cached", [run_row(1.0)]),
            ("mrpc_n1", "hf_trainer", [run_row(40.0)]),
            ("mrpc_n1", "textbrewer", "KeyError: 'a|b'"),
            ("mrpc_n1", "ours_cached", [run_row(20.0)]),
        )
    ]
    bench_rows.save(out, rows, facts | {"engine_overhead": 0.1, "student_gflops": 9.0, "bf16_matmul_gflops": 99.0})
    first = json.loads((out / "bench.json").read_text())
    assert [(row["case"], row["system"]) for row in first["cases"]] == [
        ("mrpc_n1", "ours_cached"),
        ("mrpc_n1", "hf_trainer"),
        ("mrpc_n1", "textbrewer"),
        ("sst2_n1", "ours_cached"),
    ]
    assert first["cases"][1]["ratio_to_ours"] == 2.0 and first["cases"][2]["error"] == "KeyError: 'a|b'"

    again = bench_train.summarize(prepared, "ours_cached", [run_row(10.0)], {"commit": "new"})
    bench_rows.save(out, [again], facts)
    second = json.loads((out / "bench.json").read_text())
    assert len(second["cases"]) == 4 and second["engine_overhead"] == 0.1
    assert second["cases"][0]["commit"] == "new" and second["cases"][0]["seconds"]["median"] == 10.0
    assert second["cases"][1] == first["cases"][1] | {"ratio_to_ours": 4.0}
    assert second["cases"][0]["tflop_ratio_to_ours"] == 1 < second["cases"][1]["tflop_ratio_to_ours"]
    assert second["cases"][2:] == first["cases"][2:]
    table = (out / "bench.md").read_text()
    assert "failed: KeyError: 'a/b'" in table and "| mrpc_n1 | hf_trainer | 40.0 (40.0 to 40.0) | 4.00 |" in table
    widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert widths == {len(bench_rows.COLUMNS) + 1}
    assert (out / "bench.png").stat().st_size > 1000


# -- Our own runs ------------------------------------------------------------------------------------------------------


def test_our_clock_starts_with_the_rows_and_stops_with_the_stage(tmp_path: Path) -> None:
    records = [
        {"stage": "teacher", "step": 1, "padding_share": 0.9},
        {"stage": "distill", "step": 1, "padding_share": 0.1},
        {"stage": "distill", "step": 3, "eval_accuracy": 0.7},
        {"stage": "distill", "step": 5, "padding_share": 0.3},
        {"stage": "distill", "step": 6, "eval_accuracy": 0.6},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = [
        (1.0, "a warning"),
        (2.0, "task mrpc, method"),
        (3.0, "stage distill: 6 epochs"),
        (9.5, "stage distill is over: x"),
    ]
    row = bench_runs.read_our_run([*lines, (20.0, "")], tmp_path / "metrics.jsonl", "eval_accuracy")
    assert (row["seconds"], row["dev_score"], row["padding_share"]) == (7.5, 0.7, pytest.approx(0.2))
    with pytest.raises(bench_runs.RunFailed, match="stage distill is over"):
        bench_runs.read_our_run(lines[:-1], tmp_path / "metrics.jsonl", "eval_accuracy")


def test_our_program_runs_from_the_driver(
    tiny_data: Path, tiny_encoder: Path, tiny_teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(bench_runs, "EPOCHS", 2)
    case = cases.Case("tiny", "sst2", 1)
    inputs = bench_runs.Prepared(case, tiny_data, tiny_teacher("sst2"), tiny_encoder, (10,) * 90)
    row = bench_runs.run_ours(inputs, "cached", 1, tmp_path)
    # 64 shards of 1 or 2 rows: batches of 32, 32, 13 and 13
    told = (tmp_path / "logs" / "tiny-cached-1.log").read_text()
    assert "stage distill: 2 epochs, 8 steps" in told and "built in" in told and "layer pairs 1:2" in told
    assert 0 < row["seconds"] < 100 and 0 <= row["dev_score"] <= 1 and row["padding_share"] == 0
    assert row["peak_memory_mib"] > 100
    assert not list((tmp_path / "runs").iterdir())


def test_what_a_failing_program_says_last_is_its_error(tmp_path: Path) -> None:
    code = "import sys; print('begins'); sys.exit('ValueError: the reason')"
    with pytest.raises(bench_runs.RunFailed, match=r"^ValueError: the reason$"):
        bench_runs.watch([sys.executable, "-c", code], tmp_path / "logs" / "x.log")
    assert (tmp_path / "logs" / "x.log").read_text() == "begins\nValueError: the reason\n"


def test_peak_memory_is_the_program_s_own(tmp_path: Path) -> None:
    _, small = bench_runs.watch([sys.executable, "-c", "pass"], tmp_path / "a.log")
    _, large = bench_runs.watch([sys.executable, "-c", "x = b'1' * 2**28"], tmp_path / "b.log")
    assert small < 50  # not that of this process, which has torch inside
    assert 240 < large - small < 300


def test_cases_prepare_their_first_rows(tiny_data: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    case = cases.Case("wide", "sst2", 1, num_train_rows=40, num_dev_rows=7, is_wide=True)
    made = bench_runs._teacher_folder("wide", tiny_encoder, tmp_path)
    made.mkdir(parents=True)
    (made / "tokenizer_config.json").touch()  # as if it were made
    prepared = bench_runs.prepare(case, tiny_encoder, str(tiny_data), tmp_path)
    from peakd_ds.data.reading import load_splits
    from peakd_ds.data.tasks import get_task

    kept, whole = (
        load_splits(get_task("sst2_40"), str(tmp_path / "data")),
        load_splits(get_task("sst2"), str(tiny_data)),
    )
    assert kept["train"]["sentence"] == whole["train"]["sentence"][:40] and len(kept["validation"]) == 7
    lengths = np.array([len(text.split()) + 2 for text in kept["train"]["sentence"]])  # each word is in the vocabulary
    assert prepared.lengths == tuple(lengths) and prepared.teacher == made


def test_another_encoder_has_another_teacher(tiny_encoder: Path, tmp_path: Path) -> None:
    first = bench_runs._teacher_folder("mrpc", tiny_encoder, tmp_path)
    copy = Path(shutil.copytree(tiny_encoder, tmp_path / "copy"))
    assert bench_runs._teacher_folder("mrpc", copy, tmp_path) == first
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert bench_runs._teacher_folder("mrpc", copy, tmp_path) != first


def test_layer_pairs_of_the_cases() -> None:
    assert cases.pairs_of(cases.CASES["mrpc_n1"]) == ((1, 3),)
    assert cases.pairs_of(cases.CASES["sst2_n3"]) == ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5))
    assert cases.pairs_of(cases.CASES["wide_n3"]) == ((1, 2), (2, 4), (3, 6), (4, 8), (5, 10))


# -- The step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_stored", [1, 3])
def test_needed_arithmetic_is_what_torch_counts(num_stored: int) -> None:
    config = SPSBertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=num_stored,
        num_attention_heads=2,
        intermediate_size=48,
        num_labels=3,
        attn_implementation="eager",
    )
    model, rows, length = SPSBertForSequenceClassification(config), 4, WIDTH_MULTIPLE  # so attention pads nothing
    ids = np.random.default_rng(0).integers(50, size=(rows, length))
    inputs = pack(list(ids), [np.zeros_like(row) for row in ids])
    with FlopCounterMode(display=False) as counter:
        model(**inputs).logits.sum().backward()
    counted = counter.get_total_flops()
    assert counted > 1e6
    assert arithmetic.step_flops(config, 2 * num_stored, [length] * rows, is_last_whole=False) == counted


@pytest.mark.parametrize("is_last_whole", [False, True])
def test_arithmetic_of_a_plain_forward_pass(is_last_whole: bool) -> None:
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
    config = BertConfig(**sizes, num_labels=3, attn_implementation="eager")
    model, ids = BertForSequenceClassification(config), torch.randint(50, (4, 8))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    counted = counter.get_total_flops()
    reckoned = arithmetic.forward_flops(config, 3, [8] * 4, is_last_whole)
    assert reckoned == counted if is_last_whole else 0.7 * counted < reckoned < 0.9 * counted


def test_arithmetic_of_the_systems() -> None:
    teacher, student = BertConfig(num_hidden_layers=12), BertConfig()
    lengths, each = [64] * 5, {}
    for system in cases.SYSTEMS:
        padding = 0.0 if system.startswith("ours") else 0.5
        each[system] = arithmetic.run_flops(system, teacher, student, 6, lengths, padding)
    asked = arithmetic.forward_flops(teacher, 12, lengths, False)
    learnt = cases.EPOCHS * arithmetic.step_flops(student, 6, lengths, False)
    assert (each["ours_cached"], each["ours_online"]) == (asked + learnt, cases.EPOCHS * asked + learnt)
    asked = arithmetic.forward_flops(teacher, 12, [128] * 5, True)  # half of it padding
    learnt = cases.EPOCHS * arithmetic.step_flops(student, 6, [128] * 5, True)
    assert each["published_recipe"] == asked + learnt
    assert each["hf_trainer"] == each["textbrewer"] == cases.EPOCHS * asked + learnt


def test_bare_loop_takes_the_step_of_plain_adamw() -> None:
    torch.manual_seed(0)
    module, plain = (torch.nn.Linear(4, 3) for _ in range(2))
    plain.load_state_dict(module.state_dict())
    inputs = torch.randn(8, 4)
    loop = bench_step.BareLoop(module, torch.float32, num_steps=10)
    groups = [
        {"params": [plain.weight], "weight_decay": cases.WEIGHT_DECAY},
        {"params": [plain.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    for lr in (0.0, 1.0, 8 / 9):  # warm-up of one step, then down to 0 at step 10
        for group in optimizer.param_groups:
            group["lr"] = lr * cases.LR
        plain(inputs).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), cases.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        loop.step(lambda module: module(inputs).square().sum())
    torch.testing.assert_close(module.weight, plain.weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(module.bias, plain.bias, rtol=1e-5, atol=1e-7)


def test_step_refuses_too_few_rows(
    tiny_encoder: Path, tiny_data: Path, tiny_teacher, tmp_path: Path, env: dict[str, str]
) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_step.py"), "--task", "sst2", "--num_stored_layers", "1"]
    more = {"data_dir": tiny_data, "teacher": tiny_teacher("sst2"), "encoder": tiny_encoder, "output": tmp_path / "s"}
    command += [word for name, value in more.items() for word in (f"--{name}", str(value))]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    # 90 rows are two full batches: too few, which it says before a step is made
    assert result.returncode == 2 and "--task sst2 has 90 training rows" in result.stderr
    result = subprocess.run([*command, "--batches", "0"], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "--batches 0: at least 1 must be timed" in result.stderr


# -- Wrong options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--cases mrpc_n2", "--cases mrpc_n2: choose from mrpc_n1"),
        ("--cases ,", "--cases nothing: choose from"),
        ("--systems ours,textbrewer", "--systems ours: choose from ours_cached"),
        ("--repeats 0", "--repeats 0: each system must run at least once; set 1 or more"),
        ("--minutes -1", "--minutes -1.0: must be 0"),
        ("--minutes nan", "--minutes nan: must be 0"),
        ("--recipe_steps -5", "--recipe_steps -5: must be 0"),
        ("--encoder nowhere", "--encoder nowhere: there is no config.json; make one with"),
        ("--cases mrpc_n1", "there is no mrpc/train-*.parquet; give the folder that has it"),
    ],
)
def test_wrong_option_of_the_driver(
    words: str, told: str, tiny_data: Path, tiny_encoder: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = ["--cases", "sst2_n1", "--encoder", str(tiny_encoder), "--data_dir", str(tiny_data), *words.split()]
    with pytest.raises(SystemExit) as stop:
        bench_train.parse(argv)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [("--axes width", "--axes width: choose from samples"), ("--repeats 0", "--repeats 0: each point")],
)
def test_wrong_option_of_the_scaling(words: str, told: str, tiny_encoder: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        bench_scaling.parse(["--encoder", str(tiny_encoder), *words.split()])
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"machine": "another", "cases": []}', "its rows are of another machine (another)"),
        ("{", "bench.json there is damaged"),
        ('{"machine": "x", "cases": [{}]}', "bench.json there is damaged"),
        ('{"machine": "x", "cases": [{"case": "a", "system": "b"}]}', "damaged (KeyError('tflop'))"),
    ],
)
def test_results_of_another_machine_are_left_alone(
    content: str, told: str, tiny_data: Path, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "bench.json").write_text(content)
    argv = ["--cases", "sst2_n1", "--encoder", str(tiny_encoder), "--data_dir", str(tiny_data)]
    with pytest.raises(SystemExit) as stop:
        bench_train.main([*argv, "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert told in capsys.readouterr().err
    assert (tmp_path / "bench.json").read_text() == content


def test_make_bench_passes_cases_and_the_time_on() -> None:
    def printed(*words: str) -> str:
        command = ["make", "-n", "--no-print-directory", "bench", *words]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout

    assert "bench_train.py --cases 'mrpc_n1' --minutes 15" in printed("CASES=mrpc_n1")
    assert "--minutes 0" in printed() and "--cases" not in printed()


def test_folder_of_results_is_the_repository_s() -> None:
    assert ROOT / "benchmarks" / "results" == bench_train.RESULTS
