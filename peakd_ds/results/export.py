"""Write finished models: as their own architecture, as a plain BERT, as ONNX; with a model card.

A student is saved as ``sps_bert`` (n stored layers, needs ``import peakd_ds.sps`` to load) or unrolled to a
plain BERT of the effective depth, which loads with transformers alone.
"""

import copy
import importlib
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from peakd_ds.files import flush, hidden_sibling, replace_folder, whole_file
from peakd_ds.sps import SPSBertConfig, SPSBertForSequenceClassification, execution_order

ONNX_TOLERANCE = 1e-4
"""Largest absolute difference of a logit between PyTorch and onnxruntime that :func:`export_onnx` accepts."""

_LAYERS = "bert.encoder.layer."
_QUERY, _KEY = "attention.self.query", "attention.self.key"


def unroll(student: SPSBertForSequenceClassification) -> BertForSequenceClassification:
    """Return a plain BERT that computes the same logits with nothing shared.

    It has one layer per run of a stored layer, with the parameters of query and key exchanged where the run
    exchanges them. Labels, problem type, device, dtype and training mode are the student's.
    """
    config: SPSBertConfig = student.config
    order = execution_order(config.num_hidden_layers, config.sharing, config.shuffle_qk)
    settings = config.to_dict()
    for name in ("model_type", "sharing", "shuffle_qk"):
        del settings[name]
    settings |= {"num_hidden_layers": len(order), "architectures": ["BertForSequenceClassification"]}
    plain_config = BertConfig.from_dict(settings, attn_implementation=config._attn_implementation)
    # An export in mid-training must not change the run's random numbers; the values drawn are overwritten.
    with torch.random.fork_rng(devices=[]):
        plain = BertForSequenceClassification(plain_config)
    nn.Module.to(plain, student.device, student.dtype)  # transformers' own `to` has lost its signature
    plain.load_state_dict(_unrolled_state(student.state_dict(), order))
    return plain.train(student.training)


def _unrolled_state(state: Mapping[str, torch.Tensor], order: tuple[tuple[int, bool], ...]) -> dict[str, torch.Tensor]:
    unrolled = {name: tensor for name, tensor in state.items() if not name.startswith(_LAYERS)}
    for target, (source, swapped) in enumerate(order):
        prefix = f"{_LAYERS}{source}."
        exchanged = {_QUERY: _KEY, _KEY: _QUERY} if swapped else {}
        for name in (name.removeprefix(prefix) for name in state if name.startswith(prefix)):
            module, _, kind = name.rpartition(".")
            unrolled[f"{_LAYERS}{target}.{exchanged.get(module, module)}.{kind}"] = state[prefix + name]
    return unrolled


def export_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str) -> None:
    """Write config, safetensors weights, tokenizer and ``README.md`` to ``folder``.

    The files are written to a hidden folder beside it that is then renamed, so ``folder`` is complete when it
    exists. An earlier export is moved aside, replaced, then deleted; a process that dies between the two
    renames leaves it beside ``folder`` as ``.NAME.old-*``.

    Args:
        model: Model with whole parameters (gather partitioned ones first).
        tokenizer: Its tokenizer.
        folder: Where to write; its parents are made.
        card: Text of ``README.md``, see :func:`model_card`.

    Raises:
        ValueError: If ``folder`` holds something other than an export, which would be deleted.
    """
    folder = Path(folder).resolve()  # renames act on the target of a link, not on the link
    if folder.exists() and not _is_replaceable(folder):
        raise ValueError(
            f"{folder} holds files that are no exported model (no config.json), and an export replaces the "
            "whole folder; choose a new folder or empty this one"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = hidden_sibling(folder, "new")
    try:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        (new / "README.md").write_text(card, encoding="utf-8")
        for file in new.iterdir():
            flush(file)
        replace_folder(folder, new)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # gone already unless something failed


def _is_replaceable(folder: Path) -> bool:
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
) -> str:
    """Return a Hugging Face model card: YAML front matter and Markdown.

    Args:
        task: Name of the task, such as ``rte``.
        method: Name of the method, such as ``pea-kd``.
        metrics: Evaluation metrics of the model, by name.
        teacher_metrics: The teacher's, or None where there is no teacher to compare with.
        num_parameters: Parameters of the saved model.
        num_stored_layers: Encoder layers with parameters of their own in the saved model.
        num_effective_layers: Encoder layers that run.
        settings: Training settings to list, by name.
        base_model: What the model was initialised from; named in the front matter if it is a hub id.
        model_type: The saved config's ``model_type``; ``sps_bert`` needs :mod:`peakd_ds.sps` to load.
    """
    front_matter: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-classification"}
    if base_model is not None and _is_hub_id(base_model):
        front_matter["base_model"] = base_model
    front_matter["tags"] = ["bert", "knowledge-distillation", "pea-kd"]
    if num_stored_layers == num_effective_layers:
        layers = f"{num_stored_layers}"
    else:
        layers = f"{num_stored_layers} stored, {num_effective_layers} run"
    sizes = {"parameters": f"{num_parameters:,}", "encoder layers": layers, "architecture": model_type}
    sections = [
        f"---\n{yaml.safe_dump(front_matter, sort_keys=False)}---",
        f"# {task}: {method}",
        f"A BERT text classifier for the task `{task}`, made with the method `{method}` of peakd_ds.",
        "## Evaluation",
        _metric_table(metrics, teacher_metrics),
        "## Size",
        _table(("size", "value"), sizes.items()),
        "## Use",
        _usage(model_type),
        "## Training settings",
        _table(("setting", "value"), settings.items()),
        "## Method",
        "Pea-KD (Cho and Kang): [arXiv:2009.14822](https://arxiv.org/abs/2009.14822).",
    ]
    return "\n\n".join(sections) + "\n"


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()  # transformers, too, takes an existing folder before the hub


def _metric_table(metrics: Mapping[str, float], teacher_metrics: Mapping[str, float] | None) -> str:
    if teacher_metrics is None:
        return _table(("metric", "this model"), [(name, f"{value:.4f}") for name, value in metrics.items()])
    teacher = {name: f"{value:.4f}" for name, value in teacher_metrics.items()}
    rows = [(name, f"{value:.4f}", teacher.get(name, "")) for name, value in metrics.items()]
    return _table(("metric", "this model", "teacher"), rows)


def _table(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    def line(cells: tuple[object, ...]) -> str:
        return "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), "|" + " --- |" * len(header), *map(line, rows)])


def _usage(model_type: str) -> str:
    needs_us = model_type == SPSBertConfig.model_type
    imports = "import peakd_ds.sps  # registers sps_bert with transformers\n" if needs_us else ""
    return (
        f"```python\n{imports}from transformers import pipeline\n\n"
        'classifier = pipeline("text-classification", model="path/to/this/folder")\n'
        'print(classifier("A sentence."))\n'
        'print(classifier({"text": "The first sentence", "text_pair": "and the second."}))\n```'
    )


def export_onnx(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path) -> float:
    """Write the model as a float32 ONNX file of dynamic batch and sequence, checked with onnxruntime.

    Its inputs are those of the tokenizer (``input_ids``, ``attention_mask``, ``token_type_ids``: int64
    [batch, sequence]), its output is ``logits`` [batch, labels]. The check runs other shapes than the traced.

    Args:
        model: A student, whose shared layers stay shared in the file, or the result of :func:`unroll`; it is
            not changed.
        tokenizer: Names the inputs.
        file: Where to write; appears only when the check has passed.

    Returns:
        The largest absolute difference of a logit between PyTorch and onnxruntime.

    Raises:
        ValueError: If onnx, onnxscript or onnxruntime is missing.
        RuntimeError: If the difference is more than :data:`ONNX_TOLERANCE`.
    """
    require_onnx()
    reference = copy.deepcopy(model).cpu().float().eval()
    reference.config.return_dict = False  # a tuple (logits,): the graph's outputs
    traced = _random_inputs(tokenizer, reference.config, num_rows=2, num_tokens=8)
    with whole_file(Path(file)) as new:
        with warnings.catch_warnings():
            # Every input has the same two axes, and the exporter warns once for each name it sees again.
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
        if not difference <= ONNX_TOLERANCE:  # written so that NaN fails
            raise RuntimeError(
                f"the ONNX model's logits differ from PyTorch's by {difference:.2e}, over {ONNX_TOLERANCE}; "
                "nothing was written; export with other versions of torch or onnxruntime"
            )
    return difference


def require_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(
                f"the package {package} is missing, but ONNX export needs it; pip install 'peakd_ds[onnx]'"
            ) from error


def _random_inputs(
    tokenizer: PreTrainedTokenizerBase, config: BertConfig, num_rows: int, num_tokens: int
) -> dict[str, torch.Tensor]:
    """Return int64 [num_rows, num_tokens] for each input of the tokenizer, half of the last row padding."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_rows, num_tokens)
    attention_mask = torch.ones(shape, dtype=torch.long)
    attention_mask[-1, num_tokens // 2 :] = 0
    inputs = {
        "input_ids": torch.randint(config.vocab_size, shape, generator=generator),
        "attention_mask": attention_mask,
        "token_type_ids": torch.randint(config.type_vocab_size, shape, generator=generator),
    }
    return {name: tensor for name, tensor in inputs.items() if name in tokenizer.model_input_names}


def _onnx_difference(reference: nn.Module, file: Path, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    import onnxruntime  # an optional dependency

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        (expected,) = reference(**inputs)
    return (torch.from_numpy(logits) - expected).abs().max()
