"""Tiny random models of every family, each with a tokenizer of its family's kind, as save_pretrained writes them.

All know the words of conftest's VOCABULARY. Kinds of tokenizer: WordPiece (bert, electra, distilbert, mpnet),
byte-level BPE (roberta, modernbert, qwen2, qwen3), Unigram (xlm-roberta, camembert, deberta-v2, albert), and BPE of
characters with bytes for unknown ones (llama, mistral, gemma).
"""

import json
from pathlib import Path
from typing import Any

import torch
from conftest import NEGATIVE_WORDS, NOUNS, OTHER_WORDS, POSITIVE_WORDS, VERBS, VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AlbertTokenizer,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertTokenizer,
    CamembertTokenizer,
    DebertaV2Tokenizer,
    DistilBertTokenizer,
    GemmaTokenizer,
    LlamaTokenizer,
    MPNetTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

WORDS = (*POSITIVE_WORDS, *NEGATIVE_WORDS, *NOUNS, *VERBS, *(word for word in OTHER_WORDS if word[0] != "#"))
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz,.")
NUM_MERGES = 400
NUM_POSITIONS = 128
DECODERS = ("qwen2", "qwen3", "llama", "mistral", "gemma")

SETTINGS: dict[str, dict[str, Any]] = {
    "electra": {"embedding_size": 16},
    "roberta": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "camembert": {"type_vocab_size": 1},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 3},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "position_buckets": 16,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "albert": {"embedding_size": 16},
    **{model_type: {"num_key_value_heads": 2} for model_type in DECODERS},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8},
}
"""What is special in a family, as its usual checkpoints have it."""


def save_family(
    folder: Path,
    model_type: str,
    head: dict[str, Any] | None = None,
    *,
    num_layers: int = 4,
    hidden_size: int = 32,
    seed: int = 0,
    **settings: Any,
) -> Path:
    """Write a random model of a family, with a classifier if there are `head` settings, and its tokenizer.

    Args:
        settings: More entries of its config.json, such as share_att_key=False for deberta-v2.
    """
    folder.mkdir(parents=True)
    tokenizer = tokenizer_of(model_type)
    config = config_of(model_type, tokenizer, head, num_layers=num_layers, hidden_size=hidden_size, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = AutoModel if head is None else AutoModelForSequenceClassification
        kind.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config_of(
    model_type: str,
    tokenizer: PreTrainedTokenizerBase,
    head: dict[str, Any] | None = None,
    *,
    num_layers: int = 4,
    hidden_size: int = 32,
    **settings: Any,
) -> Any:
    """The config of a tiny model whose special tokens are the tokenizer's."""
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")
    }
    first = tokenizer.pad_token_id + 1 if model_type in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0
    sizes = {
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * hidden_size,
        "max_position_embeddings": NUM_POSITIONS + first,
        "initializer_range": 0.1,  # 0.02 is for hidden states of 768: these would all look alike
    }
    if model_type == "distilbert":
        names = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
        sizes = {names.get(name, name): value for name, value in sizes.items()}
        sizes["hidden_dim"] = sizes.pop("intermediate_size")
    wanted = sizes | special | SETTINGS.get(model_type, {}) | settings | (head or {})
    return AutoConfig.for_model(model_type, **wanted)


def head_of(*names: str) -> dict[str, Any]:
    """Config entries of a classifier with these classes; one score if there are none."""
    if not names:
        return {"num_labels": 1, "problem_type": "regression"}
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


# -- Tokenizers --------------------------------------------------------------------------------------------------------


def tokenizer_of(model_type: str) -> PreTrainedTokenizerBase:
    """A tokenizer of the kind that the family's checkpoints have."""
    return _TOKENIZERS[model_type]()


def _word_pieces(*special: str) -> dict[str, int]:
    names = (*special, *VOCABULARY[5:], *(f"##{letter}" for letter in LETTERS if letter.isalpha()), *LETTERS)
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def _pieces(*special: str) -> list[tuple[str, float]]:
    """Unigram pieces: special tokens, whole words, and letters at a cost."""
    words = [(f"▁{word}", -3.0) for word in WORDS if len(word) > 1]
    letters = [("▁", -4.0), *((letter, -10.0) for letter in LETTERS)]
    return [*((name, 0.0) for name in special), *words, *letters]


def _merges(pre_tokenizer: Any, special: list[str], alphabet: list[str]) -> tuple[dict[str, int], list[tuple]]:
    """Vocabulary and merges of a BPE that knows WORDS, special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet) + NUM_MERGES,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    text = " ".join(WORDS)
    tokenizer.train_from_iterator([text, f"{text} {text}"], trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return tokenizer.get_vocab(), [tuple(pair) for pair in merges]


def _byte_pairs(*special: str) -> tuple[dict[str, int], list[tuple]]:
    return _merges(
        pre_tokenizers.ByteLevel(add_prefix_space=False), list(special), sorted(pre_tokenizers.ByteLevel.alphabet())
    )


def _char_pairs(*special: str) -> tuple[dict[str, int], list[tuple]]:
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    return _merges(pre_tokenizers.Metaspace(), names, ["▁", *LETTERS])


def _modernbert() -> PreTrainedTokenizerBase:
    vocab, merges = _byte_pairs("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(name, vocab[name]) for name in ("[CLS]", "[SEP]")],
    )
    names = ("unk", "cls", "sep", "pad", "mask")
    special = {f"{name}_token": f"[{name.upper()}]" for name in names}
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **special)


def _from_pairs(tokenizer: type, pairs: tuple[dict[str, int], list[tuple]], **more: Any) -> PreTrainedTokenizerBase:
    return tokenizer(vocab=pairs[0], merges=pairs[1], **more)


_ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_CAMEMBERT = ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>", "<mask>")
_BRACKETS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LLAMA = ("<unk>", "<s>", "</s>", "<pad>")


def _qwen() -> PreTrainedTokenizerBase:
    return _from_pairs(Qwen2Tokenizer, _byte_pairs("<|endoftext|>", "<|im_start|>", "<|im_end|>"))


def _llama() -> PreTrainedTokenizerBase:
    return _from_pairs(LlamaTokenizer, _char_pairs(*_LLAMA), pad_token="<pad>", add_bos_token=True)


_TOKENIZERS = {
    "bert": lambda: BertTokenizer(vocab=_word_pieces(*_BRACKETS)),
    "electra": lambda: BertTokenizer(vocab=_word_pieces(*_BRACKETS)),
    "distilbert": lambda: DistilBertTokenizer(vocab=_word_pieces(*_BRACKETS)),
    "mpnet": lambda: MPNetTokenizer(vocab=_word_pieces("<s>", "<pad>", "</s>", "[UNK]", "<mask>")),
    "roberta": lambda: _from_pairs(RobertaTokenizer, _byte_pairs(*_ROBERTA)),
    "xlm-roberta": lambda: XLMRobertaTokenizer(vocab=_pieces(*_ROBERTA)),
    "camembert": lambda: CamembertTokenizer(vocab=_pieces(*_CAMEMBERT)),
    "deberta-v2": lambda: DebertaV2Tokenizer(vocab=_pieces("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")),
    "albert": lambda: AlbertTokenizer(vocab=_pieces("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")),
    "modernbert": _modernbert,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "llama": _llama,
    "mistral": _llama,
    "gemma": lambda: _from_pairs(GemmaTokenizer, _char_pairs("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")),
}
