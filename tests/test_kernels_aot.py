"""The Triton kernels, compiled for GPUs that need not be present: no spills, wide loads, no barriers in loops.

The budgets are a little above the values of Triton 3.7.1 (benchmarks/results/aot_budget.csv), so another version that
uses noticeably more registers or instructions fails.
"""

import importlib.util
import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET is set, so nothing can be compiled", allow_module_level=True)

spec = importlib.util.spec_from_file_location("aot", Path(__file__).parents[1] / "benchmarks" / "aot.py")
assert spec is not None and spec.loader is not None
aot = importlib.util.module_from_spec(spec)
spec.loader.exec_module(aot)

REGISTERS = {
    "stream_kernel": {"cuda": 56, "hip": 96},
    "stream_kernel, precise": {"cuda": 72, "hip": 96},
    "multi_label_kernel": {"cuda": 128, "hip": 96},
    "fused_kernel": {"cuda": 128, "hip": 96},
    "count_kernel": {"cuda": 64, "hip": 64},
    "finish_kernel": {"cuda": 64, "hip": 64},
    "rescale_kernel": {"cuda": 64, "hip": 64},
}
"""Largest number of registers per thread (NVIDIA), or vector registers (AMD)."""
INSTRUCTIONS_PER_ELEMENT = 26
"""Per element in a streaming loop. While an H100's memory moves the 6 bytes of an element (bf16 student, teacher and
gradient), its multiprocessors issue 52 instructions at 1.7 GHz, 26 for each of the two loops."""
PRECISE_INSTRUCTIONS_PER_ELEMENT = 36
"""The same with the precise KL, which may take longer than the memory."""


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory):
    """A cache of their own, so that every kernel is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("case", aot.CASES)
def test_resources(case: str, target: str) -> None:
    backend = aot.TARGETS[target].backend
    names = []
    for name, launch, made in aot.rows(case, target, skip_common=case != next(iter(aot.CASES))):
        names.append(name)
        assert made.spills == 0 and made.stack_bytes == 0, name
        budget = f"{name}, precise" if launch.arguments.get("IS_PRECISE") else name
        assert made.registers <= REGISTERS[budget][backend], (budget, made.registers)
        if name == "fused_kernel" and launch.arguments["NUM_PAIRS"] > 1:
            assert made.loads[128] >= 4, made.loads  # hidden states
        if name == "stream_kernel":
            _check_stream(launch, made, backend)
    assert {"stream_kernel", "multi_label_kernel", "fused_kernel"} & set(names)


def _check_stream(launch, made, backend: str) -> None:
    is_aligned = launch.arguments["IS_ALIGNED"]
    assert is_aligned == (launch.arguments["teacher_stride"] % 8 == launch.arguments["student_stride"] % 8)
    if backend == "hip":  # the report has no loops: wide loads are those of rows, the others of ragged ends and labels
        assert not is_aligned or made.loads[128] >= 4, made.loads
        return
    per_thread = launch.arguments["LANES"] * launch.arguments["WIDTH"] / (32 * launch.num_warps)
    reading = [loop for loop in made.loops if loop.loads]
    assert len(reading) == 2, "two passes over a row"
    for loop in reading:
        assert loop.num_barriers == 0 and loop.num_shuffles == 0
        if is_aligned:
            assert set(loop.loads) == {128} and set(loop.stores) <= {64, 128}, (loop.loads, loop.stores)
            is_precise = launch.arguments["IS_PRECISE"]
            budget = PRECISE_INSTRUCTIONS_PER_ELEMENT if is_precise else INSTRUCTIONS_PER_ELEMENT
            assert loop.num_instructions / per_thread <= budget
