"""The command line: options and YAML to settings and back, and how every console script starts.

A YAML file is turned into command-line words that stand before the user's own, so there is one parser, one set of
checks, and the command line wins. This module imports nothing heavy.
"""

import argparse
import difflib
import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from peakd_ds import __version__
from peakd_ds.config import GROUPS, RESULT_NEUTRAL, SPECS, RunConfig, validate
from peakd_ds.config.setting import shown_default
from peakd_ds.errors import UserError, exit_with

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
    config_file = parser.parse_known_args(without_help)[0].config
    source = f"--config {config_file}"
    words = [*to_words(source, read_yaml(source, config_file)), *argv] if config_file else argv
    values = parser.parse_args(words)
    settings = {name: value for name, value in vars(values).items() if name not in ("config", "local_rank")}
    config = RunConfig(**settings)
    config = replace(
        config,
        data_dir=config.data_dir or os.environ.get("PEAKD_DATA_DIR", ""),
        run_dir=config.run_dir or os.environ.get("RUN_DIR", ""),
    )
    validate(config)
    return config


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
    raise SystemExit(status)


# -- Options -----------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser with `--version` that raises UserError for wrong options; argparse would print its usage and exit."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.add_argument("--version", action="version", version=f"peakd_ds {__version__}")

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse_args(self, args=None, namespace=None):
        """As argparse's, with a suggestion for an option that is not known."""
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            names = [word for action in self._actions for word in action.option_strings]
            self.error(f"unknown option {unknown[0]}{suggest(unknown[0].split('=')[0], names)}")
        return values


def build_parser() -> Parser:
    """The command line of train.py: every setting, under the heading of its group."""
    parser = Parser(
        "train.py",
        "Distil a BERT classifier into a small student with shuffled parameter sharing (SPS) and pretraining with the "
        "teacher's predictions (PTP).",
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="YAML file of the settings below, by the same names; the command line wins",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
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
        )


def suggest(word: str, names: Sequence[str]) -> str:
    """The end of a message about an unknown word: the name that is most like it."""
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else "; --help lists all"


def _is_switch(spec: Field[Any]) -> bool:
    return spec.type in (bool, bool | None)


def _value_type(spec: Field[Any]) -> Callable[[str], Any]:
    """What argparse converts the word with; raises ArgumentTypeError, whose text argparse prints as it is."""
    kind = next((kind for kind in (int, float, str) if spec.type in (kind, kind | None)), str)
    expected = {int: "a whole number", float: "a finite number"}.get(kind, "a value that fits")
    parse_word = spec.metadata["parse"] or (_finite if kind is float else kind)

    def convert(text: str) -> Any:
        try:
            return parse_word(text)
        except ValueError as error:
            rule = f"; its range is {spec.metadata['range']}" if spec.metadata["range"] else ""
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {expected}{rule}; the default is {shown_default(spec)}"
            ) from error

    return convert


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


# -- YAML --------------------------------------------------------------------------------------------------------------


def to_yaml(config: RunConfig) -> str:
    """Every setting as YAML that `--config` reads back; unset ones are left out."""
    values = {name: _as_lists(value) for name, value in asdict(config).items() if value is not None and value != ""}
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None)


def differences(config: RunConfig, saved_yaml: str) -> list[str]:
    """Lines `name: saved -> now` for each setting that changes the result and differs from a saved config.yaml.

    Raises:
        UserError: the saved text holds no settings.
    """
    try:
        saved = yaml.safe_load(saved_yaml)
    except yaml.YAMLError:
        saved = None
    if not isinstance(saved, dict):
        raise UserError("the config.yaml in --run_dir is damaged: it holds no settings; take another --run_dir")
    now = yaml.safe_load(to_yaml(config))
    names = [name for name in SPECS if name not in RESULT_NEUTRAL]
    return [f"{name}: {saved.get(name)} -> {now.get(name)}" for name in names if saved.get(name) != now.get(name)]


def read_yaml(source: str, file: str) -> dict[Any, Any]:
    """The settings in a YAML file.

    Args:
        source: Begins every message, such as "--config FILE".

    Raises:
        UserError: the file cannot be read, is not YAML, or holds no settings.
    """
    try:
        settings = yaml.safe_load(Path(file).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source} cannot be read ({error}); give a YAML file of settings") from error
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not YAML: {' '.join(str(error).split())}; fix the file") from error
    if not isinstance(settings, dict):
        raise UserError(f"{source} holds no settings; write lines like 'task: rte'")
    return settings


def to_words(source: str, settings: Mapping[Any, Any]) -> list[str]:
    """Settings by name, as YAML has them, as command-line words; None means not set.

    Raises:
        UserError: an unknown name, or a switch that is not true or false; the message begins with `source`.
    """
    words = []
    for name, value in settings.items():
        if name not in SPECS:
            raise UserError(f"{source}: unknown setting {name!r}{suggest(str(name), list(SPECS))}")
        if value is None:
            continue  # a line whose value was deleted and whose name was left
        if isinstance(value, bool) != _is_switch(SPECS[name]):
            expected = "a value" if isinstance(value, bool) else "true or false"
            raise UserError(f"{source}: {name}: {value!r} does not fit; write {expected}")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words.append(f"--{name}={to_word(value)}")
    return words


def to_word(value: Any) -> str:
    """A YAML value as one command-line word: [1, 3] as 1,3 and [[1, 2], [2, 4]] as 1:2,2:4."""
    if isinstance(value, list):
        return ",".join(":".join(map(str, item)) if isinstance(item, list) else str(item) for item in value)
    return str(value)


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value
