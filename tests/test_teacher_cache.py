"""The teacher's outputs in files: equal to the online teacher's, checked, and built by one start at a time."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT, save_encoder
from test_files import delete, flip, truncate

from peakd_ds import stages, train
from peakd_ds.cluster import run_lock
from peakd_ds.command_line import parse
from peakd_ds.data.tasks import get_task
from peakd_ds.errors import UserError
from peakd_ds.files import sha256_of, write_checked
from peakd_ds.model.build import task_head
from peakd_ds.ranks import dist
from peakd_ds.run import Run, open_run
from peakd_ds.teacher import cache_files
from peakd_ds.teacher.cache import CachedOutputs
from peakd_ds.teacher.cache_files import CacheFiles

START = "from peakd_ds.teacher import cache_files as c; c.PART_ROWS = 1; from peakd_ds.__main__ import main; main()"
WORDS = "--task rte --num_hidden_layers 2 --layer_map 1:1,2:2,3:3 --global_batch_size 16 --log_steps 1 --lr 1e-3"


@pytest.fixture
def argv(tiny_data: Path, tiny_teacher, tmp_path: Path) -> list[str]:
    """A run with a cache that lies outside its folder; dropout off."""
    words = [*WORDS.split(), "--epochs", "2", "--dropout", "0", "--teacher_cache", str(tmp_path / "cache")]
    return [*words, "--dtype", "fp32", "--teacher", str(tiny_teacher("rte")), "--data_dir", str(tiny_data)]


@pytest.fixture(autouse=True)
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The few rows of these tests fill as many parts as thousands do."""
    monkeypatch.setattr(cache_files, "PART_ROWS", 1)


def opened(argv: list[str], run_dir: Path, *more: str) -> Run:
    return open_run(parse([*argv, "--run_dir", str(run_dir), "--teacher_mode", "cached", *more]))


def outputs_of(run: Run) -> CachedOutputs:
    said: list[str] = []
    outputs = run.teacher_cache.outputs(said.append)
    assert outputs is not None
    return outputs["train"]


def no_engine() -> None:
    raise AssertionError("the teacher's engine was started")


def run_all(argv: list[str]) -> None:
    train.main(parse(argv))


def losses(folder: Path) -> list[tuple]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [tuple(r[k] for k in ("loss", "hard_loss", "soft_loss", "hidden_loss")) for r in records if "loss" in r]


# Rows stand beside others in the cache's build than in training, so sums run over blocks of other sizes: the last bits
# of fp32 differ, and of bf16 one rounding step (2^-8 of a value) per layer.
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-6), ("bf16", 2**-5)])
def test_outputs_are_the_teacher_s(
    argv: list[str], tmp_path: Path, single_rank: None, dtype: str, tolerance: float
) -> None:
    run = opened(argv, tmp_path / "run", "--dtype", dtype)
    micro = run.train.micro_batch(torch.randperm(90, generator=torch.Generator().manual_seed(1))[:16].numpy())
    outputs = outputs_of(run)
    logits, hidden = outputs.of(micro.rows)
    assert torch.equal(outputs.logits(micro.rows), logits)
    with torch.no_grad():
        online_logits, online_hidden = run.teacher.engine()((1, 2, 3), **micro.inputs)
    assert logits.dtype == torch.float32 and {h.dtype for h in hidden} == {online_logits.dtype}
    torch.testing.assert_close(logits, online_logits.float(), rtol=tolerance, atol=tolerance)
    for states, theirs in zip(hidden, online_hidden, strict=True):
        torch.testing.assert_close(states, theirs, rtol=tolerance, atol=tolerance)


def test_a_cached_run_has_the_losses_of_an_online_run(argv: list[str], two_ranks, tmp_path: Path) -> None:
    two_ranks.run(run_all, [*argv, "--run_dir", str(tmp_path / "online")])
    two_ranks.run(run_all, [*argv, "--run_dir", str(tmp_path / "cached"), "--teacher_mode", "cached"])
    assert len(losses(tmp_path / "online")) > 10
    for ours, theirs in zip(losses(tmp_path / "online"), losses(tmp_path / "cached"), strict=True):
        # soft is T^2 = 100 times a difference of logarithms near 0, so rounding (1e-7) shows as 1e-5
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_without_alpha_no_logits_are_read(argv: list[str], two_ranks, tmp_path: Path) -> None:
    """The online teacher ends before its last layer then; what is no logit must not be logged as a soft loss."""
    for mode in ("online", "cached"):
        folder = tmp_path / mode
        two_ranks.run(run_all, [*argv, "--alpha", "0", "--no_ptp", "--run_dir", str(folder), "--teacher_mode", mode])
        assert len(losses(folder)) > 2
        assert all(soft == 0 and hidden > 0 for _, _, soft, hidden in losses(folder))


@pytest.mark.parametrize("select_on", ["holdout", "dev"])
def test_later_runs_never_start_the_teacher(
    argv: list[str], tmp_path: Path, single_rank: None, monkeypatch: pytest.MonkeyPatch, select_on: str
) -> None:
    """Neither for PTP labels nor for a distilled batch, with other seeds, fewer layers and another micro-batch."""
    outputs_of(opened(argv, tmp_path / "first", "--select_on", select_on))
    words = ["--select_on", select_on, "--seed", "7", "--layer_map", "1:3", "--micro_batch_size", "4"]
    run = opened(argv, tmp_path / "second", *words)
    monkeypatch.setattr(run.teacher, "engine", no_engine)
    from peakd_ds.results.log import RunLog

    labels, _ = stages._ptp_labels(run, RunLog(run.folder))
    assert (labels >= 0).sum() == len(run.train_rows)
    _, hidden = outputs_of(run).of(torch.tensor([5]))
    stored = opened(argv, tmp_path / "third", "--select_on", select_on).teacher_cache.outputs(print)
    assert len(hidden) == 1 and torch.equal(hidden[0], stored["train"].of(torch.tensor([5]))[1][2])


def build_and_read(argv: list[str], run_dir: str) -> list[float]:
    with pytest.MonkeyPatch.context() as patch:  # for a rank in a process of its own
        patch.setattr(cache_files, "PART_ROWS", 1)
        outputs = outputs_of(opened(argv, Path(run_dir)))
    assert len(outputs.parts) == 64
    return outputs.of(torch.arange(90))[0].flatten().tolist()


def test_ranks_build_it_together(argv: list[str], two_ranks, tmp_path: Path, single_rank: None) -> None:
    """At ZeRO stage 3 too, where each pass is a collective, and one rank reads what two have built."""
    words = [*argv, "--teacher_ds_config", "teacher_zero3"]
    first, second = two_ranks.run(build_and_read, words, str(tmp_path / "two"))
    assert first == second == build_and_read(argv, str(tmp_path / "one"))


@pytest.mark.parametrize(
    ("num_rows", "num_parts"), [(1, 1), (128, 1), (129, 2), (408, 4), (8000, 63), (8193, 64), (10**6, 64)]
)
def test_few_rows_are_few_parts(monkeypatch: pytest.MonkeyPatch, num_rows: int, num_parts: int) -> None:
    monkeypatch.undo()
    bounds = CacheFiles(Path(), num_rows, {}).bounds
    assert len(bounds) == num_parts + 1 and bounds[0] == 0 and bounds[-1] == num_rows
    assert num_parts in (1, 64) or (bounds[1:] - bounds[:-1]).max() <= 128


def test_parts_are_mapped_not_read(argv: list[str], tmp_path: Path, single_rank: None) -> None:
    outputs = outputs_of(opened(argv, tmp_path / "run"))
    assert outputs.parts
    assert f"{tmp_path / 'cache' / 'train' / 'part-00.safetensors'}" in Path("/proc/self/maps").read_text()


def test_a_build_that_is_cut_off_continues(
    argv: list[str], tmp_path: Path, single_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a full disk: the message says what to do, finished parts stay, and no partial file is left."""
    folder, write = tmp_path / "cache" / "train", Path.write_bytes

    def full_disk(self: Path, content: bytes) -> int:
        if "part-05" in self.name:
            write(self, content[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(UserError, match=r"No space left on device.*free space or set --teacher_cache"):
        outputs_of(opened(argv, tmp_path / "run"))
    monkeypatch.setattr(Path, "write_bytes", write)
    kept = {file.name: file.stat().st_mtime_ns for file in folder.glob("part-*.safetensors")}
    assert len(kept) == 5 and not list(folder.glob(".*")) and not (folder / "lock.json").exists()
    outputs_of(opened(argv, tmp_path / "run"))
    assert kept.items() <= {file.name: file.stat().st_mtime_ns for file in folder.glob("part-*.safetensors")}.items()
    assert len(list(folder.glob("part-*.safetensors"))) == 64


def test_no_build_on_a_disk_that_is_too_small(
    argv: list[str], tmp_path: Path, single_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused when the run is opened, and again before the build: the stages before it fill the disk too."""
    run, said = opened(argv, tmp_path / "run"), []
    monkeypatch.setattr(cache_files, "free_bytes", lambda folder: 2**20)
    with pytest.raises(UserError, match=r"needs 0\.\d MiB.* has 1\.0 MiB free; free some"):
        opened(argv, tmp_path / "run")
    with pytest.raises(UserError, match=r"needs 0\.\d MiB.* has 1\.0 MiB free; free some"):
        run.teacher_cache.outputs(said.append)
    assert any("90 rows" in line for line in said), "its size is said before"
    assert not list((tmp_path / "cache").rglob("part-*"))


# -- Further layers ----------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_later_run_adds_its_layers(
    argv: list[str], tmp_path: Path, single_rank: None, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """What is there stays, and the order of runs leaves no trace: the files are those of one run with all layers."""
    words = [*argv, "--dtype", dtype]
    outputs_of(opened(words, tmp_path / "first", "--layer_map", "1:2"))
    before, said = contents(tmp_path / "cache" / "train"), []
    run = opened(words, tmp_path / "second")
    hidden = run.teacher_cache.outputs(said.append)["train"].of(torch.tensor([7, 89]))[1]
    assert any("64 of 64 parts are there (64 of them without layers [1, 3])" in line for line in said)
    after = contents(tmp_path / "cache" / "train")
    assert before.items() <= after.items()

    at_once = outputs_of(opened([*words, "--teacher_cache", str(tmp_path / "at_once")], tmp_path / "third"))
    assert after == contents(tmp_path / "at_once" / "train")
    assert len(hidden) == 3 and all(map(torch.equal, hidden, at_once.of(torch.tensor([7, 89]))[1]))

    again = opened(words, tmp_path / "first_again", "--layer_map", "1:2")
    monkeypatch.setattr(again.teacher, "engine", no_engine)
    assert torch.equal(outputs_of(again).of(torch.tensor([7, 89]))[1][0], hidden[1])


def test_an_extension_that_is_cut_off_continues(
    argv: list[str], tmp_path: Path, single_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write = tmp_path / "cache" / "train", Path.write_bytes
    outputs_of(opened(argv, tmp_path / "first", "--layer_map", "1:1"))

    def full_disk(self: Path, content: bytes) -> int:
        if "layer-03-part-05" in self.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(UserError, match=r"layer-03-part-05.* cannot be written \(No space left on device\)"):
        outputs_of(opened(argv, tmp_path / "second"))
    monkeypatch.setattr(Path, "write_bytes", write)
    kept = written_parts(folder, "*part-*")
    assert len(kept) == 2 * 64 + 6 + 5
    outputs_of(opened(argv, tmp_path / "second"))
    assert kept.items() <= written_parts(folder, "*part-*").items()
    assert len(written_parts(folder, "*part-*")) == 4 * 64 and not list(folder.glob(".*"))


def _num_missing_bytes(run: Run, monkeypatch: pytest.MonkeyPatch) -> int:
    """The least free space that the early check lets pass, without what it spares."""
    with monkeypatch.context() as patch:
        patch.setattr(cache_files, "free_bytes", lambda folder: cache_files.SPARE_BYTES)
        try:
            run.teacher_cache.check_space()
            return 0
        except UserError as error:
            needed = round(float(re.search(r"needs ([0-9.]+) MiB", str(error))[1]) * 2**20)
        patch.setattr(cache_files, "mib", str)
        with pytest.raises(UserError) as caught:
            run.teacher_cache.check_space()
        exact = int(re.search(r"needs (\d+),", str(caught.value))[1])
        assert abs(exact - needed) <= 2**20 / 20, "the message shows tenths of a MiB"
        patch.setattr(cache_files, "free_bytes", lambda folder: cache_files.SPARE_BYTES + exact)
        run.teacher_cache.check_space()
        return exact


def test_space_is_checked_before_any_stage_runs(
    argv: list[str], tmp_path: Path, single_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For exactly what is missing: all, one layer of a cache that has the others, or nothing."""
    size = opened(argv, tmp_path / "run").teacher.hidden_size
    first = opened(argv, tmp_path / "first", "--layer_map", "1:1,2:3")
    assert _num_missing_bytes(first, monkeypatch) == 90 * (8 + 4 * 2 + 2 * (8 + 4 * size))
    outputs_of(first)
    assert _num_missing_bytes(first, monkeypatch) == 0
    assert _num_missing_bytes(opened(argv, tmp_path / "second"), monkeypatch) == 90 * (8 + 4 * size)
    for file in (tmp_path / "cache" / "train").glob("layer-01-part-0*.safetensors"):
        file.unlink()
    rows = int(CacheFiles(Path(), 90, {}).bounds[10])
    assert _num_missing_bytes(first, monkeypatch) == rows * (8 + 4 * size)

    monkeypatch.setattr(cache_files, "free_bytes", lambda folder: 0)
    with pytest.raises(UserError, match=r"has 0\.0 MiB free; free some"):
        opened(argv, tmp_path / "third")
    open_run(parse([*argv, "--run_dir", str(tmp_path / "online"), "--teacher_mode", "online"]))


# -- Two users ---------------------------------------------------------------------------------------------------------


def _write_as(umask: str, folder: Path, layers: list[int]) -> None:
    """Fill what is missing from zeros, in a process with this umask."""
    code = f"""
import os, torch
os.umask({umask})
from pathlib import Path
from peakd_ds.teacher import cache_files
folder = Path({str(folder)!r})
files = cache_files.CacheFiles(folder, 3, cache_files.checked_manifest(folder, {{"rows": 3}}, {{}}))
files.prepare()
for gap in files.gaps({layers}):
    files.write(gap, torch.zeros(3, 2), {{layer: torch.zeros(3, 4) for layer in {layers}}})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_files_follow_the_umask_of_their_writer(tmp_path: Path) -> None:
    _write_as("0o022", tmp_path, [1])
    _write_as("0o077", tmp_path, [1, 2])
    _write_as("0o002", tmp_path, [1, 2, 3])
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.glob("*.s*")}
    expected = {"part-00": 0o644, "layer-01-part-00": 0o644, "layer-02-part-00": 0o600, "layer-03-part-00": 0o664}
    assert modes == {"manifest.sha256": 0o644} | {
        f"{name}.{suffix}": mode for name, mode in expected.items() for suffix in ("safetensors", "sha256")
    }


@pytest.fixture
def as_another_user() -> Iterator[Path]:
    """A folder that everyone may enter, in a process without the privileges of root."""
    folder = Path(tempfile.mkdtemp())
    is_root = os.geteuid() == 0
    folder.chmod(0o777)
    if is_root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o700)
        shutil.rmtree(folder)


def test_what_a_user_may_not_read_or_write_is_named(as_another_user: Path, single_rank: None) -> None:
    """A damage is not suspected, and nobody is told to delete what another user has made."""
    folder = as_another_user / "train"
    files = CacheFiles(folder, 3, cache_files.checked_manifest(folder, {"rows": 3}, {}))
    files.prepare()
    for gap in files.gaps([1, 2]):
        files.write(gap, torch.zeros(1, 2), {1: torch.zeros(1, 4), 2: torch.ones(1, 4)})
    for name in ("layer-02-part-00.safetensors", "layer-02-part-00.sha256"):
        (folder / name).chmod(0)
    assert torch.equal(files.open([1])[0].cls_nH[0], torch.zeros(1, 4)), "what may be read is"
    remedy = f"ask its owner for `chmod -R a\\+rX {folder}`, or take another --teacher_cache"
    with pytest.raises(UserError, match=f"layer-02-part-00.safetensors may not be read .*; {remedy}"):
        files.open([1, 2])
    cache_files.check_writable(folder)
    folder.chmod(0o500)
    with pytest.raises(UserError, match=f"{folder} may not be written; ask its owner"):
        cache_files.check_writable(folder)
    (folder / "manifest.json").chmod(0)
    with pytest.raises(UserError, match=f"manifest.json may not be read .*; {remedy}"):
        cache_files.read_manifest(folder)


# -- Wrong caches ------------------------------------------------------------------------------------------------------


def _lose_a_row(file: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(file, framework="pt") as part:
        tensors = {name: part.get_tensor(name)[:-1].clone() for name in list(part.keys())}
        metadata = part.metadata()
    save_file(tensors, file, metadata=metadata)
    file.with_suffix(".sha256").write_text(f"{sha256_of(file)}  {file.name}\n")


def _of_another_layer(file: Path) -> None:
    for suffix in (".safetensors", ".sha256"):
        shutil.copy(file.with_name("layer-01-part-03.safetensors").with_suffix(suffix), file.with_suffix(suffix))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("part-03", truncate, "not what was"),
        ("part-03", flip, "not what was"),
        ("part-03", _lose_a_row, "has no row 4"),
        ("layer-02-part-03", truncate, "not what was"),
        ("layer-02-part-03", _lose_a_row, "has no row 4"),
        ("layer-02-part-03", _of_another_layer, "belongs to another cache"),
    ],
)
def test_a_damaged_part_is_refused_and_computed_again(
    argv: list[str], tmp_path: Path, single_rank: None, name: str, damage: Callable[[Path], None], message: str
) -> None:
    outputs = build_and_read(argv, str(tmp_path / "run"))
    file = tmp_path / "cache" / "train" / f"{name}.safetensors"
    damage(file)
    with pytest.raises(UserError, match=f"{file.name} .*{message}.*; delete {file}, .* computes this part again"):
        outputs_of(opened(argv, tmp_path / "run"))
    file.unlink()
    assert build_and_read(argv, str(tmp_path / "run")) == outputs


@pytest.mark.parametrize("name", ["part-03.safetensors", "part-03.sha256", "layer-02-part-03.sha256"])
def test_a_missing_file_is_computed_again(argv: list[str], tmp_path: Path, single_rank: None, name: str) -> None:
    outputs = build_and_read(argv, str(tmp_path / "run"))
    (tmp_path / "cache" / "train" / name).unlink()
    assert build_and_read(argv, str(tmp_path / "run")) == outputs
    assert len(written_parts(tmp_path / "cache" / "train", "*part-*")) == 4 * 64


@pytest.mark.parametrize(
    ("damage", "name"), [(flip, "part-03.sha256"), (flip, "manifest.json"), (flip, "manifest.sha256")]
)
def test_other_damage_is_named(
    argv: list[str], tmp_path: Path, single_rank: None, damage: Callable[[Path], None], name: str
) -> None:
    outputs_of(opened(argv, tmp_path / "run"))
    damage(tmp_path / "cache" / "train" / name)
    with pytest.raises(UserError, match=rf"train is damaged \({name.split('.')[0]}\.\w+ is not .*; delete"):
        outputs_of(opened(argv, tmp_path / "run"))


def test_a_cache_of_an_earlier_version_has_no_checksum_of_its_manifest(
    argv: list[str], tmp_path: Path, single_rank: None
) -> None:
    outputs = build_and_read(argv, str(tmp_path / "run"))
    (tmp_path / "cache" / "train" / "manifest.sha256").unlink()
    assert build_and_read(argv, str(tmp_path / "run")) == outputs


@pytest.mark.parametrize("damage", [truncate, delete])
def test_a_manifest_that_is_cut_off_or_gone(
    argv: list[str], tmp_path: Path, single_rank: None, damage: Callable[[Path], None]
) -> None:
    outputs_of(opened(argv, tmp_path / "run"))
    damage(tmp_path / "cache" / "train" / "manifest.json")
    with pytest.raises(UserError, match=r"manifest\.json .*; delete"):
        outputs_of(opened(argv, tmp_path / "run"))


def test_a_row_that_is_not_there(argv: list[str], tmp_path: Path, single_rank: None) -> None:
    with pytest.raises(UserError, match="has rows 0 to 89, not 90 to 90; take another --teacher_cache"):
        outputs_of(opened(argv, tmp_path / "run")).of(torch.tensor([90]))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("teacher", "teacher [0-9a-f]{12} there, [0-9a-f]{12} here"),
        ("--task sst2", "task rte there, sst2 here"),
        ("--max_seq_length 64", "max_seq_length 128 there, 64 here"),
        ("--dtype bf16", "dtype fp32 there, bf16 here"),
        ("format", "format 0 there, 4 here"),
    ],
)
def test_another_cache_is_refused(
    argv: list[str], tiny_teacher, tmp_path: Path, single_rank: None, change: str, difference: str
) -> None:
    outputs_of(opened(argv, tmp_path / "run"))
    manifest = tmp_path / "cache" / "train" / "manifest.json"
    more = change.split() if change.startswith("--") else []
    if change == "teacher":
        head = task_head(get_task("rte"))
        more = ["--teacher", str(save_encoder(tmp_path / "other", head=head, initializer_range=0.2))]
    elif "sst2" in change:
        more += ["--teacher", str(tiny_teacher("sst2"))]
    elif change == "format":
        write_checked(manifest, manifest.read_bytes().replace(b'"format": 4', b'"format": 0'))
    before = {file: file.read_bytes() for file in manifest.parent.iterdir()}
    with pytest.raises(UserError, match=f"{difference}.*nothing was changed there: take another --teacher_cache"):
        outputs_of(opened(argv, tmp_path / "other_run", *more))
    assert before == {file: file.read_bytes() for file in manifest.parent.iterdir()}


def test_all_tokens_cannot_be_cached(argv: list[str], tmp_path: Path, single_rank: None) -> None:
    words = [*argv, "--run_dir", str(tmp_path / "run"), "--hidden_loss", "tokens", "--teacher_mode"]
    with pytest.raises(UserError, match="--hidden_loss tokens compares every token; set --teacher_mode online"):
        parse([*words, "cached"])
    said: list[str] = []
    assert open_run(parse([*words, "auto"])).teacher_cache.outputs(said.append) is None
    assert "auto: online, since --hidden_loss tokens" in said[0]


@pytest.mark.parametrize(("free", "choice"), [(2**40, "cached, since .* fit in"), (2**20, "online, since .* do not")])
def test_auto_says_why(
    argv: list[str], tmp_path: Path, single_rank: None, monkeypatch: pytest.MonkeyPatch, free: int, choice: str
) -> None:
    monkeypatch.setattr(cache_files, "free_bytes", lambda folder: free)
    said: list[str] = []
    run = open_run(parse([*argv, "--run_dir", str(tmp_path / "run"), "--teacher_mode", "auto"]))
    outputs = run.teacher_cache.outputs(said.append)
    assert (outputs is not None) == choice.startswith("cached")
    assert re.search(choice, said[0])


# -- One builder at a time ---------------------------------------------------------------------------------------------


def lock_of(folder: Path, pid: int, host: str = socket.gethostname()) -> Path:
    folder.mkdir(parents=True)
    there = {"host": host, "pid": pid, "process_start": run_lock.process_start(pid), "token": "other"}
    (folder / "lock.json").write_text(json.dumps(asdict(run_lock.this_start()) | there))
    return folder / "lock.json"


def test_a_dead_builder_s_lock_is_taken(argv: list[str], tmp_path: Path, single_rank: None, monkeypatch) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lock = lock_of(tmp_path / "cache" / "train", dead.pid)
    monkeypatch.setattr(run_lock, "POLL_S", 0.0)
    outputs_of(opened(argv, tmp_path / "run"))
    assert not lock.exists() and not list(lock.parent.glob(".*"))


def test_a_lock_that_another_start_has_taken_is_kept(argv: list[str], tmp_path: Path, single_rank: None) -> None:
    """A user may delete a lock, as the message says, while its start still runs."""
    lock = tmp_path / "cache" / "train" / "lock.json"
    with run_lock.waiting_for(lock, print):
        lock.unlink()
        (tmp_path / "cache" / "train").rmdir()
        lock_of(tmp_path / "cache" / "train", os.getpid())
    assert json.loads(lock.read_text())["token"] == "other"


def test_the_lock_of_this_job_s_earlier_start_is_taken(
    argv: list[str], tmp_path: Path, single_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its host has died, and Slurm has started the job again on another host."""
    monkeypatch.setattr(run_lock, "POLL_S", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    lock = lock_of(tmp_path / "cache" / "train", 1, host="elsewhere")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    outputs_of(opened(argv, tmp_path / "run"))
    assert not lock.exists() and not list(lock.parent.glob(".*"))


def test_another_host_s_silent_lock_is_named(argv: list[str], tmp_path: Path, single_rank: None) -> None:
    lock = lock_of(tmp_path / "cache" / "train", 1, host="elsewhere")
    os.utime(lock, (0, 0))
    with pytest.raises(
        UserError, match=r"process 1 on elsewhere, .* nothing was built for .* minutes; delete the file"
    ):
        outputs_of(opened(argv, tmp_path / "run"))
    assert lock.exists() and dist.is_main()


# -- Real processes ----------------------------------------------------------------------------------------------------


class Start:
    """A run in a process of its own, in its own folder, with the cache `folder`."""

    def __init__(self, argv: list[str], run_dir: Path, env: dict[str, str], in_front: Sequence[str] = ()):
        self.log = run_dir.with_suffix(".log")
        words = [*argv, "--epochs", "1", "--no_ptp", "--run_dir", str(run_dir), "--teacher_mode", "cached"]
        with self.log.open("w") as log:
            command = [*in_front, sys.executable, "-c", START, *words]
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)

    def said(self) -> str:
        return self.log.read_text()

    def wait_until(self, is_there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not is_there():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.001)

    def hold_while_building(self, folder: Path) -> None:
        """Stop it, as Ctrl-Z does, when it has built some parts and not all."""
        self.wait_until((folder / "part-02.sha256").exists)
        self.process.send_signal(signal.SIGSTOP)
        assert (folder / "lock.json").exists() and not (folder / "part-63.sha256").exists()


@pytest.fixture
def start(argv: list[str], tmp_path: Path, env: dict[str, str]) -> Iterator[Callable[..., Start]]:
    """`start(name, *in_front)`; what still runs at the end is killed."""
    made: list[Start] = []

    def started(name: str, *in_front: str) -> Start:
        made.append(Start(argv, tmp_path / name, env, in_front))
        return made[-1]

    yield started
    for one in made:
        one.process.kill()
        one.process.wait()


def written_parts(folder: Path, names: str = "part-*") -> dict[str, int]:
    """Names of parts (or "*part-*", with layers) that fit their checksums, and the time at which each was written."""
    return {
        file.name: file.stat().st_mtime_ns
        for file in folder.glob(f"{names}.safetensors")
        if (checksum := file.with_suffix(".sha256")).exists()
        and checksum.read_text().split()[0] == hashlib.sha256(file.read_bytes()).hexdigest()
    }


@pytest.mark.starts(2)
def test_of_two_starts_one_builds(start: Callable[..., Start], tmp_path: Path) -> None:
    """The other says for whom it waits, and reads what the first has built."""
    folder = tmp_path / "cache" / "train"
    first = start("first")
    first.hold_while_building(folder)
    second = start("second")
    second.wait_until(lambda: f"is being built by process {first.process.pid} on " in second.said())
    first.process.send_signal(signal.SIGCONT)
    assert (first.process.wait(120), second.process.wait(120)) == (0, 0), first.said() + second.said()
    assert f"{folder}: built in" in first.said() and f"{folder}: built in" not in second.said()
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    assert len(written_parts(folder)) == 64 and not list(folder.glob(".*")) and not (folder / "lock.json").exists()


@pytest.mark.starts(3)
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_a_stopped_build_continues(
    start: Callable[..., Start], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    folder = tmp_path / "cache" / "train"
    stopped = start("run")
    stopped.hold_while_building(folder)
    stopped.process.send_signal(number)
    stopped.process.send_signal(signal.SIGCONT)
    assert stopped.process.wait(120) == code, stopped.said()
    assert (number is signal.SIGKILL) == (folder / "lock.json").exists()
    kept, num_parts = written_parts(folder, "*part-*"), len(written_parts(folder))
    again = start("run")
    assert again.process.wait(120) == 0, again.said()
    assert f"{num_parts} of 64 parts are there" in again.said()
    assert kept.items() <= written_parts(folder, "*part-*").items() and len(written_parts(folder)) == 64
    assert not list(folder.glob(".*")) and not (folder / "lock.json").exists()


@pytest.mark.starts(2)
def test_a_disk_that_fills_up(start: Callable[..., Start], tmp_path: Path) -> None:
    """A file system of 80 MiB, mounted for this start alone, which something else fills during the build."""
    own_mounts = ("unshare", "--user", "--map-root-user", "--mount")
    mount = 'mount -t tmpfs -o size=80m tmpfs "$0" && exec "$@"'
    (tmp_path / "cache").mkdir()
    trial = [*own_mounts, "sh", "-c", mount, str(tmp_path / "cache"), "true"]
    if shutil.which("unshare") is None or subprocess.run(trial).returncode != 0:
        pytest.skip("no mounts of one's own here")
    run = start("run", *own_mounts, "sh", "-c", mount, str(tmp_path / "cache"))
    disk = Path(f"/proc/{run.process.pid}/root{tmp_path}/cache")
    run.hold_while_building(disk / "train")
    opened = os.open(disk, os.O_RDONLY)  # keeps the disk when the run is gone
    try:
        with pytest.raises(OSError, match="No space left"), (disk / "others").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        run.process.send_signal(signal.SIGCONT)
        assert run.process.wait(120) == 2
        assert re.search(
            r"cannot be written \(No space left on device\); free space or set --teacher_cache", run.said()
        )
        assert "Traceback" not in run.said()
        left = Path(f"/proc/self/fd/{opened}/train")
        names = {file.name for file in left.iterdir()}
        assert 3 <= len(written_parts(left)) < 64
        assert len(written_parts(left, "*part-*")) == sum(name.endswith(".sha256") for name in names) - 1
        assert "lock.json" not in names and not any(name.startswith(".") for name in names), "half a file is left"
    finally:
        os.close(opened)
