"""A short run on real data with a real encoder: what random weights and made-up sentences cannot show."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

ROOT = Path(__file__).parent.parent
NUM_ROWS = 160


@pytest.fixture(scope="module")
def demo_folder() -> Path:
    """What `make demo` downloads: got once, kept in build/."""
    from peakd_ds.programs import fetch

    folder = ROOT / "build" / "demo"
    try:
        fetch.fetch(fetch.MINILM, folder / "encoder")
    except fetch.DownloadError as error:
        pytest.skip(f"the demo's encoder cannot be had here: {error}")
    return folder


@pytest.fixture
def few_rows(glue_dir: Path, tmp_path: Path) -> Path:
    """The first rows of each split of RTE, in a data folder of their own."""
    (tmp_path / "data" / "rte").mkdir(parents=True)
    for file in (glue_dir / "rte").glob("*.parquet"):
        pyarrow.parquet.write_table(
            pyarrow.parquet.read_table(file).slice(0, NUM_ROWS), tmp_path / "data" / "rte" / file.name
        )
    return tmp_path / "data"


@pytest.mark.starts(1)
@pytest.mark.slow
def test_rte_from_encoder_to_results(demo_folder: Path, few_rows: Path, tmp_path: Path, env: dict[str, str]) -> None:
    words = "--task rte --num_hidden_layers 2 --max_seq_length 48 --epochs 1 --lr 5e-5 --log_steps 1 --dtype fp32"
    paths = ["--teacher", str(demo_folder / "encoder"), "--data_dir", str(few_rows), "--run_dir", str(tmp_path / "run")]
    command = [sys.executable, "peakd_ds/train.py", *words.split(), *paths]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["teacher"]["params"] == 22_713_986 and results["student"]["params"] == 15_616_130
    assert (results["student"]["stored_layers"], results["student"]["effective_layers"]) == (2, 4)
    assert results["settings"]["layer_pairs"] == [[2, 3]]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for term in ("hard_loss", "soft_loss", "hidden_loss"):
        assert all(0 < r[term] < 1 for r in records if r["stage"] == "distill" and "loss" in r)


@pytest.mark.starts(2)
@pytest.mark.slow
def test_fused_and_reference_loss_give_the_same_curve(
    demo_folder: Path, few_rows: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    """50 steps of distillation on RTE in fp32 without dropout, from the same teacher."""
    words = "--task rte --num_hidden_layers 1 --max_seq_length 32 --no_ptp --dtype fp32 --dropout 0 --log_steps 1"
    words += " --distill_epochs 10 --teacher_epochs 1 --lr 5e-5 --no_export_unrolled"

    def run(folder: Path, *more: str) -> list[dict[str, float]]:
        paths = ["--data_dir", str(few_rows), "--run_dir", str(folder), *more]
        command = [sys.executable, "peakd_ds/train.py", *words.split(), *paths]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if "loss" in record]

    run(tmp_path / "teacher", "--teacher", str(demo_folder / "encoder"), "--stages", "teacher")
    teacher = ["--teacher", str(tmp_path / "teacher" / "teacher"), "--stages", "distill"]
    fused, reference = (run(tmp_path / name, *teacher, "--loss_backend", name) for name in ("torch", "reference"))
    assert len(fused) == len(reference) == 50
    for term in ("loss", "hard_loss", "soft_loss", "hidden_loss"):
        assert [r[term] for r in fused] == pytest.approx([r[term] for r in reference], rel=1e-5)
