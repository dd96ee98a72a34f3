"""Damage to any file of a run folder: the run continues rightly, or says in one line which file is damaged."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import REMEDY, examples, snapshot
from hypothesis import event, given
from hypothesis import strategies as st

from peakd_ds import train
from peakd_ds.command_line import parse
from peakd_ds.errors import UserError
from peakd_ds.ranks import signals
from peakd_ds.ranks.preempt import Stopped
from peakd_ds.results.log import RunLog

WORDS = "--task sst2 --num_hidden_layers 1 --epochs 2 --global_batch_size 16 --lr 2e-3 --log_steps 1 --save_steps 2"
WORDS += " --dtype fp32 --layer_map 1:1 --max_seq_length 32 --teacher_mode cached"
STOPS = {"ptp": 9, "distill": 9, "never": 0}
"""Where a run is stopped: stage -> step, before the folder is damaged and the same command started again."""
IGNORED = ("tb/", "lock.json")
"""Written anew, or not read."""
WRONG_CONTENTS = (b"", b"{", b"[]", b"{}", b"1", b"null", b'"text"', b"\xff\xfe\x00", b"[" * 100_000, b"a: [\n")
SPEEDS = {"samples_per_s", "tokens_per_s"}


def losses(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in SPEEDS} for record in records]


@pytest.fixture(scope="module")
def folders(
    tiny_data: Path, tiny_encoder: Path, single_rank: None, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A folder for each of STOPS, and the words that make it."""
    place = tmp_path_factory.mktemp("runs")
    step = RunLog.step
    for stage, number in STOPS.items():

        def stop(self: RunLog, at: int, *rest: Any, stage: str = stage, number: int = number) -> None:
            if (self.stage, at) == (stage, number):
                signals.received.add(signal.SIGUSR1)
            step(self, at, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunLog, "step", stop)
            try:
                train.main(parse(words_of(tiny_data, tiny_encoder, place / stage)))
            except Stopped:
                signals.received.clear()
        (place / stage / "notes.txt").write_text("the user's")
    assert (place / "never" / "results.json").exists() and not (place / "distill" / "results.json").exists()
    return {stage: place / stage for stage in STOPS}


def words_of(data: Path, teacher: Path, run_dir: Path) -> list[str]:
    return [*WORDS.split(), "--data_dir", str(data), "--teacher", str(teacher), "--run_dir", str(run_dir)]


def damage(file: Path, kind: str, data: st.DataObject) -> None:
    content = file.read_bytes()
    if kind == "deleted":
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(content[: data.draw(st.integers(0, max(len(content) - 1, 0)), label="length")])
    elif kind == "flipped" and content:
        place = data.draw(st.integers(0, len(content) - 1), label="place")
        flipped = content[place] ^ 1 << data.draw(st.integers(0, 7), label="bit")
        file.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
    else:
        file.write_bytes(data.draw(st.sampled_from(WRONG_CONTENTS), label="content"))


@given(data=st.data())
@examples(30)
def test_damage_to_any_file(
    folders: dict[str, Path],
    tiny_data: Path,
    tiny_encoder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    stage = data.draw(st.sampled_from(sorted(folders)), label="stopped in")
    run_dir = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(folders[stage], run_dir)
    files = [name for name, content in snapshot(run_dir).items() if content is not None and name != "notes.txt"]
    files = [name for name in files if not name.startswith(IGNORED)]
    name = data.draw(st.sampled_from(files), label="file")
    damage(
        run_dir / name, data.draw(st.sampled_from(["deleted", "truncated", "flipped", "replaced"]), label="kind"), data
    )
    torch.manual_seed(0)
    try:
        train.main(parse(words_of(tiny_data, tiny_encoder, run_dir)))
    except UserError as error:
        message = str(error)
        event("refused")
        assert "\n" not in message and REMEDY.search(message), message
        parts = Path(name).parts
        assert any(str(run_dir.joinpath(*parts[: i + 1])) in message for i in range(len(parts))) or parts[0] in message
    else:
        event("right")
        assert json.loads((run_dir / "results.json").read_text())["student"]["effective_layers"] == 2
        if name != "metrics.jsonl":
            assert losses(run_dir) == losses(folders["never"]), "the run continued on damaged content"
    assert (run_dir / "notes.txt").read_text() == "the user's"
    shutil.rmtree(run_dir.parent)
