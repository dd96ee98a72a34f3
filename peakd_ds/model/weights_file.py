"""The safetensors files of a model: names, shapes and dtypes, compared with what its config.json builds.

Names are compared without the prefix of a classifier and in today's spelling (`gamma` and `beta` are old ones).
"""

import copy
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, PreTrainedConfig
from transformers.utils import cached_file

from peakd_ds.errors import UserError, as_user_error

WHOLE, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
POOLER = "pooler."
"""A part of the base model that a pretrained encoder may lack; it is there as a whole or not at all."""
PRETRAINING = tuple(
    "cls. lm_head. pooler. predictions. sop_classifier. discriminator_predictions. generator_predictions. "
    "generator_lm_head. vocab_transform. vocab_layer_norm. vocab_projector. lm_predictions. mask_predictions. "
    "decoder.".split()
)
"""Heads of pretraining, which some classifiers still carry, and poolers that a family's classifier does not use."""
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids", "rotary_emb.inv_freq")
"""Ends of names of numbers that old checkpoints hold beside the weights; nothing reads them."""
OUTPUTS = ("classifier.weight", "classifier.out_proj.weight", "score.weight")
"""The last weights of a classifier, by family."""


@dataclass(frozen=True)
class Layout:
    """The weights of a classifier by their names without the base model's prefix, and what its parts are called."""

    prefix: str
    shapes: dict[str, tuple[int, ...]]
    head: frozenset[str]
    """Names outside the base model."""
    kind: str
    """What messages call such a model."""
    base_class: str
    ignored: tuple[str, ...]
    """First parts of the names of weights that a classifier does not read."""

    def short(self, name: str) -> str:
        """A stored name without prefix and in today's spelling."""
        return _short(name, self.prefix)

    @property
    def output(self) -> str:
        """Name of the last weight."""
        return next(name for name in OUTPUTS if name in self.shapes)

    @property
    def base_parts(self) -> tuple[str, ...]:
        """First parts of the base model's names, such as `encoder.`."""
        return tuple({f"{name.split('.')[0]}." for name in self.shapes if name not in self.head})


def check_weights(path: str, option: str, config: PreTrainedConfig, is_classifier: bool) -> frozenset[str]:
    """Names of the stored weights, none for a hub model without safetensors; their values are read once.

    Raises:
        UserError: there are no weights in a folder, a file is damaged, or a weight is missing, left over, of another
            shape, no floating-point number or not finite.
    """
    source = f"--{option} {path}"
    files = _find_files(path, source, is_classifier)
    with as_user_error(f"{source} has a config.json of which no model can be built", "fix its config.json"):
        layout = layout_of(config)
    where: dict[str, Path] = {}
    for file in files:
        with _opened(file) as weights:
            for name in tuple(weights.keys()):
                short = layout.short(name)
                if short in where:
                    raise UserError(f"{source} holds {name} twice, in {where[short]} and {file}; get the model again")
                where[short] = file
    if not where:
        return frozenset()
    if is_classifier and layout.output not in where:  # transformers would make a random head
        raise UserError(
            f"{source} is a classifier by its config.json, but its weights hold no {layout.output}; get the whole "
            f"model, or set architectures in config.json to {layout.base_class} to have it fine-tuned"
        )
    _check_names(config, layout, set(where), is_classifier, source)
    expected = {name: shape for name, shape in layout.shapes.items() if is_classifier or name not in layout.head}
    for file in dict.fromkeys(where.values()):
        _check_values(file, layout, expected)
    return frozenset(where)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The open safetensors file. Raises UserError if it is damaged."""
    with as_user_error(f"{file} is not a complete safetensors file", "get it again"), safe_open(file, "pt") as weights:
        yield weights


def _find_files(path: str, source: str, is_classifier: bool) -> list[Path]:
    """The safetensors files that transformers reads."""
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in (WHOLE, INDEX)):
        problem = f"{source} has no weights; the folder must hold model.safetensors beside config.json"
        if (Path(path) / PICKLED).is_file() or (Path(path) / f"{PICKLED}.index.json").is_file():
            kind = "AutoModelForSequenceClassification" if is_classifier else "AutoModel"
            code = f"import sys, transformers as t; t.{kind}.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[1])"
            raise UserError(f"{problem}, but has {PICKLED}; write it with: python -c '{code}' {shlex.quote(path)}")
        raise UserError(f"{problem} (save the model again with save_pretrained)")
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


def _short(name: str, prefix: str) -> str:
    return re.sub("gamma$", "weight", re.sub("beta$", "bias", name.removeprefix(prefix)))


def layout_of(config: PreTrainedConfig) -> Layout:
    """The weights of a classifier of this config, built on the meta device."""
    if isinstance(config, BertConfig):
        shapes = dict(_bert_shapes(config))
        head = frozenset(name for name in shapes if name.startswith("classifier."))
        return Layout("bert.", shapes, head, "BERT", "BertModel", ("cls.",))
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(copy.deepcopy(config))
    prefix = f"{model.base_model_prefix}."
    weights = {name: weight for name, weight in model.state_dict().items() if name not in model.all_tied_weights_keys}
    shapes = {_short(name, prefix): tuple(weight.shape) for name, weight in weights.items()}
    return Layout(
        prefix,
        shapes,
        frozenset(_short(name, prefix) for name in weights if not name.startswith(prefix)),
        f"{config.model_type} model",
        type(model.base_model).__name__,
        tuple(part for part in PRETRAINING if not any(name.startswith(part) for name in shapes)),
    )


def _bert_shapes(config: BertConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each weight of a classifier; one layer is built, on the meta device, and stands for all."""
    one = copy.copy(config)
    one.num_hidden_layers = 1
    with torch.device("meta"):
        weights = BertForSequenceClassification(one).state_dict()
    for name, weight in weights.items():
        for layer in range(config.num_hidden_layers) if ".layer.0." in name else (0,):
            yield _short(name, "bert.").replace("layer.0.", f"layer.{layer}.", 1), tuple(weight.shape)


def _check_names(config: PreTrainedConfig, layout: Layout, names: set[str], is_classifier: bool, source: str) -> None:
    """Raise UserError if weights are missing or left over: a student's source is loaded hours after the start."""
    missing = [name for name in layout.shapes if name not in names]
    if not is_classifier:  # an encoder may have been saved with the head of its pretraining, or without a pooler
        has_pooler = any(name.startswith(POOLER) for name in names)
        missing = [name for name in missing if name not in layout.head and (has_pooler or not name.startswith(POOLER))]
    if missing:
        raise UserError(f"{source} lacks {len(missing)} weights, {missing[0]} among them; get the complete model")
    read = ("",) if is_classifier else layout.base_parts
    extra = sorted(
        name
        for name in names
        if name.startswith(read)
        and not name.startswith(layout.ignored)
        and name not in layout.shapes
        and not name.endswith(BUFFERS)
    )
    if extra:
        raise UserError(
            f"{source} has {len(extra)} weights, {extra[0]} among them, that a {layout.kind} "
            f"of {config.num_hidden_layers} layers has not; fix num_hidden_layers in config.json, or take another "
            "model"
        )


def _check_values(file: Path, layout: Layout, expected: dict[str, tuple[int, ...]]) -> None:
    """Raise UserError for the first weight of a file with a wrong shape or dtype, or a value that is not finite."""
    limit = torch.finfo(torch.float32).max
    with _opened(file) as weights:
        for name in tuple(weights.keys()):
            shape = expected.get(layout.short(name))
            if shape is None:
                continue
            part = weights.get_slice(name)
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
