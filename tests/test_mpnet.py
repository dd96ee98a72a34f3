"""The large teacher, for real: an MPNet of 109 million parameters on two ranks.

Its folder is what `peakd-fetch mpnet --out FOLDER` writes: the environment variable PEAKD_MPNET names it, or it is
build/mpnet in the repository. PEAKD_MINILM names the student's encoder, as `peakd-fetch minilm` writes it; without one
the student is a tiny BERT.
"""

import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, new_pools
from test_planner import check_memory

from peakd_ds import train
from peakd_ds.command_line import parse

WORDS = "--task rte --num_hidden_layers 2 --no_ptp --dtype fp32 --dropout 0 --max_seq_length 32 --log_steps 1"
BATCH = "--global_batch_size 32 --micro_batch_size 4 --epochs 1 --lr 5e-5 --save_steps 0 --no_export_unrolled"
POOLING = "mean"
"""As the MPNet's folder says; the fine-tuned teacher's folder does not."""
TOLERANCE = 1e-4
"""Relative, of losses. The cache holds what the teacher computes for other micro-batches than the student's: rows are
padded to another length there, and matrix products of another shape sum in another order."""

REST = 300_000
"""Bytes of what is not planned: norms, a batch with what the teacher computed for it."""
TIMEOUT_S = 600


@pytest.fixture(scope="module")
def mpnet() -> Path:
    folder = Path(os.environ.get("PEAKD_MPNET") or ROOT / "build" / "mpnet")
    if not (folder / "model.safetensors").exists():
        pytest.skip("no MPNet here; run `peakd-fetch mpnet --out build/mpnet`, or set PEAKD_MPNET to its folder")
    return folder


@pytest.fixture(scope="module")
def student_init(tiny_encoder: Path) -> Path:
    return Path(os.environ.get("PEAKD_MINILM") or tiny_encoder)


@pytest.fixture(scope="module")
def own_pools() -> Iterator[Callable[[int], Any]]:
    """Ranks whose peak memory is that of these tests."""
    with new_pools() as pool_of:
        yield pool_of


@pytest.fixture(scope="module")
def argv(mpnet: Path, student_init: Path, tiny_data: Path) -> list[str]:
    models = ["--teacher", str(mpnet), "--student_init", str(student_init), "--data_dir", str(tiny_data)]
    return [
        *WORDS.split(),
        *BATCH.split(),
        *models,
        "--teacher_ds_config",
        "teacher_zero3",
        "--teacher_pooling",
        POOLING,
    ]


@pytest.fixture(scope="module")
def online(own_pools, argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of both stages with an online teacher."""
    folder = tmp_path_factory.mktemp("mpnet") / "online"
    run_on(own_pools(2), "fine-tuned, and distilled online", *argv, "--run_dir", str(folder))
    return folder


def timed(argv: list[str]) -> tuple[float, float]:
    """Runs on every rank: the seconds of a run, and the process's peak memory so far [GiB]."""
    began = time.perf_counter()
    train.main(parse(argv))
    return time.perf_counter() - began, peak_gib()


def peak_gib() -> float:
    """The peak memory of a rank so far [GiB]."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run_on(pool: Any, what: str, *argv: str) -> None:
    """Run the program on every rank of a pool; print its seconds and the peak memory."""
    seconds, peaks = zip(*pool.run(timed, list(argv), timeout_s=TIMEOUT_S), strict=True)
    print(f"\n{what}: {max(seconds):.0f} s, peak memory of a rank so far {max(peaks):.2f} GiB")


def records(folder: Path, stage: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["stage"] == stage and "loss" in record]


@pytest.mark.slow
@pytest.mark.starts(6)
def test_it_teaches_online_and_from_a_cache(own_pools, argv: list[str], online: Path, tmp_path: Path) -> None:
    results = json.loads((online / "results.json").read_text())
    assert results["teacher"]["params"] == 109_488_002
    assert len(records(online, "teacher")) == len(records(online, "distill")) >= 3
    teacher = ["--teacher", str(online / "teacher"), "--stages", "distill", "--teacher_mode", "cached"]
    run_on(own_pools(2), "distilled from a cache", *argv, *teacher, "--run_dir", str(tmp_path / "run"))
    for one, other in zip(records(online, "distill"), records(tmp_path / "run", "distill"), strict=True):
        for term in ("loss", "hard_loss", "soft_loss", "hidden_loss"):
            assert one[term] == pytest.approx(other[term], rel=TOLERANCE), term


@pytest.mark.slow
@pytest.mark.starts(6)
def test_engines_hold_what_is_planned(own_pools, argv: list[str], online: Path, tmp_path: Path) -> None:
    teacher = ["--teacher", str(online / "teacher"), "--stages", "distill", "--layer_map", "1:3,2:6,3:9"]
    teacher += ["--global_batch_size", "16", "--max_seq_length", "64"]
    for stage, dtype in ((0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")):
        run_dir = tmp_path / f"zero{stage}_{dtype}"
        check_memory(own_pools(2), [*argv, *teacher], stage, dtype, run_dir, slack=REST, timeout_s=TIMEOUT_S)
    print(f"peak memory of a rank so far {max(own_pools(2).run(peak_gib)):.2f} GiB")
