"""The models of a run: the teacher as found, the student as made, and the contract between them.

B batch, S tokens, H hidden (Hs student's, Ht teacher's), C classes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerBase,
)

from peakd_ds.config import RunConfig, UserError
from peakd_ds.ptp import NUM_PTP_LABELS
from peakd_ds.sps import SPSBertConfig, SPSBertForSequenceClassification, Take, init_from_encoder
from peakd_ds.tasks import Task

NEW_WITH_A_TASK = ("classifier.", "bert.pooler.", "pooler.")
"""Weights that a pretrained encoder need not have."""


@dataclass(frozen=True)
class Pretrained:
    """A BERT checkpoint as the user names it, before its weights are read."""

    path: str
    option: str
    """The option that named it, for messages."""
    config: BertConfig
    is_classifier: bool


def find_encoder(path: str, option: str) -> Pretrained:
    """Look at a folder or hub id.

    Raises:
        UserError: nothing there, no weights in safetensors, not a BERT, or a classifier without its head.
    """
    folder, names = Path(path), set()
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"--{option} {path} has no weights; the folder must hold model.safetensors beside config.json "
            "(save the model again with save_pretrained)"
        )
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt") as opened:
                names |= set(opened.keys())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} is not a whole safetensors file ({_first_line(error)}); get it again") from error
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # besides OSError and ValueError, a validation error of its own for each bad field
        raise UserError(
            f"--{option} {path} is neither a folder with config.json nor a model that the hub gives "
            f"({_first_line(error)}); give a folder that save_pretrained wrote, or go online for a hub id"
        ) from error
    if config.model_type != "bert":
        raise UserError(
            f"--{option} {path} is a {config.model_type} model; it must be a bert, since the student "
            "takes its layers and vocabulary from it: take a BERT"
        )
    if config.is_decoder or config.add_cross_attention:
        raise UserError(f"--{option} {path} is a decoder by its config.json; take an encoder")
    is_classifier = "BertForSequenceClassification" in (config.architectures or [])
    if is_classifier and names and "classifier.weight" not in names:  # transformers would make up a random head
        raise UserError(
            f"--{option} {path} is a classifier by its config.json, but its weights hold no classifier.weight; get the "
            "whole model, or set architectures in config.json to BertModel to have it fine-tuned"
        )
    if names:
        _check_complete(config, names, f"--{option} {path}")
    return Pretrained(path, option, config, is_classifier)


def _check_complete(config: BertConfig, names: set[str], source: str) -> None:
    """A student's source is read hours into a run, after the teacher was trained: look for its weights now."""
    with torch.device("meta"):  # names only
        expected = BertModel(config).state_dict().keys()
    stored = {re.sub("gamma$", "weight", re.sub("beta$", "bias", name.removeprefix("bert."))) for name in names}
    missing = [name for name in expected if name not in stored and not name.startswith(NEW_WITH_A_TASK)]
    if missing:
        raise UserError(f"{source} lacks {len(missing)} weights, {missing[0]} among them; get the whole model")


def load_tokenizer(encoder: Pretrained) -> PreTrainedTokenizerBase:
    """The encoder's own tokenizer. Raises UserError if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder.path, trust_remote_code=False)
        tokenizer.padding_side = "right"  # the hidden-state loss takes position 0 for [CLS]
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a folder without one
            raise ValueError("no vocabulary in tokenizer.json or vocab.txt")
        return tokenizer
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--{encoder.option} {encoder.path} has no tokenizer that can be read "
            f"({_first_line(error)}); save it there with save_pretrained"
        ) from error


def check_contract(
    config: RunConfig, task: Task, teacher: Pretrained, student_init: Pretrained, tokenizer: PreTrainedTokenizerBase
) -> None:
    """What teacher and student must share, checked before any engine starts.

    Raises:
        UserError: naming both sides, when vocabularies, label orders, token types, depths or lengths do not fit.
    """
    for side in {teacher.path: teacher, student_init.path: student_init}.values():
        name = f"--{side.option} {side.path}"
        if len(tokenizer) > side.config.vocab_size:
            raise UserError(
                f"the teacher's tokenizer has {len(tokenizer)} entries, but {name} embeds "
                f"{side.config.vocab_size}; teacher and student must share one vocabulary: take the tokenizer that the "
                "model was trained with"
            )
        if config.max_seq_length > side.config.max_position_embeddings:
            raise UserError(
                f"--max_seq_length {config.max_seq_length} is longer than the "
                f"{side.config.max_position_embeddings} positions of {name}; "
                f"set at most {side.config.max_position_embeddings}"
            )
        if len(task.text_columns) == 2 and side.config.type_vocab_size < 2:
            raise UserError(
                f"task {task.name} has sentence pairs, but {name} has {side.config.type_vocab_size} token "
                "type; it would not see which sentence is which: take a BERT with 2"
            )
    if "token_type_ids" not in tokenizer.model_input_names:
        raise UserError(
            f"the tokenizer of --teacher {teacher.path} gives no token_type_ids, which BERT reads; "
            "use the tokenizer the teacher was trained with"
        )
    if student_init.path != teacher.path and load_tokenizer(student_init).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--teacher {teacher.path} and --{student_init.option} {student_init.path} have different "
            "vocabularies; take a student encoder with the teacher's tokenizer"
        )
    if teacher.is_classifier:
        check_labels(task, teacher)
    layers = config.init_layers or tuple(range(1, config.num_hidden_layers + 1))
    if max(layers) > student_init.config.num_hidden_layers:
        raise UserError(
            f"layer {max(layers)} of --{student_init.option} {student_init.path} was asked for, which has "
            f"{student_init.config.num_hidden_layers}; lower --num_hidden_layers or set --init_layers"
        )


def check_labels(task: Task, teacher: Pretrained) -> None:
    """Raises UserError, naming both sides, where a classifier's labels or their order are not the task's."""
    if task.is_regression != (teacher.config.num_labels == 1):
        raise UserError(
            f"--{teacher.option} {teacher.path} has {teacher.config.num_labels} label(s), task {task.name} needs "
            f"{task.num_labels}; take a model of this task, or to train one an encoder without a head"
        )
    if task.is_regression:
        return
    names = _label_names(teacher)
    fits = has_unnamed_labels(teacher) or tuple(name.lower() for name in names) == task.label_names
    if len(names) != task.num_labels or not fits:
        raise UserError(
            f"--{teacher.option} {teacher.path} orders its labels {list(names)}, task {task.name} orders them "
            f"{list(task.label_names)}; take a model of this task with this order "
            "(or mend id2label in its config.json)"
        )


def has_unnamed_labels(teacher: Pretrained) -> bool:
    """Whether a classifier calls its classes LABEL_0, LABEL_1, ...: their order can then not be checked."""
    return all(name == f"LABEL_{number}" for number, name in enumerate(_label_names(teacher)))


def _label_names(teacher: Pretrained) -> tuple[str, ...]:
    id2label: dict[int, str] = teacher.config.id2label  # type: ignore[assignment]
    return tuple(id2label[number] for number in sorted(id2label))


# -- Building ----------------------------------------------------------------------------------------------------------


def build_teacher(config: RunConfig, task: Task, encoder: Pretrained) -> SPSBertForSequenceClassification:
    """The teacher with a head for the task, in fp32; a new head where the checkpoint has none.

    It shares no layers: it is of the student's class for the sake of packed rows.
    """
    optional = () if encoder.is_classifier else NEW_WITH_A_TASK
    settings = teacher_config(config, task, encoder.config)
    return load_pretrained(SPSBertForSequenceClassification, encoder.path, encoder.option, optional, config=settings)


def teacher_config(config: RunConfig, task: Task, encoder: BertConfig) -> SPSBertConfig:
    """The teacher's sizes: all of `encoder`'s layers, none shared, and a head for the task."""
    settings = _inherited(encoder) | task_head(task) | _dropout_settings(config.dropout)
    return SPSBertConfig(num_hidden_layers=encoder.num_hidden_layers, sharing="none", **settings)


def build_student(
    config: RunConfig, student_init: Pretrained, head: dict[str, Any]
) -> SPSBertForSequenceClassification:
    """A new student with `head` settings (`task_head` or `ptp_head`) and the encoder's weights, in fp32."""
    student = SPSBertForSequenceClassification(student_config(config, student_init.config, head))
    encoder = load_pretrained(BertModel, student_init.path, student_init.option, NEW_WITH_A_TASK)
    init_from_encoder(student, encoder, config.init_layers or tuple(range(1, config.num_hidden_layers + 1)))
    return student


def student_config(config: RunConfig, encoder: BertConfig, head: dict[str, Any]) -> SPSBertConfig:
    """The student's sizes: those of `encoder`, with n stored layers and the `head` settings."""
    settings = _inherited(encoder) | head | _dropout_settings(config.dropout)
    return SPSBertConfig(
        num_hidden_layers=config.num_hidden_layers, sharing=config.sharing, shuffle_qk=config.swaps_qk, **settings
    )


def load_teacher(config: RunConfig, task: Task, source: Pretrained, folder: Path) -> SPSBertForSequenceClassification:
    """The trained teacher: the classifier that was given, or the one that this run has saved in `folder`."""
    return build_teacher(config, task, source if source.is_classifier else find_encoder(str(folder), "run_dir"))


def load_student_body(student: SPSBertForSequenceClassification, folder: Path) -> None:
    """Copy embeddings, layers and pooler from a saved student; its head stays behind (Pea-KD, PTP)."""
    pretrained = SPSBertForSequenceClassification.from_pretrained(folder)
    student.bert.load_state_dict(pretrained.bert.state_dict())


def task_head(task: Task) -> dict[str, Any]:
    """Config entries of a head for the task: label names both ways and the kind of problem."""
    if task.is_regression:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "id2label": dict(enumerate(task.label_names)),
        "label2id": {name: number for number, name in enumerate(task.label_names)},
        "problem_type": "single_label_classification",
    }


def ptp_head() -> dict[str, Any]:
    """Config entries of the four-class head of PTP."""
    return {"num_labels": NUM_PTP_LABELS, "problem_type": "single_label_classification"}


def _inherited(config: BertConfig) -> dict[str, Any]:
    """What a model of our class takes over from a plain BERT's configuration: sizes, vocabulary, activation."""
    own = "model_type architectures num_hidden_layers id2label label2id dtype transformers_version _name_or_path"
    return {name: value for name, value in config.to_dict().items() if name not in (*own.split(), "problem_type")}


def _dropout_settings(dropout: float | None) -> dict[str, Any]:
    if dropout is None:
        return {}
    return {
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "classifier_dropout": dropout,
    }


def load_pretrained(model_class: Any, path: str, option: str, optional: tuple[str, ...] = (), **settings: Any) -> Any:
    """A saved model in fp32. Weights whose names start with one of `optional` may be missing, and are then new.

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
            f"--{option} {path}: the weights cannot be read ({_first_line(error)}); get the model again"
        ) from error
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(optional))
    if missing:
        raise UserError(
            f"--{option} {path} lacks {len(missing)} weights, {missing[0]} among them; take a whole model of its kind"
        )
    return model.float()


# -- What the engine trains in the distill stage -----------------------------------------------------------------------


def layer_pairs(
    layer_map: str | Sequence[tuple[int, int]], student_depth: int, teacher_depth: int
) -> tuple[tuple[int, int], ...]:
    """(student layer, teacher layer) pairs, 1-based, over effective depths; the last layers are not matched.

    `skip` pairs (i, i * Lt / Ls) where that is whole and `last` pairs (i, Lt - Ls + i), both for i < Ls (Sun et al.
    2019, Patient KD); a list is taken as it is.

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
    """The student with what the hidden-state loss needs beside it; only `student` is exported.

    Where hidden sizes differ, each pair has a trained projection Hs -> Ht.
    """

    def __init__(
        self,
        student: SPSBertForSequenceClassification,
        pairs: Sequence[tuple[int, int]],
        teacher_hidden: int,
        hidden_loss: str,
    ):
        super().__init__()
        self.student, self.pairs, self.hidden_loss = student, tuple(pairs), hidden_loss
        width = student.config.hidden_size
        self.projections = nn.ModuleList(nn.Linear(width, teacher_hidden) for _ in pairs if width != teacher_hidden)

    def forward(self, **inputs: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits [B, C] and, for each pair, hidden states [B, Ht] (cls) or [1, T, Ht] (tokens), of packed inputs."""
        logits, hidden = ask(self.student, inputs, [i for i, _ in self.pairs], self.hidden_loss)
        if len(self.projections):
            hidden = [project(states) for project, states in zip(self.projections, hidden, strict=True)]
        return logits, hidden


class Teacher(nn.Module):
    """The frozen teacher, asked for no more than is read."""

    def __init__(self, model: SPSBertForSequenceClassification):
        super().__init__()
        self.model = model

    def forward(
        self, layers: Sequence[int] = (), hidden_loss: str = "cls", logits: bool = True, **inputs: Any
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits [B, C], meaningless unless asked for, and states of `layers`, [B, H] (cls) or [1, T, H] (tokens)."""
        return ask(self.model, inputs, layers, hidden_loss, logits)


def ask(
    model: SPSBertForSequenceClassification,
    inputs: dict[str, Any],
    layers: Sequence[int],
    hidden_loss: str,
    logits: bool = True,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and states of the given effective layers, from 1, of packed inputs."""
    take = Take(tuple(layers), hidden_loss == "tokens", logits)
    output = model(**inputs, take=take)
    return output.logits, [take.states[layer] for layer in layers]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
