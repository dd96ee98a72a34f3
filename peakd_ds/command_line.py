"""The command line: options and YAML to settings and back, and how every console script starts.

A YAML file is turned into command-line words that stand before the user's own, so there is one parser, one set of
checks, and the command line wins. This module imports nothing heavy.
"""

import argparse
import difflib
import functools
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from peakd_ds import __version__
from peakd_ds.config import GROUPS, RESULT_NEUTRAL, SPECS, RunConfig, validate, yaml_file
from peakd_ds.config.data import OWN_DATA
from peakd_ds.config.setting import Range, finite_number, shown_default, whole_number
from peakd_ds.errors import UserError, exit_with, first_line, shown

# -- Starting a program ------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> RunConfig:
    """Settings from `--config FILE.yaml` and the command line, which wins; checked.

    Raises:
        UserError: a word that does not fit, a value out of range, an unknown key in the YAML file, or a file that
            cannot be read.
        SystemExit: code 0, after `--help` or `--version`.
    """
    parser = build_parser()
    without_help = [word for word in argv if word not in ("-h", "--help", "--version")]
    typed = parser.parse_known_args(without_help)[0]
    source, words = f"--config {typed.config}", list(argv)
    if typed.config is not None:
        words = [*to_words(source, _without_other_rows(read_yaml(source, typed.config), typed)), *argv]
    config = RunConfig(**settings_of(parser.parse_args(words)))
    config = replace(
        config,
        data_dir=config.data_dir or os.environ.get("PEAKD_DATA_DIR", ""),
        run_dir=config.run_dir or os.environ.get("RUN_DIR", ""),
    )
    validate(config)
    return config


def settings_of(values: argparse.Namespace) -> dict[str, Any]:
    """The settings of `RunConfig` among parsed options; lists are tuples."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(values).items()
        if name in SPECS
    }


def _without_other_rows(settings: dict[str, Any], typed: argparse.Namespace) -> dict[str, Any]:
    """The settings of a YAML file without its rows, if the command line names rows of another kind: it wins."""
    files = ("train_file", "validation_file", "test_file", "unlabeled_file")
    dropped: tuple[str, ...] = ()
    if typed.task:
        dropped = (*OWN_DATA, "metric")
    elif typed.dataset_name:
        dropped = ("task", *files)
    elif any(getattr(typed, name) for name in files):
        dropped = ("task", "dataset_name", "dataset_config_name")
    return {name: value for name, value in settings.items() if name not in dropped}


def start(
    target: str,
    program: str,
    parse_words: Callable[[Sequence[str]], Any] = parse,
    on_refusal: Callable[[str], None] = lambda message: None,
) -> NoReturn:
    """Parse the command line, then import a program and run it, and exit.

    `--help`, `--version` and wrong options are answered before the program's module, and with it torch, is imported.

    Args:
        target: `package.module:function`; called with the parsed options, returns an exit code or None.
        program: Name in front of error messages.
        parse_words: Makes the options from the command-line words; raises UserError.
        on_refusal: Called with the message before the program exits for wrong options.
    """
    try:
        options = parse_words(sys.argv[1:])
    except UserError as error:
        on_refusal(str(error))
        exit_with(error, program)
    module, _, function = target.partition(":")
    try:
        status = getattr(importlib.import_module(module), function)(options)
    except (UserError, OSError) as error:  # OSError: a full disk, or a folder that is gone
        exit_with(error, program)
    except KeyboardInterrupt:  # train.py saves first, and raises none
        print(f"{program}: stopped by Ctrl-C", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    except (MemoryError, ImportError) as error:
        if isinstance(error, ImportError) and "failed to map segment" not in str(error):
            raise
        exit_with(
            UserError(f"out of memory ({first_line(error)}); free memory, or raise its limit (ulimit -v)"), program
        )
    raise SystemExit(status)


# -- Options -----------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser with `--version` that raises UserError for wrong options; argparse would print its usage and exit."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self._ranges: dict[str, Range] = {}
        self.add_argument("--version", action="version", version=f"peakd_ds {__version__}")

    def add_number(
        self, group: argparse._ActionsContainer, name: str, kind: type, range: Range, help: str, **more: Any
    ) -> None:
        """Add an option for a number, which is checked; its help ends with its default and range."""
        default = more.get("default")
        facts = f"{help}; {'' if default is None else f'default {default}; '}range {range}]"
        group.add_argument(f"--{name}", type=_convert(kind, _PARSERS[kind], f"set one in {range}"), help=facts, **more)
        self._ranges[name] = range

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's, with the numbers of `add_number` in their ranges."""
        words = sys.argv[1:] if args is None else args
        lost = next((word for word in words if re.fullmatch(r"(--\w+=)?--", word)), None)
        if lost is not None:  # argparse drops it, and the value of --NAME=-- becomes an empty list
            self.error(f"{lost} means nothing here; leave it out")
        values, unknown = super().parse_known_args(words, namespace)
        for name, range in self._ranges.items():
            value = getattr(values, name)
            if value is not None and value not in range:
                self.error(f"--{name} {shown(value)} is outside its range {range}; set one within")
        return values, unknown

    def error(self, message: str) -> NoReturn:
        """Raise UserError with argparse's message, and the remedy that argparse leaves out."""
        option = next(iter(re.findall(r"--\w+", message)), "")
        remedies = {
            "ignored explicit argument": f"write {option} alone, without = and a value{self._opposite(option)}",
            "expected one argument": f"give the value after it, or as {option}=VALUE if the value begins with -",
            "expected at least one": "give at least one",
            "are required": "give a value for each",
            "not allowed with": "leave one out",
        }
        remedy = next((remedy for part, remedy in remedies.items() if part in message), "")
        raise UserError(f"{message}; {remedy}" if remedy else message)

    def _opposite(self, option: str) -> str:
        """How to say the opposite of a switch, if there is a way."""
        name = option.removeprefix("--")
        opposite = f"--{name.removeprefix('no_')}" if name.startswith("no_") else f"--no_{name}"
        return f", or {opposite} for the opposite" if opposite in self._option_string_actions else ""

    def parse_args(self, args=None, namespace=None):
        """As argparse's, with a suggestion for an option that is not known."""
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            names = [word for action in self._actions for word in action.option_strings]
            self.error(f"unknown option {unknown[0]}{suggest(unknown[0].split('=')[0], names)}")
        return values


@functools.cache
def build_parser() -> Parser:
    """The command line of train.py: every setting, under the heading of its group."""
    parser = Parser(
        "train.py",
        "Distil a text classifier into a small student with shuffled parameter sharing (SPS) and pretraining with the "
        "teacher's predictions (PTP).",
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="YAML file of the settings below, by the same names; the command line wins",
    )
    add_local_rank(parser)
    for title, group in GROUPS.items():
        section = parser.add_argument_group(title, group.__doc__)
        for name in group.__annotations__:
            add_setting(section, SPECS[name])
    return parser


def add_setting(parser: argparse._ActionsContainer, spec: Field[Any], default: str = "") -> None:
    """Add a setting as an option whose help has its unit, range and default, or the given text for the default."""
    meta = spec.metadata
    facts = [meta["unit"], f"default {default or shown_default(spec)}", meta["range"] and f"range {meta['range']}"]
    text = f"{meta['help']} [{'; '.join(fact for fact in facts if fact)}]".replace("%", "%%")
    if _is_switch(spec):
        parser.add_argument(f"--{spec.name}", action="store_true", default=spec.default, help=text)
        parser.add_argument(
            f"--no_{spec.name}",
            dest=spec.name,
            action="store_false",
            default=spec.default,
            help=f"the opposite of --{spec.name}",
        )
    else:
        parser.add_argument(
            f"--{spec.name}",
            type=_value_type(spec),
            default=spec.default,
            choices=meta["choices"] or None,
            help=text,
            metavar=spec.name.upper() if not meta["choices"] else None,
            nargs="+" if meta["takes_many"] else None,
        )


def add_local_rank(parser: argparse._ActionsContainer) -> None:
    """Accept the option that the deepspeed launcher adds; the environment says the same."""
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)


def suggest(word: str, names: Sequence[str]) -> str:
    """The end of a message about an unknown word: the name that is most like it."""
    return closest(word, names) or "; --help lists all"


def closest(word: str, names: Sequence[str]) -> str:
    """The end of a message about an unknown word: the name that is most like it, or nothing."""
    close = difflib.get_close_matches(word[:80], names, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def _is_switch(spec: Field[Any]) -> bool:
    return spec.type in (bool, bool | None)


_PARSERS: dict[type, Callable[[str], Any]] = {int: whole_number, float: finite_number, str: str}
_EXPECTED = {int: "a whole number", float: "a finite number", str: "a value that fits"}


def _value_type(spec: Field[Any]) -> Callable[[str], Any]:
    """What argparse converts the word of a setting with."""
    one_of_many = (float,) if spec.type == tuple[float, ...] | None else ()
    kind = next((kind for kind in (int, float) if spec.type in (kind, kind | None) or kind in one_of_many), str)
    range = spec.metadata["range"]
    rule = f"{f'its range is {range}; ' if range else ''}the default is {shown_default(spec)}"
    return _convert(kind, spec.metadata["parse"] or _PARSERS[kind], rule)


def _convert(kind: type, parse_word: Callable[[str], Any], rule: str) -> Callable[[str], Any]:
    """`parse_word`, with an ArgumentTypeError for a wrong word, whose text argparse prints as it is."""

    def convert(text: str) -> Any:
        try:
            return parse_word(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not {_EXPECTED[kind]}; {rule}") from error

    return convert


# -- YAML --------------------------------------------------------------------------------------------------------------


def to_yaml(config: RunConfig) -> str:
    """Every setting as YAML that `--config` reads back; unset ones are left out."""
    return yaml.safe_dump(set_values(config), sort_keys=False, default_flow_style=None)


def set_values(config: RunConfig) -> dict[str, Any]:
    """Every setting that is set, as YAML has it: tuples are lists."""
    values, unset = asdict(config), (None, "")
    return {
        name: _as_lists(value)
        for name, value in values.items()
        if not (value in unset and SPECS[name].default in unset)
    }


def saved_settings(saved_yaml: str) -> dict[str, Any]:
    """The settings in a saved config.yaml, numbers as numbers.

    Raises:
        UserError: the saved text holds no settings.
    """
    try:
        saved = yaml_file.load(saved_yaml, with_numbers=True)
    except yaml_file.NotSettings:
        saved = None
    if not isinstance(saved, dict):
        raise UserError("the config.yaml in --run_dir is damaged: it holds no settings; take another --run_dir")
    return saved


def differences(config: RunConfig, saved_yaml: str) -> list[str]:
    """Lines `name: saved -> now` for each setting that changes the result and differs from a saved config.yaml.

    Raises:
        UserError: the saved text holds no settings.
    """
    # A setting that a former version did not have was at its default, or unset.
    defaults = {name: _as_lists(spec.default) for name, spec in SPECS.items() if spec.default not in (None, "")}
    saved, now = defaults | saved_settings(saved_yaml), set_values(config)
    names = [name for name in SPECS if name not in RESULT_NEUTRAL]
    return [f"{name}: {saved.get(name)} -> {now.get(name)}" for name in names if saved.get(name) != now.get(name)]


def read_yaml(source: str, file: str) -> dict[str, Any]:
    """The settings in a YAML file, as words.

    Args:
        source: Begins every message, such as "--config FILE".

    Raises:
        UserError: the file cannot be read, is not YAML, or holds no settings.
    """
    try:
        with Path(file).open("rb") as opened:
            content = opened.read(yaml_file.MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"{source} cannot be read ({error}); give a YAML file of settings") from error
    try:
        settings = yaml_file.load(content)
    except yaml_file.NotSettings as error:
        raise UserError(f"{source} {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{source} holds no settings; write lines like 'task: rte'")
    return settings


def to_words(source: str, settings: Mapping[Any, Any]) -> list[str]:
    """Settings by name, as YAML has them, as command-line words; None means not set.

    Raises:
        UserError: an unknown name, or a value of another kind than the setting; the message begins with `source`.
    """
    words = []
    for name, value in settings.items():
        if name not in SPECS:
            raise UserError(f"{source}: unknown setting {name!r}{suggest(str(name), list(SPECS))}")
        if value is None:
            continue  # a line whose value was deleted and whose name was left
        spec = SPECS[name]
        if _is_switch(spec):
            if not isinstance(value, bool):
                raise UserError(f"{source}: {name}: {shown(value)} does not fit; write true or false, without quotes")
            words.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, bool):
            raise UserError(
                f"{source}: {name}: {str(value).lower()} (as true, yes, on, false, no and off are read) does not fit; "
                "write a value, in quotes if it is one of these words"
            )
        elif not _is_word(value) and not (_takes_list(spec) and _is_list(value, not spec.metadata["takes_many"])):
            expected = "a value, or a list of values" if _takes_list(spec) else "one value"
            raise UserError(f"{source}: {name}: {shown(value)} does not fit; write {expected}")
        elif spec.metadata["takes_many"]:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        else:
            words.append(f"--{name}={to_word(value)}")
    return words


def to_word(value: Any) -> str:
    """A YAML value as one command-line word: [1, 3] as 1,3 and [[1, 2], [2, 4]] as 1:2,2:4."""
    if isinstance(value, list | tuple):
        return ",".join(":".join(map(str, item)) if isinstance(item, list | tuple) else str(item) for item in value)
    return str(value)


def _takes_list(spec: Field[Any]) -> bool:
    return "tuple" in str(spec.type)


def _is_word(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _is_list(value: Any, may_nest: bool) -> bool:
    """Whether it is a list of words, or of lists of words."""
    return isinstance(value, list) and all(
        _is_word(item) or (may_nest and isinstance(item, list) and all(map(_is_word, item))) for item in value
    )


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value
