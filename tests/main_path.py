"""What a reader opens to follow one distill batch from `train.main` to `engine.step()`.

    python tests/main_path.py      # prints the path, file by file, and the doors

A tiny run is traced from the call of `train.main` to the return of the first `engine.step()` of the distill stage.
Every function of ours that runs is on the path, with all its lines that are not blank, and so is every data class that
the batch travels in. A door is a function that is called on the path and need not be opened to follow the batch: the
script does not go through it, and prints why.
"""

import inspect
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PLACES = {ROOT / "peakd_ds": "", ROOT / "kernels": "kernels/"}

DOORS: dict[str, str] = {
    "run.py:open_run": "opens the run before the first batch, and with it reads the rows, the user's own too",
    "run.py:": "answers a question about settings",
    "plan.py:": "prints what is about to run before the first batch",
    "config/": "answers a question about settings",
    "command_line.py:": "writes settings as YAML",
    "ranks/": "collectives, devices and seeds",
    "cluster/": "owns the run folder",
    "results/log.py:": "prints and logs",
    "results/meter.py:": "adds up losses and times",
    "results/evaluation.py:": "predicts the rows that pick the epoch",
    "stages.py:trainable_module": "builds the student before the first batch",
    "stages.py:_teacher_logits": "predicts the rows that pick the epoch",
    "stages.py:_teacher_score": "scores the teacher before the first batch",
    "data/tasks.py:": "answers a question about the task",
    "data/metrics.py:": "says which end of a score is better",
    "engine/checkpoint.py:": "starts the engine, at a checkpoint if there is one; counts steps",
    "engine/schedule.py:": "says when to log, evaluate and save",
    "engine/engines.py:": "starts an engine; says how DeepSpeed scales gradients",
    "teacher/cache.py:": "says whether a cache is used",
    "teacher/stored.py:": "a teacher whose outputs are files; a batch meets it only with --teacher_outputs",
    "teacher/online.py:OnlineTeacher.is_trained": "says whether there is a teacher",
    "teacher/online.py:OnlineTeacher.engine": "starts the teacher's engine before the first batch",
    "teacher/online.py:OnlineTeacher.runs_ahead": "says whether the GPU has a stream for the teacher",
    "model/vocabulary.py:": "looks embeddings up in a table of the tokens in use",
    "packed/cpu.py:": "attention and dropout for CPUs; on a GPU they are PyTorch's",
    "engine/cpu.py:": "a faster copy of gradients on CPUs",
    "kernels/checks.py:": "checks the arguments of the loss",
}
"""Door, as the start of FILE:FUNCTION -> why it stays closed."""


def measure() -> dict[str, set[int]]:
    """The lines of each file on the path, by its name below peakd_ds (or kernels/)."""
    return trace()[0]


def trace() -> tuple[dict[str, set[int]], dict[str, str]]:
    """(the path, the doors that were met with the reason why they stay closed)."""
    import conftest
    from deepspeed import DeepSpeedEngine

    from peakd_ds import kernels, stages, train
    from peakd_ds.command_line import parse
    from peakd_ds.data import batches, tokens
    from peakd_ds.data.tasks import get_task
    from peakd_ds.model.build import task_head
    from peakd_ds.packed import packing

    carriers = (stages.Stage, batches.GlobalBatch, tokens.MicroBatch, packing.Packing, kernels.DistillationLoss)
    tracer = Tracer(end=DeepSpeedEngine.step)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        teacher = conftest.save_encoder(folder / "teacher", head=task_head(get_task("sst2")))
        for split, num_rows in (("train", 40), ("validation", 10)):
            conftest.write_split(folder / "data", "sst2", split, conftest.made_up_rows("sst2", num_rows, split))
        words = "--task sst2 --no_ptp --num_hidden_layers 2 --epochs 1 --layer_map 1:1 --dtype fp32".split()
        words += ["--loss_backend", "reference"]  # the loss as it is defined; other backends compute the same faster
        words += ["--teacher", str(teacher), "--data_dir", str(folder / "data"), "--run_dir", str(folder / "run")]
        config = parse(words)
        sys.setprofile(tracer)
        try:
            train.main(config)
        except EndOfPath:
            pass
        finally:
            sys.setprofile(None)
    path: dict[str, set[int]] = {}
    for code in tracer.entered:
        add_lines(path, Path(code.co_filename), code)
    for carrier in carriers:
        add_lines(path, Path(inspect.getfile(carrier)), carrier)
    return path, tracer.doors


class EndOfPath(BaseException):
    """The traced step has returned."""


class Tracer:
    """A profile function that collects our functions, and stays outside of doors."""

    def __init__(self, end: Callable[..., Any]) -> None:
        self.end, self.entered, self.doors = end.__code__, set[CodeType](), dict[str, str]()
        self.closed_at: FrameType | None = None

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "return" and frame is self.closed_at:
            self.closed_at = None
        elif event == "return" and frame.f_code is self.end and self.closed_at is None:
            raise EndOfPath
        elif event == "call" and self.closed_at is None:
            name = name_of(frame.f_code)
            if name is None:
                return
            door = next((door for door in DOORS if name.startswith(door)), None)
            if door is None:
                self.entered.add(frame.f_code)
            else:
                self.doors[name] = DOORS[door]
                self.closed_at = frame


def name_of(code: CodeType) -> str | None:
    """FILE:FUNCTION of our code; None for other code."""
    file = Path(code.co_filename)
    for place, prefix in PLACES.items():
        if file.is_relative_to(place):
            return f"{prefix}{file.relative_to(place).as_posix()}:{code.co_qualname}"
    return None


def add_lines(path: dict[str, set[int]], file: Path, thing: CodeType | type) -> None:
    """Add the lines of a function or class that are not blank."""
    lines, first = inspect.getsourcelines(thing)
    place = next(place for place in PLACES if file.is_relative_to(place))
    name = PLACES[place] + file.relative_to(place).as_posix()
    path.setdefault(name, set()).update(first + i for i, line in enumerate(lines) if line.strip())


def describe(path: dict[str, set[int]]) -> str:
    """A line for each file, and the sum."""
    lines = [f"{len(numbers):5} {name}  lines {ranges(numbers)}" for name, numbers in path.items()]
    return "\n".join([*lines, f"{sum(map(len, path.values())):5} lines in {len(path)} files"])


def ranges(numbers: Iterable[int]) -> str:
    """{1, 2, 3, 7} as 1-3 7; a gap of two blank lines does not end a range."""
    groups: list[list[int]] = []
    for number in sorted(numbers):
        if groups and number - groups[-1][-1] <= 3:
            groups[-1].append(number)
        else:
            groups.append([number])
    return " ".join(f"{group[0]}-{group[-1]}" if len(group) > 1 else str(group[0]) for group in groups)


if __name__ == "__main__":
    the_path, the_doors = trace()
    print("On the path:\n" + describe(the_path))
    print("\nDoors on the path, which need not be opened:")
    print("\n".join(f"  {name}: {reason}" for name, reason in sorted(the_doors.items())))
