"""Settings of the teacher."""

from dataclasses import dataclass

from peakd_ds.config.setting import setting


@dataclass(frozen=True)
class TeacherSettings:
    """The model that is compressed, and how the student gets its outputs."""

    teacher: str = setting(
        "",
        "folder or hub id of a BERT encoder (it is fine-tuned first) or of a BERT classifier "
        "for the task (it is used as it is)",
        shown_default="required",
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
