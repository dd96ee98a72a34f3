"""Shards: the same bytes from any number of workers, damage that is named, and the same losses as without shards."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import NUM_TRAIN_ROWS, made_up_rows, write_split
from safetensors.torch import load_file
from test_data import as_rank
from test_files import DAMAGES, delete, truncate
from test_files import flip as damage
from test_resume import assert_same_curve
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from peakd_ds import train
from peakd_ds.command_line import parse
from peakd_ds.config import RunConfig
from peakd_ds.data import reading
from peakd_ds.data import shards as shard_files
from peakd_ds.data.batches import eval_batches, global_batches
from peakd_ds.data.division import NUM_SHARDS, epoch_slots, split_holdout
from peakd_ds.data.tasks import get_task
from peakd_ds.data.tokens import MicroBatch, tokenize
from peakd_ds.errors import UserError
from peakd_ds.packed.packing import padded
from peakd_ds.programs import scripts, shard
from peakd_ds.ranks import dist, launch

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parent.parent
MPIRUN = [str(BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
needs_mpirun = pytest.mark.skipif(shutil.which("mpirun", path=str(BIN)) is None, reason="no mpirun in the environment")
SHARDS = [f"shard-{number:02d}.safetensors" for number in range(NUM_SHARDS)]
FILES = [SHARDS[7], "holdout.safetensors", "index.safetensors", "manifest.json", "manifest.sha256"]
MAX_SEQ_LENGTH = 32


@pytest.fixture(scope="module")
def words(tiny_data: Path, tiny_encoder: Path) -> list[str]:
    """Options that peakd-shard and train.py share."""
    paths = ["--teacher", str(tiny_encoder), "--data_dir", str(tiny_data)]
    return ["--task", "rte", "--max_seq_length", str(MAX_SEQ_LENGTH), *paths]


@pytest.fixture(scope="module")
def made(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards made by a single worker."""
    folder = tmp_path_factory.mktemp("made") / "shards"
    with without_launcher():
        shard.main(scripts.shard_options([*words, "--shard_dir", str(folder)]))
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy of the shards that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "shards"))


@pytest.fixture(scope="module")
def tokenizer(tiny_encoder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_encoder)


def without_launcher() -> AbstractContextManager[object]:
    names = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_ID", "SLURM_TMPDIR", "PEAKD_SCRATCH")
    return mock.patch.dict(os.environ, {name: "" for name in names})


def remake(words: list[str], folder: Path, *more: str) -> None:
    with without_launcher():
        shard.main(scripts.shard_options([*words, "--shard_dir", str(folder), *more]))


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def refusal(action: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(UserError) as caught:
        action(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- Making shards -----------------------------------------------------------------------------------------------------


class ThreadWorkers:
    """A worker that is a thread; workers exchange values as MPI ranks do."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, board: list[Any]):
        self.rank, self.size, self.meeting, self.board = rank, size, meeting, board

    def allgather(self, value: Any) -> list[Any]:
        self.board[self.rank] = value
        self.meeting.wait(60)
        values = list(self.board)
        self.meeting.wait(60)
        return values


def with_workers(size: int, action: Callable[[ThreadWorkers], Any]) -> list[Any]:
    """What `action` returns or raises on each worker."""
    meeting, board, results = threading.Barrier(size), [None] * size, [None] * size

    def work(rank: int) -> None:
        try:
            results[rank] = action(ThreadWorkers(rank, size, meeting, board))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


@pytest.fixture(scope="module")
def make(tiny_data: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Any]:
    task = get_task("rte")
    rows = reading.load_splits(task, str(tiny_data))["train"]
    return lambda workers, folder: shard.make(workers, task, rows, tokenizer, MAX_SEQ_LENGTH, "holdout", folder)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_any_number_of_workers_makes_the_same_bytes(
    made: Path, make: Callable[..., Any], tmp_path: Path, size: int
) -> None:
    results = with_workers(size, lambda workers: make(workers, tmp_path / "shards"))
    assert all(manifest.files == results[0][0].files for manifest, _ in results)
    assert content(tmp_path / "shards") == content(made)


@needs_mpirun
@pytest.mark.parametrize("size", [2, 4])
def test_mpi_ranks_are_workers(made: Path, words: list[str], env: dict[str, str], tmp_path: Path, size: int) -> None:
    command = [*MPIRUN, "-n", str(size), sys.executable, "-m", "peakd_ds.programs.shard", *words]
    done = subprocess.run(
        [*command, "--shard_dir", str(tmp_path / "shards"), "--scratch_dir", str(tmp_path / "scratch")],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert f"in 64 shards by {size} workers on 1 nodes; 65 files made" in done.stdout
    assert done.stdout.count("verified") == 1
    assert content(tmp_path / "shards") == content(made)
    (staged,) = (tmp_path / "scratch").iterdir()
    assert content(staged).items() <= content(made).items() and len(content(staged)) == NUM_SHARDS + 2


def test_a_shard_holds_its_rows(made: Path, tiny_data: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    task = get_task("rte")
    raw = reading.load_splits(task, str(tiny_data))["train"]
    full = tokenize(task, raw, tokenizer, MAX_SEQ_LENGTH)
    trained, held_out = split_holdout(len(raw))
    held = [load_file(made / name) for name in [*SHARDS, "holdout.safetensors"]]
    assert torch.cat([tensors["rows"] for tensors in held]).tolist() == [*trained, *held_out]
    sizes = [len(tensors["rows"]) for tensors in held[:-1]]
    assert max(sizes) - min(sizes) <= 1
    for tensors in held:
        tokens = iter(tensors["input_ids"].tolist())
        for row, label, length in zip(tensors["rows"], tensors["labels"], tensors["lengths"], strict=True):
            assert [next(tokens) for _ in range(length)] == full.rows[[int(row)]]["input_ids"][0].tolist()
            assert label == raw[int(row)]["label"]
        assert next(tokens, None) is None
    manifest = json.loads((made / "manifest.json").read_text())
    assert {"task", "data", "tokenizer", "max_seq_length", "select_on"} < manifest["made_from"].keys()
    assert set(manifest["files"]) == {*SHARDS, "holdout.safetensors", "index.safetensors"}
    assert content(made).keys() == {*manifest["files"], "manifest.json", "manifest.sha256"}


def test_a_task_of_few_rows_with_scores(tiny_encoder: Path, tmp_path: Path) -> None:
    """There are fewer rows than shards and none is held out, so some shards are empty."""
    for split, num_rows in (("train", 20), ("validation", 5)):
        write_split(tmp_path / "data", "stsb", split, made_up_rows("stsb", num_rows, split))
    options = ["--task", "stsb", "--teacher", str(tiny_encoder), "--data_dir", str(tmp_path / "data")]
    remake(options, tmp_path / "shards", "--select_on", "dev")
    index = load_file(tmp_path / "shards" / "index.safetensors")
    assert index["labels"].dtype == torch.float32 and len(index["labels"]) == 20
    sizes = [len(load_file(tmp_path / "shards" / name)["rows"]) for name in SHARDS]
    assert (sum(sizes), sizes.count(0)) == (20, 44)


def test_no_weights_are_needed(words: list[str], made: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    encoder = Path(shutil.copytree(tiny_encoder, tmp_path / "encoder", ignore=shutil.ignore_patterns("*.safetensors")))
    with without_launcher():
        more = ["--teacher", str(encoder), "--shard_dir", str(tmp_path / "shards")]
        shard.main(scripts.shard_options([*words, *more]))
    for name in FILES:
        assert (tmp_path / "shards" / name).read_bytes() == (made / name).read_bytes()


def test_a_later_start_makes_what_is_missing(made: Path, make: Callable[..., Any], tmp_path: Path) -> None:
    """After a stop midway, any number of workers keeps the finished shards."""
    folder, write = tmp_path / "shards", shard._write

    def write_until_full(file: Path, columns: dict[str, np.ndarray]) -> str:
        if file.name == SHARDS[40]:
            raise OSError(28, "No space left on device", str(file))
        return write(file, columns)

    with mock.patch.object(shard, "_write", write_until_full):
        errors = with_workers(2, lambda workers: make(workers, folder))
    assert all(isinstance(error, UserError) and "No space left on device" in str(error) for error in errors)
    assert not (folder / "manifest.json").exists()
    finished = {name for name in SHARDS if (folder / name).exists()}
    assert 32 < len(finished) < 64
    before = {name: (folder / name).stat().st_mtime_ns for name in finished}
    for _, notes in with_workers(3, lambda workers: make(workers, folder)):
        assert {line.split(":")[0] for line in notes} == {*SHARDS, "holdout.safetensors"} - finished
    assert {name: (folder / name).stat().st_mtime_ns for name in finished} == before
    assert content(folder) == content(made)


@pytest.mark.parametrize("harm", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_made_again(
    made: Path,
    copy: Path,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path], None],
    name: str,
) -> None:
    harm(copy / name)
    remake(words, copy)
    if name.startswith(("shard", "holdout")):
        assert f"{name}: {'missing' if harm is delete else 'damaged'}, made again" in capsys.readouterr().out
    assert content(copy) == content(made)


def test_a_full_disk_leaves_nothing_half_made(make: Callable[..., Any], tmp_path: Path) -> None:
    with mock.patch.object(Path, "write_bytes", side_effect=OSError(28, "No space left on device")):
        message = refusal(make, shard._Alone(), tmp_path / "shards")
    assert "shard-00.safetensors cannot be written" in message and "free space" in message
    assert content(tmp_path / "shards").keys() == {"made_from.json"}


# -- Wrong input of peakd-shard ----------------------------------------------------------------------------------------


def test_more_workers_than_shards(make: Callable[..., Any], tmp_path: Path) -> None:
    workers = namedtuple("Workers", "rank size")(0, 65)
    message = refusal(make, workers, tmp_path / "shards")
    assert "65 workers are more than the 64 shards" in message and "start at most 64" in message
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    ("more", "name"), [(["--max_seq_length", "16"], "max_seq_length"), (["--select_on", "dev"], "select_on")]
)
def test_shards_of_other_settings_are_kept(copy: Path, words: list[str], more: list[str], name: str) -> None:
    before = content(copy)
    message = refusal(remake, words, copy, *more)
    assert f"{name}: " in message and "give another --shard_dir" in message
    assert content(copy) == before


def test_an_error_of_one_worker_ends_all(make: Callable[..., Any], tmp_path: Path) -> None:
    def action(workers: ThreadWorkers) -> Any:
        with (
            mock.patch.object(shard, "encode_file", side_effect=OSError("disk gone"))
            if workers.rank == 2
            else nothing()
        ):
            return make(workers, tmp_path / "shards")

    errors = with_workers(4, action)
    assert all(isinstance(error, UserError) for error in errors)


def nothing() -> AbstractContextManager[object]:
    return mock.patch.object(shard, "MIB", shard.MIB)


def test_processes_that_do_not_find_each_other(env: dict[str, str], words: list[str], tmp_path: Path) -> None:
    """srun without an MPI plugin: each task would do all the work and write into the same folder."""
    task = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
    with mock.patch.dict(os.environ, task):
        message = refusal(shard.find_workers)
    assert "4 processes were started, but" in message and "srun --mpi=pmix" in message


@pytest.mark.parametrize("num_nodes", [3, 5, 48, 128])
def test_nodes_that_do_not_divide_the_shards(num_nodes: int) -> None:
    message = refusal(shard_files.shards_of_node, 0, num_nodes)
    assert message.startswith(f"{num_nodes} nodes do not divide the 64 shards; take 1, 2, 4, 8, 16, 32 or 64")


@pytest.mark.parametrize("num_nodes", [1, 2, 4, 64])
def test_nodes_share_the_shards_without_overlap(num_nodes: int) -> None:
    held = [name for node in range(num_nodes) for name in shard_files.shards_of_node(node, num_nodes)]
    assert held == SHARDS


# -- Staging -----------------------------------------------------------------------------------------------------------


def test_copies_are_verified(made: Path, tmp_path: Path) -> None:
    manifest = shard_files.read_manifest(made)
    copyfile = shutil.copyfile

    def copy_badly(source: Path, target: Path) -> None:
        copyfile(source, target)
        if source.name == SHARDS[1]:
            damage(target)

    with mock.patch.object(shutil, "copyfile", copy_badly):
        message = refusal(shard_files.stage, manifest, SHARDS[:4], tmp_path)
    assert SHARDS[1] in message and socket.gethostname() in message and "changed while it was copied" in message
    (staged,) = tmp_path.iterdir()
    assert content(staged).keys() == {SHARDS[0]}, "the bad copy is gone, under every name"
    shard_files.stage(manifest, SHARDS[:4], tmp_path)
    assert content(staged) == {name: (made / name).read_bytes() for name in SHARDS[:4]}


def test_whole_copies_are_kept_and_damaged_ones_replaced(made: Path, tmp_path: Path) -> None:
    manifest = shard_files.read_manifest(made)
    shard_files.stage(manifest, SHARDS[:4], tmp_path)
    (staged,) = tmp_path.iterdir()
    damage(staged / SHARDS[2])
    with mock.patch.object(shutil, "copyfile", wraps=shutil.copyfile) as copied:
        shard_files.stage(manifest, SHARDS[:4], tmp_path)
    assert [call.args[0] for call in copied.call_args_list] == [made / SHARDS[2]]
    assert (staged / SHARDS[2]).read_bytes() == (made / SHARDS[2]).read_bytes()


@pytest.mark.parametrize("harm", DAMAGES)
@pytest.mark.parametrize("name", [SHARDS[5], "holdout.safetensors", "index.safetensors"])
@pytest.mark.parametrize("is_staged", [True, False])
def test_a_damaged_shard_is_named(
    copy: Path, tmp_path: Path, harm: Callable[[Path], None], name: str, is_staged: bool
) -> None:
    harm(copy / name)
    scratch = tmp_path / "scratch" if is_staged else None
    message = refusal(shard_files.stage, shard_files.read_manifest(copy), [*SHARDS[:8], *FILES[1:3]], scratch)
    state = "is missing" if harm is delete else "is not what was written"
    assert message == f"{copy} is damaged ({name} {state}); run peakd-shard again, which makes the file again"


@pytest.mark.parametrize("harm", DAMAGES)
def test_a_damaged_manifest_is_named(copy: Path, harm: Callable[[Path], None]) -> None:
    harm(copy / "manifest.json")
    assert "manifest.json" in refusal(shard_files.read_manifest, copy)


@pytest.mark.parametrize("harm", DAMAGES)
def test_a_damaged_checksum_of_the_manifest(copy: Path, harm: Callable[[Path], None]) -> None:
    harm(copy / "manifest.sha256")
    if harm is delete:
        shard_files.read_manifest(copy)  # as an earlier version left it
    elif harm is not truncate:  # which takes the last newline
        assert "manifest.json" in refusal(shard_files.read_manifest, copy)


def test_a_full_scratch_is_named(made: Path, tmp_path: Path) -> None:
    manifest = shard_files.read_manifest(made)
    full = namedtuple("usage", "total used free")(1000, 900, 100)
    with mock.patch.object(shutil, "disk_usage", return_value=full):
        message = refusal(shard_files.stage, manifest, SHARDS, tmp_path)
    assert f"scratch {tmp_path} on {socket.gethostname()} has 0.0 MiB free" in message and "give another" in message
    with mock.patch.object(shutil, "copyfile", side_effect=OSError(28, "No space left on device")):
        message = refusal(shard_files.stage, manifest, SHARDS, tmp_path)
    assert "cannot be copied to scratch" in message and "No space left on device" in message
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_scratch_that_is_not_a_folder(made: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    message = refusal(shard_files.stage, shard_files.read_manifest(made), SHARDS[:2], tmp_path / "file")
    assert f"cannot be copied to scratch {tmp_path / 'file'}" in message
    assert (tmp_path / "file").read_text() == "mine"


# -- Training from shards ----------------------------------------------------------------------------------------------

RUN = "--num_hidden_layers 2 --epochs 1 --global_batch_size 16 --micro_batch_size 4 --log_steps 1 --save_steps 0"
RUN_WORDS = [*RUN.split(), *"--lr 2e-3 --dropout 0 --dtype fp32 --layer_map 1:1,2:2".split()]


def as_nodes(num_nodes: int, scratch: str, action: Callable[..., Any], *args: Any) -> Any:
    """Runs on every rank: the pool's ranks act as ranks of several hosts with a scratch disk each."""
    size = dist.world_size() // num_nodes
    node, local_rank = divmod(dist.rank(), size)
    launcher = {"LOCAL_WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank)}
    if scratch:
        launcher["SLURM_TMPDIR"] = f"{scratch}/node{node}"
    with (
        mock.patch.dict(os.environ, launcher),
        mock.patch.object(launch, "_local_rank", local_rank),
        mock.patch.object(socket, "gethostname", lambda: f"node{node}"),
    ):
        return action(*args)


def run_all(argv: list[str]) -> None:
    train.main(parse(argv))


@pytest.fixture(scope="module")
def replicated(words: list[str], pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replicated") / "run"
    pools(1).run(run_all, [*words, *RUN_WORDS, "--run_dir", str(folder)])
    return folder


@pytest.mark.parametrize(("num_ranks", "num_nodes"), [(1, 1), (2, 2), (4, 2), (4, 4)])
def test_sharded_is_replicated(
    replicated: Path, made: Path, words: list[str], pools, tmp_path: Path, num_ranks: int, num_nodes: int
) -> None:
    """All three stages give the same losses and scores, from teacher predictions to evaluation."""
    folder, scratch = tmp_path / "run", tmp_path / "scratch"
    placed = ["--data_placement", "sharded", "--shard_dir", str(made), "--run_dir", str(folder)]
    pools(num_ranks).run(as_nodes, num_nodes, str(scratch), run_all, [*words, *RUN_WORDS, *placed])
    assert_same_curve(replicated, folder, 1e-5)
    ours, theirs = (load_file(run / "checkpoints" / "ptp" / "labels.safetensors") for run in (folder, replicated))
    assert torch.equal(ours["train"], theirs["train"]) and torch.equal(ours["selection"], theirs["selection"])
    for node in range(num_nodes):  # each host has only its own shards
        (staged,) = (scratch / f"node{node}").iterdir()
        own = set(shard_files.shards_of_node(node, num_nodes))
        assert content(staged).keys() == {*own, "holdout.safetensors", "index.safetensors"}


def test_a_replicated_run_continues_sharded(
    replicated: Path, made: Path, words: list[str], two_ranks, tmp_path: Path
) -> None:
    """A run may change its data placement between two starts."""
    folder = tmp_path / "run"
    two_ranks.run(run_all, [*words, *RUN_WORDS, "--run_dir", str(folder), "--stages", "teacher"])
    placed = ["--data_placement", "sharded", "--shard_dir", str(made), "--run_dir", str(folder)]
    two_ranks.run(as_nodes, 2, "", run_all, [*words, *RUN_WORDS, *placed])
    assert_same_curve(replicated, folder, 1e-5)


@pytest.fixture
def as_node(monkeypatch: pytest.MonkeyPatch, single_rank: None) -> Callable[[int, int], None]:
    def become(node: int, num_nodes: int) -> None:
        as_rank(monkeypatch, node, num_nodes)
        monkeypatch.setattr(launch, "local_world_size", lambda: 1)

    return become


def sharded_config(words: list[str], folder: Path, *more: str) -> RunConfig:
    placed = ["--data_placement", "sharded", "--shard_dir", str(folder), "--run_dir", "unused"]
    return parse([*words, *placed, *more])


@pytest.mark.parametrize("num_nodes", [1, 2, 8])
def test_a_node_composes_its_part_of_every_batch(
    made: Path, words: list[str], tiny_data: Path, tokenizer: PreTrainedTokenizerBase, as_node, num_nodes: int
) -> None:
    task = get_task("rte")
    full = tokenize(task, reading.load_splits(task, str(tiny_data))["train"], tokenizer, MAX_SEQ_LENGTH)
    train_rows, held_out = split_holdout(NUM_TRAIN_ROWS)
    slots = epoch_slots(len(train_rows), 16, 3, 0)
    for node in range(num_nodes):
        as_node(node, num_nodes)
        config = sharded_config(words, made)
        with mock.patch.object(dist, "agree", lambda action: action()):
            part = shard_files.load(config, task, shard_files.find(config, task, tokenizer, None))
        assert np.array_equal(part.lengths, full.lengths) and torch.equal(part.labels, full.labels)
        elsewhere = dataclasses.replace(full, node_of=part.node_of)  # all rows, dealt like the sharded ones
        for ours, theirs in zip(
            global_batches(part, train_rows, slots, 2), global_batches(elsewhere, train_rows, slots, 2), strict=True
        ):
            assert (ours.num_items, ours.num_tokens) == (theirs.num_items, theirs.num_tokens)
            for mine, other in zip(ours.micro_batches, theirs.micro_batches, strict=True):
                assert mine.num_real == other.num_real
                if mine.num_real:
                    assert torch.equal(mine.rows, other.rows)
                    assert_rows_equal(mine, other)
        assert_rows_equal(part.micro_batch(held_out), full.micro_batch(held_out))
        if num_nodes > 1:
            with pytest.raises(AssertionError, match="another node"):
                part.micro_batch(train_rows)


def assert_rows_equal(ours: MicroBatch, theirs: MicroBatch) -> None:
    assert torch.equal(ours.rows, theirs.rows) and torch.equal(ours.labels, theirs.labels)
    mine, others = padded(ours.inputs), padded(theirs.inputs)
    assert all(torch.equal(mine[name], others[name]) for name in others)


@pytest.mark.parametrize(("num_nodes", "local_size"), [(1, 3), (2, 1), (2, 3), (8, 2)])
def test_each_node_predicts_its_own_rows_once(
    made: Path,
    words: list[str],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    single_rank: None,
    num_nodes: int,
    local_size: int,
) -> None:
    train_rows, held_out = split_holdout(NUM_TRAIN_ROWS)
    seen: dict[str, list[int]] = {"train": [], "holdout": []}
    passes: set[tuple[str, int]] = set()
    monkeypatch.setattr(launch, "local_world_size", lambda: local_size)
    for rank in range(num_nodes * local_size):
        as_rank(monkeypatch, rank, num_nodes * local_size)
        config = sharded_config(words, made)
        with mock.patch.object(dist, "agree", lambda action: action()):
            part = shard_files.load(config, get_task("rte"), shard_files.find(config, get_task("rte"), tokenizer, None))
        for name, rows in (("train", train_rows), ("holdout", held_out)):
            batches = list(eval_batches(part, rows, 4))
            seen[name] += real_rows(batches)
            passes.add((name, len(batches)))
    assert sorted(seen["train"]) == train_rows.tolist() and sorted(seen["holdout"]) == held_out.tolist()
    assert len(passes) == 2, "every rank makes as many passes, as sharded engines need"


def real_rows(batches: Iterable[MicroBatch]) -> list[int]:
    return [row for batch in batches for row in batch.rows[: batch.num_real].tolist()]


# -- Wrong input of train.py -------------------------------------------------------------------------------------------


def open_refusal(config: RunConfig) -> str:
    from peakd_ds.run import open_run

    message = refusal(open_run, config)
    assert not Path(config.run_dir).exists(), "nothing is written before all is right"
    return message


def placed(words: list[str], shard_dir: Path, tmp_path: Path, *more: str) -> RunConfig:
    paths = ["--shard_dir", str(shard_dir), "--run_dir", str(tmp_path / "new")]
    return parse([*words, *RUN_WORDS, "--data_placement", "sharded", *paths, *more])


def test_sharded_needs_a_shard_dir(words: list[str]) -> None:
    message = refusal(parse, [*words, "--run_dir", "unused", "--data_placement", "sharded"])
    assert "make them with peakd-shard" in message


def test_no_shards_there(words: list[str], tmp_path: Path, single_rank: None) -> None:
    message = open_refusal(placed(words, tmp_path / "nothing", tmp_path))
    assert f"{tmp_path / 'nothing'} is not a complete set of shards" in message
    assert "make it with peakd-shard" in message


def test_a_manifest_that_is_cut_off(words: list[str], copy: Path, tmp_path: Path, single_rank: None) -> None:
    intact = (copy / "manifest.json").read_text()
    (copy / "manifest.sha256").unlink()  # as an earlier version left it
    for text in (intact[: len(intact) // 2], "[]", "{}"):
        (copy / "manifest.json").write_text(text)
        assert "manifest.json is damaged" in open_refusal(placed(words, copy, tmp_path))


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (["--max_seq_length", "16"], "max_seq_length: 32 there, 16 here"),
        (["--select_on", "dev"], "select_on: holdout there, dev here"),
        (["--task", "mnli"], "task: rte there, mnli here"),
    ],
)
def test_shards_of_other_settings(
    words: list[str], made: Path, tmp_path: Path, single_rank: None, more: list[str], name: str
) -> None:
    message = open_refusal(placed(words, made, tmp_path, *more))
    assert name in message and "made by peakd-shard with these settings" in message


def test_shards_of_other_rows(words: list[str], made: Path, tiny_data: Path, tmp_path: Path, single_rank: None) -> None:
    other = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    write_split(other, "rte", "train", made_up_rows("rte", NUM_TRAIN_ROWS, seed="others"))
    message = open_refusal(placed(words, made, tmp_path, "--data_dir", str(other)))
    assert "holds shards of other data or settings (data: " in message


def test_a_damaged_shard_stops_the_run(words: list[str], copy: Path, tmp_path: Path, single_rank: None) -> None:
    damage(copy / SHARDS[63])
    for more in ([], ["--scratch_dir", str(tmp_path / "scratch")], ["--dry_run"]):
        message = open_refusal(placed(words, copy, tmp_path, *more))
        assert message.startswith(f"{copy} is damaged ({SHARDS[63]} is not what was written)")


def test_a_full_scratch_stops_the_run(words: list[str], made: Path, tmp_path: Path, single_rank: None) -> None:
    full = namedtuple("usage", "total used free")(1000, 900, 100)
    with mock.patch.object(shutil, "disk_usage", return_value=full):
        message = open_refusal(placed(words, made, tmp_path, "--scratch_dir", str(tmp_path / "scratch")))
    assert "free space there or give another --scratch_dir" in message


def test_a_dry_run_copies_nothing(words: list[str], made: Path, tmp_path: Path, single_rank: None) -> None:
    from peakd_ds.run import open_run

    run = open_run(placed(words, made, tmp_path, "--dry_run", "--scratch_dir", str(tmp_path / "scratch")))
    assert len(run.train) == NUM_TRAIN_ROWS
    assert list(tmp_path.iterdir()) == []


def test_more_nodes_than_rows(words: list[str], tokenizer: PreTrainedTokenizerBase, made: Path, as_node) -> None:
    manifest = shard_files.read_manifest(made)
    num_held_out = manifest.files["holdout.safetensors"].num_rows
    few = shard_files.Manifest(made, manifest.made_from, 18 + num_held_out, manifest.files)
    as_node(0, 32)
    with mock.patch.object(shard_files, "read_manifest", return_value=few):
        message = refusal(shard_files.find, sharded_config(words, made), get_task("rte"), tokenizer, None)
    assert "18 rows to train on, fewer than the 32 nodes; set --data_placement replicated" in message


def open_as_nodes(words: list[str], local_world_size: str, host: str | None) -> str:
    """Runs on every rank: the error message for ranks that a launcher placed badly."""
    from peakd_ds.run import open_run

    name = host or f"node{dist.rank()}"
    size = local_world_size.split(",")[dist.rank() % len(local_world_size.split(","))]
    with (
        mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": size}),
        mock.patch.object(socket, "gethostname", lambda: name),
    ):
        try:
            open_run(parse(words))
        except UserError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("num_ranks", "local_world_size", "host"),
    [(2, "2", None), (2, "1,2", "node0"), (3, "2", "node0")],
    ids=["one node by its size, two by name", "sizes differ", "uneven"],
)
def test_ranks_that_are_not_grouped_by_node(
    words: list[str], made: Path, pools, tmp_path: Path, num_ranks: int, local_world_size: str, host: str | None
) -> None:
    batch = ["--global_batch_size", str(8 * num_ranks)]
    placed = ["--data_placement", "sharded", "--shard_dir", str(made), "--run_dir", str(tmp_path / "new")]
    for message in pools(num_ranks).run(open_as_nodes, [*words, *placed, *batch], local_world_size, host):
        assert "the same number of ranks on each node, numbered node by node: set" in message
    assert not (tmp_path / "new").exists()


def test_three_nodes_are_refused_before_any_engine(words: list[str], made: Path, pools, tmp_path: Path) -> None:
    placed = ["--data_placement", "sharded", "--shard_dir", str(made), "--run_dir", str(tmp_path / "new")]
    argv = [*words, *placed, "--global_batch_size", "12"]
    for message in pools(3).run(open_as_nodes, argv, "1", None):
        assert "3 nodes do not divide the 64 shards" in message
    assert not (tmp_path / "new").exists()
