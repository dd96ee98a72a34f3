"""The bytes that an optimizer step of the distill stage sends, by formula; docs/scaling.md compares it with counts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """What the traffic of a step depends on. Parameter counts are of stored parameters, however often they run."""

    num_ranks: int
    num_accum_steps: int
    student_stage: int
    """ZeRO stage, 0 to 3."""
    teacher_stage: int
    """ZeRO stage, 0 or 3."""
    student_params: int
    student_small_params: int
    """Parameters in tensors that stage 3 does not shard (stage3_param_persistence_threshold)."""
    teacher_sharded_params: int
    """Parameters that stage 3 shards. The others are never sent, because a frozen model does not change."""
    bytes_per_number: int
    """Size of a weight or gradient on the network: 4 in fp32, 2 in bf16 and fp16."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank passes to the collectives of an optimizer step; for all_gather, the size of its own part."""

    all_reduce: float
    reduce_scatter: float
    all_gather: float

    def sent(self, num_ranks: int) -> float:
        """Bytes that leave a rank when each collective is a ring, as NCCL's are for long messages."""
        share = (num_ranks - 1) / num_ranks
        return 2 * share * self.all_reduce + share * self.reduce_scatter + (num_ranks - 1) * self.all_gather


def step_traffic(sizes: Sizes) -> Traffic:
    """The traffic of an optimizer step, without padding and without the few bytes of norms and flags."""
    n, accum = sizes.num_ranks, sizes.num_accum_steps
    params, small = sizes.student_params, sizes.student_small_params
    reduced = params * (accum if sizes.student_stage >= 2 else 1)  # sharded gradients are reduced in each micro-batch
    if n == 1 and (sizes.student_stage == 0 or (sizes.student_stage == 1 and sizes.bytes_per_number == 2)):
        reduced = 0  # our engine skips it; in the other cases DeepSpeed reduces even on a single rank
    gathered = {0: 0, 1: params, 2: params, 3: accum * (params - small) + small}[sizes.student_stage]
    if sizes.teacher_stage == 3:
        gathered += accum * sizes.teacher_sharded_params
    is_scattered = sizes.student_stage == 3
    return Traffic(
        all_reduce=0.0 if is_scattered else sizes.bytes_per_number * reduced,
        reduce_scatter=sizes.bytes_per_number * reduced if is_scattered else 0.0,
        all_gather=sizes.bytes_per_number * gathered / n if n > 1 else 0.0,
    )
