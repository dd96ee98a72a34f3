"""The baselines of the training benchmark: their loss is ours, and each run sees every row."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import baselines
import cases
import pytest
import torch

from peakd_ds.kernels import distillation_loss

NUM_ROWS, HIDDEN, PAIRS = 6, 16, ((1, 2), (2, 3))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """With several threads, models as small as these spend their time waiting for busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def outputs() -> dict[str, Any]:
    """Logits [N, C] and hidden states [N, S, H] of all layers, embeddings first, of student and teacher, in fp64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    return {
        "logits": draw(NUM_ROWS, 2, scale=3).requires_grad_(),
        "hidden": [draw(NUM_ROWS, 5, HIDDEN).requires_grad_() for _ in range(3)],
        "teacher_logits": draw(NUM_ROWS, 2, scale=3),
        "teacher_hidden": [draw(NUM_ROWS, 5, HIDDEN) for _ in range(4)],
        "labels": torch.tensor([0, 1, 1, 0, 1, 0]),
    }


def reference(outputs: dict[str, Any]) -> tuple[float, list[torch.Tensor]]:
    loss = distillation_loss(
        outputs["logits"],
        outputs["teacher_logits"],
        outputs["labels"],
        [outputs["hidden"][i][:, 0] for i, _ in PAIRS],
        [outputs["teacher_hidden"][j][:, 0] for _, j in PAIRS],
        temperature=cases.TEMPERATURE,
        alpha=cases.ALPHA,
        beta=cases.BETA,
        backend="reference",
    )
    assert min(loss.hard, loss.soft, cases.BETA * loss.hidden) > 1e-2  # every term is large enough to matter
    return loss.total.item(), gradients(outputs, loss.total)


def gradients(outputs: dict[str, Any], loss: torch.Tensor) -> list[torch.Tensor]:
    leaves = [outputs["logits"], *(outputs["hidden"][i] for i, _ in PAIRS)]
    return list(torch.autograd.grad(loss, leaves))


def assert_gradients_agree(outputs: dict[str, Any], loss: torch.Tensor) -> None:
    _, expected = reference(outputs)
    for ours, theirs in zip(expected, gradients(outputs, loss), strict=True):
        assert ours.abs().max() > 1e-4
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)  # the baselines compute in fp32


class Model(torch.nn.Module):
    """A model that returns given logits and hidden states."""

    def __init__(self, logits: torch.Tensor, hidden: list[torch.Tensor]):
        super().__init__()
        self.logits, self.hidden = logits, hidden

    def forward(self, output_hidden_states: bool = False, **inputs: torch.Tensor) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        return SequenceClassifierOutput(logits=self.logits, hidden_states=self.hidden if output_hidden_states else None)


def test_loss_of_the_baselines_equals_ours(outputs: dict[str, Any]) -> None:
    loss = baselines.distillation_loss(
        outputs["logits"],
        baselines.cls_of(outputs["hidden"], [i for i, _ in PAIRS]),
        outputs["teacher_logits"],
        baselines.cls_of(outputs["teacher_hidden"], [j for _, j in PAIRS]),
        outputs["labels"],
    )
    assert loss.item() == pytest.approx(reference(outputs)[0], rel=1e-5)
    assert_gradients_agree(outputs, loss)


def test_loss_of_the_trainer_equals_ours(outputs: dict[str, Any]) -> None:
    trainer = object.__new__(baselines.DistillationTrainer)  # its own constructor needs accelerate
    trainer.teacher, trainer.outcome = Model(outputs["teacher_logits"], outputs["teacher_hidden"]), baselines.Outcome()
    trainer.student_layers, trainer.teacher_layers = zip(*PAIRS, strict=True)
    mask = torch.tensor([[1, 1, 1, 0, 0]] * NUM_ROWS)
    inputs = {"input_ids": mask, "attention_mask": mask, "labels": outputs["labels"]}
    loss = trainer.compute_loss(Model(outputs["logits"], outputs["hidden"]).train(), inputs)
    assert loss.item() == pytest.approx(reference(outputs)[0], rel=1e-5)
    assert_gradients_agree(outputs, loss)
    assert (trainer.outcome.steps, trainer.outcome.tokens, trainer.outcome.positions) == (1, 18, 30)


def test_loss_of_textbrewer_has_our_gradient(outputs: dict[str, Any], tmp_path: Path) -> None:
    textbrewer = pytest.importorskip("textbrewer", reason="pip install '.[bench]'")
    student = Model(outputs["logits"], outputs["hidden"])
    distiller = textbrewer.GeneralDistiller(
        textbrewer.TrainingConfig(output_dir=str(tmp_path), device="cpu"),
        baselines.textbrewer_settings(PAIRS, HIDDEN),
        Model(outputs["teacher_logits"], outputs["teacher_hidden"]),
        student,
        baselines.adaptor_of_teacher,
        baselines.adaptor_of_student,
    )
    ids = torch.zeros(NUM_ROWS, 5, dtype=torch.int64)
    batch = {"teacher": {"input_ids": ids}, "student": {"input_ids": ids, "labels": outputs["labels"]}}
    loss, _ = distiller.train_on_batch(batch, {"output_hidden_states": True})
    assert_gradients_agree(outputs, loss)
    # its cross-entropy with the teacher is KL plus the teacher's entropy
    softened = (outputs["teacher_logits"] / cases.TEMPERATURE).softmax(-1)
    entropy = -(softened * softened.log()).sum(-1).mean().item()
    constant = cases.ALPHA * cases.TEMPERATURE**2 * entropy
    assert loss.item() - constant == pytest.approx(reference(outputs)[0], rel=1e-4)


# -- Runs of the baselines ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_job(tiny_data: Path, tiny_teacher, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory):
    def make(**changes: Any) -> cases.Job:
        job = cases.Job(
            task="sst2",
            data_dir=str(tiny_data),
            teacher=str(tiny_teacher("sst2")),
            encoder=str(tiny_encoder),
            num_stored_layers=1,
            pairs=((1, 2),),
            seed=0,
            bf16=False,
            folder=str(tmp_path_factory.mktemp("baseline")),
            epochs=2,
        )
        return replace(job, **changes)

    return make


STEPS_PER_EPOCH = 3  # 90 rows in batches of 32


@pytest.mark.parametrize("system", cases.BASELINES)
def test_baseline_runs_to_its_end(system: str, make_job, monkeypatch: pytest.MonkeyPatch) -> None:
    if system == "hf_trainer":
        pytest.importorskip("accelerate", reason="pip install '.[bench]'")
    if system == "textbrewer":
        pytest.importorskip("textbrewer", reason="pip install '.[bench]'")
    starts = []
    load = baselines.load_models

    def load_and_keep(*arguments: Any) -> Any:
        teacher, student = load(*arguments)
        starts.append((student, {name: tensor.clone() for name, tensor in student.state_dict().items()}))
        return teacher, student

    monkeypatch.setattr(baselines, "load_models", load_and_keep)
    job = make_job()
    outcome = baselines.FUNCTIONS[system](job)
    assert outcome.steps == 2 * STEPS_PER_EPOCH
    assert outcome.extrapolated_from_steps is None and outcome.seconds is None
    assert 0 <= outcome.dev_score <= 1 and (outcome.dev_score * 30) % 1 == pytest.approx(0, abs=1e-6)  # of 30
    padded_to = {"published_recipe": 2 * 90 * 128}
    assert outcome.tokens < outcome.positions == padded_to.get(system, outcome.positions)
    assert outcome.positions <= 2 * 90 * 128
    (student, before) = starts[0]
    moved = [name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])]
    assert {"bert.encoder.layer.0.attention.self.query.weight", "classifier.weight"} <= set(moved)
    assert [file for file in Path(job.folder).rglob("*") if file.suffix in (".pt", ".pkl", ".safetensors")]


def test_every_baseline_sees_every_token(make_job) -> None:
    pytest.importorskip("accelerate", reason="pip install '.[bench]'")
    train, _, _ = baselines.load_data(make_job())
    total = sum(len(ids) for ids in train["input_ids"])
    for system in ("published_recipe", "hf_trainer"):
        assert baselines.FUNCTIONS[system](make_job(epochs=1)).tokens == total


def test_a_recipe_that_stops_early_is_scaled_up(make_job, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(baselines.time, "perf_counter", lambda: now[0])
    take = torch.optim.AdamW.step

    def slow_step(self: Any, *arguments: Any, **options: Any) -> Any:
        now[0] += 10.0  # nothing else takes time
        return take(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", slow_step)
    outcome = baselines.published_recipe(make_job(epochs=4, max_steps=2))
    assert outcome.steps == outcome.extrapolated_from_steps == 2 and outcome.dev_score is None
    assert outcome.seconds == pytest.approx(10.0 * 4 * STEPS_PER_EPOCH)
