"""All settings of a run, one file for each group. Nothing heavy is imported here.

`setting.py` says what a field carries. YAML files and the command line are flat: no two groups share a name, and
`RunConfig` has every field of every group. A function that needs one group takes its class, and `RunConfig` is one.
"""

from dataclasses import dataclass, fields
from typing import Any

from peakd_ds.config.data import DataSettings, check_data_source
from peakd_ds.config.engines import EngineSettings
from peakd_ds.config.objective import ObjectiveSettings
from peakd_ds.config.optimisation import OptimisationSettings
from peakd_ds.config.outputs import OutputSettings
from peakd_ds.config.setting import check_text, shown_default
from peakd_ds.config.student import StudentSettings
from peakd_ds.config.teacher import TeacherSettings, check_teacher_source
from peakd_ds.errors import UserError, shown

GROUPS = {
    "Data": DataSettings,
    "Teacher": TeacherSettings,
    "Student": StudentSettings,
    "Objective": ObjectiveSettings,
    "Optimisation": OptimisationSettings,
    "Engines": EngineSettings,
    "Outputs": OutputSettings,
}
"""Settings under the headings of `--help`."""


@dataclass(frozen=True)
class RunConfig(
    OutputSettings,
    EngineSettings,
    OptimisationSettings,
    ObjectiveSettings,
    StudentSettings,
    TeacherSettings,
    DataSettings,
):
    """All settings of a run. Its fields are those of the groups, data first (dataclasses start at the last base)."""

    @property
    def method(self) -> str:
        """Name of the method that the switches add up to, for tables."""
        objective = "pkd" if self.beta > 0 else "kd" if self.alpha > 0 else "finetune"
        sharing = "" if self.sharing == "none" else self.sharing
        if sharing and self.swaps_qk != (self.sharing == "sps"):
            sharing += "+shuffle_qk" if self.swaps_qk else "-shuffle_qk"
        parts = [part for part in (sharing, "ptp" if self.ptp else "", objective) if part]
        return "pea-kd" if parts == ["sps", "ptp", "pkd"] else "+".join(parts)


SPECS = {spec.name: spec for group in GROUPS.values() for spec in fields(group)}
"""The field of each setting, in the order of `--help`."""
RESULT_NEUTRAL = frozenset(spec.name for spec in SPECS.values() if spec.metadata["is_neutral"])
"""Settings that may differ between two starts in one run folder."""


def validate(config: RunConfig) -> None:
    """Raise UserError for the first setting outside its range, with value, rule and remedy."""
    for name in SPECS:
        check_range(name, getattr(config, name))
    check_data_source(config)
    check_teacher_source(config)
    if not config.run_dir:
        raise UserError(f"--run_dir is missing: {SPECS['run_dir'].metadata['help']}; give one")
    if config.init_layers is not None and len(config.init_layers) != config.num_hidden_layers:
        raise UserError(
            f"--init_layers {','.join(map(str, config.init_layers))} names {len(config.init_layers)} "
            f"layers, but --num_hidden_layers is {config.num_hidden_layers}; give one source layer for each"
        )
    if config.teacher_mode == "cached" and config.hidden_loss == "tokens" and config.beta > 0:
        raise UserError(
            "--teacher_mode cached keeps [CLS] vectors only, but --hidden_loss tokens compares every token; set "
            "--teacher_mode online, or --hidden_loss cls"
        )
    if config.teacher_mode == "cached" and config.data_placement == "sharded":
        raise UserError(
            "--teacher_mode cached reads any row on any node, but --data_placement sharded leaves a node its own; "
            "set --teacher_mode online, or --data_placement replicated"
        )
    if config.teacher_outputs and config.beta > 0:
        raise UserError(f"--teacher_outputs has no hidden states, which --beta {config.beta:g} compares; set --beta 0")
    if config.teacher_outputs and not config.student_init:
        raise UserError(
            "--teacher_outputs has no weights to start the student from; give an encoder with --student_init"
        )
    if config.data_placement == "sharded" and not config.shard_dir:
        raise UserError("--data_placement sharded reads shards; make them with peakd-shard and give their --shard_dir")
    if config.export_onnx and not config.export_unrolled:
        raise UserError("--export_onnx writes the unrolled student, which --no_export_unrolled leaves out; drop one")
    check_sharing(config.sharing, config.shuffle_qk)


def check_range(name: str, value: Any) -> None:
    """Raise UserError if the value of a setting is outside its range, or is text that no path can have."""
    spec = SPECS[name]
    check = spec.metadata["check"]
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str):
            check_text(f"--{name}", text)
    if value is not None and check is not None and not check(value):
        rule = spec.metadata["range"]
        raise UserError(f"--{name} {shown(value)} is outside its range {rule}; the default is {shown_default(spec)}")


def check_sharing(sharing: str, shuffle_qk: bool | None) -> None:
    """Raise UserError if query and key are to be exchanged where no layer runs twice."""
    if sharing == "none" and shuffle_qk:
        raise UserError(
            "--shuffle_qk exchanges query and key in a layer's second run, but --sharing none has no "
            "second run; choose --sharing sps, cycle, cycle_rev or sequence"
        )
