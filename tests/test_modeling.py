"""Layer pairs, the student made of a teacher's layers, and what the engine trains beside it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_encoder
from torch import nn
from transformers import BertForSequenceClassification, BertModel

from peakd_ds.command_line import parse
from peakd_ds.config import RunConfig
from peakd_ds.data.tasks import TASKS, get_task
from peakd_ds.errors import UserError
from peakd_ds.model import contract
from peakd_ds.model.build import (
    MatchedStudent,
    build_student,
    build_teacher,
    layer_pairs,
    load_student_body,
    ptp_head,
    task_head,
)
from peakd_ds.packed.packing import pack, padded
from peakd_ds.ptp import NUM_PTP_LABELS
from peakd_ds.sps import SPSBertForSequenceClassification, execution_order


def effective_depth(num_stored: int, sharing: str) -> int:
    return len(execution_order(num_stored, sharing))


def settings(encoder: Path, words: str = "") -> RunConfig:
    required = ["--task", "rte", "--teacher", str(encoder), "--run_dir", "unused"]
    return parse([*required, "--num_hidden_layers", "2", *words.split()])


def make_student(
    encoder: Path, words: str = "", head: dict[str, Any] | None = None
) -> SPSBertForSequenceClassification:
    init = contract.find_encoder(str(encoder), "student_init")
    return build_student(settings(encoder, words), init, head or task_head(get_task("rte")))


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# -- Layer pairs -------------------------------------------------------------------------------------------------------

# 1-based, of a teacher of 12 layers: the teacher layers in Pea-KD's table, over the effective depth of the student.
SKIP_OF_12 = {
    ("sps", 1): [(1, 6)],
    ("sps", 2): [(1, 3), (2, 6), (3, 9)],
    ("sps", 3): [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)],
    ("sps", 6): [(3, 4), (6, 8)],
    ("none", 1): [],
    ("none", 2): [(1, 6)],
    ("none", 3): [(1, 4), (2, 8)],
    ("none", 6): [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)],
    ("sequence", 3): [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)],
    ("none", 5): [],
    ("none", 12): [(i, i) for i in range(1, 12)],
}


@pytest.mark.parametrize(("sharing", "num_stored"), SKIP_OF_12)
def test_skip_with_a_teacher_of_12(sharing: str, num_stored: int) -> None:
    depth = effective_depth(num_stored, sharing)
    assert list(layer_pairs("skip", depth, 12)) == SKIP_OF_12[sharing, num_stored]


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        (6, 6, [(i, i) for i in range(1, 6)]),
        (4, 6, [(2, 3)]),
        (9, 6, [(3, 2), (6, 4)]),  # a student that runs more layers than the teacher
        (12, 4, [(3, 1), (6, 2), (9, 3)]),
        (7, 12, []),
    ],
)
def test_skip_with_other_teachers(student: int, teacher: int, pairs: list[tuple[int, int]]) -> None:
    assert list(layer_pairs("skip", student, teacher)) == pairs


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        (3, 12, [(1, 10), (2, 11)]),
        (6, 12, [(i, 6 + i) for i in range(1, 6)]),
        (4, 4, [(1, 1), (2, 2), (3, 3)]),
        (1, 12, []),
    ],
)
def test_last(student: int, teacher: int, pairs: list[tuple[int, int]]) -> None:
    assert list(layer_pairs("last", student, teacher)) == pairs


@pytest.mark.parametrize("kind", ["skip", "last"])
def test_the_last_layers_are_never_matched(kind: str) -> None:
    for student in range(1, 13):
        for teacher in range(student, 25):
            pairs = layer_pairs(kind, student, teacher)
            assert all(1 <= i < student and 1 <= j < teacher for i, j in pairs)


def test_last_with_a_shallower_teacher() -> None:
    with pytest.raises(UserError, match="the teacher has 4 layers and the student runs 6; use skip or a list"):
        layer_pairs("last", 6, 4)


def test_a_list_is_taken_as_it_is() -> None:
    pairs = ((4, 1), (1, 12), (6, 12))
    assert layer_pairs(pairs, 6, 12) == pairs


@pytest.mark.parametrize("pair", [(0, 1), (1, 0), (7, 1), (1, 13), (-1, 3)])
def test_a_list_out_of_range(pair: tuple[int, int]) -> None:
    with pytest.raises(UserError) as caught:
        layer_pairs(((1, 1), pair), 6, 12)
    message = str(caught.value)
    assert f"--layer_map pair {pair[0]}:{pair[1]} is out of range; the student runs layers 1 to 6" in message
    assert "the teacher 1 to 12" in message


# -- The student -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "layers"), [("", [1, 2]), ("--init_layers 2,4", [2, 4]), ("--init_layers 3,1", [3, 1])]
)
def test_student_starts_from_the_encoder(tiny_encoder: Path, words: str, layers: list[int]) -> None:
    encoder = BertModel.from_pretrained(tiny_encoder)
    student = make_student(tiny_encoder, words)
    assert same(student.bert.embeddings, encoder.embeddings)
    assert encoder.pooler is not None and same(student.bert.pooler, encoder.pooler)
    assert len(student.bert.encoder.layer) == 2
    for layer, number in zip(student.bert.encoder.layer, layers, strict=True):
        assert same(layer, encoder.encoder.layer[number - 1])
        assert not same(layer, encoder.encoder.layer[number % 4])
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


def test_student_starts_from_a_classifier_s_body(tiny_teacher: Any) -> None:
    teacher = BertForSequenceClassification.from_pretrained(tiny_teacher("rte"))
    student = make_student(tiny_teacher("rte"))
    assert same(student.bert.embeddings, teacher.bert.embeddings)
    assert not torch.equal(student.classifier.weight, teacher.classifier.weight), "the head is new"


def test_new_weights_follow_from_the_seed_alone(tiny_encoder: Path) -> None:
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(make_student(tiny_encoder).classifier.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize(
    ("words", "sharing", "shuffle_qk", "depth"),
    [
        ("", "sps", True, 4),
        ("--no_shuffle_qk", "sps", False, 4),
        ("--sharing none", "none", False, 2),
        ("--sharing cycle_rev --shuffle_qk", "cycle_rev", True, 4),
    ],
)
def test_sharing_reaches_the_student(
    tiny_encoder: Path, words: str, sharing: str, shuffle_qk: bool, depth: int
) -> None:
    config = make_student(tiny_encoder, words).config
    assert (config.sharing, config.shuffle_qk, config.num_effective_layers) == (sharing, shuffle_qk, depth)
    assert config.num_hidden_layers == 2


def test_dropout_setting_wins_over_the_encoder_s(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2)
    for words, hidden, attention, head in (
        ("", 0.3, 0.2, 0.3),
        ("--dropout 0", 0, 0, 0),
        ("--dropout 0.4", 0.4, 0.4, 0.4),
    ):
        student = make_student(encoder, words)
        rates = {name: m.p for name, m in student.named_modules() if isinstance(m, nn.Dropout)}
        assert rates.pop("dropout") == head
        assert {p for name, p in rates.items() if "attention.self" in name} == {attention}
        assert {p for name, p in rates.items() if "attention.self" not in name} == {hidden}


@pytest.mark.parametrize("name", TASKS)
def test_heads_have_the_task_s_labels(tiny_encoder: Path, name: str) -> None:
    task = get_task(name)
    config = make_student(tiny_encoder, head=task_head(task)).config
    assert config.num_labels == task.num_labels
    if task.is_regression:
        assert config.problem_type == "regression"
    else:
        assert config.id2label == dict(enumerate(task.label_names))
        assert config.label2id == {label: number for number, label in enumerate(task.label_names)}
        assert config.problem_type == "single_label_classification"


def test_label_names_are_not_inherited_from_a_teacher_of_another_task(tiny_teacher: Any) -> None:
    config = make_student(tiny_teacher("mnli"), head=task_head(get_task("rte"))).config
    assert config.id2label == {0: "entailment", 1: "not_entailment"}
    assert make_student(tiny_teacher("rte"), head=ptp_head()).config.num_labels == NUM_PTP_LABELS
    config = make_student(tiny_teacher("rte"), head=task_head(get_task("stsb"))).config
    assert (config.num_labels, config.problem_type) == (1, "regression")


def test_teacher_gets_the_task_s_head(tiny_encoder: Path, tiny_teacher: Any) -> None:
    task = get_task("mnli")
    fresh = build_teacher(settings(tiny_encoder), task, contract.find_encoder(str(tiny_encoder), "teacher"))
    assert fresh.config.id2label == dict(enumerate(task.label_names)) and fresh.classifier.out_features == 3
    folder = tiny_teacher("mnli")
    given = build_teacher(settings(folder), task, contract.find_encoder(str(folder), "teacher"))
    assert same(given, BertForSequenceClassification.from_pretrained(folder))


def test_student_saved_and_loaded_is_the_same(tiny_encoder: Path, tmp_path: Path) -> None:
    student = make_student(tiny_encoder, "--init_layers 4,2").eval()
    student.save_pretrained(tmp_path / "student")
    loaded = SPSBertForSequenceClassification.from_pretrained(tmp_path / "student")
    assert same(student, loaded)
    saved = json.loads((tmp_path / "student" / "config.json").read_text())
    assert saved["architectures"] == ["SPSBertForSequenceClassification"] and saved["model_type"] == "sps_bert"
    assert saved["id2label"] == {"0": "entailment", "1": "not_entailment"}


def test_body_of_a_saved_student_leaves_the_head(tiny_encoder: Path, tmp_path: Path) -> None:
    pretrained = make_student(tiny_encoder, head=ptp_head())
    with torch.no_grad():
        for parameter in pretrained.parameters():
            parameter.add_(1.0)
    pretrained.save_pretrained(tmp_path / "ptp")
    student = make_student(tiny_encoder)
    head = student.classifier.weight.clone()
    load_student_body(student, tmp_path / "ptp")
    assert same(student.bert, pretrained.bert)
    assert torch.equal(student.classifier.weight, head) and student.classifier.out_features == 2


# -- What is found -----------------------------------------------------------------------------------------------------


def test_encoders_and_classifiers_are_told_apart(tiny_encoder: Path, tiny_teacher: Any) -> None:
    assert not contract.find_encoder(str(tiny_encoder), "teacher").is_classifier
    assert contract.find_encoder(str(tiny_teacher("sst2")), "teacher").is_classifier


def test_an_encoder_that_lacks_weights(tiny_encoder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    encoder = save_encoder(tmp_path / "encoder")
    weights = load_file(encoder / "model.safetensors")
    del weights["encoder.layer.2.output.dense.weight"]
    save_file(weights, encoder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights, encoder\.layer\.2\.output\.dense\.weight among them"):
        make_student(encoder)
    for name in [name for name in weights if name.startswith("pooler.")]:
        del weights[name]
    weights["encoder.layer.2.output.dense.weight"] = torch.zeros(32, 64)
    save_file(weights, encoder / "model.safetensors", metadata={"format": "pt"})
    make_student(encoder)  # some BERTs have no pooler; a new one is trained


def test_an_old_model_of_the_hub(tmp_path: Path) -> None:
    """Settings that change nothing, no model_type, gamma and beta, and position ids beside the weights."""
    from safetensors.torch import load_file, save_file

    encoder = save_encoder(tmp_path / "encoder")
    document = json.loads((encoder / "config.json").read_text())
    del document["model_type"]
    document |= {"position_embedding_type": "absolute", "gradient_checkpointing": False, "torch_dtype": "float16"}
    document |= {"pruned_heads": {}, "output_past": True, "attention_probs_dropout_prob": 0, "finetuning_task": None}
    (encoder / "config.json").write_text(json.dumps({**document, "architectures": ["BertForMaskedLM"]}))
    weights = load_file(encoder / "model.safetensors")
    renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {}
    for name, tensor in weights.items():
        if not name.startswith("pooler."):
            end = next((end for end in renamed if name.endswith(end)), "")
            old[f"bert.{name.removesuffix(end)}{renamed.get(end, '')}"] = tensor
    old |= {"bert.embeddings.position_ids": torch.arange(128)[None], "cls.predictions.bias": torch.zeros(9)}
    save_file(old, encoder / "model.safetensors", metadata={"format": "pt"})
    student = make_student(encoder)
    assert torch.equal(student.bert.embeddings.word_embeddings.weight, weights["embeddings.word_embeddings.weight"])
    for layer, norm in ((0, "attention.output"), (1, "output")):
        name = f"encoder.layer.{layer}.{norm}.LayerNorm.weight"
        assert torch.equal(student.bert.get_parameter(name), weights[name])


# -- Hidden states -----------------------------------------------------------------------------------------------------


@pytest.fixture
def inputs() -> dict[str, Any]:
    ids = [np.random.default_rng(n).integers(5, 50, n) for n in (7, 4, 5)]
    return pack(ids, [np.zeros_like(row) for row in ids])


@pytest.mark.parametrize("hidden_loss", ["cls", "tokens"])
@torch.no_grad()
def test_matched_student_gives_logits_and_chosen_layers(
    tiny_encoder: Path, inputs: dict[str, Any], hidden_loss: str
) -> None:
    student = make_student(tiny_encoder).eval()
    pairs = ((3, 4), (1, 2))
    matched = MatchedStudent(student, pairs, 32, hidden_loss).eval()
    logits, hidden = matched(**inputs)
    plain = student(**padded(inputs), output_hidden_states=True)
    torch.testing.assert_close(logits, plain.logits, rtol=1e-6, atol=1e-6)
    expected = [plain.hidden_states[layer] for layer in (3, 1)]
    assert len(plain.hidden_states) == 5
    for states, whole in zip(hidden, expected, strict=True):
        theirs = (
            whole[:, 0]
            if hidden_loss == "cls"
            else inputs["packing"].unpad(nn.functional.pad(whole, (0, 0, 0, 25)))[None]
        )
        torch.testing.assert_close(states, theirs, rtol=1e-6, atol=1e-6)
    assert len(matched.projections) == 0, "equal sizes need none"


@pytest.mark.parametrize("hidden_loss", ["cls", "tokens"])
def test_projections_where_hidden_sizes_differ(narrow_encoder: Path, inputs: dict[str, Any], hidden_loss: str) -> None:
    student = make_student(narrow_encoder)
    before = set(student.state_dict())
    matched = MatchedStudent(student, ((1, 1), (2, 2)), 32, hidden_loss)
    assert len(matched.projections) == 2
    _, hidden = matched(**inputs)
    assert [states.shape for states in hidden] == [(3, 32) if hidden_loss == "cls" else (1, 16, 32)] * 2
    torch.stack(hidden).sum().backward()
    assert all(projection.weight.grad is not None for projection in matched.projections)
    assert set(student.state_dict()) == before, "what is exported has none"
    assert not any("projection" in name for name in student.state_dict())
    trained = {name for name, _ in matched.named_parameters()}
    assert {"projections.0.weight", "projections.1.bias", "student.bert.pooler.dense.weight"} <= trained


def test_no_pairs_ask_for_no_hidden_states(tiny_encoder: Path, inputs: dict[str, Any]) -> None:
    student = make_student(tiny_encoder)
    matched = MatchedStudent(student, (), 48, "cls")
    logits, hidden = matched(**inputs)
    assert logits.shape == (3, 2) and hidden == [] and len(matched.projections) == 0
