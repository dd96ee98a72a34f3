"""Training a tiny model with the Triton loss gives the same curve as with the reference."""

import interpreter  # noqa: F401, I001 - first: patches Triton's interpreter, or skips

import json
from pathlib import Path

import pytest

WORDS = (
    "--task sst2 --stages distill --no_ptp --num_hidden_layers 2 --distill_epochs 1 --global_batch_size 32 "
    "--micro_batch_size 16 --log_steps 1 --lr 1e-3 --dtype fp32 --dropout 0 --no_export_unrolled --layer_map 1:1,3:3"
)


@pytest.mark.parametrize("hidden_loss", ["cls", "tokens"])
def test_triton_and_reference_give_the_same_curve(
    hidden_loss: str, tiny_data: Path, tiny_teacher, single_rank: None, tmp_path: Path
) -> None:
    from peakd_ds import train
    from peakd_ds.command_line import parse

    curves = {}
    for backend in ("triton", "reference"):
        words = [*WORDS.split(), "--hidden_loss", hidden_loss, "--loss_backend", backend]
        paths = ["--teacher", str(tiny_teacher("sst2")), "--data_dir", str(tiny_data)]
        train.main(parse([*words, *paths, "--run_dir", str(tmp_path / backend)]))
        lines = (tmp_path / backend / "metrics.jsonl").read_text().splitlines()
        steps = [record for record in map(json.loads, lines) if "loss" in record]
        curves[backend] = [
            [record[name] for name in ("loss", "hard_loss", "soft_loss", "hidden_loss")] for record in steps
        ]
    assert len(curves["triton"]) >= 3
    for triton, reference in zip(*curves.values(), strict=True):
        assert triton == pytest.approx(reference, rel=1e-5)
