"""Checkpoints that the user names, and the contract between teacher and student. No model is built here."""

from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from peakd_ds.config import RunConfig
from peakd_ds.data.labels import TeacherClasses
from peakd_ds.data.tasks import Task
from peakd_ds.data.tokens import tokenizer_digest
from peakd_ds.errors import UserError, as_user_error, shown
from peakd_ds.families import BERT, STUDENTS, has_token_types, num_positions
from peakd_ds.model.config_file import Pretrained, read_config
from peakd_ds.model.pooling import natural_pooling, teacher_pooling
from peakd_ds.model.weights_file import OUTPUTS, check_weights, layout_of
from peakd_ds.sps import check_init_layers

VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "tokenizer.model",
)
"""A tokenizer is stored with one of these at least."""


def new_with_a_task(config: PreTrainedConfig) -> tuple[str, ...]:
    """Beginnings of names of the weights that a pretrained encoder may lack: the head's and the pooler's."""
    layout = layout_of(config)
    return (*sorted(layout.head), f"{layout.prefix}pooler.", "pooler.")


def find_encoder(path: str, option: str, takes_shared: bool = False, with_weights: bool = True) -> Pretrained:
    """The checkpoint in a folder or on the hub, its config.json and weights checked.

    Its pooling is that of its own head; `teacher_pooling` says what a run takes.

    Args:
        takes_shared: Whether a student that shares layers is taken too.
        with_weights: Whether the weights are looked at; a plan and shards need none.

    Raises:
        UserError: nothing is there, a setting cannot work, or the weights are damaged or do not fit the config.
    """
    config, is_classifier = read_config(path, option, takes_shared)
    names = check_weights(path, option, config, is_classifier) if with_weights else frozenset()
    return Pretrained(path, option, config, is_classifier, names, natural_pooling(config))


# -- Tokenizers --------------------------------------------------------------------------------------------------------


def load_tokenizer(encoder: Pretrained) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, which pads right; a decoder without pad_token_id gets the tokenizer's.

    Raises:
        UserError: there is none, or an example is not tokenised as the model needs it.
    """
    problem, remedy = f"{encoder.name} has no tokenizer that can be read", "save it there with save_pretrained"
    with as_user_error(problem, remedy):
        settings = get_tokenizer_config(encoder.path)
        name = settings.get("tokenizer_class")
        if not isinstance(name, str | None):
            raise ValueError(f"tokenizer_class is {shown(name)} in tokenizer_config.json, but it must name a class")
        if settings.get("auto_map") is not None:
            raise ValueError("tokenizer_config.json has auto_map, code of its own that is not run")
        tokenizer = AutoTokenizer.from_pretrained(encoder.path, config=encoder.config, trust_remote_code=False)
        tokenizer.padding_side = "right"  # heads of encoders read position 0, also if it is padding
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # as transformers makes for a folder without one
            raise ValueError("no vocabulary in tokenizer.json or vocab.txt")
    if encoder.family.is_decoder:
        _check_padding(tokenizer, encoder)
    check_tokenizer(tokenizer, encoder)
    return tokenizer


def _check_padding(tokenizer: PreTrainedTokenizerBase, decoder: Pretrained) -> None:
    """Give a decoder the tokenizer's padding token: its head finds a row's last token by it. Raises UserError."""
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"{decoder.name} is a causal model without padding token, so that rows of several lengths make no batch; "
            "set pad_token in its tokenizer_config.json and pad_token_id in its config.json"
        )
    if decoder.config.pad_token_id is None:
        decoder.config.pad_token_id = tokenizer.pad_token_id


def load_tokenizers(
    teacher: Pretrained, student_init: Pretrained
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The student's tokenizer and the teacher's: one object if they give every text the same ids.

    A student encoder without a tokenizer of its own takes the teacher's.

    Raises:
        UserError: as `load_tokenizer`, or the teacher's tokenizer gives ids that the student encoder does not embed.
    """
    teacher_tokenizer = load_tokenizer(teacher)
    if student_init.path != teacher.path and _has_tokenizer(student_init):
        tokenizer = load_tokenizer(student_init)
        is_same = tokenizer_digest(tokenizer) == tokenizer_digest(teacher_tokenizer)
        return tokenizer, tokenizer if is_same else teacher_tokenizer
    check_vocabulary(teacher_tokenizer, student_init)
    return teacher_tokenizer, teacher_tokenizer


def _has_tokenizer(encoder: Pretrained) -> bool:
    """Whether a vocabulary is stored with the encoder."""
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return any(cached_file(encoder.path, name, **options) is not None for name in VOCABULARY_FILES)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, encoder: Pretrained) -> None:
    """Raise UserError if the model's tokenizer has no special tokens or does not tokenise an example for it."""
    remedy = "take the tokenizer that the model was trained with"
    with as_user_error(f"{encoder.name} has a tokenizer that does not fit it", remedy):
        _check_special_tokens(tokenizer, _stored_tokens(tokenizer, encoder.path), encoder)
        check_vocabulary(tokenizer, encoder)
        _check_example(tokenizer, encoder)


def _stored_tokens(tokenizer: PreTrainedTokenizerBase, path: str) -> set[str]:
    """Tokens that tokenizer.json or vocab.txt holds: transformers gives special tokens that are not there new ids.

    Of a tokenizer in other files, all its tokens; ids that are new are then too large for the model.
    """
    file = cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    if file is not None:
        return set(Tokenizer.from_file(file).get_vocab())
    file = cached_file(path, "vocab.txt", _raise_exceptions_for_missing_entries=False)
    if file is not None:
        return set(Path(file).read_text(encoding="utf-8").split("\n"))
    return set(tokenizer.get_vocab())


def _check_special_tokens(tokenizer: PreTrainedTokenizerBase, stored: set[str], encoder: Pretrained) -> None:
    is_bert, is_decoder = encoder.family.model_type == BERT, encoder.family.is_decoder
    names = ["pad_token"] if is_decoder else [*_edges(tokenizer, is_bert), "pad_token"]
    if is_bert and tokenizer.unk_token is not None:
        names.append("unk_token")
    ids = {}
    for name in names:
        token, number = getattr(tokenizer, name), getattr(tokenizer, f"{name}_id")
        if token not in stored or not isinstance(number, int):
            raise ValueError(f"its vocabulary has no {name}, {token!r}")
        ids[number] = name
    if len(ids) < len(names):
        raise ValueError(f"two of {', '.join(names)} are one token")
    pad = encoder.config.pad_token_id
    if pad not in (None, tokenizer.pad_token_id):
        raise ValueError(f"pad_token is {tokenizer.pad_token_id}, but pad_token_id in config.json is {pad}")
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= 1:
        raise ValueError(f"model_max_length is {length!r}, but it must be a number of at least 1")


def _edges(tokenizer: PreTrainedTokenizerBase, is_bert: bool) -> tuple[str, str]:
    """Names of the tokens that begin and end a row; some families call them bos_token and eos_token."""
    has_none = tokenizer.cls_token is None and not is_bert, tokenizer.sep_token is None and not is_bert
    return "bos_token" if has_none[0] else "cls_token", "eos_token" if has_none[1] else "sep_token"


def _check_example(tokenizer: PreTrainedTokenizerBase, encoder: Pretrained) -> None:
    """Tokenise a pair of sentences of words from the vocabulary itself."""
    is_bert = encoder.family.model_type == BERT
    pieces = tokenizer.get_vocab() if is_bert else [word.lstrip("▁Ġ") for word in tokenizer.get_vocab()]
    words = [word for word in pieces if word.isascii() and word.isalpha() and word.islower()][:8]
    text = " ".join(words) or "a"
    encoded = tokenizer(
        text, text, truncation=True, max_length=2 * len(words) + 3 + (not is_bert), return_token_type_ids=True
    )
    ids, types = encoded["input_ids"], encoded["token_type_ids"]
    special = {tokenizer.unk_token_id}
    if not ids:
        raise ValueError("a pair of sentences becomes no tokens")
    if not encoder.family.is_decoder:
        cls, sep = (getattr(tokenizer, f"{name}_id") for name in _edges(tokenizer, is_bert))
        special |= {cls, sep}
        num_seps = (2,) if is_bert else (2, 3)  # RoBERTa's pairs have two between the sentences
        if ids[:1] != [cls] or ids[-1:] != [sep] or ids.count(cls) != 1 or ids.count(sep) not in num_seps:
            raise ValueError("a pair of sentences does not become [CLS] ... [SEP] ... [SEP]")
    if (is_bert or has_token_types(encoder.config)) and (
        len(types) != len(ids) or types != sorted(types) or not set(types) <= {0, 1}
    ):
        raise ValueError("token_type_ids of a pair of sentences are not zeros and then ones")
    if words and set(ids) <= special:
        raise ValueError("it does not know the words of its own vocabulary")
    tokenizer(f"\u2603 {'x' * 300}")  # raises if it needs a token for unknown words and has none


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, encoder: Pretrained) -> None:
    """Raise UserError if the tokenizer gives ids that the model has no embedding for."""
    num_ids = max(tokenizer.get_vocab().values()) + 1
    if num_ids > encoder.config.vocab_size:
        raise UserError(
            f"the tokenizer has {num_ids} entries, but {encoder.name} embeds {encoder.config.vocab_size}; "
            "save there the tokenizer that the model was trained with"
        )


# -- The contract ------------------------------------------------------------------------------------------------------


def check_contract(
    config: RunConfig,
    task: Task,
    teacher: Pretrained,
    student_init: Pretrained,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Check that teacher, student, task and settings fit each other, before any engine starts.

    Args:
        tokenizer: The student's.
        teacher_tokenizer: None: the student's.

    Raises:
        UserError: vocabularies, label orders, token types, poolings, layers or lengths do not fit; names both sides.
    """
    check_student(student_init)
    teacher_tokenizer = tokenizer if teacher_tokenizer is None else teacher_tokenizer
    for side in {teacher.path: teacher, student_init.path: student_init}.values():
        check_vocabulary(teacher_tokenizer if side is teacher else tokenizer, side)
        check_length(config.max_seq_length, side)
        if side.family.model_type == BERT and len(task.text_columns) == 2 and not has_token_types(side.config):
            raise UserError(
                f"task {task.name} has sentence pairs, but {side.name} has {side.config.type_vocab_size} token "
                "type; it could not tell the sentences apart: take a BERT with 2"
            )
        own = tokenizer if side is student_init else teacher_tokenizer
        is_lent = side is not student_init and own is tokenizer
        if side.family.model_type == BERT and not is_lent and "token_type_ids" not in own.model_input_names:
            raise UserError(
                f"the tokenizer of {side.name} gives no token_type_ids, which BERT reads; use the tokenizer the model "
                "was trained with"
            )
    if teacher_tokenizer is not tokenizer and config.hidden_loss == "tokens" and config.beta > 0:
        raise UserError(
            f"--hidden_loss tokens compares a row's tokens one by one, but {teacher.name} and {student_init.name} have "
            "different tokenizers; set --hidden_loss cls or --beta 0, or take a --student_init with the teacher's "
            "tokenizer"
        )
    if config.teacher and config.hidden_loss == "cls" and config.beta > 0:
        teacher_pooling(config.teacher_pooling, teacher, teacher_tokenizer)
    if config.teacher:  # else its outputs are in files
        _check_head(task, teacher)
    layers = config.init_layers or tuple(range(1, config.num_hidden_layers + 1))
    if max(layers) > student_init.config.num_hidden_layers:
        raise UserError(
            f"layer {max(layers)} of --{student_init.option} {student_init.path} is needed, but it has "
            f"{student_init.config.num_hidden_layers}; lower --num_hidden_layers or set --init_layers"
        )
    try:
        check_init_layers(student_init.family, layers)
    except ValueError as error:
        example = ",".join(map(str, range(1, config.num_hidden_layers + 1)))
        chosen = ",".join(map(str, layers))
        raise UserError(
            f"--init_layers {chosen} does not fit {student_init.name}: {error}; begin with 1, as {example} does"
        ) from error


def _check_head(task: Task, teacher: Pretrained) -> None:
    """Raise UserError if a classifier's labels do not fit the task, or an encoder's weights have a head."""
    if teacher.is_classifier:
        check_labels(task, teacher)
        return
    output = next((name for name in OUTPUTS if name in teacher.weight_names), None)
    if output is not None:  # its head would be taken for one of the task
        classifier = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[teacher.family.model_type]
        body = classifier.replace("ForSequenceClassification", "Model")
        raise UserError(
            f"{teacher.name} has a head ({output}), but its architectures in config.json name no {classifier}; set "
            f"that if it is a classifier for the task, or save its {body} alone"
        )


def check_student(student_init: Pretrained) -> None:
    """Raise UserError if a model of this family cannot start a student."""
    reason = student_init.family.why_no_student
    if reason:
        raise UserError(
            f"{student_init.name} cannot start a student: {student_init.family.model_type}, {reason}; set "
            f"--student_init to a model of {', '.join(STUDENTS)}"
        )


def check_length(max_seq_length: int, encoder: Pretrained) -> None:
    """Raise UserError if rows of `max_seq_length` tokens are longer than the encoder's position embeddings."""
    limit = num_positions(encoder.config)
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
    problem = teacher.config.problem_type
    if problem is not None and task.is_multi_label != (problem == "multi_label_classification"):
        several = "several labels a row" if task.is_multi_label else "one label a row"
        raise UserError(
            f"--{teacher.option} {teacher.path} has problem_type {problem} in config.json, but task {task.name} has "
            f"{several}; take a model of this task"
        )
    names = _label_names(teacher)
    expected = tuple(name.casefold() for name in task.label_names)
    fits = has_unnamed_labels(teacher) or tuple(name.casefold() for name in names) == expected
    if len(names) != task.num_labels or not fits:
        raise UserError(
            f"--{teacher.option} {teacher.path} has the labels {list(names)}, task {task.name} has "
            f"{list(task.label_names)}; take a model of this task, whatever its order (or fix id2label in its "
            "config.json)"
        )


def classes_of(teacher: Pretrained) -> TeacherClasses | None:
    """The classes of a model that is a classifier; None for an encoder."""
    if not teacher.is_classifier:
        return None
    is_multi_label = teacher.config.problem_type == "multi_label_classification"
    return TeacherClasses(teacher.name, _label_names(teacher), not has_unnamed_labels(teacher), is_multi_label)


def has_unnamed_labels(teacher: Pretrained) -> bool:
    """Whether a classifier calls its classes LABEL_0, LABEL_1, ...: their order can then not be checked."""
    return all(name == f"LABEL_{number}" for number, name in enumerate(_label_names(teacher)))


def _label_names(teacher: Pretrained) -> tuple[str, ...]:
    id2label: dict[int, str] = teacher.config.id2label  # type: ignore[assignment]
    return tuple(id2label[number] for number in sorted(id2label))
