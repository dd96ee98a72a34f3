"""The training benchmark: rounds, rows, timing of our own runs, arithmetic, and wrong options."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import arithmetic
import bench_families
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

from peakd_ds.packed.packing import WIDTH_MULTIPLE, pack
from peakd_ds.sps import SPSBertConfig, SPSBertForSequenceClassification


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """With several threads, models as small as these spend their time waiting for busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- Turns and rows ----------------------------------------------------------------------------------------------------


def run_row(seconds: float, **more: Any) -> dict[str, Any]:
    row = {"seconds": seconds, "dev_score": 0.8, "padding_share": 0.1, "peak_memory_mib": 100.0}
    return row | {"extrapolated_from_steps": None} | more


def test_systems_take_turns_and_a_failure_ends_only_one_of_them() -> None:
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


def test_without_time_only_the_first_round_runs(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert "failed: KeyError: 'a\\|b'" in table and "| mrpc_n1 | hf_trainer | 40.0 (40.0 to 40.0) | 4.00 |" in table
    num_bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines() if line.startswith("|")}
    assert num_bars == {len(bench_rows.COLUMNS) + 1}
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
    log = (tmp_path / "logs" / "tiny-cached-1.log").read_text()
    assert "stage distill: 2 epochs, 8 steps" in log and "built in" in log and "layer pairs 1:2" in log
    assert 0 < row["seconds"] < 100 and 0 <= row["dev_score"] <= 1 and row["padding_share"] == 0
    assert row["peak_memory_mib"] > 100
    assert not list((tmp_path / "runs").iterdir())


def test_the_last_line_of_a_failing_program_is_its_error(tmp_path: Path) -> None:
    code = "import sys; print('begins'); sys.exit('ValueError: the reason')"
    with pytest.raises(bench_runs.RunFailed, match=r"^ValueError: the reason$"):
        bench_runs.watch([sys.executable, "-c", code], tmp_path / "logs" / "x.log")
    assert (tmp_path / "logs" / "x.log").read_text() == "begins\nValueError: the reason\n"


def test_peak_memory_is_the_program_s_own(tmp_path: Path) -> None:
    _, small = bench_runs.watch([sys.executable, "-c", "pass"], tmp_path / "a.log")
    _, large = bench_runs.watch([sys.executable, "-c", "x = b'1' * 2**28"], tmp_path / "b.log")
    assert small < 50  # not the peak of this process, which has imported torch
    assert 240 < large - small < 300


def test_cases_prepare_their_first_rows(tiny_data: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    case = cases.Case("wide", "sst2", 1, num_train_rows=40, num_dev_rows=7, is_wide=True)
    made = bench_runs._teacher_folder("wide", tiny_encoder, tmp_path)
    made.mkdir(parents=True)
    (made / "tokenizer_config.json").touch()  # as if it had been made
    prepared = bench_runs.prepare(case, tiny_encoder, str(tiny_data), tmp_path)
    from peakd_ds.data.reading import load_splits
    from peakd_ds.data.tasks import get_task

    kept, source = (
        load_splits(get_task("sst2_40"), str(tmp_path / "data")),
        load_splits(get_task("sst2"), str(tiny_data)),
    )
    assert kept["train"]["sentence"] == source["train"]["sentence"][:40] and len(kept["validation"]) == 7
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
def test_flops_of_a_packed_step_equal_torchs_count(num_stored: int) -> None:
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
    assert arithmetic.step_flops(config, 2 * num_stored, [length] * rows, runs_all_tokens=False) == counted


@pytest.mark.parametrize("runs_all_tokens", [False, True])
def test_flops_of_a_plain_forward_pass(runs_all_tokens: bool) -> None:
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
    config = BertConfig(**sizes, num_labels=3, attn_implementation="eager")
    model, ids = BertForSequenceClassification(config), torch.randint(50, (4, 8))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    counted = counter.get_total_flops()
    computed = arithmetic.forward_flops(config, 3, [8] * 4, runs_all_tokens)
    assert computed == counted if runs_all_tokens else 0.7 * counted < computed < 0.9 * counted


def test_flops_of_the_systems() -> None:
    teacher, student = BertConfig(num_hidden_layers=12), BertConfig()
    lengths, each = [64] * 5, {}
    for system in cases.SYSTEMS:
        padding = 0.0 if system.startswith("ours") else 0.5
        each[system] = arithmetic.run_flops(system, teacher, student, 6, lengths, padding)
    teacher_pass = arithmetic.forward_flops(teacher, 12, lengths, False)
    training = cases.EPOCHS * arithmetic.step_flops(student, 6, lengths, False)
    assert (each["ours_cached"], each["ours_online"]) == (
        teacher_pass + training,
        cases.EPOCHS * teacher_pass + training,
    )
    teacher_pass = arithmetic.forward_flops(teacher, 12, [128] * 5, True)  # half of it padding
    training = cases.EPOCHS * arithmetic.step_flops(student, 6, [128] * 5, True)
    assert each["published_recipe"] == teacher_pass + training
    assert each["hf_trainer"] == each["textbrewer"] == cases.EPOCHS * teacher_pass + training


def test_bare_loop_equals_plain_adamw() -> None:
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
    # 90 rows are only two full batches
    assert result.returncode == 2 and "--task sst2 has 90 training rows" in result.stderr
    result = subprocess.run([*command, "--batches", "0"], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "--batches 0: at least 1 batch must be timed" in result.stderr


# -- Wrong options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--cases mrpc_n2", "--cases mrpc_n2: choose from mrpc_n1"),
        ("--cases ,", "--cases nothing: choose from"),
        ("--systems ours,textbrewer", "--systems ours: choose from ours_cached"),
        ("--repeats 0", "--repeats 0: each system must run at least once; set 1 or more"),
        ("--minutes -1", "--minutes -1.0: must be 0"),
        ("--minutes nan", "--minutes nan: must be 0"),
        ("--recipe_steps -5", "--recipe_steps -5: must be 0"),
        ("--encoder nowhere", "--encoder nowhere: there is no config.json; fetch one with `peakd-demo"),
        ("--cases mrpc_n1", "there is no mrpc/train-*.parquet; give the folder that has it"),
    ],
)
def test_wrong_option_of_the_driver(
    words: str, message: str, tiny_data: Path, tiny_encoder: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = ["--cases", "sst2_n1", "--encoder", str(tiny_encoder), "--data_dir", str(tiny_data), *words.split()]
    with pytest.raises(SystemExit) as stop:
        bench_train.parse(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [("--axes width", "--axes width: choose from samples"), ("--repeats 0", "--repeats 0: each point")],
)
def test_wrong_option_of_the_scaling(
    words: str, message: str, tiny_encoder: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        bench_scaling.parse(["--encoder", str(tiny_encoder), *words.split()])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"machine": "another", "cases": []}', "its rows are of another machine (another)"),
        ("{", "bench.json there is damaged"),
        ('{"machine": "x", "cases": [{}]}', "bench.json there is damaged"),
        ('{"machine": "x", "cases": [{"case": "a", "system": "b"}]}', "damaged (KeyError('tflop'))"),
    ],
)
def test_results_of_another_machine_are_not_changed(
    content: str, message: str, tiny_data: Path, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "bench.json").write_text(content)
    argv = ["--cases", "sst2_n1", "--encoder", str(tiny_encoder), "--data_dir", str(tiny_data)]
    with pytest.raises(SystemExit) as stop:
        bench_train.main([*argv, "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "bench.json").read_text() == content


def test_make_bench_passes_cases_and_minutes() -> None:
    def printed(*words: str) -> str:
        command = ["make", "-n", "--no-print-directory", "bench", *words]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout

    assert "bench_train.py --cases 'mrpc_n1' --minutes 15" in printed("CASES=mrpc_n1")
    assert "--minutes 0" in printed() and "--cases" not in printed()


def test_results_go_to_the_repository() -> None:
    assert ROOT / "benchmarks" / "results" == bench_train.RESULTS


# -- Families ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", bench_families.families.TEACHERS)
def test_families_are_measured(model_type: str, single_rank: None) -> None:
    """At small sizes: each family makes its step and its forward pass beside BERT's."""
    can_learn = model_type in bench_families.families.STUDENTS
    for kind in bench_families.KINDS if can_learn else ("teacher",):
        row = bench_families.measure(kind, model_type, "fp32", 1, hidden=48, vocab_size=200)
        assert row["times_bert"] > 0 and row["ms"] > 0 and row["bert_ms"] > 0
        assert row["family"] == model_type and row["layer_parameters"] > 0


def test_families_take_turns() -> None:
    order: list[str] = []
    row = bench_families.take_turns(lambda: order.append("ours"), lambda: order.append("bert"), 2, warm_up=1)
    assert order == ["bert", "ours", "ours", "bert", "bert", "ours"] and row.keys() == {"times_bert", "ms", "bert_ms"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--families", "bart"], "--families bart: choose from bert"),
        (["--dtypes", ""], "--dtypes nothing: choose from bf16"),
        (["--repeats", "0"], "--repeats 0: each comparison takes at least one turn"),
    ],
)
def test_wrong_options_of_the_families(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_families.parse(words)
    assert message in capsys.readouterr().err


def test_families_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"times_bert": 1.5, "ms": 3.0, "bert_ms": 2.0, "layer_parameters": 10, "padded": False}
    monkeypatch.setattr(
        bench_families,
        "measure",
        lambda kind, family, dtype, repeats: {"kind": kind, "family": family, "dtype": dtype, **made},
    )
    file = tmp_path / "families.csv"
    bench_families.main(["--families", "roberta,llama", "--dtypes", "bf16", "--output", str(file), "--note", "shared"])
    header, *lines = file.read_text().splitlines()
    assert header.startswith("kind,family,dtype,times_bert,ms,bert_ms,layer_parameters,padded,date,machine")
    assert [line.split(",")[:2] for line in lines] == [
        ["student", "roberta"],
        ["teacher", "roberta"],
        ["teacher", "llama"],
    ]
