"""Export finished models as Hugging Face folders, and as ONNX.

A student is saved as `sps_bert`, `sps_roberta` and so on (n stored layers; needs `import peakd_ds.sps` to load), or
unrolled to the plain class of its family at the effective depth, which transformers loads on its own.
"""

import contextlib
import copy
import functools
import importlib
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peakd_ds.families import SHARED
from peakd_ds.files import checked_folder, needs_space, whole_file, whole_folder
from peakd_ds.model.pooling import write_pooling
from peakd_ds.sps import SPSBertConfig, shared
from peakd_ds.sps.order import order_of

ONNX_TOLERANCE = 1e-4
"""Largest absolute difference of a logit between PyTorch and onnxruntime that `export_onnx` accepts."""

_LAYERS = "bert.encoder.layer."
_QUERY, _KEY = "attention.self.query", "attention.self.key"


def unroll(model: PreTrainedModel) -> PreTrainedModel:
    """A model of transformers' own class that computes the same logits without shared layers.

    It has one layer for each run of a stored layer, with query and key parameters swapped where that run swaps them.
    Labels, problem type, device, dtype and training mode are those of `model`, which is returned itself if it shares
    nothing and has transformers' class already.
    """
    config: Any = model.config
    if not config.model_type.startswith(SHARED):
        return model
    if isinstance(config, SPSBertConfig):
        state: Mapping[str, torch.Tensor] = _unrolled_state(model.state_dict(), order_of(config))
    else:
        state = shared.unrolled_state(model)
    # Exporting during training must not change the run's random numbers. The values drawn here are overwritten.
    with torch.random.fork_rng(devices=[]):
        plain = AutoModelForSequenceClassification.from_config(shared.plain_config(config))
    plain.config.architectures = [type(plain).__name__]
    nn.Module.to(plain, model.device, model.dtype)  # transformers' own `to` has no type signature
    plain.load_state_dict(state)
    return plain.train(model.training)


def _unrolled_state(state: Mapping[str, torch.Tensor], order: tuple[tuple[int, bool], ...]) -> dict[str, torch.Tensor]:
    """The state of the unrolled model, from the student's state and its (stored layer, is swapped) order."""
    unrolled = {name: tensor for name, tensor in state.items() if not name.startswith(_LAYERS)}
    for target, (source, swapped) in enumerate(order):
        prefix = f"{_LAYERS}{source}."
        exchanged = {_QUERY: _KEY, _KEY: _QUERY} if swapped else {}
        for name in (name.removeprefix(prefix) for name in state if name.startswith(prefix)):
            module, _, kind = name.rpartition(".")
            unrolled[f"{_LAYERS}{target}.{exchanged.get(module, module)}.{kind}"] = state[prefix + name]
    return unrolled


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
    with_checksums: bool = False,
    keeps_others: bool = False,
    pooling: str = "",
) -> None:
    """Write config, safetensors weights, tokenizer and README.md to `folder`, which is complete as soon as it exists.

    An earlier export there is replaced, see `files.whole_folder`.

    Args:
        model: A model whose parameters are not sharded.
        folder: Its parents are created.
        card: Text of README.md, see `results.card`.
        with_checksums: Write SHA256SUMS too, for a model that later stages read and nobody edits.
        keeps_others: Keep what an earlier export's folder holds under other names than those that are written.
        pooling: Of a teacher, the vector of a row that its run has matched; a later run then matches the same.

    Raises:
        ValueError: `folder` holds something other than an export, which would be deleted; or the disk is full.
    """
    folder = Path(folder).resolve()  # renames act on the target of a link, not on the link
    if folder.exists() and not _is_replaceable(folder):
        raise ValueError(
            f"{folder} holds files that are not an exported model (no config.json), and an export replaces "
            "its folder; choose a new folder or empty this one"
        )
    with needs_space(folder), (checked_folder if with_checksums else whole_folder)(folder) as new:
        model.save_pretrained(new)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:  # the last call's length limit is no property of the tokenizer
            backend.no_truncation()
            backend.no_padding()
        tokenizer.save_pretrained(new)
        (new / "README.md").write_text(card, encoding="utf-8")
        if pooling:
            write_pooling(new, pooling, model.config)
        if keeps_others:
            _keep_others(folder, new)


def _keep_others(folder: Path, new: Path) -> None:
    """Copy files and folders that `new` lacks from an earlier export, except weights under other names."""
    for path in folder.iterdir() if folder.is_dir() else ():
        target = new / path.name
        if target.exists() or ".safetensors" in path.name:
            continue
        if path.is_dir():
            shutil.copytree(path, target, symlinks=True)
        else:
            shutil.copy2(path, target, follow_symlinks=False)


def _is_replaceable(folder: Path) -> bool:
    """Whether a path holds an exported model or an empty folder."""
    return folder.is_dir() and ((folder / "config.json").is_file() or not any(folder.iterdir()))


def export_onnx(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path) -> float:
    """Write the model as a float32 ONNX file with dynamic batch and sequence axes, and check it with onnxruntime.

    Inputs are those of the tokenizer (input_ids, attention_mask, token_type_ids: int64 [B, S]), the output is logits
    [B, C]. The check uses other shapes than the export.

    Args:
        model: A student, whose shared layers stay shared in the file, or an unrolled one; it is not changed.
        tokenizer: Names the inputs.
        file: It is created only if the check passes.

    Returns:
        The largest absolute difference of a logit between PyTorch and onnxruntime.

    Raises:
        ValueError: onnx, onnxscript or onnxruntime is missing.
        RuntimeError: the difference is more than `ONNX_TOLERANCE`.
    """
    require_onnx()
    reference = copy.deepcopy(model).cpu().float().eval()
    # The outputs of the graph are the tuple (logits,). In the config, it would hold for inner models too.
    reference.forward = functools.partial(reference.forward, return_dict=False)
    traced = _random_inputs(tokenizer, reference.config, num_rows=2, num_tokens=8)
    with needs_space(file), whole_file(Path(file)) as new:
        with quiet():
            torch.onnx.export(
                reference,
                kwargs=traced,
                f=new,
                dynamo=True,
                external_data=False,
                verbose=False,
                output_names=["logits"],
                dynamic_shapes={name: {0: "batch", 1: "sequence"} for name in traced},
            )
        other_shapes = ((3, 13), (1, 5))
        differences = [
            _onnx_difference(reference, new, _random_inputs(tokenizer, reference.config, *shape))
            for shape in other_shapes
        ]
        difference = float(torch.stack(differences).max())  # unlike the built-in max, keeps NaN
        if not difference <= ONNX_TOLERANCE:  # NaN fails, too
            raise RuntimeError(
                f"the ONNX model's logits differ from PyTorch's by {difference:.2e}, over {ONNX_TOLERANCE}; "
                "nothing was written; export with other versions of torch or onnxruntime"
            )
    return difference


def holds(model: PreTrainedModel, folder: Path) -> bool:
    """Whether a folder has an export with exactly these weights, and a tokenizer."""
    names = ("config.json", "tokenizer_config.json", "model.safetensors")
    if not all((folder / name).is_file() for name in names):
        return False
    state = model.state_dict()
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            stored = set(file.keys())
            return stored <= state.keys() and all(torch.equal(file.get_tensor(name), state[name]) for name in stored)
    except Exception:  # damaged: it is written again
        return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch's exporter and onnxruntime's quantiser warn of for every model, such as repeated axes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def require_onnx() -> None:
    """Raise ValueError if a package that ONNX export needs is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(
                f"the package {package} is missing, but ONNX export needs it; pip install 'peakd_ds[onnx]'"
            ) from error


def _random_inputs(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, num_rows: int, num_tokens: int
) -> dict[str, torch.Tensor]:
    """Inputs by the tokenizer's names, int64 [num_rows, num_tokens]; half of the last row is padding."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_rows, num_tokens)
    attention_mask = torch.ones(shape, dtype=torch.long)
    attention_mask[-1, num_tokens // 2 :] = 0
    inputs = {
        "input_ids": torch.randint(config.vocab_size, shape, generator=generator),
        "attention_mask": attention_mask,
    }
    if getattr(config, "type_vocab_size", 0):
        inputs["token_type_ids"] = torch.randint(config.type_vocab_size, shape, generator=generator)
    return {name: tensor for name, tensor in inputs.items() if name in tokenizer.model_input_names}


def _onnx_difference(reference: nn.Module, file: Path, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Largest absolute difference of a logit, a tensor of no dimensions."""
    import onnxruntime  # an optional dependency

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        (expected,) = reference(**inputs)
    return (torch.from_numpy(logits) - expected).abs().max()
