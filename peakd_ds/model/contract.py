"""Checkpoints that the user names, and the contract between teacher and student. Weights are not read here."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerBase,
)

from peakd_ds.config import RunConfig
from peakd_ds.data.tasks import Task
from peakd_ds.errors import UserError, first_line

NEW_WITH_A_TASK = ("classifier.", "bert.pooler.", "pooler.")
"""Weights that a pretrained encoder may lack."""


@dataclass(frozen=True)
class Pretrained:
    """A BERT checkpoint that the user has named; its weights are not read yet."""

    path: str
    option: str
    """The option that names it, for messages."""
    config: BertConfig
    is_classifier: bool


def find_encoder(path: str, option: str) -> Pretrained:
    """The checkpoint in a folder or on the hub, from its config and the names of its weights.

    Raises:
        UserError: nothing is there, there are no safetensors weights, it is no BERT, or a classifier without its head.
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
            raise UserError(f"{file} is not a complete safetensors file ({first_line(error)}); get it again") from error
    config = read_config(path, option)
    is_classifier = "BertForSequenceClassification" in (config.architectures or [])
    if is_classifier and names and "classifier.weight" not in names:  # transformers would make a random head
        raise UserError(
            f"--{option} {path} is a classifier by its config.json, but its weights hold no classifier.weight; get the "
            "whole model, or set architectures in config.json to BertModel to have it fine-tuned"
        )
    if names:
        _check_complete(config, names, f"--{option} {path}")
    return Pretrained(path, option, config, is_classifier)


def read_config(path: str, option: str) -> BertConfig:
    """The config.json of a folder or hub id. Raises UserError if there is none, or if it is not a BERT encoder's."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # besides OSError and ValueError, a validation error of its own for each bad field
        raise UserError(
            f"--{option} {path} is neither a folder with config.json nor a model that the hub gives "
            f"({first_line(error)}); give a folder that save_pretrained wrote, or go online for a hub id"
        ) from error
    if config.model_type != "bert":
        raise UserError(
            f"--{option} {path} is a {config.model_type} model; it must be a bert, since the student "
            "takes its layers and vocabulary from it: take a BERT"
        )
    if config.is_decoder or config.add_cross_attention:
        raise UserError(f"--{option} {path} is a decoder by its config.json; take an encoder")
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"--{option} {path} has hidden_size {config.hidden_size}, which is not a multiple of its "
            f"{config.num_attention_heads} attention heads; fix its config.json"
        )
    return config


def _check_complete(config: BertConfig, names: set[str], source: str) -> None:
    """Raise UserError if encoder weights are missing: a student's source is read after the teacher stage, hours later."""
    with torch.device("meta"):  # names only
        expected = BertModel(config).state_dict().keys()
    stored = {re.sub("gamma$", "weight", re.sub("beta$", "bias", name.removeprefix("bert."))) for name in names}
    missing = [name for name in expected if name not in stored and not name.startswith(NEW_WITH_A_TASK)]
    if missing:
        raise UserError(f"{source} lacks {len(missing)} weights, {missing[0]} among them; get the complete model")


def load_tokenizer(encoder: Pretrained) -> PreTrainedTokenizerBase:
    """The encoder's own tokenizer. Raises UserError if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder.path, trust_remote_code=False)
        tokenizer.padding_side = "right"  # the hidden-state loss reads [CLS] at position 0
        if len(tokenizer) <= len(
            tokenizer.all_special_tokens
        ):  # as transformers makes for a folder without a tokenizer
            raise ValueError("no vocabulary in tokenizer.json or vocab.txt")
        return tokenizer
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--{encoder.option} {encoder.path} has no tokenizer that can be read "
            f"({first_line(error)}); save it there with save_pretrained"
        ) from error


def check_contract(
    config: RunConfig, task: Task, teacher: Pretrained, student_init: Pretrained, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Check what teacher and student must share, before any engine starts.

    Raises:
        UserError: vocabularies, label orders, token types, depths or lengths do not fit; names both sides.
    """
    for side in {teacher.path: teacher, student_init.path: student_init}.values():
        name = f"--{side.option} {side.path}"
        if len(tokenizer) > side.config.vocab_size:
            raise UserError(
                f"the teacher's tokenizer has {len(tokenizer)} entries, but {name} embeds "
                f"{side.config.vocab_size}; teacher and student must share one vocabulary: take the tokenizer that the "
                "model was trained with"
            )
        check_length(config.max_seq_length, side)
        if len(task.text_columns) == 2 and side.config.type_vocab_size < 2:
            raise UserError(
                f"task {task.name} has sentence pairs, but {name} has {side.config.type_vocab_size} token "
                "type; it could not tell the sentences apart: take a BERT with 2"
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
            f"layer {max(layers)} of --{student_init.option} {student_init.path} is needed, but it has "
            f"{student_init.config.num_hidden_layers}; lower --num_hidden_layers or set --init_layers"
        )


def check_length(max_seq_length: int, encoder: Pretrained) -> None:
    """Raise UserError if rows of `max_seq_length` tokens are longer than the encoder's position embeddings."""
    limit = encoder.config.max_position_embeddings
    if max_seq_length > limit:
        raise UserError(
            f"--max_seq_length {max_seq_length} is longer than the {limit} positions of "
            f"--{encoder.option} {encoder.path}; set at most {limit}"
        )


def check_labels(task: Task, teacher: Pretrained) -> None:
    """Raise UserError, naming both sides, if a classifier's labels or their order are not the task's."""
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
            "(or fix id2label in its config.json)"
        )


def has_unnamed_labels(teacher: Pretrained) -> bool:
    """Whether a classifier calls its classes LABEL_0, LABEL_1, ...: their order can then not be checked."""
    return all(name == f"LABEL_{number}" for number, name in enumerate(_label_names(teacher)))


def _label_names(teacher: Pretrained) -> tuple[str, ...]:
    id2label: dict[int, str] = teacher.config.id2label  # type: ignore[assignment]
    return tuple(id2label[number] for number in sorted(id2label))
