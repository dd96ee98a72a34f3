"""Which rows form which batch on which rank, what is fed to a model, and what is read from disk."""

import dataclasses
import shutil
from collections.abc import Callable
from math import gcd
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import NUM_DEV_ROWS, NUM_TRAIN_ROWS, VOCABULARY, made_up_rows, write_split
from test_files import DAMAGES, damageable
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from peakd_ds.data import reading
from peakd_ds.data.batches import _deal, eval_batches, global_batches
from peakd_ds.data.division import NUM_SHARDS, epoch_slots, split_holdout
from peakd_ds.data.tasks import get_task
from peakd_ds.data.tokens import Split, tokenize
from peakd_ds.errors import UserError
from peakd_ds.files import damage_of
from peakd_ds.packed.packing import padded
from peakd_ds.ranks import dist

SIZES = [(n, b) for n in (1, 3, 10, 63, 64, 65, 90, 1000, 2490) for b in (1, 7, 16, 32, 48, 64, 96, 128)]
SEED = 5


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setattr(dist, "rank", lambda: rank)
    monkeypatch.setattr(dist, "world_size", lambda: world_size)


def shard_of(row: int, num_rows: int) -> int:
    bounds = [shard * num_rows // NUM_SHARDS for shard in range(NUM_SHARDS + 1)]
    return next(shard for shard in range(NUM_SHARDS) if bounds[shard] <= row < bounds[shard + 1])


@pytest.fixture(scope="module")
def tokenizer(tiny_encoder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_encoder)


@pytest.fixture(scope="module")
def rte(tiny_data: Path, tokenizer: PreTrainedTokenizerBase) -> Split:
    task = get_task("rte")
    return tokenize(task, reading.load_splits(task, str(tiny_data))["train"], tokenizer, 32)


# -- Slots of an epoch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_rows", "batch_size"), SIZES)
def test_each_row_once_an_epoch(num_rows: int, batch_size: int) -> None:
    slots = epoch_slots(num_rows, batch_size, SEED, 0)
    assert slots.shape[1] == batch_size
    assert sorted(slots[slots >= 0]) == list(range(num_rows))
    assert (slots >= 0).any(axis=1).all(), "no batch is empty"


@pytest.mark.parametrize(("num_rows", "batch_size"), SIZES)
def test_batches_take_alike_from_equally_spaced_shards(num_rows: int, batch_size: int) -> None:
    num_taken = gcd(batch_size, NUM_SHARDS)
    for batch in epoch_slots(num_rows, batch_size, SEED, 3):
        shards = [None if row < 0 else shard_of(row, num_rows) for row in batch]
        offset = {shard % (NUM_SHARDS // num_taken) for shard in shards if shard is not None}
        assert len(offset) == 1, "shards are equally spaced"
        for shard in set(shards) - {None}:
            assert shards.count(shard) <= batch_size // num_taken
        if None not in shards:
            assert len(set(shards)) == num_taken


@pytest.mark.parametrize("num_rows", [640, 2490])
@pytest.mark.parametrize("batch_size", [1, 16, 32, 48, 64, 96, 128])
def test_only_the_last_batches_are_smaller(num_rows: int, batch_size: int) -> None:
    sizes = (epoch_slots(num_rows, batch_size, SEED, 0) >= 0).sum(axis=1)
    # Shards differ by one row at most, so all batches but those of the last round are full.
    last_round = NUM_SHARDS // gcd(batch_size, NUM_SHARDS)
    assert (sizes[:-last_round] == batch_size).all()
    assert (sizes > 0).all()


def test_the_number_of_batches_is_the_same_in_every_epoch() -> None:
    for num_rows, batch_size in SIZES:
        assert len({len(epoch_slots(num_rows, batch_size, SEED, epoch)) for epoch in range(4)}) == 1


@pytest.mark.parametrize(
    ("batch_size", "num_nodes"),
    [(b, n) for b in (16, 32, 48, 64, 96) for n in (1, 2, 4, 8, 16, 32) if gcd(b, NUM_SHARDS) % n == 0],
)
def test_each_node_reads_its_own_block_of_shards(batch_size: int, num_nodes: int) -> None:
    num_rows, block = 1000, NUM_SHARDS // num_nodes
    for batch in epoch_slots(num_rows, batch_size, SEED, 1):
        for node, part in enumerate(batch.reshape(num_nodes, -1)):
            shards = {shard_of(row, num_rows) for row in part if row >= 0}
            assert shards <= set(range(node * block, (node + 1) * block))


def test_order_follows_from_seed_and_epoch() -> None:
    orders = {
        (seed, epoch): epoch_slots(1000, 32, seed, epoch).tobytes() for seed in (0, 1, 2**32 - 1) for epoch in range(3)
    }
    assert len(set(orders.values())) == len(orders)
    assert orders[1, 2] == epoch_slots(1000, 32, 1, 2).tobytes()


def test_shards_are_shuffled_apart() -> None:
    """Shards of equal size must not share one permutation."""
    slots = epoch_slots(6400, 64, SEED, 0)
    assert len({tuple(slots[:, shard] - 100 * shard) for shard in range(64)}) == 64


# -- Global batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "world_size"), [(b, w) for b in (16, 48, 96) for w in (1, 2, 3, 4, 8) if b % w == 0]
)
@pytest.mark.parametrize("num_accum_steps", [1, 2])
def test_ranks_unite_to_the_same_batches(
    rte: Split, monkeypatch: pytest.MonkeyPatch, batch_size: int, world_size: int, num_accum_steps: int
) -> None:
    train_rows, _ = split_holdout(len(rte))
    slots = epoch_slots(len(train_rows), batch_size, SEED, 0)
    by_rank = []
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        batches = list(global_batches(rte, train_rows, slots, num_accum_steps))
        by_rank.append([(batch, list(batch.micro_batches)) for batch in batches])
    assert {len(batches) for batches in by_rank} == {len(slots)}
    for number, slot in enumerate(slots):
        expected = train_rows[slot[slot >= 0]]
        seen, num_tokens = [], 0
        for batches in by_rank:
            batch, micro_batches = batches[number]
            assert len(micro_batches) == num_accum_steps, "engines make the same number of passes on every rank"
            assert (batch.num_items, batch.num_tokens) == (len(expected), rte.lengths[expected].sum())
            for micro in micro_batches:
                assert micro.num_real <= -(-batch_size // (world_size * num_accum_steps))
                seen += micro.rows[: micro.num_real].tolist()
                num_tokens += micro.inputs["input_ids"].numel() if micro.num_real else 0
        assert sorted(seen) == sorted(expected)
        assert num_tokens == rte.lengths[expected].sum()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
def test_ranks_get_like_numbers_of_rows_and_tokens(num_ranks: int) -> None:
    rng = np.random.default_rng(0)
    for num_rows in (0, 1, 5, 32, 97):
        lengths = np.sort(np.minimum(8 + rng.exponential(30, num_rows), 128).astype(int))[::-1]
        parts = _deal(np.arange(num_rows), num_ranks)
        assert sorted(np.concatenate(parts).tolist()) == list(range(num_rows))
        assert np.ptp([len(part) for part in parts]) <= 1
        assert np.ptp([lengths[part].sum() for part in parts]) <= lengths.max(initial=0)


def test_of_sharded_rows_a_node_s_ranks_get_those_of_its_part_of_the_slots(
    rte: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.arange(len(rte))
    slots = epoch_slots(len(rows), 32, SEED, 0)
    split = dataclasses.replace(rte, node_of=np.repeat([0, 1], len(rte) // 2))
    monkeypatch.setattr(dist, "num_nodes", lambda: 2)
    for node in range(2):
        seen: list[set[int]] = [set() for _ in slots]
        for rank in (2 * node, 2 * node + 1):
            as_rank(monkeypatch, rank, 4)
            for number, batch in enumerate(global_batches(split, rows, slots, 2)):
                seen[number] |= {int(row) for micro in batch.micro_batches for row in micro.rows[: micro.num_real]}
        assert seen == [{row for row in slot[node * 16 : node * 16 + 16] if row >= 0} for slot in slots]


def test_batches_from_the_middle_of_an_epoch(rte: Split) -> None:
    rows = np.arange(len(rte))
    slots = epoch_slots(len(rows), 16, SEED, 0)
    whole = [[m.rows.tolist() for m in b.micro_batches] for b in global_batches(rte, rows, slots, 1)]
    rest = [[m.rows.tolist() for m in b.micro_batches] for b in global_batches(rte, rows, slots, 1, first=2)]
    assert rest == whole[2:]
    assert list(global_batches(rte, rows, slots, 1, first=len(slots))) == []


# -- Micro-batches and tokens ------------------------------------------------------------------------------------------


def test_micro_batch_is_what_the_tokenizer_makes(
    tiny_data: Path, rte: Split, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = datasets.Dataset(pyarrow.parquet.read_table(next((tiny_data / "rte").glob("train-*"))))[:]
    chosen = [4, 0, 31]
    micro = rte.micro_batch(np.array(chosen))
    texts = [[rows[name][i] for i in chosen] for name in ("sentence1", "sentence2")]
    expected = tokenizer(*texts, padding=True, return_tensors="pt")
    inputs = padded(micro.inputs)
    assert inputs.keys() == expected.keys() == {"input_ids", "attention_mask", "token_type_ids"}
    for name, tensor in inputs.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.dtype == torch.int64
    assert micro.labels.tolist() == [rows["label"][i] for i in chosen]
    assert (micro.rows.tolist(), micro.num_real) == (chosen, 3)


def test_token_types_tell_the_sentences_apart(rte: Split, tokenizer: PreTrainedTokenizerBase) -> None:
    inputs = rte.micro_batch(np.array([0])).inputs
    assert set(inputs["token_type_ids"][0].tolist()) == {0, 1}
    second = inputs["input_ids"][0][inputs["token_type_ids"][0] == 1]
    assert tokenizer.decode(second).endswith("[SEP]") and "[CLS]" not in tokenizer.decode(second)


def test_a_rank_without_rows_gets_a_batch_that_does_not_count(rte: Split) -> None:
    micro = rte.micro_batch(np.array([], np.int64))
    assert micro.num_real == 0
    assert micro.inputs["packing"].num_rows == 1
    assert micro.labels[: micro.num_real].numel() == 0


def test_regression_labels_are_scores(tiny_data: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    task = get_task("stsb")
    split = tokenize(task, reading.load_splits(task, str(tiny_data))["train"], tokenizer, 32)
    assert split.labels.dtype == torch.float32
    assert set(split.labels.tolist()) == {0.0, 1.25, 2.5, 3.75, 5.0}


def test_longer_inputs_are_cut(tiny_data: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    task = get_task("rte")
    split = tokenize(task, reading.load_splits(task, str(tiny_data))["train"], tokenizer, 8)
    assert split.lengths.max() == 8
    inputs = padded(split.micro_batch(np.arange(len(split))).inputs)
    assert inputs["input_ids"].shape == (NUM_TRAIN_ROWS, 8)
    separators = inputs["input_ids"] == VOCABULARY.index("[SEP]")
    assert (separators.sum(1) == 2).all(), "both sentences keep their end"


def test_tokenised_rows_are_cached(
    tiny_data: Path,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    single_rank: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = get_task("rte")
    rows = reading.load_splits(task, str(tiny_data))
    calls = []
    encode = datasets.Dataset.map

    def counted(*args: Any, **settings: Any) -> datasets.Dataset:
        calls.append(1)
        return encode(*args, **settings)

    monkeypatch.setattr(datasets.Dataset, "map", counted)

    def cached(split: str = "train", max_seq_length: int = 32) -> Split:
        fresh = reading.load_splits(task, str(tiny_data))[split]
        return tokenize(task, fresh, tokenizer, max_seq_length, tmp_path / "cache")

    first, again = cached(), cached()
    assert len(calls) == 1
    assert (again.lengths == first.lengths).all() and torch.equal(again.labels, first.labels)
    every = np.arange(len(rows["train"]))
    theirs = padded(again.micro_batch(every).inputs)
    for name, tensor in padded(first.micro_batch(every).inputs).items():
        assert torch.equal(tensor, theirs[name])
    assert cached(max_seq_length=8).lengths.max() == 8
    assert len(cached("validation")) == NUM_DEV_ROWS
    assert len(calls) == 3
    assert not list((tmp_path / "cache").rglob(".*"))


@pytest.mark.parametrize("damage", [*DAMAGES, None])
def test_damaged_rows_are_made_again(
    tiny_data: Path,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    single_rank: None,
    damage: Callable[[Path], None] | None,
) -> None:
    """Each file in turn; for None, the folder has no checksums, as in earlier versions."""
    task = get_task("rte")
    rows = reading.load_splits(task, str(tiny_data))["train"]
    expected = padded(tokenize(task, rows, tokenizer, 32, tmp_path).micro_batch(np.arange(len(rows))).inputs)
    (folder,) = tmp_path.glob("*/*")
    files = damageable(folder)
    assert {"SHA256SUMS", "DONE", "state.json", "dataset_info.json"} < {file.name for file in files}
    for file in files:
        if damage is None:
            (folder / "SHA256SUMS").unlink()
            (folder / "DONE").unlink()
        else:
            damage(file)
        again = padded(tokenize(task, rows, tokenizer, 32, tmp_path).micro_batch(np.arange(len(rows))).inputs)
        assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items())
        assert damageable(folder) == files and damage_of(folder) is None


# -- Evaluation and holdout --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_rows", [1, 4, 30, 90])
def test_evaluation_counts_each_row_once(
    rte: Split, monkeypatch: pytest.MonkeyPatch, world_size: int, num_rows: int
) -> None:
    rows = np.random.default_rng(0).permutation(len(rte))[:num_rows]
    seen: list[int] = []
    num_batches = set()
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        batches = list(eval_batches(rte, rows, 8))
        num_batches.add(len(batches))
        for batch in batches:
            assert batch.num_real <= 8
            seen += batch.rows[: batch.num_real].tolist()
    assert sorted(seen) == sorted(rows)
    assert len(num_batches) == 1, "every rank makes the same number of passes"


@pytest.mark.parametrize("num_rows", [10, 90, 2490])
def test_holdout_is_a_fixed_tenth_that_does_not_train(num_rows: int) -> None:
    train, holdout = split_holdout(num_rows)
    assert len(holdout) == num_rows // 10
    assert sorted([*train, *holdout]) == list(range(num_rows))
    assert all((np.diff(rows) > 0).all() for rows in (train, holdout))
    assert np.array_equal(split_holdout(num_rows)[1], holdout)
    if num_rows == 90:
        assert holdout.tolist() == [5, 13, 20, 27, 50, 55, 67, 73, 81], "runs of other versions hold out the same"


# -- Reading -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tiny_data: Path, tmp_path: Path) -> Path:
    """A data folder that a test may damage."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def refusal(task_name: str, data_dir: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        reading.load_splits(get_task(task_name), str(data_dir))
    return str(caught.value)


def test_splits_are_read(tiny_data: Path) -> None:
    splits = reading.load_splits(get_task("mnli"), str(tiny_data))
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": NUM_TRAIN_ROWS,
        "validation_matched": NUM_DEV_ROWS,
        "validation_mismatched": NUM_DEV_ROWS - 7,
    }


def test_several_files_are_one_split(copy: Path) -> None:
    write_split(copy, "rte", "train", made_up_rows("rte", 5, "more")).rename(
        copy / "rte" / "train-00001-of-00002.parquet"
    )
    write_split(copy, "rte", "train", made_up_rows("rte", 7, "some")).rename(
        copy / "rte" / "train-00000-of-00002.parquet"
    )
    rows = reading.load_splits(get_task("rte"), str(copy))["train"]
    assert rows["label"][:7] == made_up_rows("rte", 7, "some")["label"]
    assert len(rows) == 12


def test_test_splits_are_read_where_they_are(copy: Path) -> None:
    columns = made_up_rows("sst2", 4, "test")
    assert "test" not in reading.load_splits(get_task("sst2"), str(copy))
    write_split(copy, "sst2", "test", {**columns, "label": [-1] * 4})
    assert len(reading.load_splits(get_task("sst2"), str(copy))["test"]) == 4


def test_real_files(glue_dir: Path) -> None:
    splits = reading.load_splits(get_task("rte"), str(glue_dir))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 2490, "validation": 277}


def test_a_part_of_a_task_is_read_by_its_own_name_only(copy: Path) -> None:
    for split in ("train", "validation"):
        columns = made_up_rows("rte", 20, split)
        columns = {"question": columns["sentence1"], "sentence": columns["sentence2"], "label": columns["label"]}
        write_split(copy, "qnli_10k", split, columns)
    task = get_task("qnli_10k")
    assert (task.name, task.base) == ("qnli_10k", "qnli")
    assert len(reading.load_splits(task, str(copy))["train"]) == 20
    assert "no qnli/train-*.parquet in data folder" in refusal("qnli", copy)


@pytest.mark.parametrize(
    ("task_name", "split"), [("rte", "train"), ("rte", "validation"), ("mnli", "validation_mismatched")]
)
def test_missing_file(copy: Path, task_name: str, split: str) -> None:
    next((copy / task_name).glob(f"{split}-*")).unlink()
    message = refusal(task_name, copy)
    assert f"no {task_name}/{split}-*.parquet in data folder {copy}" in message
    assert "give --data_dir (or PEAKD_DATA_DIR) a folder with it" in message and "nyu-mll/glue from the hub" in message


def test_missing_folder(tmp_path: Path) -> None:
    assert f"in data folder {tmp_path / 'nowhere'}; give --data_dir" in refusal("rte", tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["truncated", "empty", "another format", "in the middle"])
def test_damaged_parquet(copy: Path, damage: str) -> None:
    file = next((copy / "rte").glob("train-*"))
    content = file.read_bytes()
    broken = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "another format": b"sentence1,sentence2,label\n",
        "in the middle": content[:4] + b"\0" * 200 + content[204:],
    }
    file.write_bytes(broken[damage])
    message = refusal("rte", copy)
    assert f"{file} is not a complete parquet file (" in message and message.endswith("; get it again")
    assert "\n" not in message


def test_no_rows(copy: Path) -> None:
    file = write_split(copy, "rte", "train", {name: [] for name in ("sentence1", "sentence2", "label")})
    assert refusal("rte", copy) == f"{file} has no rows; get the train split of rte again"


@pytest.mark.parametrize("column", ["sentence1", "sentence2", "label"])
def test_missing_column(copy: Path, column: str) -> None:
    columns = made_up_rows("rte", 4, "")
    write_split(copy, "rte", "validation", {name: values for name, values in columns.items() if name != column})
    message = refusal("rte", copy)
    assert f"rte/validation-00000-of-00001.parquet has no column '{column}' but " in message
    assert "the task needs ['sentence1', 'sentence2', 'label']" in message


def write_raw(copy: Path, columns: dict[str, Any]) -> None:
    file = next((copy / "rte").glob("train-*"))
    pyarrow.parquet.write_table(pyarrow.table({**made_up_rows("rte", 4, ""), **columns}), file)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [0, 1, 2, 0],
            ".parquet row 2 has label 2; it must be a whole number from 0 to 1 (entailment, not_entailment)",
        ),
        ([0, 1, -1, 0], "row 2 has label -1"),
        ([0, None, 1, 1], "row 1 has no label; it must be"),
        ([0.0, 0.5, 1.0, 1.0], "holds labels of a wrong type, double; each must be a whole number from 0 to 1"),
        ([False, True, True, True], "holds labels of a wrong type, bool"),
        (["0", "1", "1", "1"], "holds labels of a wrong type, string"),
        (["yes", "no", "no", "no"], "holds labels of a wrong type, string"),
    ],
)
def test_label_outside_the_range(copy: Path, labels: list[Any], message: str) -> None:
    write_raw(copy, {"label": labels})
    found = refusal("rte", copy)
    assert message in found and str(copy / "rte" / "train-00000-of-00001.parquet") in found


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -0.5, 5.25])
def test_score_outside_the_range(copy: Path, score: float) -> None:
    columns = made_up_rows("stsb", 4, "")
    write_split(copy, "stsb", "train", {**columns, "label": [1.0, score, 2.0, 5.0]})
    message = refusal("stsb", copy)
    assert (
        f"stsb/train-00000-of-00001.parquet row 1 has label {score:g}; it must be a number from 0 to 5; fix the data"
        in message
    )


def test_files_with_different_columns(copy: Path) -> None:
    """A column that is not read may be in one file alone; the index of test rows is read."""
    columns = {**made_up_rows("rte", 4, ""), "label": [-1] * 4}
    for split in ("train", "test"):
        labels = {} if split == "test" else {"label": [0, 1, 0, 1]}
        for number, more in enumerate(({"idx": [1, 2, 3, 4]}, {})):
            file = write_split(copy, "rte", split, {**columns, **labels, **more})
            file.rename(file.with_name(f"{split}-0000{number}-of-00002.parquet"))
    assert "test-00001-of-00002.parquet have different columns; get the test split of rte again" in refusal("rte", copy)
    for file in (copy / "rte").glob("test-*"):
        file.unlink()
    assert reading.load_splits(get_task("rte"), str(copy))["train"]["label"] == [0, 1, 0, 1] * 2


def test_train_can_be_left_out(copy: Path) -> None:
    next((copy / "rte").glob("train-*")).unlink()
    assert list(reading.load_splits(get_task("rte"), str(copy), train=False)) == ["validation"]


@pytest.mark.parametrize("texts", [["a", None, "b", "c"], [1, 2, 3, 4]])
def test_text_that_is_none(copy: Path, texts: list[Any]) -> None:
    write_raw(copy, {"sentence2": texts})
    message = refusal("rte", copy)
    assert "rte/train-00000-of-00001.parquet column 'sentence2' holds" in message and "fix the data" in message


def test_another_label_order(copy: Path) -> None:
    rows = reading.load_splits(get_task("rte"), str(copy))["train"]
    names = datasets.ClassLabel(names=["not_entailment", "entailment"])
    features = datasets.Features({**rows.features, "label": names})
    datasets.Dataset.from_dict(rows[:], features=features).to_parquet(next((copy / "rte").glob("train-*")))
    message = refusal("rte", copy)
    assert "train-00000-of-00001.parquet orders its labels ['not_entailment', 'entailment'], the task [" in message
    assert "write the file with the task's order" in message


def test_the_hub_out_of_reach() -> None:
    message = refusal("rte", "")
    assert "no data for task rte: the hub's nyu-mll/glue cannot be read (" in message
    assert "go online, or give --data_dir (or PEAKD_DATA_DIR) a folder with rte/train-*.parquet" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["qnli_10k", "movie_reviews"])
def test_what_the_hub_does_not_have(name: str) -> None:
    message = refusal(name, "")
    assert f"task {name} is not on the hub; give --data_dir (or PEAKD_DATA_DIR)" in message


def test_rows_of_the_hub_are_checked_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    task = get_task("rte")
    columns = {**made_up_rows("rte", 6, ""), "idx": list(range(6))}
    names = list(task.label_names)

    def load_dataset(name: str, base: str, split: str) -> datasets.Dataset:
        if split == "test":
            raise OSError("not there")
        features = datasets.Features(
            {**dict.fromkeys(task.text_columns, datasets.Value("string")), "label": datasets.ClassLabel(names=names)}
            | {"idx": datasets.Value("int32")}
        )
        return datasets.Dataset.from_dict(columns, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = reading.load_splits(task, "")
    assert list(rows) == ["train", "validation"] and rows["train"]["label"] == columns["label"]
    names.reverse()
    assert "nyu-mll/glue rte/train orders its labels ['not_entailment', 'entailment'], the task" in refusal("rte", "")
    names.reverse()
    columns["label"] = [0, 1, 0, 1, 0, -1]
    assert "nyu-mll/glue rte/train row 5 has label -1; it must be a whole number from 0 to 1" in refusal("rte", "")
