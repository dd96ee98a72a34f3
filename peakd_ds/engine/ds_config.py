"""DeepSpeed configs: files of ds_configs/ or the user's, checked and completed with the numbers of the run.

A file says how an engine is spread (ZeRO stage, offload). Batch sizes and clipping follow from the run's settings and
are filled in here, so no number is stated twice.
"""

import contextlib
import copy
import importlib.resources
import importlib.util
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfig

from peakd_ds.command_line import closest
from peakd_ds.config import RunConfig
from peakd_ds.config.setting import Range, check_text
from peakd_ds.errors import UserError, shown
from peakd_ds.files import obstacle
from peakd_ds.ranks import dist
from peakd_ds.ranks.device import on_gpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FILLED_IN = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
}
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "csv_monitor": "", "comet": "comet_ml"}
"""The package that each monitor needs."""
_FILE_MONITORS = ("tensorboard", "csv_monitor")
"""Those that write files, into output_path/job_name."""

_MAX_BYTES = 1024 * 1024
_ANY = Range(0, 10**18)
_SWITCHES = (
    *("contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions"),
    *("overlap_comm", "load_from_fp32_weights", "ignore_unused_parameters", "round_robin_gradients"),
    *("parameter_alignment", "memory_efficient_linear", "override_module_apply", "log_trace_cache_warnings"),
    *("enable_sanity_checks", "stage3_gather_16bit_weights_on_model_save", "stage3_use_all_reduce_for_fetch_params"),
    "stage3_allgather_sequential",
)
_SIZES = (
    *("sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
    *("stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
    "stage3_module_granularity_threshold",
)
_OFFLOAD = {"device": ("none", "cpu"), "pin_memory": bool}
_FILES = {"enabled": bool, "output_path": str, "job_name": str}
HONOURED: dict[str, Any] = {
    "zero_optimization": {
        "stage": (0, 1, 2, 3),
        "reduce_bucket_size": Range(1, 2_000_000_000),  # elements; DeepSpeed allocates a buffer of this size
        "allgather_bucket_size": _ANY,
        "offload_param": _OFFLOAD,
        "offload_optimizer": _OFFLOAD,
        **dict.fromkeys(_SWITCHES, bool),
        **dict.fromkeys(_SIZES, _ANY),
    },
    "bf16": {"enabled": bool, "immediate_grad_update": bool, "check_grad_overflow": bool},
    "fp16": {
        "enabled": bool,
        "auto_cast": (False,),
        "loss_scale": Range(0, 2.0**32),
        "initial_scale_power": Range(0, 32),
        "loss_scale_window": Range(1, 1_000_000_000),
        "hysteresis": Range(1, 1000),
        "consecutive_hysteresis": bool,
        "min_loss_scale": Range(1, 2**32),
    },
    "data_types": {"grad_accum_dtype": tuple(DTYPES)},
    "communication_data_type": tuple(DTYPES),
    "prescale_gradients": bool,
    "gradient_predivide_factor": Range(0.001, 1000.0),
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": (False,),
    "steps_per_print": Range(1, 1_000_000_000),
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "timers": {"throughput": {"enabled": bool, "synchronized": bool}},
    "comms_logger": {"enabled": bool, "verbose": bool, "prof_all": bool, "debug": bool},
    "tensorboard": _FILES,
    "csv_monitor": _FILES,
    "wandb": {"enabled": bool, "group": str, "team": str, "project": str},
    "comet": {
        **{"enabled": bool, "online": bool, "samples_log_interval": Range(1, 1_000_000_000)},
        **dict.fromkeys(("project", "workspace", "api_key", "experiment_name", "experiment_key"), str),
        "mode": ("get", "create", "get_or_create"),
    },
}
"""Sections of a DeepSpeed config that have the effect here that DeepSpeed's documentation says, and their values.

A dict has the names of an object; a tuple the allowed values; `Range` is a number, a whole one if its limits are.
"""


# -- What a file may hold ----------------------------------------------------------------------------------------------


def load_ds_config(name: str, option: str) -> dict[str, Any]:
    """A DeepSpeed config by file path, or by name from ds_configs/.

    Raises:
        UserError: no such file, not JSON, a section or a value that is not in HONOURED, or a number that the run's own
            settings fill in.
    """
    source = f"--{option} {name}"
    builtin = importlib.resources.files("peakd_ds.ds_configs")
    known = sorted(item.name.removesuffix(".json") for item in builtin.iterdir() if item.name.endswith(".json"))
    try:
        with (builtin / f"{name}.json" if name in known else Path(name)).open("rb") as opened:
            content = opened.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"{source} is neither a file nor one of {', '.join(known)}; give one of these") from error
    try:
        if len(content) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        config = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, and numbers of thousands of digits, too
        raise UserError(f"{source} is not JSON ({error}); fix the file or take one of ds_configs/") from error
    if not isinstance(config, dict):
        raise UserError(f"{source} is JSON, but not an object; write it like those in ds_configs/")
    stated = FILLED_IN & config.keys()
    if stated:
        raise UserError(
            f"{source} sets {sorted(stated)[0]}, which follows from the run's own settings; take it out of the file"
        )
    _check_value(source, "", config, HONOURED)
    _check_sections(source, config)
    return config


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a name that is there twice."""
    config = dict(pairs)
    if len(config) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return config


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not a number of JSON")


def _check_value(source: str, where: str, value: Any, rule: Any) -> None:
    """Raise UserError for a value that is not as its rule in HONOURED says.

    Args:
        where: The names that lead to the value, such as zero_optimization.stage; empty for the whole file.
    """
    if isinstance(rule, dict):
        if not isinstance(value, dict):
            raise UserError(f"{source}: {where} is {shown(value)}, but must be an object; write it like in ds_configs/")
        for name, inner in value.items():
            full = f"{where}.{name}" if where else name
            if name not in rule:
                raise UserError(
                    f"{source}: {full} has no effect here, or none that is tested{closest(name, [*rule])}; leave it out"
                )
            _check_value(source, full, inner, rule[name])
        return
    if isinstance(rule, Range):
        is_whole = isinstance(rule.high, int)
        is_right = isinstance(value, int | float) and not isinstance(value, bool) and value in rule
        is_right = is_right and not (is_whole and value != int(value))
        expected = f"a {'whole ' if is_whole else ''}number in {rule}"
    elif isinstance(rule, tuple):
        is_right = any(type(value) is type(allowed) and value == allowed for allowed in rule)
        expected = f"one of {', '.join(map(json.dumps, rule))}"
    else:
        is_right = isinstance(value, rule)
        expected = "true or false" if rule is bool else "text"
    if not is_right:
        raise UserError(f"{source}: {where} is {shown(value)}, but must be {expected}; fix the file")
    if isinstance(value, str):
        check_text(f"{source}: {where}", value)


def _check_sections(source: str, config: dict[str, Any]) -> None:
    """Raise UserError for values that DeepSpeed refuses together only when its engine starts."""
    if _is_enabled(config, "bf16") and _is_enabled(config, "fp16"):
        raise UserError(f"{source} enables bf16 and fp16; leave one out")
    stage, zero = zero_stage(config), config.get("zero_optimization", {})
    if stage >= 2 and (config.get("prescale_gradients") or config.get("gradient_predivide_factor", 1) != 1):
        raise UserError(
            f"{source} sets prescale_gradients or gradient_predivide_factor, which ZeRO stage {stage} does not have; "
            "leave them out"
        )
    if zero.get("allgather_bucket_size", 0) % 2:
        raise UserError(
            f"{source}: zero_optimization.allgather_bucket_size is {zero['allgather_bucket_size']}, but must be even; "
            "fix the file"
        )
    for monitor, package in MONITORS.items():
        if _is_enabled(config, monitor) and package and importlib.util.find_spec(package) is None:
            raise UserError(f"{source} enables {monitor}, but there is no package {package}; add it, or leave it out")


def _is_enabled(config: dict[str, Any], section: str) -> bool:
    return bool(config.get(section, {}).get("enabled"))


def zero_stage(ds_config: dict[str, Any]) -> int:
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


# -- What the run fills in ---------------------------------------------------------------------------------------------


def batch_plan(global_batch_size: int, micro_batch_size: int, world_size: int) -> tuple[int, int]:
    """(micro, accum) with global = micro x accum x world and the largest micro that is at most `micro_batch_size`.

    Raises:
        UserError: the global batch is not a multiple of the number of ranks.
    """
    local, rest = divmod(global_batch_size, world_size)
    if rest:
        below, above = local * world_size, (local + 1) * world_size
        choice = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"--global_batch_size {global_batch_size} is not a multiple of the {world_size} ranks; "
            f"set {choice}, or start another number of ranks"
        )
    micro = max(size for size in range(1, min(local, micro_batch_size) + 1) if local % size == 0)
    return micro, local // micro


def training_ds_config(config: RunConfig, ds_config: dict[str, Any], name: str) -> dict[str, Any]:
    """The config of an engine that trains, with the run's numbers.

    Args:
        ds_config: As `resolve` returns it, without batch sizes.
        name: Name of the stage, under which DeepSpeed's monitors write if the config turns one on.
    """
    micro, accum = batch_plan(config.global_batch_size, config.micro_batch_size, dist.world_size())
    return {
        # On by default; it synchronises the host with the GPU, the teacher's stream too, twice a micro-batch.
        "timers": {"throughput": {"enabled": False}},
        **ds_config,
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accum,
        "gradient_clipping": config.max_grad_norm,  # explicit: DeepSpeed's default is 1.0, at every stage
        "zero_force_ds_cpu_optimizer": False,
        **{
            monitor: {**ds_config[monitor], "job_name": f"{ds_config[monitor].get('job_name', 'peakd_ds')}_{name}"}
            for monitor in _FILE_MONITORS
            if monitor in ds_config
        },
    }


def teacher_ds_config(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The config of the frozen teacher's engine. It has no monitor: two engines would write into the same files."""
    kept = {name: value for name, value in ds_config.items() if name not in MONITORS}
    return {**kept, "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0}


def _check_monitor_folders(source: str, config: RunConfig, ds_config: dict[str, Any]) -> None:
    """Raise UserError on rank 0, which writes them, if it may not write a monitor's files; nothing is created."""
    if not dist.is_main():
        return
    for stage in config.stages:
        completed = training_ds_config(config, ds_config, stage)
        for monitor in _FILE_MONITORS:
            if not _is_enabled(completed, monitor):
                continue
            folder = Path(completed[monitor].get("output_path", ""), completed[monitor]["job_name"])
            in_the_way = obstacle(folder)
            if in_the_way is not None:
                raise UserError(
                    f"{source}: {monitor} cannot write to {folder} ({in_the_way} is no folder you may write to); set "
                    "another output_path"
                )


def _check_by_deepspeed(source: str, ds_config: dict[str, Any]) -> None:
    """Raise UserError if DeepSpeed refuses a completed config, which it would do only when the engine starts."""
    try:
        with _silent():
            DeepSpeedConfig(copy.deepcopy(ds_config))
    except Exception as error:  # DeepSpeed raises whatever its parts do
        raise UserError(
            f"{source} is refused by DeepSpeed ({type(error).__name__}: {error}); fix the file, or take one of "
            "ds_configs/"
        ) from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hide what DeepSpeed prints and logs below errors."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


# -- Both configs of a run ---------------------------------------------------------------------------------------------


def resolve(config: RunConfig, is_bf16_fast: bool) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(dtype, training ds config, teacher ds config) as the engines will get them, without batch sizes.

    Args:
        is_bf16_fast: What `--dtype auto` goes by; the same on every rank.

    Raises:
        UserError: dtype and file disagree; fp16 without a GPU, or at student stage 0; a teacher at stage 1 or 2;
            DeepSpeed refuses a config, a monitor's folder cannot be written, or the global batch is not a multiple of
            the number of ranks.
    """
    dtype, student = _student_ds_config(config, is_bf16_fast)
    student_name = config.student_ds_config or f"zero1_{dtype}"
    if dtype == "fp16" and zero_stage(student) == 0:
        raise UserError(
            f"--student_ds_config {student_name} trains in fp16 at ZeRO stage 0, where DeepSpeed does not "
            "scale the loss and small gradients vanish; take zero1_fp16"
        )
    if dtype == "fp16" and not on_gpu():
        raise UserError(
            "fp16 needs a GPU: CPU kernels and gloo have no loss scaling in half precision; set --dtype bf16 or fp32"
        )
    teacher = _teacher_ds_config(config, dtype)
    for source, ds_config, completed in (
        (f"--student_ds_config {student_name}", student, training_ds_config(config, student, "teacher")),
        (f"--teacher_ds_config {config.teacher_ds_config}", teacher, teacher_ds_config(teacher)),
    ):
        _check_accumulation(source, ds_config, dtype)
        _check_by_deepspeed(source, completed)
    _check_monitor_folders(f"--student_ds_config {student_name}", config, student)
    return dtype, student, teacher


def _student_ds_config(config: RunConfig, is_bf16_fast: bool) -> tuple[str, dict[str, Any]]:
    """(dtype, training ds config). Raises UserError if they disagree."""
    dtype = config.dtype
    if not config.student_ds_config:
        if dtype == "auto":
            dtype = "bf16" if is_bf16_fast else "fp32"
        return dtype, load_ds_config(f"zero1_{dtype}", "student_ds_config")
    student = load_ds_config(config.student_ds_config, "student_ds_config")
    stated = next((name for name in ("bf16", "fp16") if _is_enabled(student, name)), "fp32")
    if dtype not in ("auto", stated):
        raise UserError(
            f"--dtype {dtype} does not fit --student_ds_config {config.student_ds_config}, which is "
            f"{stated}; set --dtype {stated} or take another config"
        )
    return stated, student


def _teacher_ds_config(config: RunConfig, dtype: str) -> dict[str, Any]:
    """The teacher's ds config in the run's dtype. Raises UserError if it is of another dtype, or has stage 1 or 2."""
    teacher = load_ds_config(config.teacher_ds_config, "teacher_ds_config")
    if zero_stage(teacher) in (1, 2):
        raise UserError(
            f"--teacher_ds_config {config.teacher_ds_config} has ZeRO stage {zero_stage(teacher)}, which "
            "shards optimizer states and gradients, and a frozen teacher has neither; take stage 0 "
            "(replicated) or 3 (sharded)"
        )
    other = next((name for name in ("bf16", "fp16") if name != dtype and _is_enabled(teacher, name)), None)
    if other is not None:
        raise UserError(
            f"--teacher_ds_config {config.teacher_ds_config} enables {other}, but the run is in {dtype}: the teacher "
            f"computes in the run's dtype; take {other} out of the file, or set --dtype {other}"
        )
    if dtype != "fp32":
        teacher[dtype] = {"enabled": True}
    return teacher


def _check_accumulation(source: str, ds_config: dict[str, Any], dtype: str) -> None:
    """Raise UserError for a dtype in which gradients cannot be accumulated."""
    chosen = ds_config.get("data_types", {}).get("grad_accum_dtype", dtype)
    allowed = [dtype] if zero_stage(ds_config) == 0 else list(dict.fromkeys((dtype, "fp32")))
    if chosen not in allowed:
        raise UserError(
            f"{source}: data_types.grad_accum_dtype is {chosen}, but a run in {dtype} at ZeRO stage "
            f"{zero_stage(ds_config)} accumulates in {' or '.join(allowed)}; set it, or leave it out"
        )


def has_fast_bf16() -> bool:
    """Whether the GPU, or else the CPU (AVX512_BF16 or AMX), multiplies bf16 matrices natively."""
    if on_gpu():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
