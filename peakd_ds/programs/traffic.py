"""The bytes that an optimiser step of the distill stage sends, as a formula; docs/scaling.md has counts beside it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """What the traffic of a step depends on. Parameters count as often as they are stored, not as they run."""

    num_ranks: int
    num_accum_steps: int
    student_stage: int
    teacher_stage: int
    student_params: int
    student_small_params: int
    """Of them those in tensors that stage 3 keeps whole on every rank (stage3_param_persistence_threshold)."""
    teacher_sharded_params: int
    """Those that stage 3 shards: the others never travel, since a frozen model does not change."""
    bytes_per_number: int
    """Of weights and gradients on their way: 4 in fp32, 2 in bf16 and fp16."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank hands to the collectives of one optimiser step; for gathering, its own part."""

    all_reduce: float
    reduce_scatter: float
    all_gather: float

    def sent(self, num_ranks: int) -> float:
        """Bytes that leave a rank when the collectives go round a ring, as those of NCCL do for long messages."""
        share = (num_ranks - 1) / num_ranks
        return 2 * share * self.all_reduce + share * self.reduce_scatter + (num_ranks - 1) * self.all_gather


def formula(sizes: Sizes) -> Traffic:
    """The traffic of a step, without padding and the few bytes of norms and flags."""
    n, accum = sizes.num_ranks, sizes.num_accum_steps
    params, small = sizes.student_params, sizes.student_small_params
    reduced = params * (accum if sizes.student_stage >= 2 else 1)  # shards of gradients cannot accumulate whole ones
    if n == 1 and (sizes.student_stage == 0 or (sizes.student_stage == 1 and sizes.bytes_per_number == 2)):
        reduced = 0  # ds_engine leaves it out; elsewhere DeepSpeed reduces with itself
    gathered = {0: 0, 1: params, 2: params, 3: accum * (params - small) + small}[sizes.student_stage]
    if sizes.teacher_stage == 3:
        gathered += accum * sizes.teacher_sharded_params
    is_scattered = sizes.student_stage == 3
    return Traffic(
        all_reduce=0.0 if is_scattered else sizes.bytes_per_number * reduced,
        reduce_scatter=sizes.bytes_per_number * reduced if is_scattered else 0.0,
        all_gather=sizes.bytes_per_number * gathered / n if n > 1 else 0.0,
    )
