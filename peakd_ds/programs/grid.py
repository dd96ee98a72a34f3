"""A grid: many runs from one YAML file, the product of the lists under `grid:`.

    teacher: bert-base-uncased          # settings of every run, by their names in config/
    grid:
      task: [rte, mrpc]
      method: [pea-kd, kd]              # named as in results.json
      seed: [1, 2, 3]                   # 2 x 2 x 3 = 12 elements, the last list varying fastest

An element's run folder is RUNS/TASK/METHOD/[SETTING-VALUE/]seed-N. A setting may contain the name of another in
braces, such as {task} or {seed}, which is replaced by the element's value, and {run_dir}, which is replaced by RUNS:
`teacher: "{run_dir}/{task}/teacher/seed-42/teacher"`.

Rows of your own are named by `name`, or else by their first file; {name} and {task} are both replaced by that name:

    train_file: ["data/{name}/*.csv"]   # files are a list, or one word
    grid:
      name: [tickets, mails]            # or train_file: [[a.csv, b.csv], [c.csv]]
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peakd_ds.command_line import parse, read_yaml, set_values, suggest, to_word, to_words, to_yaml
from peakd_ds.config import RESULT_NEUTRAL, SPECS, RunConfig
from peakd_ds.config.data import OWN_DATA
from peakd_ds.data.tasks import get_task
from peakd_ds.errors import UserError, shown
from peakd_ds.programs.scripts import MAX_ELEMENTS

TEACHER_ONLY = "teacher"
"""The method, in folder names and tables, of a run of the teacher stage alone."""
UNCHANGING = RESULT_NEUTRAL - {*OWN_DATA, "teacher_outputs"}
"""Settings that do not make another run. Paths of rows do, though a start may change them: it compares the content."""


@dataclass(frozen=True)
class Element:
    """One run of a grid."""

    name: str
    """Its run folder below RUNS, such as rte/pea-kd/seed-7."""
    words: list[str]
    """Options of train.py."""
    config: RunConfig


@dataclass(frozen=True)
class Grid:
    """The runs that a grid file describes."""

    axes: dict[str, int]
    """Length of each list."""
    folder: str
    """RUNS, the parent of the elements' run folders."""
    elements: list[Element]

    def __str__(self) -> str:
        product = " x ".join(f"{length} {name}" for name, length in self.axes.items())
        return f"{len(self.elements)} elements ({product}) in {self.folder}/"


def methods() -> dict[str, dict[str, Any]]:
    """The switches of every method, by its name in `RunConfig.method`.

    A name is "pea-kd" or [SHARING+][ptp+]OBJECTIVE: "pkd", "kd", "finetune", "sps+pkd" (SPS alone), "ptp+pkd" (PTP
    alone), "cycle+ptp+kd", "sps-shuffle_qk+pkd" (SPS without the exchange).
    """
    objectives: list[dict[str, Any]] = [{}, {"beta": 0}, {"alpha": 0, "beta": 0}]  # pkd, kd, finetune
    sharings = SPECS["sharing"].metadata["choices"]
    named: dict[str, dict[str, Any]] = {}
    for ptp, weights, sharing, shuffle_qk in itertools.product(
        (True, False), objectives, sharings, (None, True, False)
    ):
        if not (sharing == "none" and shuffle_qk):
            switches = {"sharing": sharing, "shuffle_qk": shuffle_qk, "ptp": ptp, **weights}
            named.setdefault(RunConfig(**switches).method, switches)
    return named


def read_grid(file: str, overrides: Sequence[str] = ()) -> Grid:
    """Read a grid file and check each element as train.py checks its command line.

    Args:
        overrides: Options of train.py for every element; they win over the file.

    Raises:
        UserError: a file that cannot be read, an unknown name, a value out of range, or an element that is there twice.
    """
    source = f"--grid {file}"
    settings = read_yaml(source, file)
    axes = _checked_axes(source, settings.pop("grid", None))
    for name in axes:
        if name in settings:
            raise UserError(f"{source}: {name} is both under grid and beside it; drop one")
        if _is_set(overrides, name):
            raise UserError(f"--{name} is a list of {source}, so it cannot be set for all elements; change it there")
    shared_method = settings.pop("method", None)
    elements: list[Element] = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        where = f"{source}: " + ", ".join(f"{name} {to_word(value)}" for name, value in chosen.items())
        method = chosen.pop("method", shared_method)
        switches = _method_switches(source, method, settings, overrides)
        words = [*to_words(source, {**settings, **chosen}), *overrides, *to_words(source, switches)]
        elements.append(_element(where, words, method, chosen))
    _check_distinct(source, elements)
    folders = {element.config.run_dir.removesuffix(f"/{element.name}") for element in elements}
    return Grid({name: len(values) for name, values in axes.items()}, folders.pop(), elements)


def _checked_axes(source: str, axes: object) -> dict[str, list[Any]]:
    """The lists under `grid:`. Raises UserError for an unknown name, or a list that is empty or repeats a value."""
    if not isinstance(axes, dict) or not axes:
        raise UserError(f"{source} has no lists to multiply; add them below a line 'grid:', such as 'seed: [1, 2, 3]'")
    names = ["method", *(name for name in SPECS if name not in UNCHANGING)]
    num_elements = math.prod(len(values) for values in axes.values() if isinstance(values, list))
    if num_elements > MAX_ELEMENTS:
        raise UserError(f"{source} has {num_elements} elements; the most is {MAX_ELEMENTS}: give several grids")
    for name, values in axes.items():
        if name in UNCHANGING:
            raise UserError(
                f"{source}: {name} does not change a run's result, so a list of it would give equal runs; "
                "set it beside grid, for all elements"
            )
        if name not in names:
            raise UserError(f"{source}: unknown setting {name!r} under grid{suggest(str(name), names)}")
        if not isinstance(values, list) or not values or None in values:
            raise UserError(f"{source}: {name} under grid is {shown(values)}; write a list of values, such as [1, 2]")
        for value in values:
            if name != "method":
                to_words(source, {name: value})
            elif not isinstance(value, str):
                raise UserError(f"{source}: method {shown(value)} is not a word; write names such as pea-kd")
        doubles = [value for number, value in enumerate(values) if value in values[:number]]
        if doubles:
            raise UserError(f"{source}: {name} under grid has {to_word(doubles[0])} twice; drop one")
    return axes


def _method_switches(
    source: str, method: object, settings: Mapping[Any, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    """The method's switches. Raises UserError for an unknown method, or for a switch that is also set on its own."""
    if method is None:
        return {}
    known = methods()
    if not isinstance(method, str) or method not in known:
        raise UserError(f"{source}: unknown method {shown(method)}{suggest(str(method), list(known))}")
    for name in ("sharing", "shuffle_qk", "ptp"):
        if name in settings or _is_set(overrides, name):
            raise UserError(f"{source}: {name} follows from method, so it cannot be set beside it; drop one")
    return known[method]


def _is_set(words: Sequence[str], name: str) -> bool:
    """Whether the command-line words set the setting `name`."""
    return any(re.fullmatch(rf"--(no_)?{name}(=.*)?", word, re.DOTALL) for word in words)


def _element(where: str, words: list[str], method: str | None, chosen: Mapping[str, Any]) -> Element:
    """The element with these command-line words, in a run folder named after its settings.

    Args:
        where: Begins every message: the grid file and the element's values.
        method: Its name in the grid file; None if the file has none.
        chosen: The element's values of the other lists.

    Raises:
        UserError: words that train.py would refuse, or that contradict the method.
    """
    try:
        config = parse(words)
        if config.dry_run:
            raise UserError("--dry_run trains nothing, so no element would ever be finished; use --list")
        if "{" in config.run_dir:
            raise UserError(f"--run_dir {config.run_dir} is the one folder for all elements; write it without {{}}")
        if method is not None and config.method != method:
            raise UserError(
                f"--alpha {config.alpha:g} and --beta {config.beta:g} make it {config.method}; "
                "set them above 0 for the methods that use them"
            )
        if config.stages == ("teacher",):
            method = TEACHER_ONLY
        values: dict[str, Any] = {name: getattr(config, name) for name in SPECS} | {"method": method}
        values["task"] = values["name"] = task = _task_name(config, values)
        others = [f"{name}-{_label(value)}" for name, value in chosen.items() if name not in ("seed", config.named_by)]
        parts = [task, method or config.method, *others, f"seed-{config.seed}"]
        name = "/".join(re.sub(r"[^\w.,:+-]+", "_", part, flags=re.ASCII) for part in parts)
        given = set_values(config) | {"run_dir": f"{config.run_dir.rstrip('/')}/{name}"}
        defaults = set_values(RunConfig())
        words = to_words(where, {name: value for name, value in given.items() if value != defaults.get(name)})
        words = [_fill_in(word, values) for word in words]
        return Element(name, words, parse(words))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _task_name(config: RunConfig, values: Mapping[str, Any]) -> str:
    """The task's name in folders. Raises UserError if the file that rows are named by has {name} in its own name."""
    if config.task:
        return get_task(config.task).name
    given = getattr(config, config.named_by)
    first = given if isinstance(given, str) else given[0]
    if re.search(r"\{(name|task)\}", first):
        raise UserError(f"--{config.named_by} {first} has the rows' name in it, which is not given; give name")
    filled: Any = _fill_in(first, values) if isinstance(given, str) else (_fill_in(first, values),)
    settings: dict[str, Any] = {config.named_by: filled}
    return replace(config, **settings).task_name


def _label(value: Any) -> str:
    """A value as folder names have it: 0.10 and 2.0e-5 as 0.1 and 2e-05, other values as they are in the grid file."""
    word = to_word(value)
    return str(float(word)) if re.fullmatch(r"[+-]?[0-9]+\.[0-9]*([eE][+-][0-9]+)?", word) else word


def _fill_in(word: str, values: Mapping[str, Any]) -> str:
    """The word with every {name} replaced by the element's value. Raises UserError if `name` is not a setting."""

    def value_of(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise UserError(f"{match[0]} in {word} is not a setting{suggest(match[1], list(values))}")
        return to_word(values[match[1]])

    return re.sub(r"\{(\w+)\}", value_of, word)


def _check_distinct(source: str, elements: Sequence[Element]) -> None:
    """Raise UserError if two elements are the same run or have the same folder."""
    seen: dict[str, Element] = {}
    for element in elements:
        config = element.config
        has_classes = not config.task or get_task(config.task).has_right_and_wrong  # own files are not read here
        effective = replace(config, ptp=config.runs_ptp(has_classes), run_dir="", name="")
        for key in (element.name, to_yaml(effective)):
            if seen.setdefault(key, element) is not element:
                remedy = "drop one"
                if config.named_by not in ("task", "name"):
                    remedy += f", or list name in place of {config.named_by}, and write {{name}} there"
                raise UserError(f"{source}: {seen[key].name} and {element.name} would be the same run; {remedy}")
