"""The whole program on two ranks, from settings to exported student: names, files and promises of the README."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

import peakd_ds.sps
from peakd_ds import stages, train
from peakd_ds.command_line import parse
from peakd_ds.errors import UserError

STEP_KEYS = "stage step epoch loss hard_loss soft_loss hidden_loss lr grad_norm samples_per_s tokens_per_s".split()
WORDS = "--num_hidden_layers 2 --epochs 2 --global_batch_size 16 --log_steps 2 --lr 2e-3 --dtype fp32"


def run_all(argv: list[str]) -> None:
    train.main(parse(argv))


@pytest.fixture(scope="module")
def argv(tiny_data: Path, tiny_encoder: Path) -> list[str]:
    return [*WORDS.split(), "--layer_map", "1:1,2:2", "--teacher", str(tiny_encoder), "--data_dir", str(tiny_data)]


@pytest.fixture(scope="module")
def finished(argv: list[str], two_ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of all three stages."""
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    two_ranks.run(run_all, [*argv, "--task", "sst2", "--run_dir", str(folder)])
    return folder


def records_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_run_folder_holds_what_it_should(finished: Path) -> None:
    names = "config.yaml tb metrics.jsonl checkpoints teacher student student_unrolled results.json README.md".split()
    assert [name for name in names if not (finished / name).exists()] == []
    assert (finished / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    assert not [*finished.rglob("*.tmp"), *finished.rglob(".*.new-*")]
    assert not [file for file in finished.rglob("*") if file.suffix in (".pt", ".bin", ".pkl")], "no pickles"


def test_metrics_have_every_field(finished: Path) -> None:
    records = records_of(finished)
    assert list(dict.fromkeys(record["stage"] for record in records)) == ["teacher", "ptp", "distill"]
    for record in records:
        if "loss" in record:
            assert {*STEP_KEYS, "padding_share"} == record.keys()
            assert record["samples_per_s"] > 0 and 0 <= record["padding_share"] < 1
        else:
            assert {"stage", "step", "split"} < record.keys() and any(name.startswith("eval_") for name in record)
    distilled = [record for record in records if record["stage"] == "distill" and "loss" in record]
    for record in distilled:
        terms = 0.3 * record["hard_loss"] + 0.7 * record["soft_loss"] + 100 * record["hidden_loss"]
        assert record["loss"] == pytest.approx(terms, rel=1e-5)
        assert min(record["hard_loss"], record["soft_loss"], record["hidden_loss"]) > 0


def test_the_results_say_it_all(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert {"task", "method", "seed", "world_size", "settings", "teacher", "student"} <= results.keys()
    assert (results["task"], results["method"], results["world_size"]) == ("sst2", "pea-kd", 2)
    for model in ("teacher", "student"):
        assert {"metrics", "params", "effective_layers", "samples_per_s"} <= results[model].keys()
    assert results["student"]["effective_layers"] == 4 and results["student"]["stored_layers"] == 2
    assert 0 <= results["student"]["agreement"] <= 1
    assert "% of the teacher's accuracy, " in results["verdict"] and " MB instead of " in results["verdict"]
    assert f"\n{results['verdict']}.\n" in (finished / "README.md").read_text()
    assert f"{results['student']['metrics']['accuracy']:.4f}" in (finished / "README.md").read_text()


def test_tensorboard_has_every_curve(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def tags(stage: str) -> dict:
        return EventAccumulator(str(finished / "tb" / stage)).Reload().Tags()

    scalars = set(tags("distill")["scalars"])
    wanted = "eval/accuracy eval/agreement loss optimizer/lr optimizer/grad_norm speed/samples_per_s speed/tokens_per_s"
    wanted += " speed/step_ms speed/padding_share speed/memory_mib speed/teacher_time_share"
    wanted += " pairs/hidden_distance/pair_1 pairs/hidden_distance/pair_2"
    assert {f"distill/{name}" for name in wanted.split()} <= scalars
    runs = {file.parent.relative_to(finished / "tb").as_posix() for file in (finished / "tb").rglob("events.*")}
    lines = {f"distill/{name}" for name in ("hard", "soft", "hidden", "teacher")}
    assert runs == {"teacher", "ptp", "distill", "results", *lines}, "each line of a chart, and none named ."
    for run in runs:
        found = tags(run)
        assert {tag.split("/")[0] for tag in (*found["scalars"], *found["images"])} <= {"teacher", "ptp", "distill"}
    assert "distill/confusion_matrix" in tags("results")["images"]
    assert {"distill/results/accuracy", "teacher/results/accuracy"} <= set(tags("results")["scalars"])
    assert "results/text_summary" in tags("results")["tensors"]
    assert {"ptp/confusion_matrix", "ptp/label_histogram"} <= set(tags("ptp")["images"])
    assert "settings/text_summary" in tags("teacher")["tensors"]


def test_both_exports_give_the_same_scores(finished: Path) -> None:
    text = "the film is very good ."
    student = AutoModelForSequenceClassification.from_pretrained(finished / "student").eval()
    assert isinstance(student, peakd_ds.sps.SPSBertForSequenceClassification)
    assert len(student.bert.encoder.layer) == 2
    tokens = AutoTokenizer.from_pretrained(finished / "student")(text, return_tensors="pt")
    with torch.no_grad():
        expected = student(**tokens).logits[0].softmax(-1)
    classify = pipeline("text-classification", model=str(finished / "student_unrolled"), top_k=None)
    scores = {answer["label"]: answer["score"] for answer in classify([text])[0]}
    assert [scores["negative"], scores["positive"]] == pytest.approx(expected.tolist(), abs=1e-5)
    assert "sst2" in (finished / "student_unrolled" / "README.md").read_text()


def test_a_student_with_a_trimmed_vocabulary(
    argv: list[str], finished: Path, tiny_data: Path, two_ranks, tmp_path: Path
) -> None:
    """A finished run that is started again with --trim_vocabulary exports the same student with fewer tokens."""
    folder, before = tmp_path / "run", json.loads((finished / "results.json").read_text())
    shutil.copytree(finished, folder)
    words = [*argv, "--task", "sst2", "--run_dir", str(folder)]
    two_ranks.run(run_all, [*words, "--trim_vocabulary", "--export_onnx"])
    after = json.loads((folder / "results.json").read_text())
    texts = pq.read_table(tiny_data / "sst2" / "validation-00000-of-00001.parquet").column("sentence").to_pylist()
    logits = [logits_of(path, texts) for path in (finished / "student", folder / "student")]
    assert torch.equal(*logits)
    torch.testing.assert_close(logits_of(folder / "student_unrolled", texts), logits[0], rtol=0, atol=1e-5)

    config = AutoConfig.from_pretrained(folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    assert "film" in tokenizer.get_vocab() and "sees" not in tokenizer.get_vocab()
    vocabulary = after["student"]["vocabulary"]
    assert vocabulary["tokens"] == len(tokenizer) == config.vocab_size < vocabulary["of"]
    assert vocabulary["rows_with_words_outside"] == {"validation": 0}
    assert before["student"]["params"] - after["student"]["params"] == vocabulary["saved_parameters"] > 0
    assert before["student"]["metrics"] == after["student"]["metrics"]
    for readme in (folder / "README.md", folder / "student" / "README.md", folder / "student_unrolled" / "README.md"):
        assert f"holds {len(tokenizer):,} of {vocabulary['of']:,} tokens" in readme.read_text()
    assert (folder / "student_unrolled" / "model.onnx").exists()
    classify = pipeline("text-classification", model=str(folder / "student_unrolled"))
    assert classify("the film is very good .")[0]["label"] in ("negative", "positive")

    weights = (folder / "student" / "model.safetensors").read_bytes()
    two_ranks.run(run_all, words)  # the tokens are gone: the setting does not bring them back
    assert (folder / "student" / "model.safetensors").read_bytes() == weights
    again = json.loads((folder / "results.json").read_text())["student"]
    assert again["vocabulary"] == vocabulary and again["metrics"] == after["student"]["metrics"]


def logits_of(folder: Path, texts: list[str]) -> torch.Tensor:
    """Logits [N, C] of a saved classifier, by its own tokenizer."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits


def test_a_finished_run_is_not_run_again(argv: list[str], finished: Path, two_ranks) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    student = (finished / "student" / "model.safetensors").read_bytes()
    two_ranks.run(run_all, [*argv, "--task", "sst2", "--run_dir", str(finished)])
    assert (finished / "metrics.jsonl").read_bytes() == before
    assert (finished / "student" / "model.safetensors").read_bytes() == student


def test_stages_one_by_one_are_the_same_run(argv: list[str], finished: Path, two_ranks, tmp_path: Path) -> None:
    for stage in ("teacher", "ptp", "distill"):
        words = ["--task", "sst2", "--run_dir", str(tmp_path / "run"), "--stages", stage]
        two_ranks.run(run_all, [*argv, *words])
    losses = [[r["loss"] for r in records_of(folder) if "loss" in r] for folder in (finished, tmp_path / "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("task", "options", "method", "metrics"),
    [
        ("stsb", "", "sps+pkd", {"pearson", "spearmanr"}),
        ("mnli", "--hidden_loss tokens --beta 0.1", "pea-kd", {"accuracy", "accuracy_mismatched"}),
        ("sst2", "--sharing none --no_ptp --alpha 0 --beta 0 --select_on dev", "finetune", {"accuracy"}),
        ("sst2", "--sharing none --no_ptp --beta 0 --dtype bf16 --export_onnx", "kd", {"accuracy"}),
    ],
)
def test_other_tasks_and_methods(
    argv: list[str], two_ranks, tmp_path: Path, task: str, options: str, method: str, metrics: set[str]
) -> None:
    folder = tmp_path / "run"
    words = ["--epochs", "1", "--task", task, "--run_dir", str(folder), *options.split()]
    two_ranks.run(run_all, [*argv, *words])
    results = json.loads((folder / "results.json").read_text())
    assert results["method"] == method
    assert results["student"]["metrics"].keys() == results["teacher"]["metrics"].keys() == metrics
    assert np.isfinite(list(results["student"]["metrics"].values())).all()
    assert (folder / "checkpoints" / "ptp").exists() == (task != "stsb" and "--no_ptp" not in options)
    assert (folder / "student_unrolled" / "model.onnx").exists() == ("--export_onnx" in options)
    if "select_on" in options:
        assert results["selected_on"] == "dev" and "optimistic" in (folder / "README.md").read_text()


def test_a_classifier_is_used_as_it_is(argv: list[str], finished: Path, two_ranks, tmp_path: Path) -> None:
    words = ["--task", "sst2", "--teacher", str(finished / "teacher"), "--run_dir", str(tmp_path / "run")]
    two_ranks.run(run_all, [*argv, *words, "--epochs", "1"])
    ours, theirs = (json.loads((f / "results.json").read_text())["teacher"] for f in (tmp_path / "run", finished))
    assert ours["metrics"] == theirs["metrics"]
    assert not (tmp_path / "run" / "teacher").exists()


def run_with_bad_term(argv: list[str], bad_rank: int, bad_step: int) -> str:
    """Runs on every rank: the program, with the soft term turned to NaN on one rank from one step on."""
    from peakd_ds.ranks import dist

    original, calls = stages.distillation_loss, iter(range(10**6))

    def spoiled(*args: object, **kwargs: object) -> object:
        loss = original(*args, **kwargs)  # type: ignore[arg-type]
        if dist.rank() == bad_rank and next(calls) >= bad_step - 1:
            nan = torch.tensor(float("nan"))
            return loss._replace(total=loss.total * nan, soft=nan)
        return loss

    stages.distillation_loss = spoiled  # type: ignore[assignment]
    try:
        run_all(argv)
    except UserError as error:
        return str(error)
    finally:
        stages.distillation_loss = original
    return "no error"


def test_a_loss_that_is_not_finite_stops_all_ranks(argv: list[str], two_ranks, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = "--task sst2 --no_ptp --beta 0 --log_steps 4 --save_steps 2 --micro_batch_size 8".split()
    two_ranks.run(run_all, [*argv, *words, "--stages", "teacher", "--run_dir", str(folder)])
    messages = two_ranks.run(run_with_bad_term, [*argv, *words, "--run_dir", str(folder)], 1, 3)
    for message in messages:
        assert "distill step 3" in message and "soft_loss" in message and "hard_loss" not in message
    kept = sorted(path.name for path in (folder / "checkpoints" / "distill").glob("step-*"))
    assert kept == ["step-00000002"], "the checkpoint from before the bad step, and none after it"
    two_ranks.run(run_all, [*argv, *words, "--run_dir", str(folder)])  # the cause is gone: it goes on
    assert (folder / "results.json").exists()


def test_deepspeeds_own_monitors_pass_through(argv: list[str], two_ranks, tmp_path: Path) -> None:
    monitored = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "student"}}
    file = tmp_path / "monitored.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, **monitored}))
    words = ["--task", "sst2", "--run_dir", str(tmp_path / "run"), "--stages", "teacher"]
    two_ranks.run(run_all, [*argv, *words, "--student_ds_config", str(file)])
    assert any("hard_loss" in table.name for table in (tmp_path / "csv").rglob("*.csv"))


def test_early_stopping_ends_a_stage(argv: list[str], two_ranks, tmp_path: Path) -> None:
    """At a learning rate of next to nothing no epoch is better than the first."""
    words = "--task sst2 --stages teacher --epochs 9 --lr 1e-12 --early_stopping_patience 2".split()
    two_ranks.run(run_all, [*argv, *words, "--run_dir", str(tmp_path / "run")])
    summary = json.loads((tmp_path / "run" / "checkpoints" / "teacher" / "FINISHED.json").read_text())
    assert (summary["best_epoch"], summary["epochs"]) == (1, 3)
