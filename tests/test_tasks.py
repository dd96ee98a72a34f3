"""The task table against GLUE's own schema, and metrics against scikit-learn and SciPy called directly."""

import dataclasses
import json
import math
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics

from peakd_ds.data.metrics import compute_metrics
from peakd_ds.data.tasks import TASKS, get_task

GLUE_TASKS = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
DATA_DIR = Path(os.environ.get("PEAKD_DATA_DIR", Path(__file__).parents[1] / "../shared/data/glue"))


def one_hot_logits(predictions, num_classes):
    return np.eye(num_classes)[predictions] * 3.0 - 1.0


def test_table_covers_glue_and_movie_reviews():
    assert list(TASKS) == [*GLUE_TASKS, "movie_reviews"]
    for name, task in TASKS.items():
        assert task.name == task.base == name
        assert task.primary_metric in task.metrics
        assert len(task.text_columns) in (1, 2)
        assert len(set(task.label_names)) == len(task.label_names)


def test_ptp_thresholds_of_the_published_code():
    published = {name: task.ptp_thresholds for name, task in TASKS.items() if task.ptp_thresholds}
    assert published == {
        "rte": (0.8, 0.6),
        "mrpc": (0.95, 0.75),
        "sst2": (0.98, 0.8),
        "qnli": (0.98, 0.7),
        "cola": (0.95, 0.7),
    }


def test_primary_metrics():
    primary = {name: task.primary_metric for name, task in TASKS.items() if task.primary_metric != "accuracy"}
    assert primary == {"cola": "matthews_correlation", "stsb": "spearmanr"}


def test_submission_file_names():
    files = {(name, split): file for name in TASKS for split, file in TASKS[name].submission_files.items()}
    assert files == {
        ("cola", "test"): "CoLA.tsv",
        ("sst2", "test"): "SST-2.tsv",
        ("mrpc", "test"): "MRPC.tsv",
        ("stsb", "test"): "STS-B.tsv",
        ("qqp", "test"): "QQP.tsv",
        ("mnli", "test_matched"): "MNLI-m.tsv",
        ("mnli", "test_mismatched"): "MNLI-mm.tsv",
        ("qnli", "test"): "QNLI.tsv",
        ("rte", "test"): "RTE.tsv",
        ("wnli", "test"): "WNLI.tsv",
    }


def test_number_of_labels_and_eval_splits():
    num_labels = {name: task.num_labels for name, task in TASKS.items() if task.num_labels != 2}
    assert num_labels == {"mnli": 3, "stsb": 1}
    assert [name for name, task in TASKS.items() if task.is_regression] == ["stsb"]
    assert get_task("mnli_10k").eval_splits == ("validation_matched", "validation_mismatched")
    assert get_task("rte").eval_splits == ("validation",)


def test_tasks_are_frozen_hashable_and_survive_pickling():
    task = get_task("mnli")
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.name = "rte"
    assert len({get_task("mnli"), task, get_task("rte")}) == 2
    assert pickle.loads(pickle.dumps(task)) == task


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("qnli", "qnli"),
        ("qnli_10k", "qnli"),
        ("qnli_10k_seed-1", "qnli"),
        ("movie_reviews", "movie_reviews"),
        ("movie_reviews_small", "movie_reviews"),
    ],
)
def test_suffix_keeps_its_name_and_takes_the_rest_from_the_base(name, base):
    task = get_task(name)
    assert task.name == name
    thresholds = TASKS[base].ptp_thresholds
    assert task.ptp_thresholds == (thresholds if name == base else None), "published for the whole task"
    assert dataclasses.replace(task, name=base, ptp_thresholds=thresholds) == TASKS[base]


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("qnl", "qnli"),
        ("QNLI", "qnli"),
        ("SST-2", "sst2"),
        ("qnli_", "qnli"),
        ("qnli10k", "qnli"),
        ("movie", "movie_reviews"),
    ],
)
def test_unknown_name_lists_the_tasks_and_the_closest(name, closest):
    with pytest.raises(ValueError, match=rf"closest: {closest}\)") as error:
        get_task(name)
    assert all(task in str(error.value) for task in TASKS)


@pytest.mark.parametrize("name", ["", "rte_../mrpc", "../rte", "rte\n", "mnli_"])
def test_a_name_is_never_a_path(name):
    with pytest.raises(ValueError, match="unknown task"):
        get_task(name)


@pytest.mark.parametrize("folder", [*GLUE_TASKS, "qnli_10k", "mnli_10k", "qqp_10k"])
def test_columns_and_label_names_are_those_of_the_data(folder):
    files = sorted((DATA_DIR / folder).glob("*.parquet"))
    if not files:
        pytest.skip(f"no parquet files of {folder}; set PEAKD_DATA_DIR to a folder of GLUE tasks")
    parquet = pytest.importorskip("pyarrow.parquet")
    task = get_task(folder)
    assert {file.name.rsplit("-00000-", 1)[0] for file in files} >= {"train", *task.eval_splits}
    for file in files:
        schema = parquet.read_schema(file)
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        assert tuple(schema.names) == (*task.text_columns, "label", "idx")
        assert tuple(features["label"].get("names", ())) == task.label_names


LABELS = np.array([0, 1, 1, 0, 1, 0, 1, 1])
PREDICTIONS = np.array([0, 1, 0, 0, 1, 1, 1, 0])
SCORES = np.array([0.0, 2.5, 4.75, 1.0, 5.0, 3.2, 2.5, 0.4])
PREDICTED_SCORES = np.array([0.3, 2.0, 4.1, 1.9, 3.9, 3.3, 2.0, -0.2])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cola", {"matthews_correlation": metrics.matthews_corrcoef(LABELS, PREDICTIONS)}),
        ("mrpc", {"accuracy": 5 / 8, "f1": metrics.f1_score(LABELS, PREDICTIONS)}),
        ("qqp_10k", {"accuracy": 5 / 8, "f1": metrics.f1_score(LABELS, PREDICTIONS)}),
        ("sst2", {"accuracy": 5 / 8}),
        ("rte", {"accuracy": 5 / 8}),
        ("wnli", {"accuracy": 5 / 8}),
        ("qnli_10k", {"accuracy": 5 / 8}),
        ("movie_reviews", {"accuracy": 5 / 8}),
    ],
)
def test_two_class_metrics(name, expected):
    result = compute_metrics(get_task(name), one_hot_logits(PREDICTIONS, 2), LABELS)
    assert result == pytest.approx(expected, abs=1e-12)
    assert all(type(value) is float for value in result.values())


def test_mrpc_by_hand():
    # 3 true positives, 1 false positive, 2 false negatives, 2 true negatives
    result = compute_metrics(get_task("mrpc"), one_hot_logits(PREDICTIONS, 2), LABELS)
    assert result == pytest.approx({"accuracy": 5 / 8, "f1": 6 / 9})
    matthews = compute_metrics(get_task("cola"), one_hot_logits(PREDICTIONS, 2), LABELS)["matthews_correlation"]
    assert matthews == pytest.approx((3 * 2 - 1 * 2) / math.sqrt(4 * 5 * 3 * 4))


def test_three_classes():
    logits = [[0.1, 0.2, 0.3], [5, 4, 3], [-1, 0, -2], [0, -math.inf, -1]]
    assert compute_metrics(get_task("mnli"), logits, [2, 0, 2, 0]) == {"accuracy": 0.75}


def test_regression():
    result = compute_metrics(get_task("stsb"), PREDICTED_SCORES[:, None], SCORES)
    assert result == pytest.approx(
        {
            "pearson": stats.pearsonr(SCORES, PREDICTED_SCORES).statistic,
            "spearmanr": stats.spearmanr(SCORES, PREDICTED_SCORES).statistic,
        },
        abs=1e-12,
    )
    assert list(result) == ["pearson", "spearmanr"]
    assert result["pearson"] != pytest.approx(result["spearmanr"], abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_a_training_run(dtype):
    logits = torch.tensor(one_hot_logits(PREDICTIONS, 2), dtype=dtype, requires_grad=True)
    assert compute_metrics(get_task("sst2"), logits, torch.tensor(LABELS)) == {"accuracy": 5 / 8}


@pytest.mark.parametrize(
    ("name", "logits", "labels", "expected"),
    [
        ("cola", one_hot_logits([1] * 8, 2), LABELS, {"matthews_correlation": 0.0}),
        ("cola", one_hot_logits(PREDICTIONS, 2), [1] * 8, {"matthews_correlation": 0.0}),
        ("cola", one_hot_logits([1] * 8, 2), [1] * 8, {"matthews_correlation": 0.0}),
        ("mrpc", one_hot_logits([0] * 8, 2), LABELS, {"accuracy": 3 / 8, "f1": 0.0}),
        ("mrpc", one_hot_logits([0] * 8, 2), [0] * 8, {"accuracy": 1.0, "f1": 0.0}),
        ("stsb", np.full((8, 1), 2.7), SCORES, {"pearson": 0.0, "spearmanr": 0.0}),
        ("stsb", PREDICTED_SCORES[:, None], [1.0] * 8, {"pearson": 0.0, "spearmanr": 0.0}),
        ("stsb", [[1.0]], [2.0], {"pearson": 0.0, "spearmanr": 0.0}),
        ("cola", [[1.0, 0.0]], [0], {"matthews_correlation": 0.0}),
    ],
)
def test_degenerate_predictions_give_zero_without_warning(name, logits, labels, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compute_metrics(get_task(name), logits, labels) == expected


def test_nearly_constant_scores_do_not_warn():
    scores = 2.0 + np.array([0, 1, 0, 1, 0, 1, 0, 1]) * 4e-16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compute_metrics(get_task("stsb"), scores[:, None], SCORES)
    assert all(-1 <= value <= 1 for value in result.values())


@pytest.mark.parametrize(
    ("name", "logits", "labels", "message"),
    [
        ("rte", np.zeros((4, 3)), [0, 1, 0, 1], r"logits \[4, 3\].*rte: pass logits \[N, 2\]"),
        ("rte", np.zeros(4), [0, 1, 0, 1], r"logits \[4\]"),
        ("stsb", np.zeros((4, 2)), [0.0, 1.0, 2.0, 3.0], r"pass logits \[N, 1\]"),
        ("rte", np.zeros((4, 2)), [0, 1, 0], r"labels \[3\] do not fit"),
        ("rte", np.zeros((0, 2)), [], "needs a sample"),
        ("rte", [[0.0, math.nan]], [0], "the model has diverged"),
        ("stsb", [[math.inf], [0.0]], [1.0, 2.0], "the model has diverged"),
        ("stsb", [[1.0], [0.0]], [1.0, math.nan], "check the data files"),
        ("rte", np.zeros((2, 2)), [-1, -1], r"label -1 of rte.*0 to 1; GLUE test splits.*on validation$"),
        ("mnli", np.zeros((2, 3)), [0, 3], r"label 3 of mnli.*on validation_matched$"),
        ("rte", np.zeros((2, 2)), [0, 0.5], r"label 0.5 of rte"),
    ],
)
def test_errors(name, logits, labels, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics(get_task(name), logits, labels)
