"""How large a saved model is on disk, and how fast it is on this machine, on rows that are padded as users pad them."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from peakd_ds.data.tokens import Split
from peakd_ds.ranks.device import device

BATCH = 32
"""Rows of a batch whose throughput is measured."""
MAX_REPEATS = 30
BUDGET_S = 0.7
"""A measurement ends after MAX_REPEATS, or after the repeat that passes this time."""
MAX_PARAMETERS = 1_500_000_000
"""Larger models are not measured: one copy more in fp32 may not fit."""

Inputs = dict[str, torch.Tensor]
Run = Callable[[Inputs], object]
"""A model: inputs by the tokenizer's names, int64 [B, S] on the CPU -> outputs, which are there when it returns."""


def measure(run: Run, split: Split, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """The latency of one row of median length, and the throughput of BATCH rows of the split; medians of repeats."""
    by_length = np.argsort(split.lengths, kind="stable")
    median = by_length[len(by_length) // 2 : len(by_length) // 2 + 1]
    spread = by_length[np.linspace(0, len(by_length) - 1, BATCH).astype(int)]
    seconds = [_median_s(run, padded(split, tokenizer, rows)) for rows in (median, spread)]
    return {"latency_ms": round(1000 * seconds[0], 2), "batch_samples_per_s": round(BATCH / seconds[1], 1)}


def measure_model(model: nn.Module, split: Split, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """The same of a model of transformers, in fp32, on this rank's device."""
    place = device()
    nn.Module.to(model, place, torch.float32).eval()

    def run(inputs: Inputs) -> object:
        return model(**{name: tensor.to(place) for name, tensor in inputs.items()}).logits.cpu()

    with torch.inference_mode():
        return measure(run, split, tokenizer)


def conditions() -> dict[str, Any]:
    """On what is measured, for results.json."""
    return {"device": device().type, "threads": torch.get_num_threads(), "batch": BATCH}


def padded(split: Split, tokenizer: PreTrainedTokenizerBase, rows: np.ndarray) -> Inputs:
    """The rows of a split as the tokenizer would give them, padded to the longest on the right, int64 [B, S]."""
    columns = split.rows[rows]
    longest = max(map(len, columns["input_ids"]))
    padding = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": tokenizer.pad_token_type_id}
    inputs = {}
    for name in tokenizer.model_input_names:
        if name == "attention_mask":
            inputs[name] = _pad([np.ones_like(ids) for ids in columns["input_ids"]], 0, longest)
        elif name in columns:
            inputs[name] = _pad(columns[name], padding[name], longest)
    return inputs


def _pad(arrays: Iterable[np.ndarray], value: int, longest: int) -> torch.Tensor:
    rows = [np.pad(array, (0, longest - len(array)), constant_values=value) for array in arrays]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def disk_mb(folder: Path) -> float:
    """Megabytes (10^6 bytes) of the weights in a folder."""
    return megabytes(folder.glob("*.safetensors"))


def memory_mb(model: nn.Module) -> float:
    """Megabytes of a model's parameters, which are those of its file."""
    return round(sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 1e6, 2)


def megabytes(files: Iterable[Path]) -> float:
    """Megabytes of files together."""
    return round(sum(file.stat().st_size for file in files) / 1e6, 2)


def _median_s(run: Run, inputs: Inputs) -> float:
    """Seconds that one call takes, after one call that is not counted unless it takes the whole budget."""
    times = [_seconds(run, inputs)]
    if times[0] < BUDGET_S:
        times.clear()
        start = time.perf_counter()
        while len(times) < MAX_REPEATS and (not times or time.perf_counter() - start < BUDGET_S):
            times.append(_seconds(run, inputs))
    return statistics.median(times)


def _seconds(run: Run, inputs: Inputs) -> float:
    start = time.perf_counter()
    run(inputs)
    return time.perf_counter() - start


def in_words(measured: Mapping[str, Any]) -> str:
    """The conditions of a measurement in one sentence."""
    threads = measured["threads"]
    on = f"CPU, {threads} thread{'' if threads == 1 else 's'}"
    if measured["device"] != "cpu":
        on = f"GPU ({measured['device']}); ONNX files: {on}"
    return (
        f"Speed: median of repeats in fp32 on rows of the dev set, on this machine ({on}). Batch 1 is a row of median "
        f"length; batch {measured['batch']} is padded to its longest row."
    )
