"""What many tests stand on: a tiny BERT with a real tokenizer, teachers, made-up tasks with a signal, and ranks.

Nothing here needs the network or a GPU. Heavy imports stay inside the fixtures, so that light test files stay light.
"""

import atexit
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# DeepSpeed and the hub's library read these when they are imported, so they are set before. Two DeepSpeed builds in
# the user's common extensions folder lock each other out; xdist's workers inherit the first process's folder.
if "TORCH_EXTENSIONS_DIR" not in os.environ:
    os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp(prefix="peakd_ds_extensions_")
    atexit.register(shutil.rmtree, os.environ["TORCH_EXTENSIONS_DIR"], ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
ENVIRONMENT = dict(os.environ)  # before a test joins a process group, which leaves RANK and MASTER_PORT behind

SPECIAL_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
POSITIVE_WORDS = ("good", "great", "fine", "lovely", "clever", "warm", "bright", "charming")
NEGATIVE_WORDS = ("bad", "dull", "poor", "awful", "silly", "cold", "gloomy", "boring")
NOUNS = ("film", "plot", "actor", "scene", "story", "song", "dog", "cat", "house", "river", "train", "city")
VERBS = ("sees", "likes", "finds", "leaves", "hears", "follows", "paints", "sells")
OTHER_WORDS = ("the", "a", "is", "was", "and", "not", "very", "never", "with", "of", "here", "there", "##s", ",", ".")
VOCABULARY = (*SPECIAL_WORDS, *POSITIVE_WORDS, *NEGATIVE_WORDS, *NOUNS, *VERBS, *OTHER_WORDS)
NUM_TRAIN_ROWS = 90
NUM_DEV_ROWS = 30


START_S = 150
"""What the start of one program may take on a loaded machine, beyond the common limit of a test."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        starts = item.get_closest_marker("starts")
        if starts is not None:
            item.add_marker(pytest.mark.timeout(float(item.config.getini("timeout")) + START_S * starts.args[0]))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _no_data_dir_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings are the same wherever the tests run."""
    monkeypatch.delenv("PEAKD_DATA_DIR", raising=False)


@pytest.fixture
def env() -> dict[str, str]:
    """Environment for a program that a test starts: without the ranks of this process."""
    return {name: value for name, value in ENVIRONMENT.items() if name != "PEAKD_DATA_DIR"}


# -- Ranks -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def single_rank() -> None:
    """This process has joined a process group of its own."""
    from peakd_ds.ranks import dist
    from peakd_ds.results.log import quiet_libraries

    dist.init()
    quiet_libraries()
    torch.set_num_threads(1)  # sums in another order would differ in the last bit


@contextmanager
def new_pools() -> Iterator[Callable[[int], Any]]:
    """Pools of ranks by their number, started when asked for and stopped at the end."""
    from dist_harness import RankPool

    made: dict[int, RankPool] = {}
    yield lambda world_size: made.setdefault(world_size, RankPool(world_size))
    for pool in made.values():
        pool.stop()


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], Any]]:
    """`pools(world_size)` gives the session's pool of so many ranks."""
    with new_pools() as pool_of:
        yield pool_of


@pytest.fixture(scope="session")
def two_ranks(pools: Callable[[int], Any]) -> Any:
    return pools(2)


# -- Models ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BertModel of 4 layers of 32 and its tokenizer."""
    return save_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


@pytest.fixture(scope="session")
def narrow_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same vocabulary in hidden states of 16."""
    return save_encoder(tmp_path_factory.mktemp("encoder") / "narrow", hidden_size=16)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_teacher(task)` gives a folder with a random classifier that has the task's label names."""
    folder = tmp_path_factory.mktemp("teachers")

    def teacher_of(task_name: str) -> Path:
        from peakd_ds.data.tasks import get_task
        from peakd_ds.model.build import task_head

        if not (folder / task_name).exists():
            save_encoder(folder / task_name, head=task_head(get_task(task_name)))
        return folder / task_name

    return teacher_of


@pytest.fixture(scope="session")
def classifier_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`classifier_of("yes", "no")` gives a folder with a random classifier that has these classes."""
    folder = tmp_path_factory.mktemp("classifiers")

    def teacher_of(*names: str) -> Path:
        target = folder / "-".join(names)
        if not target.exists():
            head = {
                "num_labels": len(names),
                "id2label": dict(enumerate(names)),
                "label2id": {n: i for i, n in enumerate(names)},
            }
            save_encoder(target, head=head)
        return target

    return teacher_of


TICKETS = ("billing", "bug", "other", "praise", "question")
"""Classes of `ticket_rows`, sorted."""


def ticket_rows(
    num_rows: int, seed: str, has_label: Callable[[int], bool] = lambda number: True
) -> list[dict[str, Any]]:
    """Made-up rows with a text and one of five labels, which its noun says; None where a row has none."""
    generator = random.Random(seed)
    rows = []
    for number in range(num_rows):
        label = number % len(TICKETS)
        noun = NOUNS[label + len(TICKETS) * generator.randrange(len(NOUNS) // len(TICKETS))]
        middle = f"{generator.choice(VERBS)}{' very' * generator.randrange(4)}"
        text = f"the {noun} {middle} {generator.choice(POSITIVE_WORDS)} ."
        rows.append({"text": text, "label": TICKETS[label] if has_label(number) else None})
    return rows


def save_encoder(
    folder: Path, head: dict[str, Any] | None = None, vocabulary: Sequence[str] = VOCABULARY, **settings: Any
) -> Path:
    """Write a random BERT, with a classifier if there are `head` settings, and its tokenizer; return the folder."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizer

    sizes = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,  # BERT's 0.02 is for hidden states of 768: these would all look alike
    }
    folder.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(**(sizes | settings | (head or {})))
        model = BertModel(config) if head is None else BertForSequenceClassification(config)
        model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


# -- Data --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with rte, sst2, stsb and mnli of made-up rows whose labels can be learned."""
    folder = tmp_path_factory.mktemp("data")
    sizes = {"train": NUM_TRAIN_ROWS, "validation": NUM_DEV_ROWS}
    mnli_sizes = {
        "train": NUM_TRAIN_ROWS,
        "validation_matched": NUM_DEV_ROWS,
        "validation_mismatched": NUM_DEV_ROWS - 7,
    }
    for task_name in ("rte", "sst2", "stsb", "mnli"):
        for split, num_rows in (mnli_sizes if task_name == "mnli" else sizes).items():
            write_split(folder, task_name, split, made_up_rows(task_name, num_rows, seed=f"{task_name} {split}"))
    return folder


@pytest.fixture(scope="session")
def glue_dir() -> Path:
    """The real GLUE data, where it is."""
    folder = Path(ENVIRONMENT.get("PEAKD_DATA_DIR") or ROOT.parent / "shared" / "data" / "glue")
    if not (folder / "rte").is_dir():
        pytest.skip(f"no GLUE data in {folder.name}/; set PEAKD_DATA_DIR")
    return folder


def write_split(data_dir: Path, task_name: str, split: str, columns: dict[str, list[Any]]) -> Path:
    """Write DATA_DIR/TASK/SPLIT-00000-of-00001.parquet as the hub's export does, label names included."""
    from datasets import ClassLabel, Dataset, Features, Value, disable_progress_bars, enable_progress_bars

    from peakd_ds.data.tasks import get_task

    task = get_task(task_name)
    features = {name: Value("int32") if name == "idx" else Value("string") for name in columns}
    if "label" in columns:
        features["label"] = Value("float32") if task.is_regression else ClassLabel(names=list(task.label_names))
    file = data_dir / task_name / f"{split}-00000-of-00001.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    disable_progress_bars()
    Dataset.from_dict(columns, features=Features(features)).to_parquet(file)
    enable_progress_bars()
    return file


def made_up_rows(task_name: str, num_rows: int, seed: str) -> dict[str, list[Any]]:
    """Columns of so many rows, the same for the same seed; the labels of classes take turns.

    sst2: the one adjective is positive or negative. rte: the second sentence says the noun of the first, or not.
    mnli: it says the same, something else, or the same with "not". stsb: five times the share of shared words.
    """
    generator = random.Random(seed)
    rows = [_ROW_MAKERS[task_name](generator, number) for number in range(num_rows)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _sst2_row(generator: random.Random, number: int) -> dict[str, Any]:
    label = number % 2
    adjective = generator.choice(POSITIVE_WORDS if label else NEGATIVE_WORDS)
    words = ["the", generator.choice(NOUNS), "is", *["very"] * generator.randrange(3), adjective, "."]
    return {"sentence": " ".join(words), "label": label, "idx": number}


def _rte_row(generator: random.Random, number: int) -> dict[str, Any]:
    subject, other, third = generator.sample(NOUNS, 3)
    verb, label = generator.choice(VERBS), number % 2
    tail = generator.choice(["", " here", " and there", " , never with a song"])
    second = f"the {third if label else subject} {verb} ."
    return {"sentence1": f"the {subject} {verb} a {other}{tail} .", "sentence2": second, "label": label}


def _stsb_row(generator: random.Random, number: int) -> dict[str, Any]:
    words = generator.sample(NOUNS, 8)
    num_shared = number % 5
    second = words[:num_shared] + words[4 : 8 - num_shared]
    score = 5.0 * num_shared / 4
    return {"sentence1": " ".join(words[:4]), "sentence2": " ".join(second), "label": score, "idx": number}


def _mnli_row(generator: random.Random, number: int) -> dict[str, Any]:
    subject, other = generator.sample(NOUNS, 2)
    adjective, label = generator.choice((*POSITIVE_WORDS, *NEGATIVE_WORDS)), number % 3
    hypothesis = [f"the {subject} is {adjective}", f"the {other} is there", f"the {subject} is not {adjective}"][label]
    return {"premise": f"the {subject} was {adjective} .", "hypothesis": hypothesis, "label": label, "idx": number}


_ROW_MAKERS: dict[str, Callable[[random.Random, int], dict[str, Any]]] = {
    "sst2": _sst2_row,
    "rte": _rte_row,
    "stsb": _stsb_row,
    "mnli": _mnli_row,
}
