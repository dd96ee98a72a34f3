"""A student with the tokens of its data only: the tokenizer and the embedding table without the others.

Ids stay in ascending order, so tokens move down to fill the gaps. Texts whose tokens are all kept are tokenised as
before, but for the new ids (a few rows that are cut at the maximal length are cut elsewhere, because words behind the
cut become other numbers of pieces):

    WordPiece  takes the longest piece that matches, and that piece is kept.
    BPE        keeps each merge whose product is kept, and the parts of that product.
    Unigram    takes the pieces with the best total score. A piece of the lowest score is kept too, because the score of
               an unknown character follows from it.

Single characters are kept as well where they are few, so that other words become pieces.
"""

import copy
import json
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peakd_ds.data.tokens import Split
from peakd_ds.errors import UserError, as_user_error
from peakd_ds.families import family_of

KINDS = ("WordPiece", "BPE", "Unigram")
MAX_CHARACTERS = 2000
"""Single characters are kept if they are at most this many, with their ## forms."""
LOW_IDS = 10
"""All ids up to the largest special id below this stay as they are: positions may follow from the padding id."""
_REMEDY = "leave --trim_vocabulary out"


class Trimmed(NamedTuple):
    """A tokenizer without the tokens that are not used."""

    tokenizer: PreTrainedTokenizerBase
    kept_ids: Tensor
    """Old ids of its tokens, int64 [K], ascending: position i holds the old id of token i."""


# -- The tokenizer -----------------------------------------------------------------------------------------------------


def check_trimmable(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if the tokenizer is of a kind that cannot be trimmed."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{type(tokenizer).__name__} has no tokenizer.json, so it cannot be trimmed; {_REMEDY}")
    kind = type(backend.model).__name__
    if kind not in KINDS:
        raise UserError(f"--trim_vocabulary knows tokenizers of {', '.join(KINDS)}, not of {kind}; {_REMEDY}")


def trimmed_tokenizer(tokenizer: PreTrainedTokenizerBase, used_ids: Tensor) -> Trimmed:
    """A tokenizer without the tokens that are not used, and the ids that it keeps.

    Special and added tokens stay, the unknown token, the bytes of a byte-level one, and single characters if they are
    few.

    Args:
        used_ids: Ids of the tokens that occur, int64 [K].

    Raises:
        UserError: it is of a kind that cannot be trimmed.
    """
    check_trimmable(tokenizer)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = _kept_ids(tokenizer, state, used_ids.tolist())
    new_id = {old: new for new, old in enumerate(kept)}
    _keep(state, new_id)
    problem = f"the vocabulary of {type(tokenizer).__name__} cannot be trimmed"
    with tempfile.TemporaryDirectory() as name, as_user_error(problem, _REMEDY):
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        for file in folder.glob("*"):
            if file.suffix in (".txt", ".model") or file.name == "vocab.json":  # earlier forms of the vocabulary
                file.unlink()
        (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        _keep_in_settings(folder / "tokenizer_config.json", new_id)
        trimmed = type(tokenizer).from_pretrained(folder)
        trimmed.padding_side = tokenizer.padding_side
        wanted = {token: new_id[old] for token, old in tokenizer.get_vocab().items() if old in new_id}
        if trimmed.get_vocab() != wanted:
            raise ValueError("read again, it has other tokens")
    return Trimmed(trimmed, torch.tensor(kept))


def kept_ids(tokenizer: PreTrainedTokenizerBase, trimmed: PreTrainedTokenizerBase) -> Tensor:
    """The old ids of a trimmed tokenizer's tokens, int64 [K], by its ids; `tokenizer` is the whole one."""
    old_id, tokens = tokenizer.get_vocab(), trimmed.get_vocab()
    return torch.tensor([old_id[token] for token in sorted(tokens, key=tokens.__getitem__)])


def num_changed(whole: Split, trimmed: Split, kept_ids: Tensor) -> int:
    """The number of rows whose tokens are others than before, since they have words outside the trimmed vocabulary."""
    rows, kept = np.arange(len(whole)), kept_ids.numpy()
    pairs = zip(whole.rows[rows]["input_ids"], trimmed.rows[rows]["input_ids"], strict=True)
    return sum(not np.array_equal(before, kept[after]) for before, after in pairs)


def _kept_ids(tokenizer: PreTrainedTokenizerBase, state: dict[str, Any], used_ids: Iterable[int]) -> list[int]:
    """Ids of the tokens that stay, ascending."""
    ids, model = tokenizer.get_vocab(), state["model"]
    special = {*tokenizer.all_special_ids, *_ids_of(state["post_processor"])}
    special |= {added["id"] for added in state["added_tokens"]}
    if tokenizer.unk_token is not None:
        special.add(ids[tokenizer.unk_token])
    used = set(used_ids)
    kept = used | special | set(range(max((id for id in special if id < LOW_IDS), default=-1) + 1))
    if model["type"] == "Unigram":
        lowest = min(range(len(model["vocab"])), key=lambda id: model["vocab"][id][1])
        kept |= {lowest} if model["unk_id"] is None else {lowest, model["unk_id"]}
    elif model.get("unk_token") in ids:
        kept.add(ids[model["unk_token"]])
    kept |= {ids[token] for token in _elementary_tokens(state, ids, used)}
    if model["type"] == "BPE":
        kept |= _parts(model, ids, kept)
    return sorted(kept & set(ids.values()))


def _elementary_tokens(state: dict[str, Any], ids: dict[str, int], used: Collection[int]) -> list[str]:
    """Bytes, or single characters, that unknown words break into.

    If the characters are too many, as in a vocabulary of many scripts, those that occur in the used tokens.
    """
    model, prefix = state["model"], state["model"].get("continuing_subword_prefix") or ""
    if model["type"] == "BPE" and "ByteLevel" in json.dumps([state["pre_tokenizer"], state["normalizer"]]):
        return [byte for byte in pre_tokenizers.ByteLevel.alphabet() if byte in ids]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if model.get("byte_fallback") else []

    def without_prefix(token: str) -> str:
        return token.removeprefix(prefix) if len(token) > len(prefix) else token

    characters = [token for token in ids if len(without_prefix(token)) == 1]
    if len(characters) > MAX_CHARACTERS:
        seen = {character for token, id in ids.items() if id in used for character in without_prefix(token)}
        characters = [token for token in characters if without_prefix(token) in seen]
    if len(characters) > MAX_CHARACTERS:
        characters = []
    return [*characters, *(byte for byte in bytes_ if byte in ids)]


def _parts(model: dict[str, Any], ids: dict[str, int], kept: Collection[int]) -> set[int]:
    """Ids of all tokens that merges make the kept tokens of."""
    pairs_of: dict[str, list[tuple[str, str]]] = {}
    for pair in _pairs(model):
        pairs_of.setdefault(_product(model, pair), []).append(pair)
    to_visit = [token for token, id in ids.items() if id in kept]
    parts: set[str] = set()
    while to_visit:
        new = {part for pair in pairs_of.get(to_visit.pop(), ()) for part in pair} - parts
        parts |= new
        to_visit.extend(new)
    return {ids[part] for part in parts}


def _pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]


def _product(model: dict[str, Any], pair: tuple[str, str]) -> str:
    return pair[0] + pair[1].removeprefix(model.get("continuing_subword_prefix") or "")


def _ids_of(processor: dict[str, Any] | None) -> set[int]:
    """Ids in a post-processor."""
    ids: set[int] = set()
    for part in _processors(processor):
        if part["type"] == "TemplateProcessing":
            ids |= {id for special in part["special_tokens"].values() for id in special["ids"]}
        ids |= {part[name][1] for name in ("cls", "sep") if name in part}  # RobertaProcessing, BertProcessing
    return ids


def _processors(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A post-processor, or the parts of a sequence of them."""
    if processor is None:
        return []
    if processor["type"] == "Sequence":
        return [part for one in processor["processors"] for part in _processors(one)]
    return [processor]


def _keep(state: dict[str, Any], new_id: dict[int, int]) -> None:
    """Cut the state of a tokenizer to the ids that stay, and give them their new ids."""
    model = state["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [piece for id, piece in enumerate(model["vocab"]) if id in new_id]
        model["unk_id"] = new_id.get(model["unk_id"])
    else:
        model["vocab"] = {token: new_id[id] for token, id in model["vocab"].items() if id in new_id}
    if model["type"] == "BPE":
        model["merges"] = [pair for pair in _pairs(model) if _product(model, pair) in model["vocab"]]
    state["truncation"] = state["padding"] = None  # of the last call
    for added in state["added_tokens"]:
        added["id"] = new_id[added["id"]]
    for part in _processors(state["post_processor"]):
        if part["type"] == "TemplateProcessing":
            for special in part["special_tokens"].values():
                special["ids"] = [new_id[id] for id in special["ids"]]
        for name in ("cls", "sep"):
            if name in part:
                part[name] = [part[name][0], new_id[part[name][1]]]


def _keep_in_settings(file: Path, new_id: dict[int, int]) -> None:
    """Give the ids in tokenizer_config.json their new values."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("unk_id") in new_id:
        settings["unk_id"] = new_id[settings["unk_id"]]
    if "added_tokens_decoder" in settings:
        added = settings["added_tokens_decoder"]
        settings["added_tokens_decoder"] = {str(new_id[int(id)]): token for id, token in added.items()}
    file.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")


# -- The model ---------------------------------------------------------------------------------------------------------


def trimmed_model(model: PreTrainedModel, kept_ids: Tensor) -> PreTrainedModel:
    """A copy of a model whose table has the embeddings of the kept tokens alone, with their ids in its config.

    Args:
        kept_ids: Old ids of the tokens, int64 [K], ascending, as `trimmed_tokenizer` gives them.
    """
    table, config = model.get_input_embeddings(), model.config
    assert isinstance(table, nn.Embedding)
    new_id = {old: new for new, old in enumerate(kept_ids.tolist())}
    pad = config.pad_token_id
    assert not family_of(config).starts_after_padding or new_id.get(pad) == pad, "positions would move"
    padding = None if table.padding_idx is None else new_id.get(table.padding_idx)
    weight = table.weight.detach()[kept_ids.to(table.weight.device)]
    smaller = nn.Embedding(weight.shape[0], weight.shape[1], padding_idx=padding, _weight=weight)
    smaller.weight.requires_grad_(table.weight.requires_grad)
    trimmed = copy.deepcopy(model, {id(table): smaller.train(table.training)})  # the table itself is not copied
    trimmed.config.vocab_size = len(kept_ids)
    for name in ("pad", "bos", "eos", "cls", "sep", "mask", "unk"):
        name = f"{name}_token_id"
        if isinstance(getattr(config, name, None), int):
            setattr(trimmed.config, name, new_id.get(getattr(config, name)))
    return trimmed
