"""Checkpoints that any number of ranks and any ZeRO stage can read.

A checkpoint is a folder with fp32 weights and both Adam moments by parameter name in safetensors, and a JSON file with
position, schedule and scores: no pickle, no shards. Word embeddings are those of the trained tokens (vocabulary.py).
Folders have checksums (files.py); a damaged one is skipped, and training continues from the one before.

    checkpoints/STAGE/step-00000120/   {weights,exp_avg,exp_avg_sq}.safetensors state.json SHA256SUMS DONE
    checkpoints/STAGE/best-0003/       weights.safetensors of the best epoch, state.json SHA256SUMS DONE
    checkpoints/STAGE/latest           name of the newest folder, for people and other programs
    checkpoints/STAGE/FINISHED.json    summary of the stage, written when it is over
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

from peakd_ds import files
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
from peakd_ds.files import (
    checked_folder,
    damage_named,
    damage_of_file,
    damaged,
    known_sha256_of,
    parse_json,
    remove_leftovers,
    write_atomically,
)
from peakd_ds.ranks import dist

NUM_KEPT = 2


@dataclass
class TrainState:
    """The position of a stage. Dropout masks follow from (seed, stage, step, rank), so no generator state is kept."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Epochs done."""
    batch: int = 0
    """Global batches done in the current epoch."""
    best_score: float | None = None
    best_epoch: int = 0
    """Epochs done when the best score was reached; 0 before the first score."""
    epochs_without_better: int = 0
    tokens: str = ""
    """Digest of the tokens that have word embeddings (vocabulary.digest)."""
    decay: float = 1.0
    """Factor that weight decay has applied to weights without gradients, such as embeddings of unused tokens."""

    def add_step(self, was_applied: bool, decayed_share: float) -> None:
        """Count an optimizer step; `decayed_share` is its lr * weight_decay, which fp16 skips with the step."""
        self.step += 1
        self.batch += 1
        self.decay *= 1 - decayed_share if was_applied else 1

    def is_best(self, score: float, higher_is_better: bool) -> bool:
        """Record the score of the epoch that has just ended; return whether it is the best so far."""
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
        UserError: on every rank, if it cannot be written or a weight is not finite; earlier checkpoints are untouched.
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
        _write_tensors(folder / name, tensors, position)
        write_atomically(folder / "latest", name)
        _prune(folder, name)

    _write_on_main(write, folder / name)


def save_best(folder: Path, engine: DeepSpeedEngine, state: TrainState) -> None:
    """Write the weights of the best epoch so far (collective). Raises UserError as `save` does.

    Each best epoch has its own folder: older checkpoints still name an older one.
    """
    weights, target = gather(engine, None), best_folder(folder, state.best_epoch)

    def write() -> None:
        _check_finite(weights, folder, state)
        _write_tensors(target, {"weights": weights}, asdict(state))

    _write_on_main(write, target)


def best_folder(folder: Path, epoch: int) -> Path:
    """Folder of an epoch's weights, which exists if the epoch was the best so far."""
    return folder / f"best-{epoch:04d}"


def _prune(folder: Path, newest_name: str) -> None:
    """Keep the newest intact checkpoints and the best weights that they name; delete the others and leftovers.

    Damaged checkpoints, which were skipped when the run started, must not count among those to keep. Finding them costs
    one read of an older checkpoint, unless this process has read or written it.
    """
    kept = [folder / newest_name]
    for candidate in _candidates(folder):
        if candidate.name < newest_name and len(kept) < NUM_KEPT and _damage_with_best(candidate) is None:
            kept.append(candidate)
    kept_best = {best_folder(folder, _position(candidate)["best_epoch"]) for candidate in kept}
    earlier_leftovers = {*folder.glob("step-*.tmp"), *folder.glob("best-*.tmp")}  # of versions before SHA256SUMS
    for old in (set(_candidates(folder)) - set(kept)) | (set(folder.glob("best-????")) - kept_best) | earlier_leftovers:
        shutil.rmtree(old, ignore_errors=True)
    remove_leftovers(folder, "*")


def finish(folder: Path, state: TrainState, score: str, selected_on: str) -> None:
    """Mark the stage as over (collective).

    Args:
        score: Name of the metric that picked the best epoch.
        selected_on: Name of the rows that it was computed on.
    """
    summary = {
        "steps": state.step,
        "epochs": state.epoch,
        "best_epoch": state.best_epoch,
        "selected_on": selected_on,
        score: state.best_score,
    }
    _write_on_main(lambda: write_atomically(folder / "FINISHED.json", json.dumps(summary, indent=2) + "\n"), folder)


def finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a stage that is over; None for a stage that is not."""
    marker = folder / "FINISHED.json"
    if not marker.exists():
        return None
    with damage_named(marker, "delete it, and the same command finishes the stage again"):
        return {**parse_json(marker.read_bytes())}


def gather(engine: DeepSpeedEngine, moment: str | None) -> dict[str, torch.Tensor]:
    """fp32 weights (`moment` None) or an Adam moment of every trained parameter (collective).

    Returns:
        On rank 0, tensors on the CPU by parameter name; some may share memory with the engine, so write them before
        the next step. On other ranks, an empty dict.
    """
    tensors = {}
    for name, parameter in engine.module.named_parameters():
        value = read_full(engine, parameter, moment)
        if dist.is_main():
            tensors[name] = value.detach().to("cpu", torch.float32).contiguous()
    return tensors


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
    """An engine around `module` at the newest intact checkpoint of a stage, or at its start (collective).

    Args:
        folder: The stage's checkpoints; its name is the stage's.
        tokens: Digest of the tokens that the module has embeddings for.
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
    """The newest intact checkpoint, and why newer ones are skipped (collective: all ranks read the same one)."""

    def find_newest() -> tuple[Path | None, list[str]]:
        skipped: list[str] = []
        for candidate in _candidates(folder):
            damage = _damage_with_best(candidate)
            if damage is None:
                return candidate, skipped
            skipped.append(f"checkpoint {candidate.name} is skipped: {damage}")
        return None, skipped

    return dist.on_main(find_newest)


def load_weights(module: nn.Module, checkpoint: Path, tokens: str | None = None) -> None:
    """Put a checkpoint's weights into a module that no engine has yet (collective).

    Args:
        tokens: Digest of the tokens that the module has embeddings for; None skips the comparison.

    Raises:
        UserError: names, shapes or tokens differ, or a rank cannot read the file; names the first difference.
    """

    def stored_weights() -> dict[str, torch.Tensor]:
        if tokens is not None and state_of(checkpoint).tokens != tokens:
            raise UserError(
                f"{checkpoint} was written when the rows had other tokens: the tokenizer's files or library changed; "
                "take another --run_dir, or the tokenizer that it was started with"
            )
        try:
            return load_file(checkpoint / "weights.safetensors")
        except SafetensorError as error:
            remedy = f"delete {checkpoint}, and the same command continues from an older checkpoint"
            raise damaged(checkpoint / "weights.safetensors", str(error), remedy) from error

    stored = dist.agree(stored_weights)
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
        warnings.simplefilter("ignore")  # of a scheduler that steps before its optimizer
        engine.lr_scheduler.step()
    set_loss_scaler(engine, position["loss_scaler"])
    engine.global_steps = position["step"]
    engine.global_samples = position["step"] * engine.train_batch_size()
    return state_of(checkpoint)


def state_of(checkpoint: Path) -> TrainState:
    """The position of the stage when the checkpoint, or the best weights, were written."""
    position = _position(checkpoint)
    return TrainState(**{name: position[name] for name in asdict(TrainState()) if name in position})


# -- Damage ------------------------------------------------------------------------------------------------------------


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words; None if nothing is. Known files are not read again."""
    if not (checkpoint / files.CHECKSUMS).exists():
        return _damage_in_earlier_format(checkpoint)
    return files.damage_of(checkpoint, known_sha256_of)


def _damage_in_earlier_format(checkpoint: Path) -> str | None:
    """The same for versions before SHA256SUMS: state.json has the checksums, and DONE is the checksum of state.json."""
    try:
        marker, text = (checkpoint / files.DONE).read_text(), (checkpoint / "state.json").read_bytes()
        digests: dict[str, str] | None = parse_json(text).get("sha256")
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"state.json or {files.DONE} cannot be read: {error}"
    if digests is None:  # written by this version
        return f"{files.CHECKSUMS} is missing"
    if hashlib.sha256(text).hexdigest() != marker:
        return f"state.json or {files.DONE} is not what was written"
    damages = (damage_of_file(checkpoint / name, digest, known_sha256_of) for name, digest in digests.items())
    return next((damage for damage in damages if damage is not None), None)


def _damage_with_best(checkpoint: Path) -> str | None:
    """Damage of a checkpoint or of the best weights that it names, which a resumed stage needs too."""
    damage = damage_of(checkpoint)
    if damage is None and (best_epoch := _position(checkpoint)["best_epoch"]):
        best = best_folder(checkpoint.parent, best_epoch)
        damage = damage_of(best)
        return None if damage is None else f"in {best.name}, which it names, {damage}"
    return damage


# -- Files -------------------------------------------------------------------------------------------------------------


def _check_finite(weights: dict[str, torch.Tensor], folder: Path, state: TrainState) -> None:
    """Raise UserError if a weight is not finite: a finite loss can have a gradient that is not."""
    bad = next((name for name, weight in weights.items() if not weight.isfinite().all()), None)
    if bad is not None:
        raise UserError(
            f"{folder.name} step {state.step}: weight {bad} is NaN or infinite, so it is not saved; the last good "
            f"checkpoint is kept in {folder}: in another --run_dir, lower --lr or take --dtype fp32"
        )


def _position(checkpoint: Path) -> dict[str, Any]:
    return parse_json((checkpoint / "state.json").read_text())["position"]


def _candidates(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted(folder.glob("step-????????"), reverse=True)


def _write_tensors(target: Path, tensors: dict[str, dict[str, torch.Tensor]], position: dict[str, Any]) -> None:
    with checked_folder(target) as folder:
        (folder / "state.json").write_text(json.dumps({"position": position}, indent=2))
        with ThreadPoolExecutor() as pool:
            list(pool.map(save_file, tensors.values(), [folder / f"{name}.safetensors" for name in tensors]))


def _write_on_main(write: Callable[[], None], target: Path) -> None:
    """Write on rank 0 (collective). Raises UserError on every rank if that fails, or if the run folder is lost."""

    def write_or_stop() -> None:
        run_lock.check()  # another start may have taken the run folder
        try:
            write()
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{target} cannot be written ({error}); what was saved before is untouched: free some space "
                "or fix the folder, then start the same command again"
            ) from error

    dist.on_main(write_or_stop)
