"""Whole runs on two ranks with a teacher and a student of every family, from `train.main` to the saved models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from tiny_families import head_of, save_family
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import peakd_ds.sps  # noqa: F401 - registers the students
from peakd_ds import train
from peakd_ds.command_line import parse
from peakd_ds.data.tasks import get_task
from peakd_ds.errors import UserError
from peakd_ds.families import BERT, FAMILIES, STUDENTS
from peakd_ds.results import figures

HEAD = head_of(*get_task("rte").label_names)
WORDS = "--task rte --num_hidden_layers 2 --epochs 1 --max_seq_length 32 --global_batch_size 32 --micro_batch_size 8"
MORE_WORDS = "--log_steps 1 --save_steps 0 --lr 1e-3 --dtype fp32 --layer_map 1:1,2:2,3:4"
MODES = ("online", "cached")
TEXTS = ("the film likes a good dog .", "the dog likes .")

Made = Callable[[str, bool], Path]
"""(model type, whether it is a classifier) -> the folder of a model."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("families")

    def folder_of(model_type: str, is_classifier: bool) -> Path:
        target = folder / f"{model_type}-{is_classifier}"
        return target if target.exists() else save_family(target, model_type, HEAD if is_classifier else None)

    return folder_of


def run_all(argvs: list[list[str]]) -> None:
    """Runs on every rank; the loss curves are not drawn, which takes a quarter of such a short run."""
    with mock.patch.object(figures, "loss_curves", lambda *_: None):
        for argv in argvs:
            train.main(parse(argv))


@pytest.fixture(scope="module")
def words(tiny_data: Path) -> list[str]:
    return [*WORDS.split(), *MORE_WORDS.split(), "--data_dir", str(tiny_data)]


@pytest.fixture(scope="module")
def run_of(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[list[str], Path]]:
    """`run_of(name, teacher, student, more words)` gives a command line and its run folder."""
    folder = tmp_path_factory.mktemp("runs")

    def argv(name: str, teacher: Path, student: Path | None, *more: str) -> tuple[list[str], Path]:
        models = ["--teacher", str(teacher), *(["--student_init", str(student)] if student else [])]
        return [*words, *models, "--run_dir", str(folder / name), *more], folder / name

    return argv


def records_of(folder: Path, stage: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["stage"] == stage and "loss" in record]


@torch.no_grad()
def logits_of(folder: Path) -> torch.Tensor:
    """Of TEXTS, one at a time, as a user of transformers has them."""
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return torch.cat([model.eval()(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])


def check_saved(folder: Path, teacher: str, student: str) -> None:
    """What a finished run leaves: results, and models that load and agree."""
    results = json.loads((folder / "results.json").read_text())
    for name in ("teacher", "student"):
        assert {"metrics", "params", "effective_layers", "samples_per_s"} <= results[name].keys(), name
        assert 0 <= results[name]["metrics"]["accuracy"] <= 1
    assert results["student"]["effective_layers"] == 4 and results["student"]["stored_layers"] == 2
    assert 0 <= results["student"]["agreement"] <= 1 and results["settings"]["layer_pairs"] == [[1, 1], [2, 2], [3, 4]]
    assert AutoConfig.from_pretrained(folder / "student").model_type == f"sps_{student}"
    assert AutoConfig.from_pretrained(folder / "student_unrolled").model_type == student
    ours, unrolled = logits_of(folder / "student"), logits_of(folder / "student_unrolled")
    assert ours.shape == (len(TEXTS), 2) and torch.allclose(ours, unrolled, atol=2e-6)
    if (folder / "teacher").exists():
        assert AutoConfig.from_pretrained(folder / "teacher").model_type == teacher
        assert logits_of(folder / "teacher").shape == (len(TEXTS), 2)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_classifier_teaches(model_type: str, two_ranks, made: Made, run_of: Any) -> None:
    """Online and cached, with the same losses; the student is a BERT."""
    models = made(model_type, True), made(BERT, False)
    runs = {mode: run_of(f"{model_type}-{mode}", *models, "--teacher_mode", mode, "--no_ptp") for mode in MODES}
    two_ranks.run(run_all, [argv for argv, _ in runs.values()])
    online, cached = (folder for _, folder in runs.values())
    for folder in (online, cached):
        check_saved(folder, model_type, BERT)
    assert (cached / "teacher_cache").is_dir() and not (online / "teacher_cache").exists()
    assert_same_losses(online, cached, "distill")


def assert_same_losses(one: Path, other: Path, stage: str, tolerance: float = 2e-5) -> None:
    ours, theirs = records_of(one, stage), records_of(other, stage)
    assert len(ours) == len(theirs) >= 2
    for mine, their in zip(ours, theirs, strict=True):
        for name in ("loss", "hard_loss", "soft_loss", "hidden_loss"):
            assert mine[name] == pytest.approx(their[name], rel=tolerance, abs=tolerance), (name, mine, their)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_encoder_is_fine_tuned_and_teaches(model_type: str, two_ranks, made: Made, run_of: Any) -> None:
    """All three stages; the student is of the teacher's family where that can learn, else a BERT."""
    student = model_type if model_type in STUDENTS else BERT
    init = None if student == model_type else made(BERT, False)
    argv, folder = run_of(f"{model_type}-encoder", made(model_type, False), init)
    two_ranks.run(run_all, [argv])
    check_saved(folder, model_type, student)
    assert all(len(records_of(folder, stage)) >= 2 for stage in ("teacher", "ptp", "distill"))
    assert (folder / "teacher" / "model.safetensors").exists()


# -- Wrong input -------------------------------------------------------------------------------------------------------

CANNOT_LEARN = "cannot start a student: {}, {}; set --student_init to a model of bert, roberta, "
OWN = "its layers share their parameters already"
CAUSAL = "it is a causal model, whose first token sees no other"
REFUSED: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "no student of albert": ("albert", "", "", ("--teacher ", CANNOT_LEARN.format("albert", OWN))),
    "no student of qwen2": ("qwen2", "", "", ("--teacher ", CANNOT_LEARN.format("qwen2", CAUSAL))),
    "an albert to start with": ("bert", "albert", "", ("--student_init ", CANNOT_LEARN.format("albert", OWN))),
    "a qwen2 to start with": ("bert", "qwen2", "", ("--student_init ", CANNOT_LEARN.format("qwen2", CAUSAL))),
    "first layers of modernbert": (
        "bert",
        "modernbert",
        "--init_layers 2,4",
        (
            "--init_layers 2,4 does not fit --student_init ",
            "no LayerNorm before attention",
            "begin with 1, as 1,2 does",
        ),
    ),
    "the first layer of modernbert twice": ("modernbert", "", "--init_layers 1,1", ("--init_layers 1,1 does not fit",)),
    "the first token of a decoder": (
        "llama",
        "bert",
        "--teacher_pooling cls",
        ("--teacher_pooling cls takes the first token's state", "set --teacher_pooling last or mean"),
    ),
    "a score for classes": (
        "deberta-v2 with one score",
        "bert",
        "",
        ("has 1 label(s), task rte needs 2", "take a model of this"),
    ),
    "a decoder without padding": (
        "gemma with no padding",
        "bert",
        "",
        ("causal model without padding token", "set pad_token in its tokenizer_config.json"),
    ),
}
"""(teacher, --student_init, more words, parts of the message)."""


def no_engine(*_: Any, **__: Any) -> None:
    raise AssertionError("an engine was started")


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_models_are_refused_in_one_line(
    case: str,
    words: list[str],
    made: Made,
    tmp_path: Path,
    single_rank: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher, student, more, parts = REFUSED[case]
    family, _, kind = teacher.partition(" with ")
    folder = save_family(tmp_path / "teacher", family, head_of() if kind == "one score" else HEAD)
    if kind == "no padding":
        for file, name in (("config.json", "pad_token_id"), ("tokenizer_config.json", "pad_token")):
            document = json.loads((folder / file).read_text())
            (folder / file).write_text(json.dumps(document | {name: None}))
    argv = [*words, "--teacher", str(folder), "--run_dir", str(tmp_path / "run"), *more.split()]
    argv += ["--student_init", str(made(student, False))] if student else []
    monkeypatch.setattr(deepspeed, "initialize", no_engine)
    with pytest.raises(UserError) as caught:
        run_all([argv])
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and all(part in message for part in parts), message
    assert not (tmp_path / "run").exists()
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err


def test_the_first_layer_of_modernbert_may_be_chosen_with_others(
    words: list[str], made: Made, tmp_path: Path, single_rank: None
) -> None:
    encoder = made("modernbert", False)
    argv = [*words, "--teacher", str(encoder), "--init_layers", "1,4", "--run_dir", str(tmp_path / "run"), "--dry_run"]
    run_all([argv])
