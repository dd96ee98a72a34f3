"""The models of a run: the teacher, the SPS student, and what the distill stage trains.

B rows, T tokens of packed rows, C classes, Hs and Ht hidden sizes of student and teacher.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from peakd_ds.config import RunConfig
from peakd_ds.data.tasks import Task
from peakd_ds.errors import UserError, first_line
from peakd_ds.families import BERT, SHARED
from peakd_ds.files import damage_of, damaged, has_checksums
from peakd_ds.model import contract
from peakd_ds.packed.rows import attention_of, take_packed_rows
from peakd_ds.ptp import NUM_PTP_LABELS
from peakd_ds.ranks import dist
from peakd_ds.sps import (
    SPSBertConfig,
    SPSBertForSequenceClassification,
    Take,
    classes_of,
    init_from_encoder,
    init_shared,
)

# -- Building ----------------------------------------------------------------------------------------------------------


def build_teacher(config: RunConfig, task: Task, encoder: contract.Pretrained) -> PreTrainedModel:
    """The teacher with a head for the task, in fp32; the head is new if the checkpoint has none.

    A BERT has the class of a student that shares no layers, which takes packed rows; others have transformers' own.
    """
    optional = () if encoder.is_classifier else contract.new_with_a_task(encoder.config)
    return load_classifier(encoder, teacher_config(config, task, encoder.config), optional)


def teacher_config(config: RunConfig, task: Task, encoder: PreTrainedConfig) -> PreTrainedConfig:
    """The teacher's configuration: all layers of `encoder`, none shared, and a head for the task."""
    return unshared_config(encoder, task_head(task) | _dropout_settings(encoder, config.dropout))


def unshared_config(plain: PreTrainedConfig, settings: dict[str, Any]) -> PreTrainedConfig:
    """A plain model's config with other `settings`, for the class that runs it here."""
    settings = _inherited(plain) | settings
    if plain.model_type == BERT:
        return SPSBertConfig(num_hidden_layers=plain.num_hidden_layers, sharing="none", **settings)
    return type(plain).from_dict(settings)


def load_classifier(
    source: contract.Pretrained, config: PreTrainedConfig, optional: tuple[str, ...]
) -> PreTrainedModel:
    """The model in a folder or on the hub with this config, in fp32, taking packed rows.

    Args:
        optional: Beginnings of names of weights that may be missing, and are then new.
    """
    model = load_pretrained(_class_of(config), source.path, source.option, optional, config=_with_attention(config))
    return _taking_packed_rows(model)


def build_classifier(config: PreTrainedConfig) -> PreTrainedModel:
    """A new model of a config that `teacher_config` or `student_config` gives, taking packed rows."""
    kind, config = _class_of(config), _with_attention(config)
    is_auto = kind is AutoModelForSequenceClassification
    return _taking_packed_rows(kind.from_config(config) if is_auto else kind(config))


def _class_of(config: PreTrainedConfig) -> Any:
    if isinstance(config, SPSBertConfig):
        return SPSBertForSequenceClassification
    is_shared = config.model_type.startswith(SHARED)
    return classes_of(config.model_type).classifier if is_shared else AutoModelForSequenceClassification


def _with_attention(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with the attention that packed rows need; BERT's class here has its own."""
    attention = attention_of(config)
    if attention is not None and not isinstance(config, SPSBertConfig):
        config._attn_implementation = attention
    return config


def _taking_packed_rows(model: PreTrainedModel) -> PreTrainedModel:
    if not isinstance(model, SPSBertForSequenceClassification):  # which does so itself
        take_packed_rows(model)
    return model


def build_student(config: RunConfig, student_init: contract.Pretrained, head: dict[str, Any]) -> PreTrainedModel:
    """A new student with `head` settings (`task_head` or `ptp_head`) and the encoder's weights, in fp32."""
    student = build_classifier(student_config(config, student_init.config, head))
    path, option, source_config = student_init.path, student_init.option, student_init.config
    kind = BertModel if source_config.model_type == BERT else AutoModel
    encoder = load_pretrained(kind, path, option, contract.new_with_a_task(source_config), config=source_config)
    if isinstance(student, SPSBertForSequenceClassification):
        init_from_encoder(student, encoder, init_layers(config))
    else:
        init_shared(student, encoder, init_layers(config))
    return student


def init_layers(config: RunConfig) -> tuple[int, ...]:
    """1-based layers of the encoder that become the stored layers."""
    return config.init_layers or tuple(range(1, config.num_hidden_layers + 1))


def student_config(config: RunConfig, encoder: PreTrainedConfig, head: dict[str, Any]) -> PreTrainedConfig:
    """The student's configuration: the sizes of `encoder`, n stored layers and the `head` settings."""
    settings = _inherited(encoder) | head | _dropout_settings(encoder, config.dropout)
    settings |= {"sharing": config.sharing, "shuffle_qk": config.swaps_qk}
    if encoder.model_type == BERT:
        return SPSBertConfig(num_hidden_layers=config.num_hidden_layers, **settings)
    kind = classes_of(encoder.model_type).config
    settings[kind.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = config.num_hidden_layers
    if settings.get("layer_types"):
        settings["layer_types"] = [settings["layer_types"][number - 1] for number in init_layers(config)]
    return kind(**settings)


def load_teacher(config: RunConfig, task: Task, source: contract.Pretrained, folder: Path) -> PreTrainedModel:
    """The trained teacher: the user's classifier, or the one that this run has saved in `folder`.

    Raises:
        UserError: the saved one is damaged or cannot be read.
    """
    if not source.is_classifier:
        check_saved_teacher(folder)
        source = contract.find_encoder(str(folder), "run_dir")
    return build_teacher(config, task, source)


def load_student_body(student: PreTrainedModel, folder: Path) -> None:
    """Copy the saved PTP student's base model: embeddings, layers and, in BERT, the pooler; not its head (Pea-KD).

    Raises:
        UserError: the saved student is damaged or cannot be read.
    """
    _check_saved_model(folder, "ptp", folder.parent)
    pretrained = load_pretrained(type(student), str(folder), "run_dir")
    student.base_model.load_state_dict(pretrained.base_model.state_dict())


def check_saved_teacher(folder: Path) -> None:
    """Raise UserError if the teacher that this run has saved is damaged."""
    _check_saved_model(folder, "teacher", folder.parent / "checkpoints" / "teacher")


def _check_saved_model(folder: Path, stage: str, checkpoints: Path) -> None:
    """Raise UserError if a stage's model is not what the stage saved.

    Earlier versions saved models without checksums. Rank 0 says so once, and the model is read as it is.
    """
    if folder.is_dir() and not has_checksums(folder):
        _note_once(f"{folder} has no checksums (made by an earlier version); it is read as it is")
        return
    damage = damage_of(folder) if folder.is_dir() else "it is missing"
    if damage is not None:
        raise damaged(
            folder,
            damage,
            f"delete it and {checkpoints / 'FINISHED.json'}, and the same command (with the {stage} stage) writes it "
            "again from its checkpoint",
        )


@functools.cache
def _note_once(text: str) -> None:
    if dist.is_main():
        print(text, file=sys.stderr, flush=True)


def task_head(task: Task) -> dict[str, Any]:
    """Config entries of a head for the task: label names both ways and the kind of problem."""
    if task.is_regression:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "id2label": dict(enumerate(task.label_names)),
        "label2id": {name: number for number, name in enumerate(task.label_names)},
        "problem_type": "multi_label_classification" if task.is_multi_label else "single_label_classification",
    }


def ptp_head() -> dict[str, Any]:
    """Config entries of the four-class head of PTP."""
    return {"num_labels": NUM_PTP_LABELS, "problem_type": "single_label_classification"}


def _inherited(config: PreTrainedConfig) -> dict[str, Any]:
    """The entries of a plain model's configuration that ours inherits: sizes, vocabulary, activation."""
    own = "model_type architectures id2label label2id dtype transformers_version _name_or_path problem_type".split()
    if config.model_type == BERT:
        own.append("num_hidden_layers")
    return {name: value for name, value in config.to_dict().items() if name not in own}


def _dropout_settings(encoder: PreTrainedConfig, dropout: float | None) -> dict[str, Any]:
    """Config entries that set every dropout probability of a family."""
    if dropout is None:
        return {}
    return {name: dropout for name in encoder.to_dict() if "dropout" in name}


def load_saved(folder: Path) -> PreTrainedModel:
    """The student that this run has saved, taking packed rows. Raises ValueError if weights are missing."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model, report = _class_of(config).from_pretrained(
        folder, config=_with_attention(config), use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    if report["missing_keys"]:
        raise ValueError(f"{len(report['missing_keys'])} weights are missing")
    return _taking_packed_rows(model)


def load_pretrained(model_class: Any, path: str, option: str, optional: tuple[str, ...] = (), **settings: Any) -> Any:
    """A saved model in fp32. Weights whose names start with one of `optional` may be missing; they are then new.

    Raises:
        UserError: the weights cannot be read, or others are missing.
    """
    try:
        model, report = model_class.from_pretrained(
            path,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **settings,
        )
    except Exception as error:  # safetensors, hub and shape errors have no common base
        raise UserError(
            f"--{option} {path}: the weights cannot be read ({first_line(error)}); get the model again"
        ) from error
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(optional))
    if missing:
        raise UserError(
            f"--{option} {path} lacks {len(missing)} weights, {missing[0]} among them; take a complete model"
        )
    return model.float()


# -- What the engine trains in the distill stage -----------------------------------------------------------------------


def layer_pairs(
    layer_map: str | Sequence[tuple[int, int]], student_depth: int, teacher_depth: int
) -> tuple[tuple[int, int], ...]:
    """(student layer, teacher layer) pairs, 1-based, over effective depths; last layers are not matched.

    `skip` pairs (i, i * Lt / Ls) where that is whole and `last` pairs (i, Lt - Ls + i), both for i < Ls (Sun et al.
    2019, Patient KD); a list is used as it is.

    Raises:
        UserError: a layer that is not there, or `last` with a teacher shallower than the student.
    """
    if layer_map == "skip":
        return tuple(
            (i, i * teacher_depth // student_depth)
            for i in range(1, student_depth)
            if i * teacher_depth % student_depth == 0
        )
    if layer_map == "last":
        if teacher_depth < student_depth:
            raise UserError(
                f"--layer_map last needs a teacher at least as deep as the student, but the teacher has "
                f"{teacher_depth} layers and the student runs {student_depth}; use skip or a list"
            )
        return tuple((i, teacher_depth - student_depth + i) for i in range(1, student_depth))
    assert not isinstance(layer_map, str)
    for i, j in layer_map:
        if not (1 <= int(i) <= student_depth and 1 <= int(j) <= teacher_depth):
            raise UserError(
                f"--layer_map pair {i}:{j} is out of range; the student runs layers 1 to {student_depth}, "
                f"the teacher 1 to {teacher_depth}: choose pairs STUDENT:TEACHER within both"
            )
    return tuple(layer_map)


class MatchedStudent(nn.Module):
    """The student and the projections that the hidden-state loss trains with it; only `student` is exported.

    Each pair has a projection Hs -> Ht if the hidden sizes differ.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        pairs: Sequence[tuple[int, int]],
        teacher_hidden: int,
        hidden_loss: str,
    ):
        super().__init__()
        self.student, self.pairs, self.hidden_loss = student, tuple(pairs), hidden_loss
        width = student.config.hidden_size
        self.projections = nn.ModuleList(nn.Linear(width, teacher_hidden) for _ in pairs if width != teacher_hidden)

    def forward(self, **inputs: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits [B, C] of packed inputs and, for each pair, hidden states [B, Ht] (cls) or [1, T, Ht] (tokens)."""
        student_layers = [student_layer for student_layer, _ in self.pairs]
        logits_BC, hidden = forward_with_states(self.student, inputs, student_layers, self.hidden_loss)
        if len(self.projections):
            hidden = [project(states) for project, states in zip(self.projections, hidden, strict=True)]
        return logits_BC, hidden


class Teacher(nn.Module):
    """The frozen teacher; its forward pass computes only what is read."""

    def __init__(self, model: PreTrainedModel, pooling: str = "cls"):
        super().__init__()
        self.model, self.pooling = model, pooling

    def forward(
        self, layers: Sequence[int] = (), hidden_loss: str = "cls", with_logits: bool = True, **inputs: Any
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits [B, C] of packed inputs, and states of `layers`: [B, Ht] (cls) or [1, T, Ht] (tokens).

        Without `with_logits` the logits mean nothing.
        """
        return forward_with_states(self.model, inputs, layers, hidden_loss, with_logits, self.pooling)


def forward_with_states(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    layers: Sequence[int],
    hidden_loss: str,
    with_logits: bool = True,
    pooling: str = "cls",
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [B, C] and states of the given effective layers (1-based) of packed inputs, as `Teacher.forward`."""
    take = Take(tuple(layers), hidden_loss == "tokens", pooling, with_logits)
    output = model(**inputs, take=take)
    return output.logits, [take.states[layer] for layer in layers]
