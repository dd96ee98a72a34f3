"""Settings of the engines, kernels and ranks."""

from dataclasses import dataclass

from peakd_ds.config.setting import Range, setting

RANK_TIMEOUT_S = 100.0


@dataclass(frozen=True)
class EngineSettings:
    """Precision, DeepSpeed configs and kernels."""

    dtype: str = setting(
        "auto",
        "compute precision; auto: the DeepSpeed config's, else bf16 if GPU or CPU (AVX512_BF16, AMX) has it, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    student_ds_config: str = setting(
        "",
        "DeepSpeed config of the trained model: file, or name in ds_configs/",
        shown_default="zero1_DTYPE",
        is_neutral=True,
    )
    teacher_ds_config: str = setting(
        "teacher_zero0",
        "DeepSpeed config of the frozen teacher (stage 0 or 3): file, or name in ds_configs/",
        is_neutral=True,
    )
    loss_backend: str = setting(
        "auto",
        "what computes the losses: triton (GPUs), torch (fused, for CPUs), reference (plain autograd); auto: triton on "
        "a GPU, else torch",
        choices=("auto", "triton", "torch", "reference"),
        is_neutral=True,
    )
    rank_timeout: float = setting(
        RANK_TIMEOUT_S,
        "all ranks end if one does not join, or is silent, for this long",
        unit="s",
        range=Range(5, 86_400),
        is_neutral=True,
    )
