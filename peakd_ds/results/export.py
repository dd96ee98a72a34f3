"""Export finished models as Hugging Face folders with a model card, and as ONNX.

A student is saved as `sps_bert`, `sps_roberta` and so on (n stored layers; needs `import peakd_ds.sps` to load), or
unrolled to the plain class of its family at the effective depth, which transformers loads on its own.
"""

import copy
import functools
import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peakd_ds.data.metrics import MAX_CLASSES_IN_TABLE, in_words
from peakd_ds.data.tasks import Task
from peakd_ds.families import FAMILIES, SHARED, plain_type
from peakd_ds.files import checked_folder, needs_space, whole_file, whole_folder
from peakd_ds.results import markdown
from peakd_ds.sps import SPSBertConfig, shared
from peakd_ds.sps.order import order_of

ONNX_TOLERANCE = 1e-4
"""Largest absolute difference of a logit between PyTorch and onnxruntime that `export_onnx` accepts."""

PATHS = frozenset(
    "run_dir data_dir train_file validation_file test_file unlabeled_file shard_dir scratch_dir teacher_outputs "
    "teacher_cache".split()
)
"""Settings that are paths of the user's."""
SOURCES = frozenset("teacher student_init dataset_name student_ds_config teacher_ds_config".split())
"""Settings that are paths of the user's, or names that everybody knows."""
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
    plain_config: PreTrainedConfig
    state: Mapping[str, torch.Tensor]
    if isinstance(config, SPSBertConfig):
        plain_config, state = _plain_bert_config(config), _unrolled_state(model.state_dict(), order_of(config))
    else:
        plain_config, state = shared.plain_config(config), shared.unrolled_state(model)
    # Exporting during training must not change the run's random numbers. The values drawn here are overwritten.
    with torch.random.fork_rng(devices=[]):
        plain = AutoModelForSequenceClassification.from_config(plain_config)
    plain.config.architectures = [type(plain).__name__]
    nn.Module.to(plain, model.device, model.dtype)  # transformers' own `to` has no type signature
    plain.load_state_dict(state)
    return plain.train(model.training)


def _plain_bert_config(config: SPSBertConfig) -> BertConfig:
    settings = config.to_dict()
    for name in ("model_type", "sharing", "shuffle_qk"):
        del settings[name]
    settings["num_hidden_layers"] = config.num_effective_layers
    return BertConfig.from_dict(settings, attn_implementation=config._attn_implementation)


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
) -> None:
    """Write config, safetensors weights, tokenizer and README.md to `folder`, which is complete as soon as it exists.

    An earlier export there is replaced, see `files.whole_folder`.

    Args:
        model: A model whose parameters are not sharded.
        folder: Its parents are created.
        card: Text of README.md, see `model_card`.
        with_checksums: Write SHA256SUMS too, for a model that later stages read and nobody edits.

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


def _is_replaceable(folder: Path) -> bool:
    """Whether a path holds an exported model or an empty folder."""
    return folder.is_dir() and ((folder / "config.json").is_file() or not any(folder.iterdir()))


def model_card(
    *,
    task: str,
    method: str,
    metrics: Mapping[str, float],
    teacher_metrics: Mapping[str, float] | None,
    num_parameters: int,
    num_stored_layers: int,
    num_effective_layers: int,
    settings: Mapping[str, object],
    base_model: str | None = None,
    model_type: str = "bert",
    own_task: Task | None = None,
    vocabulary: str = "",
) -> str:
    """A Hugging Face model card: YAML front matter and Markdown.

    Args:
        task: Name of the task, such as rte.
        method: Name of the method, such as pea-kd.
        metrics: Metrics of the model on the dev set, by name.
        teacher_metrics: Metrics of the teacher; None if there is no teacher to compare with.
        num_parameters: Parameters of the saved model.
        num_stored_layers: Encoder layers that the saved model stores.
        num_effective_layers: Encoder layers that run.
        settings: Training settings by name; those that are set and tell no path of the user's are listed.
        base_model: What the model was initialised from; the front matter names it if it is a hub id.
        model_type: Of the saved config; `sps_bert` and the like need peakd_ds.sps to load.
        own_task: The task if it is the user's own data: the card says what labels and metrics are.
        vocabulary: A paragraph on its vocabulary, if that is trimmed.
    """
    front_matter: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-classification"}
    if base_model is not None and _is_hub_id(base_model):
        front_matter["base_model"] = base_model
    front_matter["tags"] = [plain_type(model_type), "knowledge-distillation", "pea-kd"]
    if num_stored_layers == num_effective_layers:
        layers = f"{num_stored_layers}"
    else:
        layers = f"{num_stored_layers} stored, {num_effective_layers} run"
    sizes = {"parameters": f"{num_parameters:,}", "encoder layers": layers, "architecture": model_type}
    sections = [
        f"---\n{yaml.safe_dump(front_matter, sort_keys=False)}---",
        f"# {task}: {method}",
        f"A text classifier ({FAMILIES[plain_type(model_type)].name}) for the task `{task}`, made with the method "
        f"`{method}` of peakd_ds.",
        *(_labels(own_task) if own_task else []),
        "## Evaluation",
        _metric_table(metrics, teacher_metrics),
        *(["\n".join(f"- {name}: {in_words(name)}" for name in metrics)] if own_task else []),
        "## Size",
        markdown.table(("size", "value"), sizes.items()),
        *([vocabulary] if vocabulary else []),
        "## Use",
        _usage(model_type, own_task is not None and own_task.is_multi_label),
        "## Training settings",
        markdown.table(("setting", "value"), publishable(settings).items()),
        "## Method",
        "Pea-KD (Cho and Kang): [arXiv:2009.14822](https://arxiv.org/abs/2009.14822).",
    ]
    return "\n\n".join(sections) + "\n"


def publishable(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings that are set and tell no path of the user's: a hub id stays, a folder does not."""
    return {
        name: value
        for name, value in settings.items()
        if value not in (None, "") and name not in PATHS and (name not in SOURCES or _is_hub_id(str(value)))
    }


def _labels(task: Task) -> list[str]:
    """Paragraphs of a card: what the outputs of a model of own data mean."""
    texts = "a text" if len(task.text_columns) == 1 else "two texts"
    if task.is_regression:
        return [f"The data is the maker's own. The model reads {texts} and gives a score, its one output."]
    given = f"one of {task.num_labels} classes"
    if task.is_multi_label:
        given = f"those of {task.num_labels} classes that apply, which are those with a logit above 0"
    shown = list(enumerate(task.label_names))[:MAX_CLASSES_IN_TABLE]
    left_out = task.num_labels - len(shown)
    return [
        f"The data is the maker's own. The model reads {texts} and gives {given}.",
        markdown.table(("output", "class"), shown),
        *([f"and {left_out:,} more, which config.json has."] if left_out else []),
    ]


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()  # transformers prefers an existing folder to the hub, too


def _metric_table(metrics: Mapping[str, float], teacher_metrics: Mapping[str, float] | None) -> str:
    if not metrics:
        return "No row has a label, so there is no score."
    if teacher_metrics is None:
        return markdown.table(("metric", "this model"), [(name, f"{value:.4f}") for name, value in metrics.items()])
    teacher = {name: f"{value:.4f}" for name, value in teacher_metrics.items()}
    rows = [(name, f"{value:.4f}", teacher.get(name, "")) for name, value in metrics.items()]
    return markdown.table(("metric", "this model", "teacher"), rows)


def _usage(model_type: str, gives_several: bool) -> str:
    is_shared = model_type.startswith(SHARED)
    imports = f"import peakd_ds.sps  # registers {model_type} with transformers\n" if is_shared else ""
    options = ", top_k=None" if gives_several else ""  # the probability of every class, not of the largest
    return (
        f"```python\n{imports}from transformers import pipeline\n\n"
        f'classifier = pipeline("text-classification", model="path/to/this/folder"{options})\n'
        'print(classifier("A sentence."))\n'
        'print(classifier({"text": "The first sentence", "text_pair": "and the second."}))\n```'
    )


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
        with warnings.catch_warnings():
            # All inputs have the same two axes, and the exporter warns for each repeated name.
            warnings.filterwarnings("ignore", message=".*axis name.*will not be used", category=UserWarning)
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
