"""Which token's state stands for a whole row when the hidden-state loss compares teacher and student."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from peakd_ds.errors import UserError, as_user_error
from peakd_ds.families import family_of
from peakd_ds.model.config_file import Pretrained

FILE = "1_Pooling/config.json"
"""Where sentence-transformers says how a model's token states become one vector."""
PREFIX = "pooling_mode_"
POOLINGS = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last", "cls": "cls", "mean": "mean"}
"""Ours, by the names of sentence-transformers."""
MAX_BYTES = 2**20
REMEDY = "set --teacher_pooling cls, last or mean"


def natural_pooling(config: PreTrainedConfig) -> str:
    """The token that a model's own head reads."""
    if family_of(config).is_decoder:
        return "last"
    return "mean" if getattr(config, "classifier_pooling", "cls") == "mean" else "cls"


def teacher_pooling(setting: str, teacher: Pretrained, tokenizer: PreTrainedTokenizerBase) -> str:
    """cls, last or mean: what `--teacher_pooling` means for this teacher. Only `--hidden_loss cls` reads it.

    Args:
        setting: The value of `--teacher_pooling`.
        tokenizer: The teacher's.

    Raises:
        UserError: the folder says a pooling that is not computed here, or the first token says nothing of a row.
    """
    is_told = setting != "auto"
    pooling = setting if is_told else stored_pooling(teacher) or natural_pooling(teacher.config)
    said_by = f"--teacher_pooling {setting}" if is_told else f"{FILE} of {teacher.name}"
    if pooling == "cls" and teacher.family.is_decoder:
        raise UserError(
            f"{said_by} takes the first token's state, but {teacher.name} is a causal model, whose first token sees no "
            "other; set --teacher_pooling last or mean"
        )
    if pooling == "cls" and first_token(tokenizer) is None:
        raise UserError(
            f"{said_by} takes the first token's state, but the tokenizer of {teacher.name} starts no row with a "
            "cls_token; set --teacher_pooling mean or last"
        )
    return pooling


def first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the special token that starts every row, cls_token or bos_token; None if rows start with their text."""
    found = {tuple(tokenizer(text)["input_ids"][:1]) for text in ("a", "the b")}
    ids = found.pop() if len(found) == 1 else ()
    return ids[0] if ids and ids[0] in (tokenizer.cls_token_id, tokenizer.bos_token_id) else None


def stored_pooling(encoder: Pretrained) -> str | None:
    """What a sentence-transformers folder says; None if the model is none.

    Raises:
        UserError: the file cannot be read, or says a pooling that is not computed here.
    """
    with as_user_error(f"{encoder.name} has a {FILE} that cannot be read", REMEDY):
        if Path(encoder.path).is_dir():
            file = Path(encoder.path) / FILE
            if not file.exists():
                return None
        else:
            options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
            found = cached_file(encoder.path, FILE, **options)
            if found is None:
                return None
            file = Path(found)
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES:,} bytes")
        document = json.loads(file.read_bytes().decode())
        if not isinstance(document, dict):
            raise ValueError("it is no JSON object")
    modes = _modes(document)
    if len(modes) != 1 or modes[0] not in POOLINGS:
        shown = " and ".join(modes)[:80] or "no pooling"
        raise UserError(f"{encoder.name} has {shown} in {FILE}, which is not computed here; {REMEDY}")
    return POOLINGS[modes[0]]


def write_pooling(folder: Path, pooling: str, config: PreTrainedConfig) -> None:
    """Write to a model's folder what its pooling is, as sentence-transformers does, unless its own head reads that."""
    if pooling != natural_pooling(config):
        mode = next(name for name, ours in POOLINGS.items() if ours == pooling)
        (folder / FILE).parent.mkdir()
        (folder / FILE).write_text(json.dumps({f"{PREFIX}{mode}": True}, indent=2) + "\n", encoding="utf-8")


def _modes(document: dict[str, Any]) -> list[str]:
    """Names of the poolings that a file switches on: `pooling_mode` in new ones, `pooling_mode_...: true` in old."""
    named = document.get("pooling_mode")
    if named is not None:
        return [str(name) for name in (named if isinstance(named, list) else [named])]
    return [name.removeprefix(PREFIX) for name, is_on in document.items() if name.startswith(PREFIX) and is_on is True]
