"""The user's own rows through the whole program on two ranks, and a teacher whose outputs are in files."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
from transformers import AutoModelForSequenceClassification, pipeline

from peakd_ds import train
from peakd_ds.command_line import parse
from peakd_ds.data.tasks import own_task
from peakd_ds.errors import UserError
from peakd_ds.programs import glue_eval, predict, scripts, shard, tables
from peakd_ds.run import open_run
from peakd_ds.teacher import outputs_file, stored

WORDS = (
    "--num_hidden_layers 1 --epochs 2 --global_batch_size 16 --log_steps 1 --lr 2e-3 --dtype fp32 --max_seq_length 32"
)
LEARNING = f"{WORDS} --lr 5e-3 --epochs 5 --layer_map 1:1 --class_weights balanced --metric macro_f1"


def run_all(argv: list[str]) -> None:
    train.main(parse(argv))


def write_rows(file: Path, rows: list[dict[str, Any]], **more: Any) -> Path:
    """Rows as csv or jsonl; `more` are columns made of a row's number."""
    rows = [row | {name: make(number) for name, make in more.items()} for number, row in enumerate(rows)]
    if file.suffix == ".csv":
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    return file


def losses_of(folder: Path, stage: str = "distill") -> list[float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["stage"] == stage and "loss" in record]


@pytest.fixture(scope="module")
def tickets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A csv of five classes, and a jsonl of rows without labels beside it."""
    folder = tmp_path_factory.mktemp("own")
    write_rows(folder / "mails.jsonl", conftest.ticket_rows(60, "mails", lambda number: False))
    return write_rows(folder / "tickets.csv", conftest.ticket_rows(240, "tickets"))


@pytest.fixture(scope="module")
def finished(tickets: Path, tiny_encoder: Path, two_ranks) -> Path:
    """The folder of a finished run on the csv and the rows without labels."""
    folder = tickets.parent / "run"
    files = ["--train_file", str(tickets), "--unlabeled_file", str(tickets.with_name("mails.jsonl"))]
    words = f"{LEARNING} --run_dir {folder}"
    two_ranks.run(run_all, [*files, "--teacher", str(tiny_encoder), *words.split()])
    return folder


def test_a_csv_becomes_a_classifier_with_the_users_labels(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert (results["task"], results["method"], results["selected_on"]) == ("tickets", "pea-kd", "holdout")
    for model in ("teacher", "student"):
        assert results[model]["metrics"]["accuracy"] > 0.5  # chance is 0.2
        assert set(results[model]["per_class"]) == set(conftest.TICKETS)
    classify = pipeline("text-classification", model=str(finished / "student_unrolled"))
    assert classify(["the film is very good ."])[0]["label"] in conftest.TICKETS
    assert "| billing" in (finished / "README.md").read_text()
    for folder in ("student", "student_unrolled"):
        card = (finished / folder / "README.md").read_text()
        assert "gives one of 5 classes" in card and "- macro_f1: the mean of" in card
        assert str(finished.parent) not in card and "tickets.csv" not in card


def test_stages_before_distillation_train_on_labelled_rows_alone(finished: Path) -> None:
    """216 of 240 rows are not reported, 22 of these pick epochs; 60 more have no label."""
    steps = [len(losses_of(finished, stage)) for stage in ("teacher", "ptp", "distill")]
    assert steps[0] == steps[1] and 194 / 16 <= steps[0] / 5 < 194 / 16 + 4
    assert 254 / 16 <= steps[2] / 5 < 254 / 16 + 4


def test_sharded_rows_give_the_same_losses(
    finished: Path, tickets: Path, tiny_encoder: Path, two_ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ["--train_file", str(tickets), "--unlabeled_file", str(tickets.with_name("mails.jsonl"))]
    paths = ["--teacher", str(tiny_encoder), "--shard_dir", str(tmp_path / "shards")]
    monkeypatch.delenv("PEAKD_SCRATCH", raising=False)
    shard.main(scripts.shard_options([*files, *paths, "--max_seq_length", "32"]))
    words = f"{LEARNING} --run_dir {tmp_path / 'run'}"
    words += " --data_placement sharded --stages teacher"
    two_ranks.run(run_all, [*files, *paths, *words.split()])
    assert losses_of(tmp_path / "run", "teacher") == losses_of(finished, "teacher")


def test_the_student_is_scored_and_its_predictions_written(
    finished: Path, tickets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], single_rank: None
) -> None:
    file = tmp_path / "predictions.csv"
    words = ["--model", str(finished / "student"), "--test_file", str(tickets), "--predictions", str(file)]
    glue_eval.main(scripts.evaluate_options([*words, "--max_seq_length", "32"]))
    printed = capsys.readouterr()
    metrics = json.loads(printed.out)["metrics"]
    with file.open() as opened:
        rows = list(csv.DictReader(opened))
    truth = [row["label"] for row in conftest.ticket_rows(240, "tickets")]
    right = [row["label"] == label for row, label in zip(rows, truth, strict=True)]
    assert metrics["accuracy"] == pytest.approx(sum(right) / len(right))
    assert list(rows[0]) == ["id", "label", *(f"p_{name}" for name in conftest.TICKETS)]
    assert sum(float(rows[0][f"p_{name}"]) for name in conftest.TICKETS) == pytest.approx(1)


# -- No labels at all --------------------------------------------------------------------------------------------------


def test_rows_without_any_label(two_ranks, tickets: Path, classifier_of, tmp_path: Path, single_rank: None) -> None:
    file = str(tickets.with_name("mails.jsonl"))
    teacher = classifier_of(*conftest.TICKETS)
    words = [*WORDS.split(), "--layer_map", "1:1", "--unlabeled_file", file, "--teacher", str(teacher)]
    two_ranks.run(run_all, [*words, "--run_dir", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["student"]["metrics"] == {} and 0 <= results["student"]["agreement"] <= 1
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student_unrolled")
    assert tuple(student.config.id2label.values()) == conftest.TICKETS
    agreement = f"{results['student']['agreement']:.4f}"
    assert f"| agreement | {agreement} |" in (tmp_path / "run" / "student_unrolled" / "README.md").read_text()
    (row,), _ = tables.gather([tmp_path / "run"])
    assert (row.task, row.results[0].metrics) == ("mails", {"agreement": results["student"]["agreement"]})
    with pytest.raises(UserError, match=r"--alpha 0.5 gives labels a weight, but no row has one; leave it out"):
        open_run(parse([*words, "--alpha", "0.5", "--run_dir", str(tmp_path / "other")]))


# -- Outputs from files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_teacher(two_ranks, tickets: Path, classifier_of) -> Path:
    """A run on a teacher that runs beside the student, without hidden states."""
    folder = tickets.parent / "by_teacher"
    rows = [row for row in conftest.ticket_rows(150, "named")]
    file = write_rows(tickets.parent / "named.jsonl", rows, key=lambda number: f"row {number}")
    words = f"{WORDS} --beta 0 --run_dir {folder} --id_column key --train_file {file}"
    teacher = str(classifier_of(*conftest.TICKETS))
    two_ranks.run(run_all, [*words.split(), "--teacher", teacher, "--student_init", teacher])
    return folder


@pytest.mark.parametrize(("kind", "has_ids"), [("logits", True), ("logits", False), ("probabilities", True)])
def test_a_run_on_outputs_equals_the_run_on_their_teacher(
    by_teacher: Path, two_ranks, classifier_of, tmp_path: Path, single_rank: None, kind: str, has_ids: bool
) -> None:
    teacher, file, out = (
        str(classifier_of(*conftest.TICKETS)),
        by_teacher.with_name("named.jsonl"),
        tmp_path / "o.jsonl",
    )
    column = "key" if has_ids else "no_such_column"
    words = ["--model", teacher, "--train_file", str(file), "--id_column", column, "--max_seq_length", "32"]
    predict.main(scripts.predict_options([*words, "--out", str(out)]))
    if kind == "probabilities":
        rows = list(map(json.loads, out.read_text().splitlines()))
        for row in rows:
            logits = row.pop("logits")
            values = torch.tensor(list(logits.values()), dtype=torch.float64).softmax(-1).tolist()
            row["probabilities"] = dict(reversed(list(zip(logits, values, strict=True))))
        out.write_text("\n".join(map(json.dumps, reversed(rows))))
    words = f"{WORDS} --beta 0 --run_dir {tmp_path / 'run'} --id_column {column} --train_file {file}"
    two_ranks.run(run_all, [*words.split(), "--teacher_outputs", str(out), "--student_init", teacher])
    for stage in ("ptp", "distill"):
        ours, theirs = losses_of(tmp_path / "run", stage), losses_of(by_teacher, stage)
        assert ours == pytest.approx(theirs, rel=1e-6 if kind == "logits" else 1e-4)
    results = [json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "run", by_teacher)]
    assert results[0]["teacher"]["metrics"] == results[1]["teacher"]["metrics"]
    assert results[0]["student"]["agreement"] == pytest.approx(results[1]["student"]["agreement"])


def test_the_classifier_may_order_its_classes_otherwise(
    two_ranks, tiny_data: Path, classifier_of, tmp_path: Path
) -> None:
    """A teacher of a GLUE task that numbers the classes the other way round: labels are matched by name."""
    words = f"{WORDS} --task sst2 --stages distill --no_ptp --layer_map 1:1 --data_dir {tiny_data}"
    folders = []
    for names in (("negative", "positive"), ("POSITIVE", "NEGATIVE")):
        folders.append(tmp_path / names[0])
        argv = [*words.split(), "--teacher", str(classifier_of(*names)), "--run_dir", str(folders[-1])]
        two_ranks.run(run_all, argv)
    metrics = [json.loads((folder / "results.json").read_text())["teacher"]["metrics"] for folder in folders]
    # The two random teachers are the same weights: what one calls negative, the other calls POSITIVE.
    assert metrics[0]["accuracy"] == pytest.approx(1 - metrics[1]["accuracy"])
    student = AutoModelForSequenceClassification.from_pretrained(folders[1] / "student_unrolled")
    assert student.config.id2label == {0: "POSITIVE", 1: "NEGATIVE"}
    assert os.listdir(folders[1])


def test_ids_that_stand_there_twice(tmp_path: Path) -> None:
    """An id of two rows cannot say which of them an output is for; a reported split with ids of its own is left out."""
    task = own_task("mine", "classes", ("text",), ("a", "b"))
    file = write_rows(tmp_path / "o.jsonl", [{"probabilities": [0.25, 0.75]}] * 3, id=str)

    def read(train: list[str], dev: list[str], optional: tuple[str, ...] = ()) -> set[str]:
        ids = {"train": train, "validation": dev}
        sizes = {name: len(names) for name, names in ids.items()}
        return set(outputs_file.read_outputs([file], None, "id", task, ids, sizes, optional))

    assert read(["0", "1"], ["2"]) == {"train", "validation"}
    assert read(["0", "1"], ["1"], ("validation",)) == {"train"}
    for trained, others in ((["0", "0"], ["2"]), (["0", "1"], ["1"])):
        with pytest.raises(UserError, match=r"two rows with id '[01]', so .*o.jsonl cannot tell them apart"):
            read(trained, others)


def test_outputs_are_found_by_class_name_id_and_weight(tmp_path: Path) -> None:
    """Whatever the order of classes, rows and files."""
    of_model = own_task("mine", "classes", ("text",), ("b", "a"))
    of_run = own_task("mine", "classes", ("text",), ("a", "b"))
    files = [tmp_path / "z.jsonl", tmp_path / "a.parquet"]
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    outputs_file.write_outputs(files[0], ["0", "1", "2"], logits, of_model, "id")
    outputs_file.write_outputs(files[1], ["0", "1", "2"], -logits, of_model, "id")

    def read(files: list[Path], weights: list[float] | None, ids: list[str] | None) -> torch.Tensor:
        return outputs_file.read_outputs(files, weights, "id", of_run, {"train": ids}, {"train": 3}, ())["train"]

    assert read(files[:1], None, None).tolist() == logits.flip(1).tolist()
    assert read(files[:1], None, ["2", "0", "1"]).tolist() == logits.flip(1)[[2, 0, 1]].tolist()
    mixed = (3 * logits.flip(1).double().softmax(1) + (-logits.flip(1)).double().softmax(1)) / 4
    assert torch.allclose(read(files, [3.0, 1.0], None).double().exp(), mixed, atol=1e-6)
    config = parse(
        ["--task", "rte", "--run_dir", "r", "--student_init", "s", "--beta", "0", "--teacher_outputs", *map(str, files)]
    )
    assert stored._files(config) == files  # not sorted: the weights are in this order
    outputs_file.write_outputs(tmp_path / "named.jsonl", ["2", "0", "1"], logits, of_model, "id")
    with pytest.raises(UserError, match="names its rows in 'id', but the data has no such column in every file"):
        read([tmp_path / "named.jsonl"], None, None)
    with pytest.raises(UserError, match="--teacher_weights gives 1 numbers, but --teacher_outputs names 2 files"):
        read(files, [3.0], None)
