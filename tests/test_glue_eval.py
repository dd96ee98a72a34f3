"""Evaluation against plain forward passes, test files for the GLUE server, and peakd-eval on a saved student."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NUM_DEV_ROWS, made_up_rows, write_split
from transformers import AutoTokenizer, BertForSequenceClassification, PreTrainedTokenizerBase

from peakd_ds.command_line import parse
from peakd_ds.data import reading
from peakd_ds.data.metrics import compute_metrics
from peakd_ds.data.tasks import get_task
from peakd_ds.data.tokens import Split, tokenize
from peakd_ds.errors import UserError
from peakd_ds.model import contract
from peakd_ds.model.build import build_student, task_head
from peakd_ds.packed.packing import padded
from peakd_ds.programs import glue_eval, scripts
from peakd_ds.ranks import dist
from peakd_ds.results import evaluation
from peakd_ds.results.export import export_model, unroll
from peakd_ds.sps import SPSBertForSequenceClassification


def read_tsv(file: Path) -> list[list[str]]:
    content = file.read_bytes()
    assert b"\r" not in content and content.endswith(b"\n")
    return list(csv.reader(content.decode("ascii").splitlines(), delimiter="\t"))


def splits_of(task_name: str, data_dir: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Split]:
    task = get_task(task_name)
    rows = reading.load_splits(task, str(data_dir))
    return {name: tokenize(task, rows[name], tokenizer, 32) for name in task.eval_splits}


# -- Submission files --------------------------------------------------------------------------------------------------

# What the GLUE server takes: class names for mnli, qnli and rte, class numbers elsewhere, scores for stsb.
SUBMITTED = {
    ("cola", "test"): ("CoLA.tsv", ["1", "0"]),
    ("sst2", "test"): ("SST-2.tsv", ["1", "0"]),
    ("mrpc", "test"): ("MRPC.tsv", ["1", "0"]),
    ("stsb", "test"): ("STS-B.tsv", ["3.142", "0.000", "5.000"]),
    ("qqp", "test"): ("QQP.tsv", ["1", "0"]),
    ("mnli", "test_matched"): ("MNLI-m.tsv", ["neutral", "entailment", "contradiction"]),
    ("mnli", "test_mismatched"): ("MNLI-mm.tsv", ["neutral", "entailment", "contradiction"]),
    ("qnli", "test"): ("QNLI.tsv", ["not_entailment", "entailment"]),
    ("rte", "test"): ("RTE.tsv", ["not_entailment", "entailment"]),
    ("wnli", "test"): ("WNLI.tsv", ["1", "0"]),
}


@pytest.mark.parametrize(("name", "split"), SUBMITTED)
def test_submission_file(tmp_path: Path, name: str, split: str) -> None:
    task = get_task(name)
    file_name, predictions = SUBMITTED[name, split]
    if task.is_regression:
        logits = torch.tensor([[3.14159], [-0.2], [5.7]])
    else:
        logits = torch.tensor([[-1.0, 2.0, 0.0], [3.0, 2.0, 1.0], [0.0, 1.0, 9.0]])[:, : task.num_labels]
        logits = logits[: len(predictions)]
    ids = [7, 0, 12][: len(predictions)]
    file = glue_eval.write_submission(task, split, logits, ids, tmp_path / "new" / "folder")
    assert file == tmp_path / "new" / "folder" / file_name
    assert read_tsv(file) == [["index", "prediction"], *([str(i), p] for i, p in zip(ids, predictions, strict=True))]


def test_every_test_split_has_a_submission_file() -> None:
    names = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
    assert {(name, split) for name in names for split in get_task(name).submission_files} == set(SUBMITTED)


def test_there_must_be_an_id_for_each_prediction(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="longer"):
        glue_eval.write_submission(get_task("rte"), "test", torch.zeros(3, 2), [0, 1], tmp_path)


# -- Agreement ---------------------------------------------------------------------------------------------------------


def test_agreement_is_the_share_of_the_teacher_s_classes() -> None:
    student = torch.tensor([[1.0, 0.0, 0.5], [0.0, 5.0, 1.0], [0.0, 0.0, 1.0], [9.0, 1.0, 8.0]])
    teacher = torch.tensor([[9.0, 8.0, 7.0], [1.0, 0.0, 0.0], [0.1, 0.2, 0.3], [0.0, 0.1, 0.0]])
    assert evaluation.agreement(get_task("mnli"), student, teacher) == 0.5
    assert evaluation.agreement(get_task("mnli"), student, student * 3) == 1.0


def test_agreement_of_scores_is_their_correlation() -> None:
    task, scores = get_task("stsb"), torch.tensor([[1.0], [2.0], [4.0], [3.5]])
    assert evaluation.agreement(task, scores, 2 * scores - 7) == pytest.approx(1.0)
    assert evaluation.agreement(task, scores, -scores) == pytest.approx(-1.0)
    expected = np.corrcoef([1, 2, 4, 3.5], [0, 1, 0, 2])[0, 1]
    assert evaluation.agreement(task, scores, torch.tensor([[0.0], [1.0], [0.0], [2.0]])) == pytest.approx(expected)
    assert evaluation.agreement(task, scores, torch.ones(4, 1)) == 0.0, "a constant agrees with nothing"
    assert evaluation.agreement(task, scores[:1], scores[:1]) == 0.0


# -- Evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rte", "stsb", "mnli"])
@pytest.mark.parametrize("micro_batch_size", [1, 7, 64])
@torch.no_grad()
def test_evaluation_equals_plain_forward_passes(
    tiny_data: Path, tiny_teacher: Callable[[str], Path], name: str, micro_batch_size: int
) -> None:
    task = get_task(name)
    model = BertForSequenceClassification.from_pretrained(tiny_teacher(name)).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher(name))
    dev = splits_of(name, tiny_data, tokenizer)
    metrics, logits, speed = evaluation.evaluate(
        lambda inputs: model(**padded(inputs)).logits, task, dev, micro_batch_size
    )
    assert speed > 0
    expected_metrics = {}
    for split, rows in reading.load_splits(task, str(tiny_data)).items():
        if split == "train":
            continue
        one_by_one = [
            model(**tokenizer(*(row[column] for column in task.text_columns), return_tensors="pt")).logits[0]
            for row in rows
        ]
        assert torch.allclose(logits[split], torch.stack(one_by_one), atol=1e-5)
        suffix = "_mismatched" if split == "validation_mismatched" else ""
        for metric, value in compute_metrics(task, torch.stack(one_by_one), torch.tensor(rows["label"])).items():
            expected_metrics[metric + suffix] = value
    assert metrics == pytest.approx(expected_metrics, abs=1e-6)
    if name == "mnli":
        assert list(metrics) == ["accuracy", "accuracy_mismatched"]


@torch.no_grad()
def test_logits_of_chosen_rows_come_in_their_order(tiny_data: Path, tiny_teacher: Callable[[str], Path]) -> None:
    model = BertForSequenceClassification.from_pretrained(tiny_teacher("rte")).eval()
    split = splits_of("rte", tiny_data, AutoTokenizer.from_pretrained(tiny_teacher("rte")))["validation"]

    def predict(rows: np.ndarray) -> torch.Tensor:
        return evaluation.predict(lambda inputs: model(**padded(inputs)).logits, split, rows, 4, 2)[0]

    all_logits, rows = predict(np.arange(len(split))), np.array([29, 3, 11, 0])
    assert torch.allclose(predict(rows), all_logits[rows], atol=1e-6)
    assert len({tuple(row) for row in all_logits.tolist()}) > 10, "the logits of the rows differ"


@pytest.mark.parametrize("world_size", [2, 3, 7])
@torch.no_grad()
def test_ranks_together_predict_each_row_once(
    tiny_data: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    """The ranks' results add up to those of one rank."""
    split = splits_of("sst2", tiny_data, AutoTokenizer.from_pretrained(tiny_encoder))["validation"]

    def forward(inputs: dict[str, Any]) -> torch.Tensor:
        return padded(inputs)["input_ids"].sum(1, keepdim=True) + torch.ones(1, 2)

    rows = np.arange(NUM_DEV_ROWS)
    alone = evaluation.predict(forward, split, rows, 4, 2)[0]
    parts = []
    monkeypatch.setattr(dist, "world_size", lambda: world_size)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor)
    for rank in range(world_size):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        parts.append(evaluation.predict(forward, split, rows, 4, 2)[0])
    assert torch.equal(torch.stack(parts).sum(0), alone)
    assert ((torch.stack(parts) != 0).any(2).sum(0) == 1).all()


# -- peakd-eval --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a student for sst2 in both forms, with random weights."""
    folder = tmp_path_factory.mktemp("exported")
    words = ["--task", "sst2", "--teacher", str(tiny_encoder), "--run_dir", "unused", "--num_hidden_layers", "2"]
    source = contract.find_encoder(str(tiny_encoder), "teacher")
    model = build_student(parse(words), source, task_head(get_task("sst2"))).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    with torch.no_grad():
        model.classifier.weight.normal_(generator=torch.Generator().manual_seed(0))
        inputs = tokenizer(made_up_rows("sst2", 40, "train")["sentence"], padding=True, return_tensors="pt")
        model.classifier.bias -= model(**inputs).logits.mean(0)  # now it predicts both classes
    export_model(model, tokenizer, folder / "student", "")
    export_model(unroll(model), tokenizer, folder / "student_unrolled", "")
    return folder


def evaluated(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[dict[str, Any], str]:
    """The JSON that peakd-eval prints, and the lines after it."""
    glue_eval.main(scripts.evaluate_options([*map(str, words)]))
    text = capsys.readouterr().out
    end = text.index("\n}\n") + 3
    return json.loads(text[:end]), text[end:]


@pytest.mark.parametrize("form", ["student", "student_unrolled"])
def test_peakd_eval_of_a_student(
    student: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str], single_rank: None, form: str
) -> None:
    printed, rest = evaluated(capsys, "--model", student / form, "--task", "sst2", "--data_dir", tiny_data)
    model = SPSBertForSequenceClassification.from_pretrained(student / "student").eval()
    dev = splits_of("sst2", tiny_data, AutoTokenizer.from_pretrained(student / "student"))
    expected, _, _ = evaluation.evaluate(lambda inputs: model(**padded(inputs)).logits, get_task("sst2"), dev, 8)
    assert printed["metrics"] == pytest.approx(expected) and rest == ""
    assert (printed["task"], printed["model"]) == ("sst2", str(student / form))
    assert printed["samples_per_s"] > 0


def test_peakd_eval_of_a_teacher_on_both_splits(
    tiny_teacher: Callable[[str], Path], tiny_data: Path, capsys: pytest.CaptureFixture[str], single_rank: None
) -> None:
    words = ("--task", "mnli", "--data_dir", tiny_data, "--micro_batch_size", "5", "--max_seq_length", "16")
    printed, _ = evaluated(capsys, "--model", tiny_teacher("mnli"), *words)
    assert list(printed["metrics"]) == ["accuracy", "accuracy_mismatched"]


def test_peakd_eval_finds_data_as_train_does(
    student: Path,
    tiny_data: Path,
    capsys: pytest.CaptureFixture[str],
    single_rank: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PEAKD_DATA_DIR", str(tiny_data))
    assert evaluated(capsys, "--model", student / "student", "--task", "sst2")[0]["metrics"]


def test_peakd_eval_writes_a_submission(
    student: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], single_rank: None
) -> None:
    folder = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    columns = made_up_rows("sst2", 11, "test")
    ids = [3 * number for number in range(11)]
    write_split(folder, "sst2", "test", {**columns, "label": [-1] * 11, "idx": ids})
    words = ("--model", student / "student", "--task", "sst2", "--data_dir", folder)
    _, rest = evaluated(capsys, *words, "--submission", tmp_path / "glue")
    assert rest == f"wrote {tmp_path / 'glue' / 'SST-2.tsv'}\n"
    header, *lines = read_tsv(tmp_path / "glue" / "SST-2.tsv")
    assert header == ["index", "prediction"] and [int(line[0]) for line in lines] == ids

    model = SPSBertForSequenceClassification.from_pretrained(student / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(student / "student")
    inputs = tokenizer(columns["sentence"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits.argmax(-1).tolist()
    assert [int(line[1]) for line in lines] == expected
    assert set(expected) == {0, 1}, "both classes occur, so equal predictions mean something"


def refusal(*words: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        glue_eval.main(scripts.evaluate_options([*map(str, words)]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_peakd_eval_without_a_test_split(student: Path, tiny_data: Path, tmp_path: Path, single_rank: None) -> None:
    words = ("--model", student / "student", "--task", "sst2", "--data_dir", tiny_data)
    message = refusal(*words, "--submission", tmp_path / "glue")
    assert "task sst2 has no test split in the data, so there is nothing to submit; add sst2/test-*.parquet" in message
    (tmp_path / "movie_reviews").symlink_to(tiny_data / "sst2")
    words = ("--model", student / "student", "--task", "movie_reviews", "--data_dir", tmp_path)
    assert "GLUE takes no files of this task: leave --submission out" in refusal(*words, "--submission", "x")
    assert not (tmp_path / "glue").exists()


@pytest.mark.usefixtures("single_rank")
class TestPeakdEvalRefuses:
    def test_no_model(self, tiny_data: Path, tmp_path: Path) -> None:
        message = refusal("--model", tmp_path, "--task", "rte", "--data_dir", tiny_data)
        assert message == f"--model {tmp_path} is not a folder with config.json; give a saved classifier"

    def test_an_unknown_task(self, student: Path, tiny_data: Path) -> None:
        assert "unknown task 'sst3'" in refusal(
            "--model", student / "student", "--task", "sst3", "--data_dir", tiny_data
        )

    def test_a_model_of_another_task(self, student: Path, tiny_data: Path) -> None:
        words = ("--model", student / "student", "--data_dir", tiny_data)
        assert "has 2 label(s), task stsb needs 1; take a model of" in refusal(*words, "--task", "stsb")
        message = refusal(*words, "--task", "rte")
        assert message.startswith(f"--model {student / 'student'} has the labels ['negative', 'positive'], task rte")

    def test_an_encoder_without_a_head(self, tiny_encoder: Path, tiny_data: Path) -> None:
        """Its metrics would be those of a random head."""
        message = refusal("--model", tiny_encoder, "--task", "rte", "--data_dir", tiny_data)
        assert f"--model {tiny_encoder} is an encoder without a head for a task; give a" in message

    def test_a_model_without_tokenizer(self, student: Path, tiny_data: Path, tmp_path: Path) -> None:
        bare = Path(shutil.copytree(student / "student", tmp_path / "bare"))
        for file in bare.glob("tokenizer*"):
            file.unlink()
        assert "has no tokenizer" in refusal("--model", bare, "--task", "sst2", "--data_dir", tiny_data)

    def test_damaged_weights(self, student: Path, tiny_data: Path, tmp_path: Path) -> None:
        broken = Path(shutil.copytree(student / "student", tmp_path / "broken"))
        content = (broken / "model.safetensors").read_bytes()
        (broken / "model.safetensors").write_bytes(content[:999])
        message = refusal("--model", broken, "--task", "sst2", "--data_dir", tiny_data)
        assert f"{broken}/model.safetensors is not a complete safetensors file (" in message
        assert message.endswith("get it again")

    @pytest.mark.parametrize(
        ("words", "rule"),
        [
            (("--max_seq_length", "129"), "is longer than the 128 positions of --model"),
            (("--max_seq_length", "0"), "is outside its range"),
            (("--micro_batch_size", "0"), "is outside its range"),
        ],
    )
    def test_sizes(self, student: Path, tiny_data: Path, words: tuple[str, str], rule: str) -> None:
        message = refusal("--model", student / "student", "--task", "sst2", "--data_dir", tiny_data, *words)
        assert message.startswith(f"{' '.join(words)} {rule}")

    def test_no_data(self, student: Path, tmp_path: Path) -> None:
        words = ("--model", student / "student", "--task", "sst2")
        assert "no sst2/validation-*.parquet in data folder" in refusal(*words, "--data_dir", tmp_path)
        assert "go online, or give --data_dir" in refusal(*words)
