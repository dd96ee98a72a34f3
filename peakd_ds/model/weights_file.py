"""The safetensors files of a model: names, shapes and dtypes, compared with what its config.json builds.

Names are compared without the prefix of a classifier and in today's spelling (`gamma` and `beta` are old ones).
"""

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import cached_file

from peakd_ds.errors import UserError, as_user_error

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
OPTIONAL = ("pooler.", "classifier.")
"""Parts that a pretrained encoder may lack; each is there as a whole or not at all."""
ENCODER = ("embeddings.", "encoder.", "pooler.")
PRETRAINING = ("cls.",)
"""The head of BERT's pretraining, which some classifiers still carry."""
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
"""Whole numbers that old checkpoints hold beside the weights; nothing reads them."""


def check_weights(path: str, option: str, config: BertConfig, is_classifier: bool) -> frozenset[str]:
    """Names of the stored weights, none for a hub model without safetensors; their values are read once.

    Raises:
        UserError: there are no weights in a folder, a file is damaged, or a weight is missing, left over, of another
            shape, no floating-point number or not finite.
    """
    source = f"--{option} {path}"
    where: dict[str, Path] = {}
    for file in _find_files(path, source):
        with _opened(file) as weights:
            for name in tuple(weights.keys()):
                short = _short(name)
                if short in where:
                    raise UserError(f"{source} holds {name} twice, in {where[short]} and {file}; get the model again")
                where[short] = file
    if not where:
        return frozenset()
    if is_classifier and "classifier.weight" not in where:  # transformers would make a random head
        raise UserError(
            f"{source} is a classifier by its config.json, but its weights hold no classifier.weight; get the whole "
            "model, or set architectures in config.json to BertModel to have it fine-tuned"
        )
    expected = {name: shape for name, shape in _shapes(config) if is_classifier or not name.startswith("classifier.")}
    _check_names(config, expected, set(where), is_classifier, source)
    for file in dict.fromkeys(where.values()):
        _check_values(file, expected)
    return frozenset(where)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The open safetensors file. Raises UserError if it is damaged."""
    with as_user_error(f"{file} is not a complete safetensors file", "get it again"), safe_open(file, "pt") as weights:
        yield weights


def _find_files(path: str, source: str) -> list[Path]:
    """The safetensors files that transformers reads."""
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in (WHOLE, INDEX)):
        raise UserError(
            f"{source} has no weights; the folder must hold model.safetensors beside config.json (save the model "
            "again with save_pretrained)"
        )
    with as_user_error(f"{source} has weights that cannot be read", "get the model again"):
        whole = cached_file(path, WHOLE, _raise_exceptions_for_missing_entries=False)
        if whole is not None:
            return [Path(whole)]
        index = cached_file(path, INDEX, _raise_exceptions_for_missing_entries=False)
        if index is None:  # a hub model, whose pickled weights transformers may convert
            return []
        names = set(json.loads(Path(index).read_bytes())["weight_map"].values())
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{INDEX} names {name!r}, which is outside the folder")
        return [Path(str(cached_file(path, name))) for name in sorted(names)]


def _short(name: str) -> str:
    return re.sub("gamma$", "weight", re.sub("beta$", "bias", name.removeprefix("bert.")))


def _shapes(config: BertConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each weight of a classifier; one layer is built, on the meta device, and stands for all."""
    one = copy.copy(config)
    one.num_hidden_layers = 1
    with torch.device("meta"):
        weights = BertForSequenceClassification(one).state_dict()
    for name, weight in weights.items():
        for layer in range(config.num_hidden_layers) if ".layer.0." in name else (0,):
            yield _short(name).replace("layer.0.", f"layer.{layer}.", 1), tuple(weight.shape)


def _check_names(
    config: BertConfig, expected: dict[str, tuple[int, ...]], names: set[str], is_classifier: bool, source: str
) -> None:
    """Raise UserError if weights are missing or left over: a student's source is loaded hours after the start."""
    optional = {part for part in OPTIONAL if not is_classifier and not any(name.startswith(part) for name in names)}
    missing = [name for name in expected if name not in names and not name.startswith(tuple(optional))]
    if missing:
        raise UserError(f"{source} lacks {len(missing)} weights, {missing[0]} among them; get the complete model")
    read = ("",) if is_classifier else ENCODER  # an encoder may have been saved with the head of its pretraining
    extra = sorted(
        name
        for name in names
        if name.startswith(read) and not name.startswith(PRETRAINING) and name not in expected and name not in BUFFERS
    )
    if extra:
        raise UserError(
            f"{source} has {len(extra)} weights, {extra[0]} among them, that a BERT "
            f"of {config.num_hidden_layers} layers has not; fix num_hidden_layers in config.json, or take another "
            "model"
        )


def _check_values(file: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Raise UserError for the first weight of a file with a wrong shape or dtype, or a value that is not finite."""
    limit = torch.finfo(torch.float32).max
    with _opened(file) as weights:
        for name in tuple(weights.keys()):
            if _short(name) not in expected:
                continue
            part, shape = weights.get_slice(name), expected[_short(name)]
            if part.get_dtype() not in FLOAT_DTYPES:
                raise UserError(
                    f"{file} stores {name} as {part.get_dtype()}; weights must be floating-point numbers, one of "
                    f"{', '.join(FLOAT_DTYPES)}: take a model that is not quantised"
                )
            if tuple(part.get_shape()) != shape:
                raise UserError(
                    f"{file} has {name} of shape {list(part.get_shape())}, but its config.json makes it {list(shape)}; "
                    "get both from the same model"
                )
            low, high = (float(value) for value in torch.aminmax(weights.get_tensor(name)))
            if not (-limit <= low and high <= limit):  # also if they are NaN
                raise UserError(
                    f"{file} has values in {name} that are NaN, infinite or beyond fp32; take a model that has not "
                    "diverged"
                )
