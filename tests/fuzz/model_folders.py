"""A small encoder and classifier to damage, what is read from them, and what must hold of what is read."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from conftest import NOUNS, save_encoder
from harness import FACTOR, REMEDY, snapshot
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from peakd_ds.command_line import parse
from peakd_ds.data.tasks import get_task
from peakd_ds.errors import UserError
from peakd_ds.model import contract
from peakd_ds.model.build import build_student, build_teacher, task_head
from peakd_ds.model.config_file import Pretrained
from peakd_ds.packed.packing import pack

TASK = get_task("rte")
SENTENCES = [f"the {one} sees a {other} ." for one, other in zip(NOUNS, reversed(NOUNS), strict=True)]
NUM_FLIPS = 40 * FACTOR


def save_both(folder: Path) -> dict[str, Path]:
    """An encoder, and a classifier for rte."""
    sizes = {"num_hidden_layers": 2, "intermediate_size": 48}
    heads: dict[str, dict[str, Any] | None] = {"encoder": None, "classifier": task_head(TASK)}
    return {kind: save_encoder(folder / kind, head=head, **sizes) for kind, head in heads.items()}


def read(folder: Path) -> tuple[Pretrained, PreTrainedTokenizerBase]:
    """The model and tokenizer, by the functions that every program calls."""
    source = contract.find_encoder(str(folder), "teacher")
    tokenizer = contract.load_tokenizer(source)
    contract.check_contract(settings_of(folder), TASK, source, source, tokenizer)
    return source, tokenizer


def settings_of(folder: Path) -> Any:
    words = ["--task", "rte", "--teacher", str(folder), "--run_dir", "unused"]
    return parse([*words, "--max_seq_length", "16", "--num_hidden_layers", "1"])


T = TypeVar("T")


def read_or_refuse(folder: Path, what: str, reader: Callable[[Path], T] = read) -> T | None:  # type: ignore[assignment]
    """What the reader gives, or None if the folder is refused as it should be; nothing on disk changes."""
    before = snapshot(folder)
    try:
        return reader(folder)
    except UserError as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and len(message) < 2000, f"{what}: {message}"
        assert str(folder) in message and REMEDY.search(message), f"{what}: {message}"
        return None
    finally:
        assert snapshot(folder) == before, what


def assert_builds(source: Pretrained, tokenizer: PreTrainedTokenizerBase) -> None:
    """Teacher and student have the file's weights, and give finite logits."""
    settings = settings_of(Path(source.path))
    teacher, student = build_teacher(settings, TASK, source), build_student(settings, source, task_head(TASK))
    stored = load_file(Path(source.path) / "model.safetensors")
    for name, weight in teacher.state_dict().items():
        found = stored.get(name, stored.get(name.removeprefix("bert.")))
        assert found is None or torch.equal(found.float(), weight), name
    ids = tokenizer(SENTENCES[0], SENTENCES[1])["input_ids"]
    for model in (teacher, student):
        with torch.no_grad():
            assert torch.isfinite(model.eval()(**pack([ids], [[0] * len(ids)])).logits).all()


def rows_of(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    encoded = tokenizer(SENTENCES, SENTENCES[::-1], truncation=True, max_length=16, return_token_type_ids=True)
    return [*encoded["input_ids"], *encoded["token_type_ids"]]


def flips(content: bytes, seed: str) -> Iterator[bytes]:
    """The content with a few bytes changed, or cut, at places that the seed gives."""
    generator = random.Random(seed)
    for number in range(NUM_FLIPS):
        damaged = bytearray(content)
        for _ in range(generator.choice((1, 1, 2, 8))):
            byte = generator.choice((0, 255, 34, 44, 48, generator.randrange(256)))
            damaged[generator.randrange(len(damaged))] = byte
        yield bytes(damaged[: generator.randrange(len(damaged))] if number % 4 == 3 else damaged)
