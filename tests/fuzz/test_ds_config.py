"""DeepSpeed configs of every wrong shape: refused before anything runs, or both engines start with them."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime import constants
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from hypothesis import given
from hypothesis import strategies as st

from peakd_ds.config import RunConfig
from peakd_ds.config.setting import Range
from peakd_ds.engine import engines
from peakd_ds.engine.ds_config import FILLED_IN, HONOURED, load_ds_config, resolve
from peakd_ds.errors import UserError

CONFIG = RunConfig(task="rte", teacher="t", run_dir="r", global_batch_size=4, micro_batch_size=2)
OPTIONS = ("student_ds_config", "teacher_ds_config")
NAMES = sorted(
    {
        *HONOURED,
        *FILLED_IN,
        *(word for name, word in vars(constants).items() if name.isupper() and re.fullmatch(r"[a-z]\w+", str(word))),
        *deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS,
        *("autotuning", "aio", "flops_profiler", "hybrid_engine", "data_efficiency", "compile", "expert_parallel"),
        *("activation_checkpointing", "weight_quantization", "tensor_parallel", "sparse_attention", "pipeline"),
        *("zero_optimisation", "_comment", "", "\0"),
    }
)
"""Names of sections in DeepSpeed's source, and some that it does not know."""
ZERO_NAMES = sorted({*HONOURED["zero_optimization"], *DeepSpeedZeroConfig.model_fields, "mics_shard_size", "stage4"})
SHAPES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**70, 1e308, 0.5, "", "x", "auto", "fp32", "\0", "\ud800", [], [1], ["x"], {}),
    *({"enabled": True}, {"enabled": 1}, {"enabled": "x"}, {"enabled": None}, {"x": 1}, {"device": "nvme"}, {"": {}}),
    *({"device": "cpu", "pin_memory": 3}, {"stage": "3"}, {"throughput": 3}, {"enabled": True, "verbose": "x"}, [[{}]]),
)


def refusal(file: Path, content: bytes | object, option: str) -> str | None:
    """The message with which a config is refused; None if it is taken. Other errors are raised."""
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    try:
        load_ds_config(str(file), option)  # the quick part first
        resolve(replace(CONFIG, **{option: str(file)}), is_bf16_fast=False)
    except UserError as error:
        message = str(error)
        assert message.isprintable() and harness.REMEDY.search(message), message
        assert f"--{option} {file}" in message or "fp16 needs a GPU" in message, message
        return message
    return None


# -- Shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
def test_every_section_in_every_shape(option: str, tmp_path: Path) -> None:
    taken: set[str] = set()
    for name in NAMES:
        for shape in SHAPES:
            message = refusal(tmp_path / "ds.json", {name: shape}, option)
            if message is None:
                taken.add(name)
            elif name not in HONOURED:
                assert "leave it out" in message or "take it out of the file" in message, message
    assert taken == {*HONOURED}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_part_of_a_section_in_every_shape(option: str, tmp_path: Path) -> None:
    taken: Counter[str] = Counter()
    for section in HONOURED:
        names = ZERO_NAMES if section == "zero_optimization" else ["enabled", "x", *_names_in(HONOURED[section])]
        for name in names:
            for shape in SHAPES:
                taken[section] += refusal(tmp_path / "ds.json", {section: {name: shape}}, option) is None
    assert all(taken[section] for section in HONOURED if isinstance(HONOURED[section], dict)), taken


def _names_in(rule: Any) -> list[str]:
    return [*rule] if isinstance(rule, dict) else []


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": ' * 100_000, "is not JSON"),
        (b'{"bf16": {}, "bf16": {}}', "bf16 is there twice"),
        (b'{"steps_per_print": NaN}', "NaN is not a number of JSON"),
        (b'{"steps_per_print": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"steps_per_print": 1e999}', "steps_per_print is inf, but must be a whole number"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"", "is not JSON"),
        (b" " * (1024 * 1024 + 1), "more than 1048576 bytes"),
        (b"{}{}", "is not JSON"),
        (b"3", "is JSON, but not an object"),
        (b"null", "is JSON, but not an object"),
        (b'{"zero_optimisation": {"stage": 1}}', "did you mean zero_optimization?; leave it out"),
        (b'{"amp": {"enabled": true}}', "amp has no effect here"),
        (b'{"csv_monitor": 3}', "csv_monitor is 3, but must be an object"),
        (b'{"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}', "device is 'nvme', but must be one of"),
        (b'{"zero_optimization": {"stage": true}}', "stage is True, but must be one of 0, 1, 2, 3"),
        (b'{"bf16": {"enabled": "auto"}}', "bf16.enabled is 'auto', but must be true or false"),
        (b'{"wandb": {"enabled": true}}', "there is no package wandb"),
        (b'{"bf16": {"enabled": true}, "fp16": {"enabled": true}}', "enables bf16 and fp16; leave one out"),
    ],
)
def test_whole_files(option: str, content: bytes, part: str, tmp_path: Path) -> None:
    assert part in str(refusal(tmp_path / "ds.json", content, option))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["", ".", "/", "\0", "\ud800", "a" * 300, "no/such.json", "zero1_fp32/x", "zero9"])
def test_names_of_no_config(option: str, name: str) -> None:
    if (option, name) == ("student_ds_config", ""):
        return  # the default
    with pytest.raises(UserError) as caught:
        resolve(replace(CONFIG, **{option: name}), is_bf16_fast=False)
    assert "is neither a file nor one of" in str(caught.value) and str(caught.value).isprintable()


def test_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    assert refusal(tmp_path / "ds.json", b"\xef\xbb\xbf{}", "student_ds_config") is None


# -- What is taken starts ----------------------------------------------------------------------------------------------


def values_of(rule: Any) -> st.SearchStrategy[Any]:
    """Values that a rule of HONOURED allows; the buffers stay small."""
    if isinstance(rule, dict):
        return st.fixed_dictionaries({}, optional={name: values_of(inner) for name, inner in rule.items()})
    if isinstance(rule, Range):
        if not isinstance(rule.high, int):
            return st.floats(rule.low, rule.high)
        return st.one_of(st.integers(int(rule.low), min(rule.high, 10**6)), st.sampled_from([rule.low, 10**6]))
    if isinstance(rule, tuple):
        return st.sampled_from(rule)
    return st.booleans() if rule is bool else st.text(st.characters(codec="ascii", min_codepoint=97), max_size=9)


configs = st.fixed_dictionaries(
    {}, optional={name: values_of(rule) for name, rule in HONOURED.items() if name not in ("wandb", "comet")}
)


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Monitors write below the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))


def start_and_step(dtype: str, student: dict[str, Any], teacher: dict[str, Any]) -> None:
    """Train both engines' module for a step and run the teacher's."""
    trained = engines.training_engine(network(), replace(CONFIG, dtype=dtype), student, 4, "teacher")
    for _ in range(trained.gradient_accumulation_steps()):
        rows = torch.randn(2, 8).to(next(trained.module.parameters()).dtype)
        trained.backward(trained(rows).float().square().mean())
        trained.step()
    assert trained.global_steps == 1
    trained.destroy()
    frozen = engines.teacher_engine(network(), teacher)
    with torch.no_grad():
        frozen(torch.randn(2, 8).to(torch.bfloat16 if dtype == "bf16" else torch.float32))
    frozen.destroy()


def test_both_engines_start_with_what_is_taken(in_tmp_path: Path, single_rank: Iterator[None]) -> None:
    seen: Counter[str] = Counter()

    @harness.examples(25)
    @given(student=configs, teacher=configs)
    def search(student: dict[str, Any], teacher: dict[str, Any]) -> None:
        for option, config in zip(OPTIONS, (student, teacher), strict=True):
            (in_tmp_path / f"{option}.json").write_text(json.dumps(config))
        files = {option: str(in_tmp_path / f"{option}.json") for option in OPTIONS}
        try:
            resolved = resolve(replace(CONFIG, **files), is_bf16_fast=False)
        except UserError as error:
            seen["refused"] += 1
            assert harness.REMEDY.search(str(error))
            return
        seen["taken"] += 1
        start_and_step(*resolved)

    search()
    assert seen["taken"] > 3, seen


# -- The programs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("content", ['{"csv_monitor": 3}', '{"amp": {"enabled": true}}', "[" * 100_000])
def test_a_dry_run_says_one_line(
    option: str, content: str, tiny_encoder: Path, tiny_data: Path, tmp_path: Path, single_rank: None
) -> None:
    (tmp_path / "ds.json").write_text(content)
    words = ["--task=rte", f"--teacher={tiny_encoder}", f"--data_dir={tiny_data}", f"--run_dir={tmp_path / 'run'}"]
    words += ["--num_hidden_layers=2", "--max_seq_length=32", "--dtype=fp32", "--dry_run"]
    assert harness.run(words).code == 0, "the same command without the wrong file"
    harness.assert_refused(harness.run([*words, f"--{option}={tmp_path / 'ds.json'}"]), f"--{option}", "ds.json")
    assert not (tmp_path / "run").exists()
