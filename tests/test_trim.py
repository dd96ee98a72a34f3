"""Trimmed vocabularies: texts of the data get the same tokens and logits, in every kind of tokenizer and family."""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import NOUNS, VERBS
from datasets import Dataset
from tiny_families import WORDS, config_of, head_of, tokenizer_of
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from peakd_ds.data.tasks import get_task
from peakd_ds.data.tokens import tokenize
from peakd_ds.errors import UserError
from peakd_ds.families import STUDENTS
from peakd_ds.model.build import build_classifier
from peakd_ds.model.sizes import count_parameters
from peakd_ds.results import trim
from peakd_ds.results.export import unroll
from peakd_ds.sps import classes_of

FAMILIES = STUDENTS


def texts_of(words: tuple[str, ...], count: int = 60, seed: int = 0) -> list[str]:
    """Sentences of the words, some with parts of words, capitals, unknown characters and odd spaces."""
    generator = random.Random(seed)
    texts = []
    for number in range(count):
        chosen = generator.choices(words, k=generator.randrange(1, 9))
        if number % 4 == 1:
            chosen.append(generator.choice(words)[: generator.randrange(1, 4)] + generator.choice(words))
        if number % 4 == 2:
            chosen.insert(0, generator.choice(words).capitalize())
        if number % 8 == 3:
            chosen.append("\u2603\u00e9")
        texts.append(("  " if number % 5 == 0 else " ").join(chosen))
    return texts


def used_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    found = tokenizer(texts)["input_ids"] + tokenizer(texts, texts)["input_ids"]
    return torch.tensor(sorted({id for ids in found for id in ids}))


SEEN = (*NOUNS[:6], *VERBS[:3], "the", "is", ".")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_texts_of_the_data_get_the_same_tokens(model_type: str, tmp_path: Path) -> None:
    tokenizer, texts = tokenizer_of(model_type), texts_of(SEEN)
    trimmed, kept = trim.trimmed_tokenizer(tokenizer, used_ids(tokenizer, texts))
    assert len(kept) == len(trimmed) < len(tokenizer)
    assert kept.tolist() == sorted(kept.tolist())
    trimmed.save_pretrained(tmp_path)
    for other in (trimmed, AutoTokenizer.from_pretrained(tmp_path)):
        assert other.get_vocab() == trimmed.get_vocab()
        for arguments in ((texts,), (texts, texts[::-1])):
            ours, theirs = other(*arguments), tokenizer(*arguments)
            assert [kept[ids].tolist() for ids in ours["input_ids"]] == theirs["input_ids"]
            assert ours.keys() == theirs.keys()
            assert ours.get("token_type_ids") == theirs.get("token_type_ids")
        for name in ("pad", "unk", "cls", "sep", "mask"):
            assert kept[getattr(other, f"{name}_token_id")] == getattr(tokenizer, f"{name}_token_id")
            assert getattr(other, f"{name}_token") == getattr(tokenizer, f"{name}_token")
        assert other.model_input_names == tokenizer.model_input_names
        assert other.padding_side == tokenizer.padding_side


@pytest.mark.parametrize("model_type", FAMILIES)
def test_other_words_become_pieces(model_type: str) -> None:
    tokenizer = tokenizer_of(model_type)
    trimmed, _ = trim.trimmed_tokenizer(tokenizer, used_ids(tokenizer, texts_of(SEEN)))
    ids = trimmed("charming", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1 and trimmed.unk_token_id not in ids
    pieces = [token.removeprefix("##").strip("\u2581\u0120") for token in trimmed.convert_ids_to_tokens(ids)]
    assert "".join(pieces) == "charming"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_trimmed_tokenizer_is_trimmed_again_to_itself(model_type: str) -> None:
    tokenizer = tokenizer_of(model_type)
    trimmed, _ = trim.trimmed_tokenizer(tokenizer, used_ids(tokenizer, texts_of(SEEN)))
    again, kept = trim.trimmed_tokenizer(trimmed, used_ids(trimmed, texts_of(SEEN)))
    assert again.get_vocab() == trimmed.get_vocab() and kept.tolist() == list(range(len(trimmed)))


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("is_shared", [False, True])
def test_logits_are_the_same(model_type: str, is_shared: bool, tmp_path: Path) -> None:
    tokenizer, texts = tokenizer_of(model_type), texts_of(SEEN)
    config = config_of(model_type, tokenizer, head_of("no", "yes"), num_layers=2)
    torch.manual_seed(0)
    if is_shared and model_type != "bert":
        settings = {name: value for name, value in config.to_dict().items() if name != "model_type"}
        whole = build_classifier(classes_of(model_type).config(**settings, sharing="sps"))
    else:
        whole = AutoModelForSequenceClassification.from_config(config)
    whole.eval()
    trimmed_tokenizer, kept = trim.trimmed_tokenizer(tokenizer, used_ids(tokenizer, texts))
    small = trim.trimmed_model(whole, kept)
    assert small.config.vocab_size == len(kept) == small.get_input_embeddings().num_embeddings
    assert small.config.pad_token_id == trimmed_tokenizer.pad_token_id
    before, after = count_parameters(whole), count_parameters(small)
    width = config.embedding_size if model_type == "electra" else 32
    assert after == before._replace(embeddings=len(kept) * width)
    assert whole.config.vocab_size == whole.get_input_embeddings().num_embeddings > len(kept)
    with torch.no_grad():
        expected = whole(**tokenizer(texts, texts, padding=True, return_tensors="pt")).logits
        inputs = trimmed_tokenizer(texts, texts, padding=True, return_tensors="pt")
        assert torch.equal(small(**inputs).logits, expected)
        small.save_pretrained(tmp_path)
        assert torch.equal(
            AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()(**inputs).logits, expected
        )
        plain = unroll(small).eval()
        torch.testing.assert_close(plain(**inputs).logits, expected, rtol=0, atol=1e-5)
    assert plain.config.vocab_size == len(kept)


def test_low_ids_stay() -> None:
    """RoBERTa counts positions from the padding id."""
    tokenizer = tokenizer_of("roberta")
    _, kept = trim.trimmed_tokenizer(tokenizer, torch.tensor([300]))
    assert kept[:5].tolist() == [0, 1, 2, 3, 4] and 300 in kept.tolist()


def test_all_bytes_stay() -> None:
    tokenizer = tokenizer_of("roberta")
    trimmed, _ = trim.trimmed_tokenizer(tokenizer, used_ids(tokenizer, ["the cat"]))
    text = "Caf\u00e9 \u2603 \U0001f600 zzz"
    assert trimmed.decode(trimmed(text, add_special_tokens=False)["input_ids"]) == text


def test_merges_keep_their_parts() -> None:
    """Two ways to make one token: both stay, with their parts."""
    vocab = {token: number for number, token in enumerate(["<unk>", *"abcd", "ab", "bc", "abc", "cd", "abcd"])}
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc"), ("c", "d"), ("abc", "d"), ("ab", "cd")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    trimmed, kept = trim.trimmed_tokenizer(tokenizer, torch.tensor([vocab["abc"]]))
    assert {"abc", "ab", "bc", "a", "b", "c"} < trimmed.get_vocab().keys()
    assert "abcd" not in trimmed.get_vocab() and "cd" not in trimmed.get_vocab()
    for text in ("abc", "ab", "bc", "abcab"):
        assert kept[trimmed(text)["input_ids"]].tolist() == tokenizer(text)["input_ids"]


def test_an_unknown_character_keeps_its_score() -> None:
    """In Unigram the lowest score decides what an unknown character costs: with a higher one, x would be unknown."""
    pieces = [("<unk>", 0.0), ("a", -1.0), ("x", -25.0), ("xa", -27.0), ("b", -2.0), ("rare", -30.0)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=0)), unk_token="<unk>")
    trimmed, kept = trim.trimmed_tokenizer(tokenizer, torch.tensor([3]))
    assert kept.tolist() == [0, 1, 2, 3, 4, 5]
    for text in ("xa", "xab", "ay"):
        assert kept[trimmed(text)["input_ids"]].tolist() == tokenizer(text)["input_ids"]


def test_characters_of_many_scripts_stay_if_they_occur(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trim, "MAX_CHARACTERS", 12)
    tokenizer = tokenizer_of("xlm-roberta")
    trimmed, _ = trim.trimmed_tokenizer(tokenizer, used_ids(tokenizer, ["cat house"]))
    singles = {token for token in trimmed.get_vocab() if len(token) == 1}
    assert singles == set("\u2581cathouse")
    monkeypatch.setattr(trim, "MAX_CHARACTERS", 3)
    trimmed, _ = trim.trimmed_tokenizer(tokenizer, used_ids(tokenizer, ["cat house"]))
    assert len([token for token in trimmed.get_vocab() if len(token) == 1]) <= 2


def test_added_tokens_and_the_last_calls_limits(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bert")
    tokenizer.add_tokens(["[E1]", "qqq"])
    tokenizer("the cat", truncation=True, max_length=3, padding="max_length")
    trimmed, kept = trim.trimmed_tokenizer(tokenizer, used_ids(tokenizer, ["the cat qqq"]))
    trimmed.save_pretrained(tmp_path)
    for other in (trimmed, AutoTokenizer.from_pretrained(tmp_path)):
        ids = other("the cat qqq [E1]")["input_ids"]
        assert kept[ids].tolist() == tokenizer("the cat qqq [E1]")["input_ids"] and len(ids) == 6
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    assert state["truncation"] is None and state["padding"] is None


def test_rows_with_words_outside_are_counted() -> None:
    tokenizer, task = tokenizer_of("roberta"), get_task("sst2")
    trimmed, kept = trim.trimmed_tokenizer(tokenizer, used_ids(tokenizer, ["the cat", "the dog"]))
    assert trim.kept_ids(tokenizer, trimmed).tolist() == kept.tolist()
    rows = Dataset.from_dict({"sentence": ["the dog", "the charming cat", "the cat"], "label": [0, 1, 0]})
    splits = [tokenize(task, rows, one, 16) for one in (tokenizer, trimmed)]
    assert trim.num_changed(*splits, kept) == 1


def test_everything_used_changes_nothing() -> None:
    tokenizer = tokenizer_of("bert")
    trimmed, kept = trim.trimmed_tokenizer(tokenizer, torch.arange(len(tokenizer)))
    assert trimmed.get_vocab() == tokenizer.get_vocab() and kept.tolist() == list(range(len(tokenizer)))


def test_other_kinds_are_refused() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, **{word: n for n, word in enumerate(WORDS, 1)}}, "<unk>"))
    with pytest.raises(UserError, match="not of WordLevel; leave --trim_vocabulary out"):
        trim.check_trimmable(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))

    class Slow:
        pass

    with pytest.raises(UserError, match=r"Slow has no tokenizer\.json"):
        trim.check_trimmable(Slow())  # type: ignore[arg-type]
