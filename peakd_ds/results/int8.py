"""A dynamically quantised ONNX file: weights in int8, and what that costs in score against the float32 file.

N rows, C classes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from peakd_ds.data.metrics import compute_metrics, higher_is_better
from peakd_ds.data.tasks import Task
from peakd_ds.data.tokens import Split
from peakd_ds.errors import first_line
from peakd_ds.files import needs_space, whole_file
from peakd_ds.results import evaluation, speed
from peakd_ds.results.export import quiet

MAX_ROWS = 2000
"""Most rows on which both files are scored; of more, evenly spaced ones are taken."""
_BATCH = 32


class NotQuantised(Exception):
    """The model cannot be quantised; the message says why, in one line."""


def quantise(file: Path, target: Path) -> None:
    """Write an ONNX file with weights of linear layers and embeddings in int8, one scale for each channel.

    Raises:
        NotQuantised: onnxruntime cannot quantise the model; nothing was written.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with needs_space(target), whole_file(target) as new, quiet():
        try:
            model = onnx.load(file)
            model.graph.ClearField("value_info")  # shapes of weights that the quantiser transposes
            quantize_dynamic(model, new, weight_type=QuantType.QInt8, per_channel=True)
            _session(new)
        except OSError:
            raise
        except Exception as error:  # onnx and onnxruntime have errors of many kinds
            raise NotQuantised(" ".join(first_line(error).split())[:200]) from error


def score(files: Sequence[Path], task: Task, split: Split, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """What the float32 file, and the quantised one if it is given too, are worth on the split, for results.json.

    The entry of the quantised file says how much of the main score it loses (`drop`, negative if it wins), and on what
    share of the rows it has the float32 file's class. Without labels, the drop is what is missing of that share.
    """
    rows = np.unique(np.linspace(0, len(split) - 1, min(len(split), MAX_ROWS)).astype(int))
    entries: list[dict[str, Any]] = []
    logits = []
    for file in files:
        run = runner(file)
        logits.append(_logits(run, split, tokenizer, rows))
        metrics = compute_metrics(task, logits[-1], split.labels[rows]) if task.has_labels else {}
        measured = speed.measure(run, split, tokenizer)
        entries.append({"metrics": metrics, "disk_mb": speed.megabytes([file]), **measured, "rows": len(rows)})
    if len(files) > 1:
        agreement = evaluation.agreement(task, logits[1], logits[0])
        entries[1] |= {"agreement_with_fp32": agreement, "drop": 1 - agreement}
        main = task.primary_metric
        if main in entries[0]["metrics"]:
            sign = 1 if higher_is_better(main) else -1
            entries[1]["drop"] = sign * (entries[0]["metrics"][main] - entries[1]["metrics"][main])
    return entries


def runner(file: Path) -> Callable[[speed.Inputs], torch.Tensor]:
    """A function that runs an ONNX classifier on the CPU: inputs int64 [B, S] -> logits [B, C]."""
    session = _session(file)
    names = [given.name for given in session.get_inputs()]

    def run(inputs: speed.Inputs) -> torch.Tensor:
        return torch.from_numpy(session.run(["logits"], {name: inputs[name].numpy() for name in names})[0])

    return run


def _session(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _logits(
    run: Callable[[speed.Inputs], torch.Tensor], split: Split, tokenizer: PreTrainedTokenizerBase, rows: np.ndarray
) -> torch.Tensor:
    """float32 [N, C] for the given rows, in their order."""
    by_length = np.argsort(split.lengths[rows], kind="stable")
    parts = np.array_split(by_length, -(-len(rows) // _BATCH))
    found = torch.cat([run(speed.padded(split, tokenizer, rows[part])) for part in parts])
    logits = torch.empty_like(found)
    logits[torch.from_numpy(by_length)] = found
    return logits


def verdict(entry: dict[str, Any], max_drop: float, metric: str) -> tuple[bool, str]:
    """Whether the quantised file is recommended, and a sentence on what it loses."""
    drop, rows = entry["drop"], entry["rows"]
    change = "loses nothing of" if drop == 0 else f"loses {drop:.4f} of" if drop > 0 else f"gains {-drop:.4f} of"
    sentence = (
        f"model_int8.onnx {change} {metric} on {rows:,} rows of the dev set, where it agrees with model.onnx on "
        f"{entry['agreement_with_fp32']:.4f}"
    )
    if drop > max_drop:
        return False, f"{sentence}: more than --max_int8_drop {max_drop:g} allows, so ship model.onnx"
    return True, f"{sentence}: within --max_int8_drop {max_drop:g}, so it can be shipped"
