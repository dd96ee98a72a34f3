"""Checkpoints of a real engine: exact, readable at every ZeRO stage, intact or skipped, and without pickles."""

import errno
import itertools
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from deepspeed import DeepSpeedEngine
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from test_files import DAMAGES as FILE_DAMAGES
from test_files import damageable, flip
from torch import nn

from peakd_ds.command_line import parse
from peakd_ds.config import RunConfig
from peakd_ds.data.tasks import get_task
from peakd_ds.engine import checkpoint, engines
from peakd_ds.engine.checkpoint import NUM_KEPT, TrainState
from peakd_ds.engine.ds_config import load_ds_config
from peakd_ds.engine.state import MOMENTS, adam_step
from peakd_ds.errors import UserError
from peakd_ds.model import contract
from peakd_ds.model.build import build_student, task_head

STAGES = (0, 1, 2, 3)
DTYPES = ("fp32", "bf16")
CONFIGS = [f"zero{stage}_{dtype}" for dtype in DTYPES for stage in STAGES]
NUM_STEPS = 12  # of the schedule
MICRO, ACCUM = 4, 2
NewEngine = Callable[..., DeepSpeedEngine]
FILES = ("weights.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors", "state.json")


@pytest.fixture
def config(tiny_encoder: Path, tmp_path: Path, single_rank: None) -> RunConfig:
    words = "--task rte --num_hidden_layers 2 --dropout 0 --lr 1e-2 --warmup_ratio 0.5 --weight_decay 0.1"
    batch = f"--global_batch_size {MICRO * ACCUM} --micro_batch_size {MICRO}"
    return parse([*words.split(), *batch.split(), "--teacher", str(tiny_encoder), "--run_dir", str(tmp_path / "run")])


def build(config: RunConfig, seed: int = 0, num_hidden_layers: int | None = None) -> nn.Module:
    """A student like the program's, with other first weights for other seeds."""
    torch.manual_seed(seed)
    settings = task_head(get_task("rte"))
    student = build_student(config, contract.find_encoder(config.teacher, "teacher"), settings)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return student


@pytest.fixture
def new_engine(config: RunConfig) -> Iterator[NewEngine]:
    """`new_engine("zero1_fp32")` gives an engine; all end with the test."""
    made: list[DeepSpeedEngine] = []

    def make(ds_config: str, module: nn.Module | None = None) -> DeepSpeedEngine:
        settings = load_ds_config(ds_config, "student_ds_config")
        made.append(engines.training_engine(module or build(config), config, settings, NUM_STEPS, "teacher"))
        return made[-1]

    yield make
    for engine in made:
        engine.destroy()


def train(engine: DeepSpeedEngine, first_step: int, num_steps: int) -> list[float]:
    """Optimizer steps on batches that follow from the step's number; their losses."""
    engine.train()
    losses = []
    for step in range(first_step, first_step + num_steps):
        generator = torch.Generator().manual_seed(step)
        for _ in range(ACCUM):
            ids = torch.randint(5, 50, (MICRO, 9), generator=generator)
            labels = torch.randint(0, 2, (MICRO,), generator=generator)
            logits = engine(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            loss = nn.functional.cross_entropy(logits.float(), labels)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def state_of(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """fp32 weights and moments by kind and name, the counted steps and the learning rates."""
    state = {
        f"{moment}/{name}": tensor
        for moment in (None, *MOMENTS)
        for name, tensor in checkpoint.gather(engine, moment).items()
    }
    assert len(state) == 3 * len(list(engine.module.named_parameters()))
    return {
        **state,
        "adam_step": torch.tensor(adam_step(engine)),
        "lr": torch.tensor(engine.get_lr(), dtype=torch.float64),
        "group_lr": torch.tensor([group["lr"] for group in engine.optimizer.param_groups], dtype=torch.float64),
        "scheduler_step": torch.tensor(engine.lr_scheduler.last_epoch),
    }


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def resume(
    folder: Path, config: RunConfig, new_engine: NewEngine, ds_config: str
) -> tuple[DeepSpeedEngine, TrainState]:
    """What the program does with its newest checkpoint."""
    newest, skipped = checkpoint.newest(folder)
    assert newest is not None and skipped == []
    module = build(config, seed=1)
    checkpoint.load_weights(module, newest)
    engine = new_engine(ds_config, module)
    return engine, checkpoint.restore(engine, newest)


# -- Exact restart -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ds_config", CONFIGS)
def test_a_restored_engine_is_the_one_that_was_saved(
    config: RunConfig, new_engine: NewEngine, tmp_path: Path, ds_config: str
) -> None:
    engine = new_engine(ds_config)
    train(engine, 0, 3)
    saved = TrainState(step=3, epoch=1, batch=2, best_score=0.5, best_epoch=0, epochs_without_better=0)
    checkpoint.save(tmp_path, engine, saved)
    before = state_of(engine)
    assert before["adam_step"] == before["scheduler_step"] == 3
    assert before["lr"][0] == pytest.approx(config.lr * 3 / 6)
    assert before["exp_avg/bert.pooler.dense.weight"].any() and before["exp_avg_sq/classifier.bias"].any()

    other, state = resume(tmp_path, config, new_engine, ds_config)
    assert state == saved
    assert largest_difference(state_of(other), before) == 0
    assert other.global_steps == engine.global_steps == 3
    assert other.global_samples == engine.global_samples == 3 * config.global_batch_size

    assert train(other, 3, 2) == train(engine, 3, 2)
    assert largest_difference(state_of(other), state_of(engine)) == 0
    assert state_of(other)["adam_step"] == 5


@pytest.mark.parametrize(("saved_at", "read_at"), [(s, r) for s in STAGES for r in STAGES if s != r])
def test_every_stage_reads_what_every_other_wrote(
    config: RunConfig, new_engine: NewEngine, tmp_path: Path, saved_at: int, read_at: int
) -> None:
    engine = new_engine(f"zero{saved_at}_fp32")
    train(engine, 0, 2)
    checkpoint.save(tmp_path, engine, TrainState(step=2))
    other, _ = resume(tmp_path, config, new_engine, f"zero{read_at}_fp32")
    assert largest_difference(state_of(other), state_of(engine)) == 0
    assert train(other, 2, 2) == pytest.approx(train(engine, 2, 2), abs=1e-6)
    # Adam makes a full step in the sign of a gradient that should be 0, so rounding can show in single weights.
    ours, theirs = state_of(other), state_of(engine)
    assert largest_difference(ours, theirs) < 1e-5


@pytest.mark.parametrize(("saved_at", "read_at"), [("zero1_bf16", "zero3_bf16"), ("zero0_bf16", "zero2_bf16")])
def test_every_stage_reads_what_every_other_wrote_in_bf16(
    config: RunConfig, new_engine: NewEngine, tmp_path: Path, saved_at: str, read_at: str
) -> None:
    """Exactly too, since fp32 masters are what is written."""
    engine = new_engine(saved_at)
    train(engine, 0, 2)
    checkpoint.save(tmp_path, engine, TrainState(step=2))
    other, _ = resume(tmp_path, config, new_engine, read_at)
    assert largest_difference(state_of(other), state_of(engine)) == 0
    weights = load_file(tmp_path / "step-00000002" / "weights.safetensors")
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in weights.values()), "masters, not copies"


def test_a_fresh_engine_has_fp32_weights_and_counts_no_step(config: RunConfig, new_engine: NewEngine) -> None:
    """DeepSpeed's stage 0 in bf16 steps once with zero gradients at construction."""
    for ds_config in CONFIGS:
        module = build(config)
        first = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        state = state_of(new_engine(ds_config, module))
        for name, tensor in first.items():
            # DeepSpeed casts the module before it makes the masters; they are set again from the fp32 weights.
            assert torch.equal(state[f"None/{name}"], tensor), (ds_config, name)
        assert state["adam_step"] == 0, ds_config
        assert not any(tensor.any() for name, tensor in state.items() if name.startswith("exp_avg")), ds_config


def test_all_stages_train_alike(new_engine: NewEngine) -> None:
    """The first steps from the same weights; bf16 roughly."""
    losses = {ds_config: train(new_engine(ds_config), 0, 3) for ds_config in CONFIGS}
    for ds_config in CONFIGS:
        tolerance = 1e-5 if ds_config.endswith("fp32") else 0.05
        assert losses[ds_config] == pytest.approx(losses["zero0_fp32"], abs=tolerance), ds_config


def test_the_best_epoch_s_weights(config: RunConfig, new_engine: NewEngine, tmp_path: Path) -> None:
    engine = new_engine("zero2_fp32")
    train(engine, 0, 1)
    checkpoint.save_best(tmp_path, engine, TrainState(step=1, epoch=1, best_score=0.4, best_epoch=1))
    train(engine, 1, 1)
    expected = checkpoint.gather(engine, None)
    better = TrainState(step=2, epoch=2, best_score=0.6, best_epoch=2)
    checkpoint.save_best(tmp_path, engine, better)
    module = build(config, seed=1)
    checkpoint.load_weights(module, checkpoint.best_folder(tmp_path, 2))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in module.state_dict().items() if name in expected)
    assert names(tmp_path) == ["best-0001", "best-0002"], "an older checkpoint may still name the older one"
    assert checkpoint.newest(tmp_path) == (None, []), "the best weights have no Adam state to continue from"
    checkpoint.save(tmp_path, engine, better)
    assert names(tmp_path) == ["best-0002", "latest", "step-00000002"]
    (tmp_path / "best-0002" / "weights.safetensors").unlink()
    newest, (reason,) = checkpoint.newest(tmp_path)
    assert newest is None and "step-00000002 is skipped" in reason, "a checkpoint without its best weights is damaged"


# -- Files -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_saved(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory, single_rank: None) -> Path:
    """A stage's folder after saving at steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("saved") / "teacher"
    words = "--task rte --num_hidden_layers 2 --dropout 0 --global_batch_size 8 --micro_batch_size 4 --run_dir x"
    config = parse([*words.split(), "--teacher", str(tiny_encoder)])
    settings = load_ds_config("zero1_fp32", "student_ds_config")
    engine = engines.training_engine(build(config), config, settings, NUM_STEPS, "teacher")
    for step in (1, 2, 3):
        train(engine, step - 1, 1)
        checkpoint.save(folder, engine, TrainState(step=step))
    engine.destroy()
    return folder


@pytest.fixture
def folder(three_saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(three_saved, tmp_path / "teacher"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept(folder: Path) -> None:
    assert names(folder) == ["latest", "step-00000002", "step-00000003"]
    assert NUM_KEPT == 2
    assert (folder / "latest").read_text() == "step-00000003"
    assert checkpoint.newest(folder) == (folder / "step-00000003", [])


def test_nothing_is_saved_yet(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "teacher") == (None, [])
    assert checkpoint.finished(tmp_path / "teacher") is None


def test_files_are_safetensors_and_json(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in (folder / "step-00000003").iterdir()} == {*FILES, "SHA256SUMS", "DONE"}
    for file in files:
        content = file.read_bytes()
        assert not content.startswith(b"\x80") and not zipfile.is_zipfile(file), "a pickle, or torch.save's archive"
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                assert {opened.get_tensor(name).dtype for name in opened.keys()} == {torch.float32}  # noqa: SIM118
        else:
            content.decode("ascii")
    state = json.loads((folder / "step-00000003" / "state.json").read_text())
    assert state["position"]["step"] == state["position"]["adam_step"] == 3


def test_names_are_the_model_s(folder: Path, config: RunConfig) -> None:
    expected = {name: parameter.shape for name, parameter in build(config).named_parameters()}
    for kind in ("weights", *MOMENTS):
        stored = load_file(folder / "step-00000003" / f"{kind}.safetensors")
        assert {name: tensor.shape for name, tensor in stored.items()} == expected


@pytest.mark.parametrize("damage", FILE_DAMAGES)
def test_damage_to_any_file_is_found_and_named(folder: Path, damage: Callable[[Path], None]) -> None:
    for number, file in enumerate(damageable(folder / "step-00000003")):
        copy = Path(shutil.copytree(folder / "step-00000003", folder / f"step-{number + 10:08d}"))
        damage(copy / file.name)
        found, reasons = checkpoint.newest(folder)
        assert reasons[0].startswith(f"checkpoint {copy.name} is skipped: ") and file.name in reasons[0]
        assert found == folder / "step-00000003", reasons
        shutil.rmtree(copy)
    assert number == 5, "four files, SHA256SUMS and DONE"


def empty_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "DONE is missing": lambda path: (path / "DONE").unlink(),
    "SHA256SUMS is missing": lambda path: (path / "SHA256SUMS").unlink(),
    "state is missing": lambda path: (path / "state.json").unlink(),
    "all is missing": empty_folder,
    "a byte": lambda path: flip(path / "weights.safetensors"),
    "emptied": lambda path: os.truncate(path / "weights.safetensors", 0),
    "state changed": lambda path: (path / "state.json").write_text('{"position": {}, "sha256": {}}'),
    "state is no text": lambda path: (path / "state.json").write_bytes(b"\xff\xfe"),
    "DONE of another": lambda path: (path / "DONE").write_text("0" * 64),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(folder: Path, damage: str) -> None:
    DAMAGES[damage](folder / "step-00000003")
    found, skipped = checkpoint.newest(folder)
    assert found == folder / "step-00000002"
    assert len(skipped) == 1 and skipped[0].startswith("checkpoint step-00000003 is skipped: ")
    DAMAGES[damage](folder / "step-00000002")
    found, skipped = checkpoint.newest(folder)
    assert found is None and len(skipped) == 2


def test_what_a_kill_leaves_behind_is_no_checkpoint(folder: Path) -> None:
    (folder / "step-00000003").rename(folder / ".step-00000004.new-00ff00ff")
    (folder / "step-00000002").rename(folder / ".step-00000009.old-00ff00ff")
    assert checkpoint.newest(folder) == (None, [])


def test_the_next_save_removes_what_a_kill_leaves_behind(
    folder: Path, config: RunConfig, new_engine: NewEngine
) -> None:
    of_this_version = (".step-00000004.new-00ff00ff", ".best-0001.new-00ff00ff", ".step-00000003.old-00ff00ff")
    for name in (*of_this_version, "step-00000009.tmp", "best-0001.tmp"):
        (folder / name).mkdir()
    checkpoint.save(folder, new_engine("zero1_fp32", build(config)), TrainState(step=4))
    assert names(folder) == ["latest", "step-00000003", "step-00000004"] and not list(folder.glob(".*"))


def test_a_damaged_newer_one_does_not_push_out_good_ones(
    folder: Path, config: RunConfig, new_engine: NewEngine
) -> None:
    """Step 9 was skipped; saving more often than before must not count it among those to keep."""
    (folder / "step-00000009").mkdir()
    engine, _ = resume_skipping(folder, config, new_engine, "checkpoint step-00000009 is skipped")
    train(engine, 3, 1)
    checkpoint.save(folder, engine, TrainState(step=4))
    assert names(folder) == ["latest", "step-00000003", "step-00000004"]


@pytest.mark.parametrize("damage", ["a byte", "state is missing"])
def test_a_damaged_older_one_does_not_push_out_good_ones(
    folder: Path, config: RunConfig, new_engine: NewEngine, damage: str
) -> None:
    """Step 3 was skipped, and the next to be saved is step 4: step 2 is still the only good one before it."""
    DAMAGES[damage](folder / "step-00000003")
    engine, _ = resume_skipping(folder, config, new_engine, "checkpoint step-00000003 is skipped")
    train(engine, 2, 2)
    checkpoint.save(folder, engine, TrainState(step=4))
    assert names(folder) == ["latest", "step-00000002", "step-00000004"]


def resume_skipping(
    folder: Path, config: RunConfig, new_engine: NewEngine, warning: str
) -> tuple[DeepSpeedEngine, TrainState]:
    newest, skipped = checkpoint.newest(folder)
    assert newest is not None and skipped[0].startswith(warning)
    module = build(config)
    checkpoint.load_weights(module, newest)
    engine = new_engine("zero1_fp32", module)
    return engine, checkpoint.restore(engine, newest)


def test_a_damaged_one_is_replaced_when_its_step_comes_again(
    folder: Path, config: RunConfig, new_engine: NewEngine
) -> None:
    flip(folder / "step-00000003" / "weights.safetensors")
    engine, state = resume_skipping(folder, config, new_engine, "checkpoint step-00000003 is skipped")
    assert state.step == 2
    train(engine, 2, 1)
    checkpoint.save(folder, engine, TrainState(step=3))
    assert checkpoint.newest(folder) == (folder / "step-00000003", [])
    assert names(folder) == ["latest", "step-00000002", "step-00000003"]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("ds_config", ["zero0_fp32", "zero3_bf16"])
def test_weights_that_are_not_finite_are_not_saved(
    folder: Path, config: RunConfig, new_engine: NewEngine, value: float, ds_config: str
) -> None:
    """A finite loss can have a gradient that is not; a run that continues from its step never recovers."""
    module = build(config)
    with torch.no_grad():
        module.bert.pooler.dense.weight[3, 4] = value  # type: ignore[union-attr, operator]
    engine = new_engine(ds_config, module)
    before = names(folder)
    for write in (checkpoint.save, checkpoint.save_best):
        with pytest.raises(UserError) as caught:
            write(folder, engine, TrainState(step=4))
        message = str(caught.value)
        assert "teacher step 4: weight bert.pooler.dense.weight is NaN or infinite, so it is not saved" in message
        assert f"the last good checkpoint is kept in {folder}: in another --run_dir, lower --lr" in message
    assert names(folder) == before


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("I/O error")])
@pytest.mark.parametrize("at_file", [1, 3])
def test_a_failing_write_leaves_the_earlier_ones(
    folder: Path, new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch, error: Exception, at_file: int
) -> None:
    engine = new_engine("zero1_fp32")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    save_file, numbers = checkpoint.save_file, itertools.count(1)

    def failing(tensors: dict[str, torch.Tensor], file: Path) -> None:
        number = next(numbers)  # files are written in threads, and this is one step for all of them
        save_file(tensors, file)
        if number == at_file:
            os.truncate(file, 100)
            raise error

    monkeypatch.setattr(checkpoint, "save_file", failing)
    for write in (checkpoint.save, checkpoint.save_best):
        if write is checkpoint.save_best and at_file > 1:
            continue
        numbers = itertools.count(1)
        with pytest.raises(UserError) as caught:
            write(folder, engine, TrainState(step=4))
        assert f"{folder}/" in str(caught.value) and "cannot be written (" in str(caught.value)
        assert "what was saved before is untouched: free some space or fix the folder" in str(caught.value)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    checkpoint.save(folder, engine, TrainState(step=4))
    assert checkpoint.newest(folder) == (folder / "step-00000004", [])


def test_a_marker_that_cannot_be_written(tmp_path: Path, single_rank: None) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(.*free some space or fix the folder"):
        checkpoint.finish(tmp_path / "file", TrainState(), "accuracy", "dev")


def test_a_stage_that_is_over(tmp_path: Path, single_rank: None) -> None:
    state = TrainState(step=7, epoch=3, best_epoch=2, best_score=0.5)
    checkpoint.finish(tmp_path / "teacher", state, "accuracy", "holdout")
    summary = {"steps": 7, "epochs": 3, "best_epoch": 2, "selected_on": "holdout", "accuracy": 0.5}
    assert checkpoint.finished(tmp_path / "teacher") == summary


# -- Weights that do not fit -------------------------------------------------------------------------------------------


def test_another_shape_is_refused_by_name(folder: Path, config: RunConfig) -> None:
    module = build(config)
    module.bert.pooler.dense = nn.Linear(32, 16)  # type: ignore[union-attr]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(UserError) as caught:
        checkpoint.load_weights(module, folder / "step-00000003")
    message = str(caught.value)
    assert "does not fit the model: bert.pooler.dense.bias is [32] there and [16] here; take another" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items()), "half-loaded"


def test_another_number_of_layers_is_refused_by_name(folder: Path, config: RunConfig) -> None:
    module = build(config)
    module.bert.encoder.layer.append(module.bert.encoder.layer[0])  # type: ignore[union-attr, operator, index]
    module.bert.encoder.layer[2] = type(module.bert.encoder.layer[0])(module.config)  # type: ignore
    with pytest.raises(UserError, match=r"bert\.encoder\.layer\.2\.\S+ is absent there and \[.*\] here"):
        checkpoint.load_weights(module, folder / "step-00000003")
    del module.bert.encoder.layer[1:]  # type: ignore[union-attr, operator]
    with pytest.raises(UserError, match=r"bert\.encoder\.layer\.1\.\S+ is \[.*\] there and absent here"):
        checkpoint.load_weights(module, folder / "step-00000003")


def test_other_tokens_are_refused(folder: Path, config: RunConfig) -> None:
    """As many rows of the embedding table, but of other tokens."""
    state = checkpoint.state_of(folder / "step-00000003")
    module = build(config)
    checkpoint.load_weights(module, folder / "step-00000003", state.tokens)
    with pytest.raises(UserError, match=r"step-00000003 was written when the rows had other tokens: .* take another"):
        checkpoint.load_weights(module, folder / "step-00000003", "0123456789abcdef")
