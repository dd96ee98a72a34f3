"""Training the tokens that occur, and no others, gives the model that training the whole table gives."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel

from peakd_ds import train
from peakd_ds.command_line import parse
from peakd_ds.data.tokens import ON_ALL_NODES, Split, TokenRows, used_tokens
from peakd_ds.model import vocabulary
from peakd_ds.ranks import dist

WORDS = "--task sst2 --num_hidden_layers 2 --epochs 2 --global_batch_size 16 --log_steps 1 --lr 3e-3 --weight_decay 0.5"


def split_of(*parts: list[list[int]]) -> Split:
    """A split in so many arrays, each of some rows."""
    rows = [row for part in parts for row in part]
    lengths = np.array([len(row) for row in rows])
    numbers = np.split(np.arange(len(rows)), np.cumsum([len(part) for part in parts])[:-1])
    columns = [{"input_ids": np.array([id for row in part for id in row], np.int32)} for part in parts]
    held = TokenRows(zip(numbers, columns, strict=True), lengths)
    return Split(held, lengths, torch.zeros(len(rows)), np.full(len(rows), ON_ALL_NODES))


def test_tokens_of_all_splits(single_rank: None) -> None:
    splits = split_of([[2, 7], [2, 9, 3]], [[2, 3]]), split_of([[2, 5]])
    assert used_tokens(splits, 12).tolist() == [2, 3, 5, 7, 9]


def used_here(ids: list[int]) -> list[int]:
    """Runs on each of two ranks, which hold other rows."""
    return used_tokens([split_of([[2, ids[dist.rank()]]])], 12).tolist()


def test_tokens_of_all_ranks(two_ranks) -> None:
    assert two_ranks.run(used_here, [9, 4]) == [[2, 4, 9]] * 2


@pytest.mark.parametrize("padding_idx", [None, 0, 4])
def test_same_embeddings_and_gradients(padding_idx: int | None) -> None:
    whole, tokens = nn.Embedding(10, 4, padding_idx=padding_idx), torch.tensor([2, 4, 7])
    used, ids = vocabulary.UsedEmbedding(whole, tokens), torch.tensor([[7, 2], [4, 7]])
    weights = torch.randn(2, 2, 4)
    for table in (whole, used):
        (table(ids) * weights).sum().backward()
    assert torch.equal(whole(ids), used(ids))
    assert whole.weight.grad is not None and used.weight.grad is not None
    assert torch.equal(whole.weight.grad[tokens], used.weight.grad)
    assert used.state_dict().keys() == {"weight"} and used.weight.shape == (3, 4)
    with pytest.raises(IndexError):
        used(torch.tensor([3]))


def test_restored_table(single_rank: None) -> None:
    sizes = {"hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 2}
    model = nn.ModuleDict({"model": BertModel(BertConfig(vocab_size=5, **sizes))})
    first, tokens = model["model"].get_input_embeddings().weight.detach().clone(), torch.tensor([1, 4])
    whole = vocabulary.trim(model, tokens)
    assert list(whole) == ["model.embeddings.word_embeddings"]
    assert model["model"].get_input_embeddings().weight.shape == (2, 2)
    nn.init.constant_(model["model"].get_input_embeddings().weight, 9.0)
    vocabulary.restore(model, whole, tokens, decay=0.5)
    restored = model["model"].get_input_embeddings().weight
    assert torch.equal(restored[tokens], torch.full((2, 2), 9.0))
    assert torch.equal(restored[[0, 2, 3]], first[[0, 2, 3]] / 2)


def run(argv: list[str], is_whole: bool) -> None:
    """A run of all stages on this rank; with the whole table if asked for."""
    trim, restore = vocabulary.trim, vocabulary.restore
    if is_whole:
        vocabulary.trim, vocabulary.restore = (lambda *_: {}), (lambda *_: None)
    try:
        train.main(parse(argv))
    finally:
        vocabulary.trim, vocabulary.restore = trim, restore


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_run_equals_one_with_the_whole_table(
    dtype: str, tiny_data: Path, tiny_encoder: Path, two_ranks, tmp_path: Path
) -> None:
    """All stages, two ranks: losses, exported weights, those of tokens that never occur too."""
    argv = [*WORDS.split(), "--dtype", dtype, "--teacher", str(tiny_encoder), "--data_dir", str(tiny_data)]
    folders = [tmp_path / name for name in ("used", "whole")]
    for folder, is_whole in zip(folders, (False, True), strict=True):
        two_ranks.run(run, [*argv, "--run_dir", str(folder)], is_whole)
    records = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders]
    losses, norms = ([[r[key] for r in told if "loss" in r] for told in records] for key in ("loss", "grad_norm"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if dtype == "fp32" else 1e-2)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4 if dtype == "fp32" else 5e-2)
    for name in ("teacher", "student"):
        used, whole = (load_file(folder / name / "model.safetensors") for folder in folders)
        assert used.keys() == whole.keys()
        for key in used:
            torch.testing.assert_close(used[key], whole[key], rtol=1e-4, atol=1e-5 if dtype == "fp32" else 1e-2)
    table = "bert.embeddings.word_embeddings.weight"
    saved = load_file(next((folders[0] / "checkpoints" / "distill").glob("best-*")) / "weights.safetensors")
    num_used, num_all = len(saved[f"student.{table}"]), len(whole[table])
    assert 10 < num_used < num_all  # so something was left out
    untouched = (load_file(tiny_encoder / "model.safetensors")["embeddings.word_embeddings.weight"])[1]
    decay = used[table][1] / untouched  # [UNK] is in no row
    assert 0.5 < decay.mean() < 0.99 and torch.allclose(decay, decay.mean().expand(32), rtol=1e-5)
