"""Teacher and student with tokenizers of their own: rows are tokenised for both, and each model reads its own."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SPECIAL_WORDS, VOCABULARY, save_encoder
from safetensors.torch import load_file, save_file
from test_resume import assert_same_curve, run_until_saved
from test_shard import as_nodes, content, refusal, without_launcher
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from peakd_ds import report, train
from peakd_ds.command_line import parse
from peakd_ds.data import reading
from peakd_ds.data.tasks import get_task
from peakd_ds.data.tokens import MicroBatch, tokenizer_digest
from peakd_ds.packed.packing import padded
from peakd_ds.plan import plan
from peakd_ds.programs import scripts, shard
from peakd_ds.ranks import dist
from peakd_ds.run import Run, open_run
from peakd_ds.teacher.online import OnlineTeacher

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
SPELLED = (*SPECIAL_WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS), "the", ",", ".")
"""A vocabulary by which most words are spelled: other ids than by VOCABULARY, and more of them."""
WORDS = "--task rte --num_hidden_layers 2 --epochs 1 --global_batch_size 16 --micro_batch_size 4 --log_steps 1"
MORE_WORDS = "--lr 2e-3 --dropout 0 --dtype fp32 --layer_map 1:1,2:2 --max_seq_length 64 --save_steps 0"


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder that spells words."""
    return save_encoder(tmp_path_factory.mktemp("encoder") / "speller", vocabulary=SPELLED)


@pytest.fixture(scope="module")
def argv(tiny_data: Path, tiny_encoder: Path, speller: Path) -> list[str]:
    """A run whose teacher reads words and whose student spells them."""
    models = ["--teacher", str(tiny_encoder), "--student_init", str(speller)]
    return [*WORDS.split(), *MORE_WORDS.split(), *models, "--data_dir", str(tiny_data)]


def run_all(argv: list[str]) -> None:
    train.main(parse(argv))


def opened(argv: list[str], run_dir: Path, *more: str) -> Run:
    return open_run(parse([*argv, "--run_dir", str(run_dir), *more]))


def texts_of(tiny_data: Path, rows: Sequence[int]) -> tuple[list[str], list[str]]:
    """First and second sentences of rows of rte."""
    found = reading.load_splits(get_task("rte"), str(tiny_data))["train"][list(rows)]
    return found["sentence1"], found["sentence2"]


def assert_reads(micro: MicroBatch, encoder: Path, tiny_data: Path, rows: Sequence[int]) -> None:
    """The micro-batch has what the encoder's own tokenizer makes of these rows."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    texts, options = texts_of(tiny_data, rows), {"truncation": True, "max_length": 64, "padding": True}
    expected = tokenizer(*texts, return_tensors="pt", return_token_type_ids=True, **options)
    found = padded(micro.inputs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


# -- One tokenizer or two ----------------------------------------------------------------------------------------------


def has_one(run: Run) -> bool:
    """Whether the run has one tokenizer, and nothing twice."""
    is_one = run.teacher_tokenizer is run.tokenizer
    assert (run.train.teacher_rows is None) == is_one == (run.train_of("teacher") is run.train)
    assert (run.used_tokens_of("teacher") is run.used_tokens) == is_one
    return is_one


@pytest.mark.parametrize("student", ["the teacher", "same files", "vocab.txt alone", "no files", "spelled", "cased"])
def test_one_tokenizer_is_one_object(
    argv: list[str], tiny_encoder: Path, speller: Path, tmp_path: Path, single_rank: None, student: str
) -> None:
    init = tiny_encoder
    if student != "the teacher":
        init = Path(shutil.copytree(speller if student == "spelled" else tiny_encoder, tmp_path / "init"))
    if student in ("vocab.txt alone", "no files"):
        for file in [*init.glob("*token*"), *([init / "vocab.txt"] if student == "no files" else [])]:
            file.unlink()
    if student == "cased":
        BertTokenizer.from_pretrained(init, do_lower_case=False).save_pretrained(init)
    run = opened(argv, tmp_path / "run", "--student_init", str(init))
    assert has_one(run) == (student not in ("spelled", "cased"))
    folders = [folder for host in (tmp_path / "run" / "cache").iterdir() for folder in host.iterdir()]
    assert len(folders) == (2 if has_one(run) else 4), "rows that are read by one tokenizer are kept once"
    micro = run.train.micro_batch(np.arange(3))
    assert (run.train.micro_batch_for_teacher(micro) is micro) == has_one(run)


def test_teacher_outputs_need_no_tokenizer(argv: list[str], tiny_data: Path, tmp_path: Path, single_rank: None) -> None:
    """Then no teacher runs: the student's tokenizer is the only one."""
    from datasets import Dataset

    rows = Dataset.from_list([{"text": f"the cat is {'good' if n % 2 else 'bad'}", "label": n % 2} for n in range(40)])
    rows.to_parquet(tmp_path / "train.parquet")
    outputs = Dataset.from_list([{"logits": [0.5, float(n % 2)]} for n in range(40)])
    outputs.to_parquet(tmp_path / "outputs.parquet")
    words = ["--train_file", str(tmp_path / "train.parquet"), "--teacher_outputs", str(tmp_path / "outputs.parquet")]
    student = argv[argv.index("--student_init") + 1]
    run = opened(["--student_init", student, "--beta", "0", *words], tmp_path / "run", "--no_ptp")
    assert has_one(run) and tokenizer_digest(run.tokenizer) == tokenizer_digest(load(Path(student)))
    assert plan(run).count("tokens of a row") == 1


def load(encoder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(encoder)


# -- Rows --------------------------------------------------------------------------------------------------------------


def test_each_model_reads_its_own_tokens(
    argv: list[str], tiny_data: Path, tiny_encoder: Path, speller: Path, tmp_path: Path, single_rank: None
) -> None:
    run = opened(argv, tmp_path / "run", "--class_weights", "balanced")
    rows = np.array([5, 80, 2, 41])
    micro = run.train_of("distill").micro_batch(rows)
    assert_reads(micro, speller, tiny_data, rows.tolist())
    for theirs in (run.train_of("teacher").micro_batch(rows), run.train.micro_batch_for_teacher(micro)):
        assert_reads(theirs, tiny_encoder, tiny_data, rows.tolist())
        assert torch.equal(theirs.labels, micro.labels) and torch.equal(theirs.rows, micro.rows)
        assert theirs.label_weights is not None and torch.equal(theirs.label_weights, micro.label_weights)
    filler = run.train.micro_batch_for_teacher(run.train.micro_batch(np.arange(0)))
    assert filler.num_real == 0
    assert_reads(filler, tiny_encoder, tiny_data, [0])
    assert run.selection_of("ptp").split is run.train and run.selection_of("teacher").split.teacher_rows is None
    for stage, encoder in (("teacher", tiny_encoder), ("ptp", speller), ("distill", speller)):
        texts = texts_of(tiny_data, range(len(run.train)))
        ids = load(encoder)(*texts, truncation=True, max_length=64)["input_ids"]
        assert run.used_tokens_of(stage).tolist() == sorted({token for row in ids for token in row})


def test_the_plan_shows_both_lengths(argv: list[str], tmp_path: Path, single_rank: None) -> None:
    run = opened(argv, tmp_path / "run", "--max_seq_length", "32", "--dry_run")
    lines = [line for line in plan(run).splitlines() if line.startswith("tokens of a row")]
    assert [line.split(":")[0] for line in lines] == [
        "tokens of a row for the student",
        "tokens of a row for the teacher",
    ]
    cut = [float(line.split("; ")[1].split("%")[0]) for line in lines]
    assert cut[0] > 50 and cut[1] == 0, "spelled rows are too long, those of words are not"


def test_the_teacher_is_judged_on_its_own_tokens(
    argv: list[str], tiny_data: Path, tiny_teacher: Callable[[str], Path], tmp_path: Path, single_rank: None
) -> None:
    """Its predictions, online, in the report and in the cache, are those of a plain model with its own tokenizer."""
    folder = tiny_teacher("rte")
    run = opened(argv, tmp_path / "run", "--teacher", str(folder), "--teacher_mode", "cached")
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = {}
    for name in ("train", "validation"):
        rows = reading.load_splits(get_task("rte"), str(tiny_data))[name]
        texts, options = (rows["sentence1"][:], rows["sentence2"][:]), {"padding": True, "return_tensors": "pt"}
        with torch.no_grad():
            expected[name] = model(**load(folder)(*texts, **options)).logits
    assert isinstance(run.teacher, OnlineTeacher)
    found = {"train": run.teacher.logits(run.train, np.arange(len(run.train))), **report._judge_teacher(run)[1]}
    outputs = run.teacher_cache.outputs(print)
    assert outputs is not None
    found["cached"], expected["cached"] = outputs["train"].logits(torch.arange(len(run.train))), expected["train"]
    assert found.keys() == expected.keys()
    for name, logits in found.items():
        torch.testing.assert_close(logits, expected[name], rtol=1e-4, atol=1e-5)


# -- Training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def online(argv: list[str], two_ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of all three stages, with the teacher online."""
    folder = tmp_path_factory.mktemp("two") / "run"
    two_ranks.run(run_all, [*argv, "--run_dir", str(folder)])
    return folder


def test_models_are_saved_with_their_own_tokenizers(online: Path, tiny_encoder: Path, speller: Path) -> None:
    for name, encoder in (("teacher", tiny_encoder), ("student", speller), ("student_unrolled", speller)):
        assert tokenizer_digest(load(online / name)) == tokenizer_digest(load(encoder))
        table = next(v for k, v in load_file(online / name / "model.safetensors").items() if "word_embeddings" in k)
        assert len(table) == len(load(encoder))
    results = json.loads((online / "results.json").read_text())
    assert results["teacher"]["metrics"] and results["student"]["agreement"] is not None


def test_a_cached_run_has_the_losses_of_an_online_run(argv: list[str], online: Path, two_ranks, tmp_path: Path) -> None:
    two_ranks.run(run_all, [*argv, "--run_dir", str(tmp_path / "run"), "--teacher_mode", "cached"])
    assert (tmp_path / "run" / "teacher_cache").is_dir()
    assert_same_curve(online, tmp_path / "run", 1e-4)


def test_a_stopped_run_continues(argv: list[str], online: Path, two_ranks, tmp_path: Path) -> None:
    """In the teacher's stage and in the student's, whose embedding tables have other tokens."""
    folder = tmp_path / "run"
    words = [*argv, "--run_dir", str(folder), "--save_steps", "2"]
    for stage in ("teacher", "distill"):
        assert set(two_ranks.run(run_until_saved, words, stage, 2)) == {"stopped"}
    two_ranks.run(run_all, words)
    assert_same_curve(online, folder, 1e-5)


def shuffled(encoder: Path, folder: Path) -> Path:
    """The encoder with its words in another order: other ids, the same function of a text."""
    order = [*range(len(SPECIAL_WORDS)), *random.Random(0).sample(range(5, len(VOCABULARY)), len(VOCABULARY) - 5)]
    save_encoder(folder, vocabulary=[VOCABULARY[number] for number in order])
    weights = load_file(encoder / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    save_file(weights | {name: weights[name][order].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("role", ["teacher", "student_init"])
def test_other_ids_of_the_same_words_are_the_same_run(
    argv: list[str], tiny_encoder: Path, two_ranks, tmp_path: Path, role: str
) -> None:
    """A model whose words have other ids reads them as before, in every stage, so all losses stay."""
    models = {"teacher": tiny_encoder, "student_init": tiny_encoder}
    for folder in (tmp_path / "one", tmp_path / "two"):
        words = [word for name, encoder in models.items() for word in (f"--{name}", str(encoder))]
        two_ranks.run(run_all, [*argv, *words, "--run_dir", str(folder)])
        models |= {role: shuffled(tiny_encoder, tmp_path / "shuffled")} if folder.name == "one" else {}
    assert_same_curve(tmp_path / "one", tmp_path / "two", 1e-4)
    scores = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    for model in ("teacher", "student"):
        assert scores[0][model]["metrics"] == scores[1][model]["metrics"]


# -- Shards ------------------------------------------------------------------------------------------------------------

SHARED = ("--task", "--data_dir", "--teacher", "--max_seq_length", "--student_init")


def make_shards(argv: list[str], folder: Path, without: str = "") -> None:
    words = [word for name in SHARED if name != without for word in (name, argv[argv.index(name) + 1])]
    with without_launcher():
        shard.main(scripts.shard_options([*words, "--shard_dir", str(folder)]))


@pytest.fixture(scope="module")
def made(argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards for both tokenizers."""
    folder = tmp_path_factory.mktemp("made") / "shards"
    make_shards(argv, folder)
    return folder


def test_shards_have_the_tokens_of_both(made: Path, tiny_encoder: Path, speller: Path, tiny_data: Path) -> None:
    made_from = json.loads((made / "manifest.json").read_text())["made_from"]
    digests = {"tokenizer": speller, "teacher_tokenizer": tiny_encoder}
    assert all(made_from[name] == tokenizer_digest(load(encoder)) for name, encoder in digests.items())
    index, columns = load_file(made / "index.safetensors"), load_file(made / "shard-03.safetensors")
    for prefix, encoder in (("", speller), ("teacher_", tiny_encoder)):
        texts = texts_of(tiny_data, columns["rows"].tolist())
        encoded = load(encoder)(*texts, truncation=True, max_length=64, return_token_type_ids=True)
        assert columns[f"{prefix}lengths"].tolist() == [len(ids) for ids in encoded["input_ids"]]
        assert torch.equal(index[f"{prefix}lengths"][columns["rows"]], columns[f"{prefix}lengths"])
        for name in ("input_ids", "token_type_ids"):
            assert columns[prefix + name].tolist() == [token for row in encoded[name] for token in row]


def test_shards_of_one_tokenizer_have_one_set_of_columns(argv: list[str], tiny_encoder: Path, tmp_path: Path) -> None:
    """With the teacher as --student_init they are the same bytes as without."""
    make_shards(argv, tmp_path / "without", without="--student_init")
    words = [*argv[: argv.index("--student_init")], "--student_init", str(tiny_encoder)]
    make_shards([*words, *argv[argv.index("--data_dir") :]], tmp_path / "with")
    assert content(tmp_path / "with") == content(tmp_path / "without")
    assert b"teacher" not in (tmp_path / "with" / "manifest.json").read_bytes()
    assert load_file(tmp_path / "with" / "index.safetensors").keys() == {"lengths", "labels"}


def test_damaged_shards_are_made_again(argv: list[str], made: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "shards"))
    (copy / "shard-07.safetensors").unlink()
    make_shards(argv, copy)
    assert content(copy) == content(made)


def run_sharded(argv: list[str], shards: str) -> dict[str, Any]:
    """Runs on every rank, each a node of its own: all stages, and the rows of the node as both models read them."""
    words = [*argv, "--data_placement", "sharded", "--shard_dir", shards]
    run_all(words)
    run = open_run(parse(words))
    rows = np.flatnonzero(run.train.node_of == dist.node_rank())[:5]
    micro = run.train.micro_batch(rows)
    return {"rows": rows.tolist(), "student": micro, "teacher": run.train.micro_batch_for_teacher(micro)}


def test_sharded_is_replicated(
    argv: list[str],
    online: Path,
    made: Path,
    tiny_data: Path,
    tiny_encoder: Path,
    speller: Path,
    two_ranks,
    tmp_path: Path,
) -> None:
    words = [*argv, "--run_dir", str(tmp_path / "run"), "--scratch_dir", str(tmp_path / "scratch")]
    found = two_ranks.run(as_nodes, 2, "", run_sharded, words, str(made))
    assert_same_curve(online, tmp_path / "run", 1e-5)
    assert not {*found[0]["rows"]} & {*found[1]["rows"]}
    for of_node in found:
        assert_reads(of_node["student"], speller, tiny_data, of_node["rows"])
        assert_reads(of_node["teacher"], tiny_encoder, tiny_data, of_node["rows"])


def test_shards_of_one_tokenizer_do_not_serve_two(
    argv: list[str], made: Path, tiny_encoder: Path, tmp_path: Path, single_rank: None
) -> None:
    make_shards(argv, tmp_path / "one", without="--student_init")
    placed = ["--data_placement", "sharded", "--shard_dir"]
    message = refusal(opened, argv, tmp_path / "run", *placed, str(tmp_path / "one"))
    assert "teacher_tokenizer: None there" in message and "give another --shard_dir" in message
    words = [*argv, "--student_init", str(tiny_encoder)]
    message = refusal(opened, words, tmp_path / "run", *placed, str(made))
    assert "teacher_tokenizer: " in message and "None here" in message
