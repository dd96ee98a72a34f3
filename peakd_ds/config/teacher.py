"""Settings of the teacher."""

from dataclasses import dataclass

from peakd_ds.config.setting import Range, finite_number, setting
from peakd_ds.errors import UserError


@dataclass(frozen=True)
class TeacherSettings:
    """The model that is compressed, and how the student gets its outputs."""

    teacher: str = setting(
        "",
        "folder or hub id of an encoder (it is fine-tuned first) or of a classifier for the task (it is used as it "
        "is): BERT, RoBERTa, DeBERTa, ModernBERT, MPNet, Qwen, Llama and other families",
        shown_default="required, or --teacher_outputs",
    )
    teacher_outputs: tuple[str, ...] | None = setting(
        None,
        "in place of --teacher: parquet or jsonl files with a column logits or probabilities, a number for each class; "
        "each file is one teacher, and several are averaged; they have no hidden states, so beta must be 0",
        shown_default="none",
        is_neutral=True,
        takes_many=True,
    )
    teacher_weights: tuple[float, ...] | None = setting(
        None,
        "weights of the --teacher_outputs, e.g. 2 1",
        parse=finite_number,
        range=Range(0, 1_000_000, is_open=True, each="a number for each file"),
        shown_default="equal ones",
        takes_many=True,
    )
    teacher_mode: str = setting(
        "online",
        "online: the teacher runs beside the student; cached: its outputs are computed once and kept; auto: cached "
        "where they fit the disk, the loss needs [CLS] only and data is replicated",
        choices=("online", "cached", "auto"),
        is_neutral=True,
    )
    teacher_cache: str = setting(
        "",
        "folder of the teacher's outputs, which runs with the same task, teacher, dtype and length may share",
        shown_default="RUN_DIR/teacher_cache",
        is_neutral=True,
    )
    teacher_pooling: str = setting(
        "auto",
        "whose hidden state stands for a row of the teacher, compared with the student's: the first token's (cls), the "
        "last one's (last), or the mean of all; auto: what a sentence-transformers folder says, else last for a causal "
        "model, mean for one that classifies by it, cls for others",
        choices=("auto", "cls", "last", "mean"),
    )


def check_teacher_source(settings: TeacherSettings) -> None:
    """Raise UserError unless there is one kind of teacher, with a weight for each file of outputs or none."""
    files, weights = settings.teacher_outputs or (), settings.teacher_weights or ()
    if not settings.teacher and not files:
        raise UserError("--teacher is missing: give a folder or a hub id, or files of a teacher's --teacher_outputs")
    if settings.teacher and files:
        raise UserError(f"--teacher {settings.teacher} and --teacher_outputs {files[0]} are both given; leave one out")
    if weights and len(weights) != len(files):
        raise UserError(
            f"--teacher_weights gives {len(weights)} numbers, but --teacher_outputs {len(files)} files; give one for "
            "each"
        )
