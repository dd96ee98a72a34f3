"""Metrics of own data against scikit-learn and SciPy called directly, and against numbers made by hand."""

import json
import math
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import NUM_DEV_ROWS
from scipy import stats
from sklearn.metrics import classification_report, f1_score
from sklearn.utils.class_weight import compute_class_weight

from peakd_ds import report, stages, train
from peakd_ds.command_line import parse
from peakd_ds.data.metrics import class_weights, compute_metrics, higher_is_better, majority_class, per_class
from peakd_ds.data.tasks import OWN_METRICS, TASKS, Task, own_task
from peakd_ds.errors import UserError
from peakd_ds.results import evaluation
from peakd_ds.run import Run
from peakd_ds.teacher.online import OnlineTeacher

NAMES = ("red", "green", "blue")
CLASSES = own_task("colours", "classes", ("text",), NAMES)
TAGS = own_task("tags", "multi_label", ("text",), NAMES)
STARS = own_task("stars", "scores", ("title", "text"), ())

LABELS = np.array([0, 1, 2, 1, 0, 1, 1, 2, 1, 0])
PREDICTIONS = np.array([0, 1, 1, 1, 2, 0, 1, 2, 1, 0])
SCORES = np.array([1.0, 3.5, -2.0, 7.25, 0.0])
PREDICTED_SCORES = np.array([1.5, 3.0, -1.0, 6.0, 1.0])
TAG_LABELS = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0]])
TAG_PREDICTIONS = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 1]])


def logits_of(predictions: np.ndarray) -> np.ndarray:
    return np.eye(len(NAMES))[predictions] * 3.0 - 1.0


def tag_logits_of(predictions: np.ndarray) -> np.ndarray:
    return np.where(predictions, 0.25, 0.0)  # a logit of 0 is no prediction


# -- Tasks -------------------------------------------------------------------------------------------------------------


def test_kinds_of_tasks() -> None:
    assert {name: task.kind for name, task in TASKS.items() if task.kind != "classes"} == {"stsb": "scores"}
    assert not any(task.is_own or task.is_multi_label for task in TASKS.values())
    assert [task.num_labels for task in (CLASSES, TAGS, STARS)] == [3, 3, 1]
    assert [task.is_regression for task in (CLASSES, TAGS, STARS)] == [False, False, True]
    assert [task.is_multi_label for task in (CLASSES, TAGS, STARS)] == [False, True, False]
    assert [task.primary_metric for task in (CLASSES, TAGS, STARS)] == ["accuracy", "micro_f1", "spearmanr"]
    for task in (CLASSES, TAGS, STARS):
        assert task.is_own and task.ptp_thresholds is None and not task.submission_files
        assert task.metrics == OWN_METRICS[task.kind] and task.primary_metric in task.metrics
    task = own_task("colours", "classes", ("text",), NAMES, "macro_f1", ("dev", "test"))
    assert (task.primary_metric, task.eval_splits) == ("macro_f1", ("dev", "test"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kinds", ("text",), NAMES), "kind 'kinds' of task mine is unknown; set one of classes, multi_label, scores"),
        (
            ("classes", ("text",), NAMES, "rmse"),
            "--metric 'rmse' is no score of task mine, whose labels are classes; set one of accuracy, macro_f1, ",
        ),
        (("classes", (), NAMES), r"task mine has text columns \[\]; give one"),
        (("classes", ("a", "b", "c"), NAMES), "; give one, or two different ones"),
        (("classes", ("a", "a"), NAMES), "; give one, or two different ones"),
        (("classes", ("a",), ("one",)), r"task mine has label names \['one'\]; give two or more different ones"),
        (("multi_label", ("a",), ("one", "two", "one")), "give two or more different ones"),
        (("scores", ("a",), NAMES), "task mine has scores, but label names .*; leave them out"),
    ],
)
def test_a_task_that_cannot_be(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        own_task("mine", *arguments)


# -- Metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_of_classes() -> None:
    found = compute_metrics(CLASSES, logits_of(PREDICTIONS), LABELS)
    expected = {
        "accuracy": 7 / 10,
        "macro_f1": f1_score(LABELS, PREDICTIONS, average="macro"),
        "weighted_f1": f1_score(LABELS, PREDICTIONS, average="weighted"),
    }
    assert found == pytest.approx(expected, abs=1e-12) and list(found) == list(CLASSES.metrics)
    # red: 2 of 3 predicted and of 3 there; green: 4 of 5 and of 5; blue: 1 of 2 and of 2
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5 + 1 / 2) / 3)
    assert found["weighted_f1"] == pytest.approx((3 * 2 / 3 + 5 * 4 / 5 + 2 * 1 / 2) / 10)


def test_metrics_of_tags() -> None:
    found = compute_metrics(TAGS, tag_logits_of(TAG_PREDICTIONS), torch.from_numpy(TAG_LABELS).float())
    # red: 3 of 3 and 3; green: 1 of 2 predicted and of 2 there; blue: 1 of 2 predicted and of 1 there
    expected = {"micro_f1": 2 * 5 / (7 + 6), "macro_f1": (1 + 1 / 2 + 2 / 3) / 3, "exact_match": 2 / 5}
    assert found == pytest.approx(expected, abs=1e-12) and list(found) == list(TAGS.metrics)


def test_metrics_of_scores() -> None:
    found = compute_metrics(STARS, PREDICTED_SCORES[:, None], SCORES)
    expected = {
        "pearson": stats.pearsonr(SCORES, PREDICTED_SCORES).statistic,
        "spearmanr": stats.spearmanr(SCORES, PREDICTED_SCORES).statistic,
        "rmse": math.sqrt((0.25 + 0.25 + 1 + 1.25**2 + 1) / 5),
    }
    assert found == pytest.approx(expected, abs=1e-12) and list(found) == list(STARS.metrics)


def test_one_class_per_row_table() -> None:
    table = per_class(CLASSES, logits_of(PREDICTIONS), LABELS)
    theirs = classification_report(LABELS, PREDICTIONS, target_names=NAMES, output_dict=True)
    assert list(table) == list(NAMES)
    for name, row in table.items():
        expected = {key.replace("f1-score", "f1"): value for key, value in theirs[name].items()}
        assert row == pytest.approx(expected, abs=1e-12)
    assert json.loads(json.dumps(table)) == table and table["green"]["support"] == 5


def test_table_of_tags() -> None:
    table = per_class(TAGS, tag_logits_of(TAG_PREDICTIONS), TAG_LABELS)
    assert table == {
        "red": {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 3},
        "green": {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2},
        "blue": {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "support": 1},
    }
    assert per_class(STARS, PREDICTED_SCORES[:, None], SCORES) == {}


def test_a_class_that_does_not_occur_is_zero_without_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = per_class(CLASSES, logits_of(np.array([0, 1])), [0, 0])
        found = compute_metrics(CLASSES, logits_of(np.array([0, 1])), [0, 0])
        tags = compute_metrics(TAGS, np.full((2, 3), -1.0), np.zeros((2, 3)))
    assert table["blue"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0) / 2), "over the classes that occur, as scikit-learn's"
    assert tags == {"micro_f1": 0.0, "macro_f1": 0.0, "exact_match": 1.0}


@pytest.mark.parametrize(
    ("task", "logits", "labels", "hidden"),
    [
        (CLASSES, logits_of(PREDICTIONS), LABELS, -1),
        (TAGS, tag_logits_of(TAG_PREDICTIONS), TAG_LABELS, -1),
        (STARS, PREDICTED_SCORES[:, None], SCORES, math.nan),
    ],
)
def test_rows_without_a_label_do_not_count(task: Task, logits: np.ndarray, labels: np.ndarray, hidden: float) -> None:
    some = labels.astype(float)
    some[1::2] = hidden
    assert compute_metrics(task, logits, some) == compute_metrics(task, logits[::2], labels[::2])
    assert compute_metrics(task, logits, some) != compute_metrics(task, logits, labels)
    assert per_class(task, logits, some) == per_class(task, logits[::2], labels[::2])
    assert majority_class(task, some) == majority_class(task, labels[::2])
    none = np.full(labels.shape, hidden)
    assert compute_metrics(task, logits, none) == {} == per_class(task, logits, none)
    assert majority_class(task, none) is None


@pytest.mark.parametrize(
    ("task", "logits", "labels", "message"),
    [
        (CLASSES, np.zeros((2, 3)), [0, 3], "label 3 of colours is neither a class id from 0 to 2 nor -1; check"),
        (CLASSES, np.zeros((2, 3)), [0, math.nan], "labels of colours hold NaN or infinity; check the data"),
        (TAGS, np.zeros((2, 3)), [[1, 0, 0], [-1, 1, -1]], "label -1 of tags is neither 0 nor 1, and its row has"),
        (TAGS, np.zeros((2, 3)), [[1, 0, 0], [0, 2, 0]], "label 2 of tags"),
        (
            TAGS,
            np.zeros((2, 3)),
            [0, 1],
            r"do not fit task tags: pass logits \[N, 3\] and labels \[N, 3\]",
        ),
        (STARS, [[1.0], [0.0]], [1.0, math.inf], "labels of stars hold NaN or infinity"),
        (STARS, [[math.nan], [0.0]], [math.nan, 1.0], "the model has diverged"),
    ],
)
def test_errors(task: Task, logits: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_metrics(task, logits, labels)


def test_the_better_end() -> None:
    all_metrics = [*OWN_METRICS.values(), *(task.metrics for task in TASKS.values())]
    names = {name for metrics in all_metrics for name in metrics}
    assert {name for name in names if not higher_is_better(name)} == {"rmse"}
    assert not higher_is_better("loss"), "ptp's"
    for metric in STARS.metrics:
        task = own_task("stars", "scores", ("text",), (), metric)
        run = object.__new__(Run)
        run.task, run.teacher = task, object.__new__(OnlineTeacher)
        stage = stages._teacher_stage(run, cast(Any, None))
        assert (stage.score, stage.higher_is_better) == (metric, metric != "rmse")


# -- Labels ------------------------------------------------------------------------------------------------------------


def test_majority() -> None:
    assert majority_class(CLASSES, LABELS) == ("green", 0.5)
    assert majority_class(CLASSES, [2, 0, 0, 2]) == ("red", 0.5)
    assert majority_class(TAGS, TAG_LABELS) == ("red", 0.6)
    assert majority_class(STARS, SCORES) is None


def test_balanced_weights() -> None:
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    weights_C = class_weights([*LABELS, -1, -1], 3)
    assert weights_C.dtype == torch.float32 and weights_C.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert class_weights(torch.tensor([0, 2, 2, -1]), 3).tolist() == [1.0, 0.0, 0.5]
        assert class_weights([-1], 2).tolist() == [0.0, 0.0]
    for labels in ([0, 3], [0, -2], [[0, 1]], [0.5]):
        with pytest.raises(ValueError, match=r"are not \[N\] of class ids from 0 to 2, or -1"):
            class_weights(labels, 3)


def test_agreement_of_tags_is_over_rows_and_classes() -> None:
    student, teacher = torch.tensor([[1.0, -1.0, 2.0], [0.0, 3.0, -1.0]]), torch.tensor([[2.0, 1.0, 9.0], [-1, -1, -1]])
    assert evaluation.agreement(TAGS, student, teacher) == pytest.approx(4 / 6)


# -- Results of a run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["own", "glue"])
def test_results_have_a_table_for_own_data(
    kind: str, tiny_data: Path, tiny_encoder: Path, tmp_path: Path, single_rank: None
) -> None:
    rows = ["--task", "rte", "--data_dir", str(tiny_data)]
    if kind == "own":
        train_file, validation_file = (str(tiny_data / "rte" / f"{name}-*.parquet") for name in ("train", "validation"))
        test_file = shutil.copy(next((tiny_data / "rte").glob("validation-*.parquet")), tmp_path / "reported.parquet")
        rows = ["--train_file", train_file, "--validation_file", validation_file, "--test_file", str(test_file)]
        rows += ["--metric", "macro_f1"]
    names = TASKS["rte"].label_names
    words = "--stages teacher --epochs 1 --num_hidden_layers 2 --dtype fp32".split()
    paths = ["--teacher", str(tiny_encoder), "--run_dir", str(tmp_path / "run")]
    train.main(parse([*rows, *words, *paths]))
    results, readme = json.loads((tmp_path / "run" / "results.json").read_text()), tmp_path / "run" / "README.md"
    teacher = results["teacher"]
    if kind == "glue":
        measured = {"disk_mb", "latency_ms", "batch_samples_per_s"}
        assert set(teacher) == {"metrics", "params", "effective_layers", "samples_per_s", *measured}
        assert "primary_metric" not in results and "Each class" not in readme.read_text()
        return
    assert list(teacher["metrics"]) == ["accuracy", "macro_f1", "weighted_f1"]
    assert {name: row["support"] for name, row in teacher["per_class"].items()} == dict.fromkeys(
        names, NUM_DEV_ROWS / 2
    )
    assert results["primary_metric"] == "macro_f1" and results["selected_on"] == "validation"
    assert "Epochs were picked on the validation rows, which no stage trained on." in readme.read_text()
    f1 = [row["f1"] for row in teacher["per_class"].values()]
    assert teacher["metrics"]["macro_f1"] == pytest.approx(np.mean(f1))
    assert results["majority_class"] == {
        "name": names[0],
        "share": 0.5,
        "metrics": {"accuracy": 0.5, "macro_f1": pytest.approx(1 / 3), "weighted_f1": pytest.approx(1 / 3)},
    }
    assert "The largest class of test is entailment, with 0.5000 of the rows, the" in readme.read_text()
    (row,) = [line.split("|")[1:-1] for line in readme.read_text().splitlines() if line.startswith("| not_entailment")]
    scores = teacher["per_class"]["not_entailment"]
    assert [cell.strip() for cell in row[1:]] == ["15", *(f"{scores[s]:.4f}" for s in ("precision", "recall", "f1"))]


def test_no_table_of_very_many_classes() -> None:
    for number, expected in ((50, {"per_class"}), (51, set())):
        names = tuple(f"class {i}" for i in range(number))
        task = own_task("many", "classes", ("text",), names)
        one = SimpleNamespace(task=task, dev={"validation": SimpleNamespace(labels=torch.tensor([0, 1]))})
        assert set(report._per_class(cast(Any, one), {"validation": torch.zeros(2, number)})) == expected
