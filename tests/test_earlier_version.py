"""Run folders, caches and shards that commit 7503deb wrote are read, and runs continue as that commit continued them.

fixtures/run_folders_of_7503deb.tar.xz holds an encoder, data, shards and three runs of one rank, each stopped in one
stage. expected.json has the command line of each run and the records that the same commit logged when it continued.
"""

import json
import shutil
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_files import DAMAGES

from peakd_ds import train
from peakd_ds.command_line import parse
from peakd_ds.engine import checkpoint
from peakd_ds.errors import UserError
from peakd_ds.files import damage_of, has_checksums, sha256_of
from peakd_ds.model import build
from peakd_ds.programs import scripts, shard
from peakd_ds.run import open_run
from peakd_ds.teacher.cache import CachedOutputs

ARCHIVE = Path(__file__).parent / "fixtures" / "run_folders_of_7503deb.tar.xz"
STOPPED_AT = 10  # steps of the stage, half of its second epoch


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def here(extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the archive's content as the current directory, as if this host had written it."""
    folder = Path(shutil.copytree(extracted, tmp_path / "here"))
    for cache in folder.glob("stopped_in_*/cache/*"):
        cache.rename(cache.with_name(socket.gethostname()))
    monkeypatch.chdir(folder)
    build._note_once.cache_clear()
    return folder


def records_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["teacher", "ptp", "distill"])
def test_a_run_continues(here: Path, stage: str, single_rank: None, capsys: pytest.CaptureFixture[str]) -> None:
    expected = json.loads((here / "expected.json").read_text())[stage]
    run_dir = here / f"stopped_in_{stage}"
    cache = run_dir / "cache" / socket.gethostname()
    rows_before = {path.name for path in cache.iterdir()}
    train.main(parse(expected["words"]))
    output = capsys.readouterr().err
    assert f"stage {stage}: 2 epochs, 16 steps, from step {STOPPED_AT}" in output
    assert "built in" not in output, "the teacher's cached outputs are read"
    saved = {"ptp": ["teacher"], "distill": ["teacher", "checkpoints/ptp/student"]}.get(stage, [])
    for name in ("teacher", "checkpoints/ptp/student"):
        note = f"stopped_in_{stage}/{name} has no checksums (made by an earlier version); it is read as it is"
        assert output.count(note) == (name in saved)
        assert has_checksums(run_dir / name) == (name not in saved)

    found = records_of(run_dir)
    assert [(r["stage"], r["step"]) for r in found] == [(r["stage"], r["step"]) for r in expected["records"]]
    losses = [name for name in found[0] if "loss" in name]
    for ours, theirs in zip(found, expected["records"], strict=True):
        for name in losses if "loss" in theirs else ():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7), (name, ours, theirs)

    rows_now = [path for path in cache.iterdir() if path.name not in rows_before]
    assert len(rows_now) == len(rows_before), "made again, under names that say more of the tokenizer"
    assert all(damage_of(path) is None for path in rows_now), "with checksums"
    checkpoints = sorted((run_dir / "checkpoints" / stage).glob("step-*"))
    assert [path.name for path in checkpoints] == ["step-00000014", "step-00000016"]
    assert all(damage_of(path) is None for path in checkpoints)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["weights.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors", "state.json", "DONE"]
)
def test_a_damaged_checkpoint_is_skipped(
    here: Path, name: str, damage: Callable[[Path], None], single_rank: None
) -> None:
    folder = here / "stopped_in_distill" / "checkpoints" / "distill"
    assert checkpoint.newest(folder) == (folder / "step-00000010", [])
    damage(folder / "step-00000010" / name)
    found, (reason,) = checkpoint.newest(folder)
    assert found == folder / "step-00000008"
    assert reason.startswith("checkpoint step-00000010 is skipped: ") and name in reason


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_best_weights_are_named(here: Path, damage: Callable[[Path], None], single_rank: None) -> None:
    folder = here / "stopped_in_distill" / "checkpoints" / "distill"
    damage(folder / "best-0001" / "weights.safetensors")
    found, (reason, _) = checkpoint.newest(folder)
    assert found is None and "in best-0001, which it names, weights.safetensors is" in reason


def test_temporary_names_are_ignored_and_then_deleted(here: Path, single_rank: None) -> None:
    run_dir = here / "stopped_in_distill"
    folder, cache = run_dir / "checkpoints" / "distill", run_dir / "cache" / socket.gethostname()
    leftovers = [
        folder / "step-00000012.tmp",
        folder / "best-0002.tmp",
        folder / ".step-00000010.old-00ff00ff",
        cache / f"{next(cache.iterdir()).name}.4711.tmp",
    ]
    for path in leftovers:
        path.mkdir()
    train.main(parse(json.loads((here / "expected.json").read_text())["distill"]["words"]))
    assert [path.exists() for path in leftovers] == [False, False, False, True]


# -- Teacher caches ----------------------------------------------------------------------------------------------------

CACHE_WORDS = "--task sst2 --num_hidden_layers 1 --data_dir data --max_seq_length 32 --dtype fp32 --teacher_mode cached"
EARLIER_CACHE = Path("stopped_in_distill/teacher_cache")


def cached_by(run_dir: str, *words: str) -> tuple[CachedOutputs, list[str]]:
    """The outputs of a run that takes the teacher of the stopped run, and what it says."""
    more = ["--run_dir", run_dir, "--teacher", "stopped_in_distill/teacher", *words]
    said: list[str] = []
    outputs = open_run(parse([*CACHE_WORDS.split(), *more])).teacher_cache.outputs(said.append)
    assert outputs is not None
    return outputs["train"], said


def test_an_earlier_cache_is_extended(here: Path, single_rank: None) -> None:
    """The layer in its part file is read from there; another is added beside it, and nothing is written anew."""
    shared, rows = ("--teacher_cache", str(EARLIER_CACHE)), torch.arange(90)
    before = contents(EARLIER_CACHE / "train")
    _, said = cached_by("same_layer", "--layer_map", "1:1", *shared)
    assert said == [] and contents(EARLIER_CACHE / "train") == before
    logits, (first, second) = cached_by("both", "--layer_map", "1:1,2:2", *shared)[0].of(rows)
    added = {"layer-02-part-00.safetensors", "layer-02-part-00.sha256"}
    after = contents(EARLIER_CACHE / "train")
    assert after.keys() - before.keys() == added and before.items() <= after.items()

    at_once = cached_by("at_once", "--layer_map", "1:1,2:2", "--teacher_cache", "new")[0].of(rows)
    for ours, anew in zip((logits, first, second), (at_once[0], *at_once[1]), strict=True):
        torch.testing.assert_close(ours, anew, rtol=1e-4, atol=1e-5)  # another CPU may have made ours


def test_a_part_of_an_earlier_cache_is_computed_again(here: Path, single_rank: None) -> None:
    """In the earlier format, with the layers that the manifest lists, though this run reads none of them."""
    part = EARLIER_CACHE / "train" / "part-00.safetensors"
    with safe_open(part, framework="pt") as opened:
        before, note = {name: opened.get_tensor(name).clone() for name in list(opened.keys())}, opened.metadata()
    part.unlink()
    cached_by("run", "--layer_map", "1:2", "--teacher_cache", str(EARLIER_CACHE))
    with safe_open(part, framework="pt") as opened:
        assert opened.metadata() == note and set(opened.keys()) == set(before)
        for name, tensor in before.items():
            torch.testing.assert_close(opened.get_tensor(name), tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", ['"layers": []', '"layers": "1"', '"layers": [true]', '"lay": [1]'])
def test_a_manifest_of_an_earlier_cache_that_lists_other_layers(here: Path, single_rank: None, layers: str) -> None:
    manifest = EARLIER_CACHE / "train" / "manifest.json"
    text = json.dumps(json.loads(manifest.read_text()))
    manifest.write_text(text.replace('"layers": [1]', layers))
    with pytest.raises(UserError, match=r"(manifest.json is damaged|belongs to another cache).*; delete"):
        cached_by("run", "--layer_map", "1:2", "--teacher_cache", str(EARLIER_CACHE))


# -- Shards ------------------------------------------------------------------------------------------------------------

SHARD_WORDS = "--task sst2 --teacher encoder --data_dir data --max_seq_length 32 --shard_dir shards".split()


def contents(folder: Path) -> dict[str, str]:
    return {file.name: sha256_of(file) for file in folder.iterdir()}


def files_of_rows(folder: Path) -> dict[str, str]:
    """Contents without the manifest, whose note of the tokenizer says more than in the earlier version."""
    return {name: digest for name, digest in contents(folder).items() if not name.startswith("manifest.")}


def test_shards_are_kept(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of_rows(here / "shards")
    shard.main(scripts.shard_options(SHARD_WORDS))
    assert "0 files made, the others kept" in capsys.readouterr().out
    assert files_of_rows(here / "shards") == before


def unfinished(folder: Path, num_finished: int) -> None:
    """Turn a folder of shards into what the earlier version left when it was stopped."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("manifest.json", "index.safetensors", "holdout.safetensors"):
        (folder / name).unlink()
    for number in range(64):
        file = folder / f"shard-{number:02d}.safetensors"
        if number < num_finished:
            record = {"made_from": manifest["made_from"], "record": manifest["files"][file.name]}
            file.with_suffix(".json").write_text(json.dumps(record))
        else:
            file.unlink()


def test_unfinished_shards_are_finished(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of_rows(here / "shards")
    unfinished(here / "shards", 40)
    shard.main(scripts.shard_options(SHARD_WORDS))
    assert "25 files made, the others kept" in capsys.readouterr().out
    assert files_of_rows(here / "shards") == before


def test_unfinished_shards_of_other_settings_are_refused(here: Path) -> None:
    unfinished(here / "shards", 40)
    before = contents(here / "shards")
    with pytest.raises(ValueError, match="max_seq_length: 32 there, 16 here"):
        shard.main(scripts.shard_options([*SHARD_WORDS, "--max_seq_length", "16"]))
    assert contents(here / "shards") == before
