"""Settings of the run folder, and of what is written when."""

import argparse
import re
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


def _parse_license(text: str) -> str:
    if text and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no licence id; write one of the hub's, such as apache-2.0")
    return text


def _parse_languages(text: str) -> str:
    codes = text.replace(" ", "").split(",") if text else []
    wrong = next((code for code in codes if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*", code)), None)
    if wrong is not None:
        raise argparse.ArgumentTypeError(f"{wrong!r} is no language code; write codes such as en, or de,fr")
    return ",".join(codes)


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
        "also write student_unrolled/model.onnx, checked against onnxruntime, and model_int8.onnx, whose loss of score "
        "is measured (needs the onnx extra)",
        is_neutral=True,
    )
    max_int8_drop: float = setting(
        0.01,
        "warn if model_int8.onnx scores worse by more than this, and recommend model.onnx",
        range=Range(0, 1),
        is_neutral=True,
    )
    trim_vocabulary: bool = setting(
        False,
        "export the student with only those tokens that occur in its training and selection rows; other words become "
        "pieces or unknown",
        is_neutral=True,
    )
    model_license: str = setting(
        "",
        "licence that the model cards state, as the hub names it, such as mit or apache-2.0",
        parse=_parse_license,
        shown_default="none",
        is_neutral=True,
    )
    language: str = setting(
        "",
        "languages of the texts that the model cards state, such as en, or de,fr",
        parse=_parse_languages,
        shown_default="none",
        is_neutral=True,
    )
    dry_run: bool = setting(
        False,
        "check everything, print the plan, and stop before any engine starts",
        is_neutral=True,
    )
