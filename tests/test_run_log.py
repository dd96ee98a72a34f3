"""What a run tells: no point twice after a restart, the term that went wrong by name, and TensorBoard's pages."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter

from peakd_ds.engine.checkpoint import TrainState
from peakd_ds.errors import UserError
from peakd_ds.kernels import DistillationLoss
from peakd_ds.ranks import dist
from peakd_ds.results import figures
from peakd_ds.results.forecast import Forecast, StageWork, duration
from peakd_ds.results.log import RunLog, read_metrics
from peakd_ds.results.meter import TERMS, StepMeter, TeacherClock

METRICS = dict.fromkeys((*TERMS, "samples_per_s", "tokens_per_s", "padding_share"), 1.0)
pytestmark = pytest.mark.usefixtures("single_rank")


@pytest.fixture(autouse=True)
def _ordered_event_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Event files of one second are read in the order of their numbers as text, where 10 comes before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


class Engine:
    """What the log reads of an engine."""

    global_samples = 96

    def __init__(self, grad_norm: float | None, has_monitor: bool = False) -> None:
        self.grad_norm, self.monitor, self.enabled, self.events = grad_norm, self, has_monitor, []

    def get_global_grad_norm(self) -> float | None:
        return self.grad_norm

    def write_events(self, events: list[Any]) -> None:
        self.events.extend(events)


def write_steps(log: RunLog, steps: range, loss: float = 1.0) -> None:
    for step in steps:
        metrics, extras = {**METRICS, "loss": loss + step}, {"memory_mib": 5.0, "hidden_distance/pair_1": 0.5}
        log.step(step, 10, 0, (metrics, extras), 1.0, Engine(None if step == 1 else 2.0))


@dataclass
class Logged:
    """What the log reads of a stage."""

    name: str
    weights: dict[str, float] = field(default_factory=lambda: {"hard_loss": 1.0})
    teacher_scores: dict[str, float] = field(default_factory=dict)


DISTILL = Logged("distill", {"hard_loss": 0.25, "soft_loss": 0.75, "hidden_loss": 100.0}, {"accuracy": 0.875})


def start(folder: Path, step: int = 0, stage: str | Logged = "teacher") -> RunLog:
    log = RunLog(folder)
    log.start_stage(Logged(stage) if isinstance(stage, str) else stage, 2, 10, step, "task: rte\nlr: 2.0e-05\n")
    return log


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder: Path, tag: str, stage: str = "teacher") -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder / "tb" / stage))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def tags(folder: Path, stage: str) -> dict[str, Any]:
    accumulator = EventAccumulator(str(folder / "tb" / stage))
    return accumulator.Reload().Tags()


# -- After a restart ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_killed", [False, True])
@pytest.mark.parametrize("resumed_at", [0, 3, 6])
def test_a_resumed_stage_drops_later_points(tmp_path: Path, resumed_at: int, is_killed: bool) -> None:
    log = start(tmp_path)
    write_steps(log, range(1, 7))
    log.evaluation(3, 1, "holdout", {"accuracy": 0.25})
    log.evaluation(6, 2, "holdout", {"accuracy": 0.5})
    if is_killed:
        assert log.charts is not None
        log.charts.writer.flush()  # what a killed process has on disk; nothing is closed
    else:
        log.end_stage("accuracy", TrainState(best_score=0.5), "dev")
    log = start(tmp_path, step=resumed_at)
    write_steps(log, range(resumed_at + 1, 10), loss=100.0)
    log.evaluation(9, 3, "holdout", {"accuracy": 0.75})
    log.end_stage("accuracy", TrainState(best_score=0.5), "dev")

    expected = [(step, (1.0 if step <= resumed_at else 100.0) + step) for step in range(1, 10)]
    assert scalars(tmp_path, "teacher/loss") == expected
    steps = [record for record in records(tmp_path) if "loss" in record]
    assert [(record["step"], record["loss"]) for record in steps] == expected
    evaluations = [(record["step"], record["eval_accuracy"]) for record in records(tmp_path) if "split" in record]
    assert evaluations == [*(point for point in [(3, 0.25), (6, 0.5)] if point[0] <= resumed_at), (9, 0.75)]
    assert scalars(tmp_path, "teacher/eval/accuracy") == evaluations
    assert [step for step, _ in scalars(tmp_path, "teacher/optimizer/grad_norm")] == list(range(2, 10)), (
        "no point for None"
    )


def test_a_cut_off_last_line_is_dropped(tmp_path: Path) -> None:
    log = start(tmp_path)
    write_steps(log, range(1, 4))
    log.end_stage("accuracy", TrainState(best_score=0.5), "dev")
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text()[:-20])
    log = start(tmp_path, step=3)
    write_steps(log, range(4, 6))
    log.end_stage("accuracy", TrainState(best_score=0.5), "dev")
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 4, 5]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["metrics.jsonl"]


def test_other_stages_keep_their_points(tmp_path: Path) -> None:
    for stage in ("teacher", "ptp"):
        log = start(tmp_path, stage=stage)
        write_steps(log, range(1, 5))
        log.end_stage("accuracy", TrainState(best_score=0.5), "dev")
    log = start(tmp_path, step=2, stage="ptp")
    log.end_stage("accuracy", TrainState(best_score=0.5), "dev")
    assert [(record["stage"], record["step"]) for record in records(tmp_path)] == [
        *(("teacher", step) for step in range(1, 5)),
        *(("ptp", step) for step in range(1, 3)),
    ]
    assert len(scalars(tmp_path, "teacher/loss", "teacher")) == 4


def test_settings_stand_once(tmp_path: Path) -> None:
    for step in (0, 4, 4):
        log = start(tmp_path, step=step)
        write_steps(log, range(step + 1, step + 3))
        log.end_stage("accuracy", TrainState(best_score=0.5), "dev")
    accumulator = EventAccumulator(str(tmp_path / "tb" / "teacher")).Reload()
    (event,) = accumulator.Tensors("settings/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert text == "    task: rte\n    lr: 2.0e-05\n"


# -- What is written ---------------------------------------------------------------------------------------------------


def test_records_hold_the_promised_names(tmp_path: Path) -> None:
    log = start(tmp_path)
    write_steps(log, range(1, 2))
    log.evaluation(1, 0, "dev", {"accuracy": 0.5, "f1": 0.25})
    log.end_stage("accuracy", TrainState(best_score=0.5), "dev")
    step, evaluation = records(tmp_path)
    promised = (
        "stage step epoch loss hard_loss soft_loss hidden_loss lr grad_norm samples_per_s tokens_per_s padding_share"
    )
    assert set(step) == set(promised.split())
    assert set(evaluation) >= {"stage", "step", "eval_accuracy", "eval_f1"}
    found = tags(tmp_path, "teacher")
    wanted = "pairs/hidden_distance/pair_1 eval/accuracy eval/f1 loss optimizer/lr"
    wanted += " speed/memory_mib speed/padding_share speed/samples_per_s speed/tokens_per_s"
    assert {f"teacher/{name}" for name in wanted.split()} == set(found["scalars"])
    assert not [path for path in (tmp_path / "tb" / "teacher").iterdir() if path.is_dir()], "one term is no chart"


def test_a_chart_has_the_terms_as_weighted_and_the_teacher_beside_the_student(tmp_path: Path) -> None:
    """TensorBoard draws one tag of several folders in one chart."""
    log = start(tmp_path, stage=DISTILL)
    write_steps(log, range(1, 3))
    log.evaluation(2, 1, "dev", {"accuracy": 0.5, "agreement": 0.75})
    log.end_stage("accuracy", TrainState(best_score=0.5), "dev")
    lines = {name: scalars(tmp_path, "distill/loss", f"distill/{name}") for name in ("hard", "soft", "hidden")}
    assert lines == {"hard": [(1, 0.25), (2, 0.25)], "soft": [(1, 0.75), (2, 0.75)], "hidden": [(1, 100), (2, 100)]}
    assert scalars(tmp_path, "distill/loss", "distill") == [(1, 2.0), (2, 3.0)]
    assert scalars(tmp_path, "distill/eval/accuracy", "distill") == [(2, 0.5)]
    assert scalars(tmp_path, "distill/eval/accuracy", "distill/teacher") == [(0, 0.875), (2, 0.875)]
    assert tags(tmp_path, "distill/teacher")["scalars"] == ["distill/eval/accuracy"], "none for the agreement"
    shown = sorted(tags(tmp_path, "distill")["scalars"])
    assert shown[:3] == ["distill/eval/accuracy", "distill/eval/agreement", "distill/loss"], (
        "what one wants comes first"
    )
    assert not any(name.removesuffix("_loss") != name for name in shown)
    (evaluation,) = [record for record in records(tmp_path) if "split" in record]
    assert evaluation["teacher_accuracy"] == 0.875


def test_the_charts_of_an_earlier_version_stay(tmp_path: Path) -> None:
    """Its tags were other ones, all in the stage's folder; new ones begin where the stage goes on."""
    with SummaryWriter(str(tmp_path / "tb" / "distill")) as writer:
        for step in range(1, 7):
            writer.add_scalar("train/loss", step, step)
    log = start(tmp_path, step=4, stage=DISTILL)
    write_steps(log, range(5, 7))
    log.end_stage("accuracy", TrainState(best_score=0.5), "dev")
    assert [step for step, _ in scalars(tmp_path, "train/loss", "distill")] == [1, 2, 3, 4]
    assert [step for step, _ in scalars(tmp_path, "distill/loss", "distill")] == [5, 6]


def test_the_results_stand_once(tmp_path: Path) -> None:
    """Also where a run that is over is started again, and where an earlier version has written them."""
    with SummaryWriter(str(tmp_path / "tb" / "final")) as writer:
        writer.add_scalar("dev/accuracy", 0.25)
    for accuracy in (0.5, 0.75):
        settings = {"lr": 2e-5, "ptp": True, "task": "rte", "init_layers": None, "layer_map": ((1, 2),)}
        metrics = {"distill/results/accuracy": accuracy, "teacher/results/accuracy": 0.875}
        matrix = figures.confusion_matrix(["no", "yes"], torch.tensor([0, 1]), torch.tensor([0, 0]))
        RunLog(tmp_path).final(settings, metrics, "| a | b |", {"distill/confusion_matrix": matrix})
    files = list((tmp_path / "tb").rglob("events.*"))
    assert {file.parent for file in files} == {tmp_path / "tb" / "results"}, 'no run named "."'
    assert scalars(tmp_path, "distill/results/accuracy", "results") == [(0, 0.75)]
    found = EventAccumulator(str(tmp_path / "tb" / "results")).Reload()
    assert found.Tags()["images"] == ["distill/confusion_matrix"]
    (text,) = found.Tensors("results/text_summary")
    assert text.tensor_proto.string_val[0] == b"| a | b |"
    assert "_hparams_/experiment" not in found.Tags()["tensors"], "TensorBoard lists the columns, of all runs"
    metadata = found.SummaryMetadata("_hparams_/session_start_info")
    data = plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content)
    shown = {name: value.WhichOneof("kind") for name, value in data.session_start_info.hparams.items()}
    assert shown.keys() == {"lr", "ptp", "task", "init_layers", "layer_map"}
    assert (shown["lr"], shown["task"]) == ("number_value", "string_value")


def test_figures(tmp_path: Path) -> None:
    log = start(tmp_path, stage="ptp")
    names = ["confidently_correct", "unconfidently_correct"]
    log.figure(
        "ptp/confusion_matrix", figures.confusion_matrix(names, torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))
    )
    log.figure("ptp/labels", figures.label_histogram(names, [3, 4]))
    log.end_stage("accuracy", TrainState(best_score=0.5), "dev")
    assert set(tags(tmp_path, "ptp")["images"]) == {"ptp/confusion_matrix", "ptp/labels"}
    log.figure("after/the/end", None)  # nothing is open: nothing happens


def test_loss_curves_are_drawn_from_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in (Logged("teacher"), DISTILL):
        log = start(tmp_path, stage=stage)
        write_steps(log, range(1, 4), loss=0.001 if stage.name == "teacher" else 1000.0)
        log.evaluation(3, 1, "dev", {"accuracy": 0.5})
        log.end_stage("accuracy", TrainState(best_score=0.5), "dev")
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\n1\n[]\n{"stage": "teacher"}\n{"step": 1}\n{"stage": 1, "step": 2, "split": "dev"}\n{"st')
    read = read_metrics(tmp_path / "metrics.jsonl")
    assert len(read) == 8, "damaged lines are left out"
    drawn: dict[str, Any] = {}

    def keep(self: Figure, target: Path, **options: Any) -> None:
        drawn["axes"] = self.axes

    curves = [(stage.name, stage.weights, "accuracy") for stage in (Logged("teacher"), Logged("ptp"), DISTILL)]
    figures.loss_curves(read, curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(Figure, "savefig", keep)
    figures.loss_curves(read, curves, tmp_path / "curves.png")
    labels = [[line.get_label() for line in axes.get_lines()] for axes in drawn["axes"]]
    assert labels == [
        ["loss"],
        ["loss", "0.25 x hard", "0.75 x soft", "100 x hidden"],
        ["teacher"],
        ["student", "teacher 0.875"],
    ]
    weighted = {line.get_label(): list(line.get_ydata()) for line in drawn["axes"][1].get_lines()}
    assert weighted["100 x hidden"] == [100.0] * 3
    assert list(drawn["axes"][3].get_lines()[0].get_xdata()) == [3]
    figures.loss_curves([], curves, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_numbers_in_a_confusion_matrix_can_be_read() -> None:
    names = ["a rather long name of a class", "b"] + [f"class_{number}" for number in range(8)]
    labels = torch.arange(10)
    (axes,) = figures.confusion_matrix(names, labels, labels.clamp(max=8)).axes
    colors = {text.get_text(): text.get_color() for text in axes.texts}
    assert colors == {"0": "black", "1": "white"}, "white on dark cells"
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {45.0}
    assert axes.get_yticklabels()[0].get_text() == "a rather long\nname of a class"


def test_only_rank_0_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dist, "rank", lambda: 1)
    log = start(tmp_path)
    write_steps(log, range(1, 3))
    log.evaluation(2, 0, "dev", {"accuracy": 0.5})
    log.figure("a/figure", figures.label_histogram(["a"], [1]))
    log.title("teacher")
    log.final({}, {}, "", {})
    log.advance()
    log.say("hello")
    log.end_stage("accuracy", TrainState(best_score=0.5), "dev")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_a_log_that_cannot_be_written_stops_the_run_later(tmp_path: Path) -> None:
    """Rank 0 alone notices, while the others wait for it in a collective."""
    log = start(tmp_path)
    log.stop_if_failed()
    (tmp_path / "metrics.jsonl").mkdir()
    write_steps(log, range(1, 2))
    with pytest.raises(
        UserError, match=r"the log in .* cannot be written \(.*\); free some space, then start the same"
    ):
        log.stop_if_failed()
    log.end_stage("accuracy", TrainState(best_score=0.5), "dev")


def test_a_full_disk_that_tensorboard_meets_stops_the_run_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread meets it, and the next point raises: on rank 0 alone, while the others go on to a collective."""
    log = start(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    assert log.charts is not None
    monkeypatch.setattr(log.charts.writer, "add_scalar", full)
    log.evaluation(1, 0, "dev", {"accuracy": 0.5})
    with pytest.raises(UserError, match="No space left on device"):
        log.stop_if_failed()
    log.end_stage("accuracy", TrainState(best_score=0.5), "dev")


def test_plain_lines_have_the_terms_of_their_stage_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal. The terms are as weighted, so that they add up; nothing is said of the time left at first."""
    for stage in (Logged("teacher"), DISTILL):
        log = start(tmp_path, stage=stage)
        log.title(stage.name)
        write_steps(log, range(1, 2))
        log.advance()
        log.end_stage("accuracy", TrainState(best_score=0.5), "dev")
    lines = capsys.readouterr().err.splitlines()
    assert "teacher step 1/10  loss 2.0000  lr 1.00e+00  1.0 samples/s" in lines
    terms = "0.2500 hard + 0.7500 soft + 100.0000 hidden"
    assert f"distill step 1/10  loss 2.0000 = {terms}  lr 1.00e+00  1.0 samples/s" in lines
    assert "stage distill: 2 epochs, 10 steps; loss = 0.25 hard + 0.75 soft + 100 hidden" in lines
    assert "== distill: the student is distilled ==" in lines


def test_lines_say_how_long_the_run_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    works = [StageWork("teacher", 10, 2, step=3.0, epoch_end=1.0), StageWork("distill", 10, 1, 1.0, 10.0, before=6.0)]
    log = RunLog(tmp_path)
    log.forecast = Forecast(works, report=2.0)
    log.title("distill")
    log.start_stage(Logged("teacher"), 2, 10, 2, "")
    now[0] += 1000.0  # of compiling
    for step in (3, 4):
        log.advance()
        write_steps(log, range(step, step + 1))
        now[0] += 6.0
    log.end_stage("accuracy", TrainState(best_score=0.5), "dev")
    before, first, second = [line for line in capsys.readouterr().err.splitlines() if "==" in line or "samples" in line]
    assert before.startswith("== distill (2 of 2): ")
    assert "left" not in first and second.endswith("samples/s  about 2 min left"), "6 * 3 + 2 + 6 + 20 + 2 units of 2 s"


def test_forecast_goes_on_with_the_speed_of_the_stage_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    works = [StageWork("teacher", 4, 2, step=3.0, epoch_end=1.0), StageWork("distill", 10, 1, 1.0, 10.0, before=6.0)]
    forecast = Forecast(works, report=2.0)
    assert Forecast([], 1.0).in_words() == forecast.in_words() == ""
    forecast.start_stage("teacher", 0)
    for seconds in (100.0, 6.0, 8.0, 6.0):  # the third with the first epoch's evaluation
        now[0] += seconds
        forecast.end_step()
    assert forecast.seconds_left() == pytest.approx(2 * (1 + 6 + 20 + 2)), "the last evaluation is to come"
    forecast.start_stage("distill", 5)
    assert forecast.seconds_left() == pytest.approx(2 * (15 + 2))
    forecast.end_step()
    now[0] += 0.5
    forecast.end_step()
    assert forecast.seconds_left() == pytest.approx(0.5 * (13 + 2))


def test_durations_in_words() -> None:
    seconds = (0, 89.4, 90, 3599, 3600, 12345, 90000, 200000)
    words = ["0 s", "89 s", "2 min", "1 h 0 min", "1 h 0 min", "3 h 26 min", "1 d 1 h", "2 d 7 h"]
    assert [duration(number) for number in seconds] == words


def test_leaving_the_log_closes_what_is_open(tmp_path: Path) -> None:
    with pytest.raises(KeyError), start(tmp_path) as log:
        write_steps(log, range(1, 3))
        raise KeyError
    assert log.bar is log.charts is None
    assert [step for step, _ in scalars(tmp_path, "teacher/loss")] == [1, 2]


# -- The meter ---------------------------------------------------------------------------------------------------------


def loss_of(**terms: float) -> DistillationLoss:
    return DistillationLoss(*(torch.tensor(terms.get(name, 1.0)) for name in ("total", "hard", "soft", "hidden")))


def meter_after(*steps: DistillationLoss) -> StepMeter:
    meter = StepMeter("distill")
    for number, loss in enumerate(steps, start=1):
        meter.start_step()
        meter.add(loss, None, 10)
        meter.end_step(number, 4, 30)
    return meter


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("terms", "named"),
    [
        (["total", "hard"], "hard_loss is"),
        (["total", "soft"], "soft_loss is"),
        (["total", "hidden"], "hidden_loss is"),
        (["total", "hard", "hidden"], "hard_loss, hidden_loss is"),
        (["total"], "step 2: loss is"),
    ],
)
def test_a_loss_that_is_not_finite_is_named_with_its_step(
    tmp_path: Path, terms: list[str], named: str, bad: float
) -> None:
    meter = meter_after(
        loss_of(), loss_of(**dict.fromkeys(terms, bad)), loss_of(total=bad, soft=bad, hard=bad), loss_of()
    )
    with pytest.raises(UserError) as caught:
        meter.stop_if_not_finite(tmp_path / "checkpoints")
    message = str(caught.value)
    assert message.startswith("distill step 2: ") and f"{named} NaN or infinite" in message
    assert (
        f"the last good checkpoint is kept in {tmp_path / 'checkpoints'}: in another --run_dir, lower --lr" in message
    )


def test_one_bad_micro_batch_is_enough(tmp_path: Path) -> None:
    meter = StepMeter("teacher")
    meter.start_step()
    for loss in (loss_of(), loss_of(total=math.nan, hard=math.nan), loss_of()):
        meter.add(loss, None, 10)
    meter.end_step(7, 4, 30)
    with pytest.raises(UserError, match="teacher step 7: hard_loss is NaN"):
        meter.stop_if_not_finite(tmp_path)


def test_finite_losses_go_on(tmp_path: Path) -> None:
    meter_after(loss_of(), loss_of(total=1e30)).stop_if_not_finite(tmp_path)


def test_every_rank_stops_at_the_first_bad_step_of_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This rank is well; another met an infinite soft loss in step 3."""
    theirs = [torch.tensor(3), torch.tensor([1.0, 0.0, 1.0, 0.0])]
    mine = []

    def reduced(tensor: torch.Tensor, op: Any = None) -> torch.Tensor:
        mine.append(tensor)
        return theirs[len(mine) - 1]

    monkeypatch.setattr(dist, "all_reduce", reduced)
    with pytest.raises(UserError, match="distill step 3: soft_loss is NaN or infinite"):
        meter_after(loss_of(), loss_of()).stop_if_not_finite(tmp_path)
    assert mine[0] > 3 and not mine[1].any()


def test_shares_of_micro_batches_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    meter = StepMeter("distill")
    meter.start_step()
    meter.add(loss_of(total=1.0, hard=2.0, soft=3.0, hidden=4.0), torch.tensor([0.5, 0.25]), 64)
    meter.add(loss_of(total=0.5, hard=0.5, soft=0.5, hidden=0.5), torch.tensor([0.5, 0.5]), 36)
    meter.end_step(1, num_samples=8, num_tokens=75)
    with meter.teacher_clock:
        now[0] += 0.5
    now[0] += 1.5
    metrics, watched = meter.reduce()
    assert [metrics[name] for name in TERMS] == [1.5, 2.5, 3.5, 4.5]
    assert (metrics["samples_per_s"], metrics["tokens_per_s"], metrics["padding_share"]) == (4.0, 37.5, 0.25)
    assert (watched["teacher_time_share"], watched["teacher_hidden_share"]) == (0.25, 0.0)
    assert watched["step_ms"] == 2000.0
    assert (watched["hidden_distance/pair_1"], watched["hidden_distance/pair_2"]) == (1.0, 0.75)
    assert watched["memory_mib"] > 10
    with meter.teacher_clock:  # in an evaluation
        now[0] += 9.0
    meter.restart_clock()
    meter.start_step()
    meter.add(loss_of(), None, 10)
    meter.end_step(2, 4, 5)
    now[0] += 1.0
    metrics, watched = meter.reduce()
    assert (metrics["samples_per_s"], metrics["padding_share"], metrics["loss"]) == (4.0, 0.5, 1.0)
    assert not {"teacher_time_share", "hidden_distance/pair_1"} & watched.keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's clock is its own")
def test_teacher_clock_counts_what_it_is_around(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = TeacherClock()
    for seconds in (1.0, 2.0):
        with clock:
            now[0] += seconds
        now[0] += 10.0
    assert clock.take() == (3.0, 3.0), "asked in turn, its time is waited for"
    assert clock.take() == (0.0, 0.0)


def test_monitors_of_the_deepspeed_config_get_the_same(tmp_path: Path) -> None:
    log, engine = start(tmp_path), Engine(None, has_monitor=True)
    log.step(1, 10, 0, (METRICS, {"memory_mib": 5.0}), 0.5, engine)
    log.end_stage("accuracy", TrainState(best_score=0.5), "dev")
    names = [name for name in (*METRICS, "lr")]
    assert engine.events == [(f"teacher/{name}", 0.5 if name == "lr" else 1.0, 96) for name in names]
