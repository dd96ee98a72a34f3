"""Damaged models: each is refused in one line with a remedy, or loads what its files say.

Every key of config.json takes values of every JSON type and extreme numbers; tokenizers and weights are cut, changed
and rewritten. What is accepted is compared with the undamaged model, or with an independent reading of the files.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import FACTOR, assert_refused, assert_refused_or_right, run, snapshot
from model_folders import SENTENCES, TASK, assert_builds, flips, read, read_or_refuse, rows_of, save_both, settings_of
from transformers import BertConfig, PreTrainedTokenizerBase

from peakd_ds.model import contract
from peakd_ds.model.config_file import SETTINGS, Pretrained
from peakd_ds.model.config_rules import FACTS, ONLY_VALUES
from peakd_ds.programs import scripts

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 100, 2**31, 2**63, 10**30, 0.5, -0.5, 1e-12, 1.0, 1e308, math.nan, math.inf),
    *("", "x", "2", "relu", "float32", "int8", "a\nb", "\u0000", "[CLS]", "x" * 10_000),
    *([], [3], ["x"], [[]], {}, {"0": "x"}, {"0": "x", "1": "x"}, {"x": 1}, {"__float__": "NaN"}),
)
OTHER_KEYS = (
    "__class__ __init__ _attn_implementation _attn_implementation_internal _name_or_path attn_implementation "
    "attribute_map embedding_size finetuning_task from_dict get_text_config gradient_checkpointing keys_to_ignore "
    "layer_norm_epsilon max_length model_type n_layer name_or_path num_effective_layers output_attentions "
    "output_hidden_states output_past sharing sub_configs task_specific_params to_dict torchscript "
    "transformers_version transformers_weights unknown use_bfloat16 validate_architecture"
).split()
KEYS = sorted({*SETTINGS, *FACTS, *ONLY_VALUES, *OTHER_KEYS})


def some_values(number: int, step: int) -> tuple[Any, ...]:
    """Every `step`-th value, others for each number; all of them under `make fuzz`."""
    return VALUES if FACTOR > 1 else VALUES[number % step :: step]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An encoder, and a classifier for rte."""
    return save_both(tmp_path_factory.mktemp("good"))


@pytest.fixture(params=["encoder", "classifier"])
def folder(request: pytest.FixtureRequest, good: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of one of them, to damage."""
    return Path(shutil.copytree(good[request.param], tmp_path / request.param))


@pytest.fixture
def encoder(good: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the encoder, to damage."""
    return Path(shutil.copytree(good["encoder"], tmp_path / "encoder"))


def model_alone(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Pretrained:
    """The model, checked with a tokenizer that is loaded already."""
    source = contract.find_encoder(str(folder), "teacher")
    contract.check_tokenizer(tokenizer, source)
    contract.check_contract(settings_of(folder), TASK, source, source, tokenizer)
    return source


def config_of(document: dict[str, Any]) -> dict[str, Any]:
    """What the settings of a config.json should give, by key."""
    default = BertConfig().to_dict()
    return {name: document.get(name, default[name]) for name in SETTINGS}


# -- config.json -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_every_value_of_a_setting(encoder: Path, good: dict[str, Path], key: str) -> None:
    file = encoder / "config.json"
    document = json.loads(file.read_text())
    undamaged, tokenizer = read(good["encoder"])
    for value in some_values(KEYS.index(key), 4) if key in OTHER_KEYS else VALUES:
        file.write_text(json.dumps({**document, key: value}))
        source = read_or_refuse(encoder, f"{key} {value!r}"[:200], lambda folder: model_alone(folder, tokenizer))
        if source is not None:
            expected = config_of({**document, key: value})
            assert {name: getattr(source.config, name) for name in expected} == expected
            if expected == config_of(document):
                facts = {"architectures", "id2label", "label2id", "_name_or_path", "problem_type"}
                theirs, ours = source.config.to_dict(), undamaged.config.to_dict()
                assert all(theirs[name] == ours[name] for name in ours.keys() - facts)
            else:
                assert_builds(source, tokenizer)


@pytest.mark.parametrize("key", sorted(FACTS))
def test_every_value_of_a_fact_about_a_classifier(good: dict[str, Path], tmp_path: Path, key: str) -> None:
    folder = Path(shutil.copytree(good["classifier"], tmp_path / "classifier"))
    file = folder / "config.json"
    document = json.loads(file.read_text())
    for value in VALUES:
        file.write_text(json.dumps({**document, key: value}))
        found = read_or_refuse(folder, f"{key} {value!r}"[:200])
        if found is not None:
            assert found[0].is_classifier and found[0].config.num_labels == 2
            assert tuple(found[0].config.id2label.values()) in (TASK.label_names, ("LABEL_0", "LABEL_1"))
            assert_builds(*found)


RAW_CONFIGS: dict[str, Callable[[str], bytes]] = {
    "empty": lambda text: b"",
    "a list": lambda text: b"[]",
    "a number": lambda text: b"3",
    "nested": lambda text: b'{"a": ' * 100_000,
    "nested and closed": lambda text: b"[" * 50_000 + b"]" * 50_000,
    "nested in a key": lambda text: text.replace("{", '{"a": ' + "[" * 5000 + "]" * 5000 + ",", 1).encode(),
    "utf-16": lambda text: text.encode("utf-16"),
    "latin-1": lambda text: text.replace("{", '{"a": "\u00e9",', 1).encode("latin-1"),
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "many digits": lambda text: text.replace("{", '{"hidden_size": ' + "9" * 5000 + ",", 1).encode(),
    "a key twice": lambda text: text.replace("{", '{"hidden_size": 16,', 1).encode(),
    "binary": lambda text: bytes(range(256)),
    "100,000 layers": lambda text: text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 100000').encode(),
    "1,000 layers": lambda text: text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 1000').encode(),
    "fewer layers than weights": lambda text: text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 1').encode(),
}


@pytest.mark.parametrize("name", RAW_CONFIGS)
def test_other_bytes_in_config_json(encoder: Path, name: str) -> None:
    file = encoder / "config.json"
    file.write_bytes(RAW_CONFIGS[name](file.read_text()))
    assert read_or_refuse(encoder, name) is None or name == "nested in a key"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_folder_in_place_of_a_file(encoder: Path, good: dict[str, Path], name: str) -> None:
    (encoder / name).unlink()
    (encoder / name).mkdir()
    found = read_or_refuse(encoder, name)
    assert (found is not None) == name.startswith("tokenizer")  # vocab.txt and BERT's settings give the same rows
    assert found is None or rows_of(found[1]) == rows_of(read(good["encoder"])[1])


def test_changed_bytes_of_config_json(folder: Path) -> None:
    file = folder / "config.json"
    for content in flips(file.read_bytes(), "config"):
        file.write_bytes(content)
        found = read_or_refuse(folder, content.decode(errors="replace"))
        if found is not None:
            expected = config_of(json.loads(content))
            assert {name: getattr(found[0].config, name) for name in expected} == expected
            assert_builds(*found)


# -- Tokenizers --------------------------------------------------------------------------------------------------------


def assert_tokenises(found: tuple[Pretrained, PreTrainedTokenizerBase], what: str) -> list[list[int]]:
    """The rows of the sentences, each [CLS] ... [SEP] ... [SEP] with ids in the table."""
    source, tokenizer = found
    rows = rows_of(tokenizer)
    for ids, types in zip(rows[: len(SENTENCES)], rows[len(SENTENCES) :], strict=True):
        assert len(ids) == len(types) <= 16 and set(types) == {0, 1} and types == sorted(types), what
        assert ids[0] == tokenizer.cls_token_id and ids.count(tokenizer.sep_token_id) == 2, what
        assert max(ids) < source.config.vocab_size, what
    return rows


TEXT_SETTINGS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars", "truncation_side", "tokenizer_class")
"""Settings of tokenizer_config.json that may change the rows."""


def test_every_value_of_a_tokenizer_setting(encoder: Path, good: dict[str, Path]) -> None:
    file = encoder / "tokenizer_config.json"
    document = json.loads(file.read_text())
    expected = rows_of(read(good["encoder"])[1])
    more = "added_tokens_decoder additional_special_tokens auto_map extra_special_tokens model_input_names padding_side"
    keys = sorted({*document, *TEXT_SETTINGS, *more.split(), "unknown", "vocab_file", "chat_template"})
    for number, key in enumerate(keys):
        for value in some_values(number, 7):
            file.write_text(json.dumps({**document, key: value}))
            what = f"{key} {value!r}"[:200]
            found = read_or_refuse(encoder, what)
            if found is not None:
                rows = assert_tokenises(found, what)
                assert rows == expected or key in TEXT_SETTINGS, what


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Keys that lead to each value in a JSON document; of a long collection only the first."""
    yield path
    items = enumerate(document) if isinstance(document, list) else getattr(document, "items", tuple)()
    for key, value in list(items)[:8]:
        yield from places(value, (*path, key))


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = dict(document) if isinstance(document, dict) else list(document)
    changed[path[0]] = replaced(document[path[0]], path[1:], value)
    return changed


def test_every_place_of_tokenizer_json(encoder: Path) -> None:
    file = encoder / "tokenizer.json"
    document = json.loads(file.read_text())
    for number, path in enumerate(places(document)):
        for value in some_values(number, 18):
            file.write_text(json.dumps(replaced(document, path, value)))
            found = read_or_refuse(encoder, f"{path} {value!r}"[:200])
            if found is not None:
                assert_tokenises(found, f"{path} {value!r}"[:200])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.txt"])
def test_changed_bytes_of_a_tokenizer(encoder: Path, name: str) -> None:
    if name == "vocab.txt":
        (encoder / "tokenizer.json").unlink()
    content = (encoder / name).read_bytes()
    for damaged in flips(content, name):
        (encoder / name).write_bytes(damaged)
        found = read_or_refuse(encoder, damaged.decode(errors="replace"))
        if found is not None:
            assert_tokenises(found, damaged.decode(errors="replace"))


VOCABULARIES: dict[str, Callable[[list[str]], bytes]] = {
    "empty": lambda words: b"",
    "binary": lambda words: bytes(range(256)) * 10,
    "zeros": lambda words: bytes(5000),
    "carriage returns": lambda words: "\r\n".join(words).encode(),
    "utf-16": lambda words: "\n".join(words).encode("utf-16"),
    "no [CLS]": lambda words: "\n".join(word for word in words if word != "[CLS]").encode(),
    "no [SEP] and a free row": lambda words: "\n".join(word for word in words if word != "[SEP]").encode(),
    "too many": lambda words: "\n".join([*words, "one", "more"]).encode(),
    "special tokens alone": lambda words: "\n".join(words[:5]).encode(),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_vocabularies(encoder: Path, good: dict[str, Path], name: str) -> None:
    (encoder / "tokenizer.json").unlink()
    file = encoder / "vocab.txt"
    file.write_bytes(VOCABULARIES[name](file.read_text().split()))
    found = read_or_refuse(encoder, name)
    assert (found is not None) == (name == "carriage returns")
    assert found is None or rows_of(found[1]) == rows_of(read(good["encoder"])[1])


# -- Programs ----------------------------------------------------------------------------------------------------------

CHANGES: dict[str, Any] = {
    "num_attention_heads": 0,
    "num_hidden_layers": 100_000,
    "hidden_act": "nonsense",
    "return_dict": False,
    "architectures": 3,
    "chunk_size_feed_forward": 7,
    "position_embedding_type": "relative_key",
    "auto_map": {"AutoConfig": "evil.Config"},
    "pad_token_id": 10_000,
    "id2label": {"0": "x", "2": "y"},
    "problem_type": "none",
    "dtype": "nonsense",
    "hidden_size": -32,
}


OPTIONS = ("student_init", "model", "plan", "teacher")


@pytest.mark.parametrize(
    ("option", "key"), [(OPTIONS[number % 4], key) for number, key in enumerate((*CHANGES, "tokenizer_class") * 2)]
)
def test_programs_refuse(good: dict[str, Path], tiny_data: Path, tmp_path: Path, option: str, key: str) -> None:
    kind = "classifier" if option == "model" else "encoder"
    folder = Path(shutil.copytree(good[kind], tmp_path / "damaged"))
    file = folder / ("tokenizer_config.json" if key == "tokenizer_class" else "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), key: CHANGES.get(key, 3)}))
    before = snapshot(tmp_path)
    if option == "model":
        words = ["--model", str(folder), "--task", "rte", "--data_dir", str(tiny_data), "--max_seq_length", "32"]
        outcome = run(words, scripts.evaluate)
    elif option == "plan":
        outcome = run(["--teacher", str(folder), "--max_seq_length", "32", "--num_hidden_layers", "1"], scripts.plan)
    else:
        models = {"teacher": good["encoder"], option: folder}
        words = ["--task", "rte", "--data_dir", str(tiny_data), "--run_dir", str(tmp_path / "run"), "--dry_run"]
        words += ["--num_hidden_layers", "1", "--max_seq_length", "32", "--dtype", "fp32"]
        outcome = run([*words, *(word for name, path in models.items() for word in (f"--{name}", str(path)))])
    if option == "plan" and key == "tokenizer_class":
        assert_refused_or_right(outcome)  # a plan needs no tokenizer
    else:
        assert_refused(outcome, str(folder))
    assert snapshot(tmp_path) == before
