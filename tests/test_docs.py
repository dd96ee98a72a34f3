"""Commands in the documentation do what the text says. They are taken from the pages and run, in a page's order."""

import re
import shlex
from pathlib import Path

import conftest
import pytest
from test_own_pipeline import write_rows

from peakd_ds import train
from peakd_ds.command_line import parse
from peakd_ds.programs import glue_eval, predict, scripts

DOCS = Path(__file__).resolve().parents[1] / "docs"
PROGRAMS = {
    "deepspeed peakd_ds/train.py": lambda words: train.main(parse(words)),
    "peakd-eval": lambda words: glue_eval.main(scripts.evaluate_options(words)),
    "peakd-predict": lambda words: predict.main(scripts.predict_options(words)),
}
"""What a command starts here, in this process, on one rank."""


def commands_of(page: Path) -> list[str]:
    """The commands in a page's sh blocks, each in one line."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_a_page_of_own_data(
    tmp_path: Path, tiny_encoder: Path, classifier_of, single_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my-classifier").symlink_to(classifier_of(*conftest.TICKETS))
    Path("some-encoder").symlink_to(tiny_encoder)
    write_rows(Path("tickets.csv"), conftest.ticket_rows(60, "tickets"))
    write_rows(Path("new-tickets.csv"), conftest.ticket_rows(20, "new"))
    write_rows(Path("mails.jsonl"), [{"text": row["text"]} for row in conftest.ticket_rows(40, "mails")])
    commands = commands_of(DOCS / "your-data.md")
    for command in commands:
        program = next(name for name in PROGRAMS if command.startswith(name))
        PROGRAMS[program](shlex.split(command.removeprefix(program)))
    assert len(commands) == 6
    for name in ("tickets", "tickets-and-mails", "mails", "from-outputs"):
        assert (tmp_path / "runs" / name / "student_unrolled" / "model.safetensors").exists()
    assert len(Path("predictions.csv").read_text().splitlines()) == 21
