"""Damaged weights: each file is refused in one line with a remedy, or the model has the weights that it stores."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import FACTOR
from model_folders import assert_builds, flips, read_or_refuse, save_both
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, BertModel

from peakd_ds.model.build import load_pretrained


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


def save(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    weights = {name: weight.clone().contiguous() for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
DTYPES = sorted(
    FLOATS | {torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn}, key=str
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", ["one", "all"])
def test_stored_dtypes(folder: Path, dtype: torch.dtype, which: str) -> None:
    weights = load_file(folder / "model.safetensors")
    for name in list(weights) if which == "all" else [next(name for name in weights if "layer.1" in name)]:
        weights[name] = weights[name].to(dtype)
    save(folder, weights)
    found = read_or_refuse(folder, str(dtype))
    assert (found is not None) == (dtype in FLOATS)
    if found is not None:
        assert_builds(*found)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_values_that_are_not_finite(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    for name in list(weights)[:: 1 if FACTOR > 1 else 4]:
        damaged = weights[name].to(torch.float64 if value == 1e300 else torch.float32).clone()
        damaged.view(-1)[-1] = value
        save(folder, {**weights, name: damaged})
        assert read_or_refuse(folder, name) is None, name


def test_weights_missing_renamed_or_of_another_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    for name, weight in list(weights.items())[:: 1 if FACTOR > 1 else 4]:
        others = {other: tensor for other, tensor in weights.items() if other != name}
        for changes in ({}, {f"{name}_": weight}, {name: weight[:-1]}, {name: weight[None]}):
            save(folder, {**others, **changes})
            assert read_or_refuse(folder, name) is None, name


def test_names_that_mean_the_same(folder: Path) -> None:
    """Names with and without prefix and the old gamma and beta are right, but not two of them for one weight."""
    original = load_file(folder / "model.safetensors")
    plain = {name.removeprefix("bert."): weight for name, weight in original.items()}
    prefixed = {name if name.startswith("classifier") else f"bert.{name}": weight for name, weight in plain.items()}
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): weight
        for name, weight in original.items()
    }
    heads = {"cls.predictions.bias": torch.zeros(3), "embeddings.position_ids": torch.arange(128)[None]}
    for weights in (plain, prefixed, old, {**prefixed, **heads}):
        save(folder, weights)
        found = read_or_refuse(folder, "names")
        assert found is not None
        model_class = BertForSequenceClassification if found[0].is_classifier else BertModel
        model = load_pretrained(model_class, str(folder), "teacher", config=found[0].config)
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, plain[name.removeprefix("bert.")]), name
    for weights in ({**plain, **prefixed}, {**old, **original}):
        save(folder, weights)
        assert read_or_refuse(folder, "twice") is None


def test_changed_bytes_of_the_weights(folder: Path) -> None:
    """Of the header for the most part: a number in the data that is finite is as good as another."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for number, damaged in enumerate(flips(content[:header], "weights")):
        damaged = damaged + content[header:] if number % 8 else content[: 997 * number]
        file.write_bytes(damaged)
        found = read_or_refuse(folder, str(damaged[:header]))
        if found is not None:
            with safe_open(file, "pt") as opened:
                assert len(opened.keys()) > 10
            assert_builds(*found)


@pytest.mark.parametrize("damage", ["none", "outside", "missing", "not there", "no map", "a number"])
def test_weights_in_several_files(encoder: Path, damage: str) -> None:
    weights = load_file(encoder / "model.safetensors")
    (encoder / "model.safetensors").unlink()
    names = list(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, encoder / file, metadata={"format": "pt"})
    first, second = parts
    weight_map: Any = {name: file for file, part in parts.items() for name in part}
    if damage == "outside":
        shutil.move(encoder / second, encoder.parent / second)
        weight_map = {name: file if file == first else f"../{file}" for name, file in weight_map.items()}
    elif damage == "missing":
        (encoder / second).unlink()
    elif damage == "not there":
        weight_map = {name: file for name, file in weight_map.items() if file == first}
    index = {"metadata": {}, "weight_map": 3 if damage == "a number" else weight_map}
    text = json.dumps({} if damage == "no map" else index)
    (encoder / "model.safetensors.index.json").write_text(text)
    found = read_or_refuse(encoder, damage)
    assert (found is not None) == (damage == "none")
    if found is not None:
        model = load_pretrained(BertModel, str(encoder), "teacher", config=found[0].config)
        assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_a_head_that_no_architecture_names(good: dict[str, Path], tmp_path: Path) -> None:
    """It would be loaded as the new head of a teacher that is fine-tuned."""
    folder = Path(shutil.copytree(good["classifier"], tmp_path / "classifier"))
    document = json.loads((folder / "config.json").read_text())
    for names in (None, [], ["BertModel"], ["BertForTokenClassification"]):
        (folder / "config.json").write_text(json.dumps({**document, "architectures": names}))
        assert read_or_refuse(folder, str(names)) is None
