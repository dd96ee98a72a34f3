"""Settings of the run folder, and of what is written when."""

import argparse
from dataclasses import dataclass

from peakd_ds.config.setting import Range, setting

STAGES = ("teacher", "ptp", "distill")
MAX_STEPS = 1_000_000_000


def _parse_stages(text: str) -> tuple[str, ...]:
    chosen = text.replace(" ", "").split(",")
    unknown = [name for name in chosen if name not in STAGES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown stage {unknown[0]!r}; choose from {','.join(STAGES)}")
    return tuple(name for name in STAGES if name in chosen)


@dataclass(frozen=True)
class OutputSettings:
    """The run folder, what is written to it and when."""

    run_dir: str = setting(
        "",
        "folder that receives everything the run writes; started again in it, a run continues",
        shown_default="$RUN_DIR, else required",
        is_neutral=True,
    )
    stages: tuple[str, ...] = setting(
        STAGES,
        "stages to run, comma-separated",
        parse=_parse_stages,
        range="teacher,ptp,distill",
        is_neutral=True,
    )
    save_steps: int = setting(
        500,
        "checkpoint every this many steps and at the end of each epoch; 0: epochs only",
        unit="steps",
        range=Range(0, MAX_STEPS),
        is_neutral=True,
    )
    eval_steps: int = setting(
        0,
        "evaluate every this many steps and at the end of each epoch; 0: epochs only",
        unit="steps",
        range=Range(0, MAX_STEPS),
        is_neutral=True,
    )
    log_steps: int = setting(
        10,
        "write metrics every this many steps",
        unit="steps",
        range=Range(1, MAX_STEPS),
        is_neutral=True,
    )
    export_unrolled: bool = setting(
        True,
        "also write the student in transformers' own class, at the effective depth",
        is_neutral=True,
    )
    export_onnx: bool = setting(
        False,
        "also write student_unrolled/model.onnx, checked against onnxruntime (needs the onnx extra)",
        is_neutral=True,
    )
    trim_vocabulary: bool = setting(
        False,
        "export the student with only those tokens that occur in its training and selection rows; other words become "
        "pieces or unknown",
        is_neutral=True,
    )
    dry_run: bool = setting(
        False,
        "check everything, print the plan, and stop before any engine starts",
        is_neutral=True,
    )
