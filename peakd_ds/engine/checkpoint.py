"""Checkpoints that any number of ranks and any ZeRO stage can read.

A checkpoint is a folder of tensors by parameter name in safetensors (fp32 weights and both Adam moments) and a JSON
file (position, schedule, scores, checksums): no pickle, no shards. It is written under a temporary name, its DONE
marker last, and then renamed, so a folder with its final name is whole unless the disk damaged it later.

Of the word embeddings it has those that are trained (vocabulary.py).

    checkpoints/STAGE/step-00000120/   weights.safetensors exp_avg.safetensors exp_avg_sq.safetensors state.json DONE
    checkpoints/STAGE/best-0003/       weights.safetensors of the best epoch, state.json, DONE
    checkpoints/STAGE/latest           name of the newest folder, for people and other programs
    checkpoints/STAGE/FINISHED.json    the stage is over; its summary
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from peakd_ds.cluster import run_lock
from peakd_ds.config import RunConfig
from peakd_ds.engine import engines
from peakd_ds.engine.state import (
    MOMENTS,
    adam_step,
    create_adam_state,
    loss_scaler,
    read_full,
    set_loss_scaler,
    write_full,
)
from peakd_ds.errors import UserError
from peakd_ds.files import flush, replace_folder, sha256_of, write_atomically
from peakd_ds.ranks import dist

NUM_KEPT = 2


@dataclass
class TrainState:
    """Where a stage stands. Dropout masks follow from (seed, stage, step, rank), so no generator state is kept."""

    step: int = 0
    """Optimiser steps done."""
    epoch: int = 0
    """Epochs done."""
    batch: int = 0
    """Global batches done in the current epoch."""
    best_score: float | None = None
    best_epoch: int = 0
    """Epochs done when the best score was reached; 0: none yet."""
    epochs_without_better: int = 0
    tokens: str = ""
    """Which tokens the word embeddings are of (vocabulary.digest)."""
    decay: float = 1.0
    """What weight decay has left of a weight without gradients, as those of tokens that do not occur."""

    def add_step(self, was_applied: bool, decayed_share: float) -> None:
        """Count an optimizer step; `decayed_share` is its lr * weight_decay, which fp16 skips with the step."""
        self.step += 1
        self.batch += 1
        self.decay *= 1 - decayed_share if was_applied else 1

    def is_best(self, score: float, higher_is_better: bool) -> bool:
        """Record the score of the epoch that has just ended; whether it is the best so far."""
        is_better = self.best_score is None or (
            score > self.best_score if higher_is_better else score < self.best_score
        )
        if is_better:
            self.best_score, self.best_epoch, self.epochs_without_better = score, self.epoch, 0
        else:
            self.epochs_without_better += 1
        return is_better


# -- Saving ------------------------------------------------------------------------------------------------------------


def save(folder: Path, engine: DeepSpeedEngine, state: TrainState) -> None:
    """Write a checkpoint of the stage (collective) and prune old ones.

    Raises:
        UserError: it cannot be written, or a weight is not finite, on every rank; earlier checkpoints are untouched.
    """
    tensors = {"weights": gather(engine, None), **{key: gather(engine, key) for key in MOMENTS}}
    position = {
        **asdict(state),
        "scheduler_step": engine.lr_scheduler.last_epoch,
        "adam_step": adam_step(engine),
        "loss_scaler": loss_scaler(engine),
        "world_size": dist.world_size(),
    }
    name = f"step-{state.step:08d}"

    def write() -> None:
        _check_finite(tensors["weights"], folder, state)
        _write_folder(folder / name, tensors, position)
        write_atomically(folder / "latest", name)
        _prune(folder, name)

    _on_main_or_stop(write, folder / name)


def save_best(folder: Path, engine: DeepSpeedEngine, state: TrainState) -> None:
    """Write the weights of the best epoch so far (collective). Raises UserError as `save` does.

    Each has a folder of its own: the checkpoint written next names it, and until then an older one names the older.
    """
    weights, target = gather(engine, None), best_folder(folder, state.best_epoch)

    def write() -> None:
        _check_finite(weights, folder, state)
        _write_folder(target, {"weights": weights}, asdict(state))

    _on_main_or_stop(write, target)


def best_folder(folder: Path, epoch: int) -> Path:
    """Where the weights of that epoch are, if it was the best so far."""
    return folder / f"best-{epoch:04d}"


def _prune(folder: Path, newest_name: str) -> None:
    """Keep the newest whole checkpoints and the best weights that they name.

    Damaged ones were skipped when the run started, and lie before or beyond the newest; they must not push out good
    ones. Telling them costs reading one older checkpoint, if this process has not read or written it.
    """
    kept = [folder / newest_name]
    for candidate in _candidates(folder):
        if candidate.name < newest_name and len(kept) < NUM_KEPT and _damage_with_best(candidate) is None:
            kept.append(candidate)
    kept_best = {best_folder(folder, _position(candidate)["best_epoch"]) for candidate in kept}
    of_killed_saves = {*folder.glob("step-*.tmp"), *folder.glob("best-*.tmp"), *folder.glob(".*.old-*")}
    for old in (set(_candidates(folder)) - set(kept)) | (set(folder.glob("best-????")) - kept_best) | of_killed_saves:
        shutil.rmtree(old, ignore_errors=True)


def finish(folder: Path, state: TrainState, score: str, selected_on: str) -> None:
    """Mark the stage as over (collective).

    Args:
        score: Name of the metric that picked the best epoch.
        selected_on: Name of the rows that picked it.
    """
    summary = {
        "steps": state.step,
        "epochs": state.epoch,
        "best_epoch": state.best_epoch,
        "selected_on": selected_on,
        score: state.best_score,
    }
    _on_main_or_stop(lambda: write_atomically(folder / "FINISHED.json", json.dumps(summary, indent=2) + "\n"), folder)


def finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a stage that is over, else None."""
    marker = folder / "FINISHED.json"
    try:
        return json.loads(marker.read_text()) if marker.exists() else None
    except ValueError as error:
        raise UserError(f"{marker} is damaged ({error}); delete it to have the stage finished again") from error


def gather(engine: DeepSpeedEngine, moment: str | None) -> dict[str, torch.Tensor]:
    """fp32 weights (`moment` None) or an Adam moment of every trained parameter (collective).

    Returns:
        Tensors on the CPU by parameter name on rank 0, the engine's own where it has whole ones in fp32 there, so to
        be written before the next step; an empty dict elsewhere.
    """
    whole = {}
    for name, parameter in engine.module.named_parameters():
        value = read_full(engine, parameter, moment)
        if dist.is_main():
            whole[name] = value.detach().to("cpu", torch.float32).contiguous()
    return whole


# -- Loading -----------------------------------------------------------------------------------------------------------


def resume(
    folder: Path,
    module: nn.Module,
    tokens: str,
    config: RunConfig,
    ds_config: dict[str, Any],
    num_steps: int,
    say: Callable[[str], None],
) -> tuple[DeepSpeedEngine, TrainState]:
    """An engine around `module` at the newest whole checkpoint of a stage, or at its start (collective).

    Args:
        folder: The stage's checkpoints; its name is the stage's.
        tokens: Digest of the tokens that the module has embeddings of.
        ds_config: The student's DeepSpeed config.
        num_steps: Optimizer steps of the whole stage.

    Raises:
        UserError: the checkpoint does not fit the module, or cannot be read.
    """
    resumed_from, skipped = newest(folder)
    for warning in skipped:
        say(f"warning: {warning}")
    if resumed_from is not None:
        load_weights(module, resumed_from, tokens)
    engine = engines.training_engine(module, config, ds_config, num_steps, folder.name)
    return engine, TrainState(tokens=tokens) if resumed_from is None else restore(engine, resumed_from)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint (collective, so that all ranks read the same one) and why newer ones were skipped."""

    def look() -> tuple[Path | None, list[str]]:
        skipped: list[str] = []
        for candidate in _candidates(folder):
            damage = _damage_with_best(candidate)
            if damage is None:
                return candidate, skipped
            skipped.append(f"checkpoint {candidate.name} is skipped: {damage}")
        return None, skipped

    return dist.on_main(look)


def load_weights(module: nn.Module, checkpoint: Path, tokens: str | None = None) -> None:
    """Put a checkpoint's weights into a module that no engine has yet (collective).

    Args:
        tokens: Digest of the tokens that the module has embeddings of; None: not compared.

    Raises:
        UserError: names, shapes or tokens differ, with the first that does, or a rank cannot read the file.
    """

    def read() -> dict[str, torch.Tensor]:
        if tokens is not None and state_of(checkpoint).tokens != tokens:
            raise UserError(
                f"{checkpoint} was written when the rows had other tokens: the tokenizer's files or library changed; "
                "take another --run_dir, or the tokenizer that it was started with"
            )
        try:
            return load_file(checkpoint / "weights.safetensors")
        except SafetensorError as error:
            raise UserError(
                f"{checkpoint / 'weights.safetensors'} cannot be read ({error}); delete {checkpoint}, and the same "
                "command goes on from an older checkpoint"
            ) from error

    stored = dist.agree(read)
    parameters = dict(module.named_parameters())
    for name in sorted(parameters.keys() | stored.keys()):
        shapes = [list(tensors[name].shape) if name in tensors else "absent" for tensors in (stored, parameters)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{checkpoint} does not fit the model: {name} is {shapes[0]} there and {shapes[1]} here; "
                "take another --run_dir"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name])


def restore(engine: DeepSpeedEngine, checkpoint: Path) -> TrainState:
    """Put master weights, Adam moments and schedule into an engine whose module has the checkpoint's weights."""
    position = _position(checkpoint)
    create_adam_state(engine, position["adam_step"])
    for moment in (None, *MOMENTS):
        with safe_open(checkpoint / f"{moment or 'weights'}.safetensors", framework="pt") as file:
            for name, parameter in engine.module.named_parameters():
                write_full(engine, parameter, moment, file.get_tensor(name))
    engine.lr_scheduler.last_epoch = position["scheduler_step"] - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this scheduler's optimiser has not stepped yet, which is so
        engine.lr_scheduler.step()
    set_loss_scaler(engine, position["loss_scaler"])
    engine.global_steps = position["step"]
    engine.global_samples = position["step"] * engine.train_batch_size()
    return state_of(checkpoint)


def state_of(checkpoint: Path) -> TrainState:
    """Where the stage stood when the checkpoint, or the best weights, were written."""
    position = _position(checkpoint)
    return TrainState(**{name: position[name] for name in asdict(TrainState()) if name in position})


def damage_of(checkpoint: Path) -> str | None:
    """What is missing or changed in a checkpoint folder; None if it is whole."""
    try:
        marker = (checkpoint / "DONE").read_text()
        text = (checkpoint / "state.json").read_bytes()
        if hashlib.sha256(text).hexdigest() != marker:
            return "state.json is not what was written"
        for name, digest in json.loads(text)["sha256"].items():
            if _sha256(checkpoint / name) != digest:
                return f"{name} is not what was written"
            with safe_open(checkpoint / name, framework="pt"):
                pass
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return f"a file is missing or unreadable ({error})"
    return None


def _damage_with_best(checkpoint: Path) -> str | None:
    """The same for a checkpoint and the best weights that it names, which a resumed stage needs too."""
    damage = damage_of(checkpoint)
    if damage is None and (best_epoch := _position(checkpoint)["best_epoch"]):
        damage = damage_of(best_folder(checkpoint.parent, best_epoch))
    return damage


# -- Files -------------------------------------------------------------------------------------------------------------


def _check_finite(weights: dict[str, torch.Tensor], folder: Path, state: TrainState) -> None:
    """A finite loss can have a gradient that is not: its step must not become the checkpoint to go on from."""
    bad = next((name for name, weight in weights.items() if not weight.isfinite().all()), None)
    if bad is not None:
        raise UserError(
            f"{folder.name} step {state.step}: weight {bad} is NaN or infinite, so it is not saved; the last good "
            f"checkpoint is kept in {folder}: in another --run_dir, lower --lr or take --dtype fp32"
        )


def _position(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text())["position"]


def _candidates(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted(folder.glob("step-????????"), reverse=True)


def _write_folder(target: Path, tensors: dict[str, dict[str, torch.Tensor]], position: dict[str, Any]) -> None:
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        files = [temporary / f"{name}.safetensors" for name in tensors]
        with ThreadPoolExecutor() as pool:  # one file is hashed while others go to the disk
            list(pool.map(save_file, tensors.values(), files))
            digests = dict(zip((file.name for file in files), pool.map(_synced_sha256, files), strict=True))
        text = json.dumps({"position": position, "sha256": digests}, indent=2)
        (temporary / "state.json").write_text(text)
        (temporary / "DONE").write_text(hashlib.sha256(text.encode()).hexdigest())
        for file in (temporary / "state.json", temporary / "DONE"):
            flush(file)
        replace_folder(target, temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _synced_sha256(file: Path) -> str:
    flush(file)
    return _sha256(file)


_digests: dict[tuple[int, ...], str] = {}
"""Of files that this process has read: an older checkpoint is looked at in every save, and is the same file as then."""


def _sha256(file: Path) -> str:
    stat = file.stat()
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)  # the same when its folder is renamed
    if key not in _digests:
        _digests[key] = sha256_of(file)
    return _digests[key]


def _on_main_or_stop(write: Any, what: Path) -> None:
    def attempt() -> None:
        run_lock.check()  # a start that was cut off must not write into what a later one has saved
        try:
            write()
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{what} cannot be written ({error}); what was saved before is untouched: free some space "
                "or mend the folder, then start the same command again"
            ) from error

    dist.on_main(attempt)
