"""The Triton kernels compiled for GPUs that are not here: nothing spills, loads are wide, loops have no barrier.

The budgets stand a little above what Triton 3.7.1 makes (benchmarks/results/aot_budget.csv); another version may move
a few registers, and that is worth knowing.
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
    "fused_kernel": {"cuda": 128, "hip": 96},
    "count_kernel": {"cuda": 64, "hip": 64},
    "finish_kernel": {"cuda": 64, "hip": 64},
    "rescale_kernel": {"cuda": 64, "hip": 64},
}
"""Most registers a thread may have (NVIDIA) or vector registers (AMD)."""
INSTRUCTIONS_PER_ELEMENT = 26
"""Of a streaming loop. At 1.7 GHz, H100's multiprocessors issue 26 for each of the 2 bytes a third of which is due a
picosecond: the loop must stay below what the memory takes."""


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory):
    """What is compiled here is compiled now."""
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
        assert made.registers <= REGISTERS[name][backend], (name, made.registers)
        if name == "fused_kernel" and launch.arguments["NUM_PAIRS"] > 1:
            assert made.loads[128] >= 4, made.loads  # hidden states
        if name == "stream_kernel":
            _check_stream(launch, made, backend)
    assert "stream_kernel" in names or "fused_kernel" in names


def _check_stream(launch, made, backend: str) -> None:
    is_aligned = launch.arguments["IS_ALIGNED"]
    assert is_aligned == (launch.arguments["teacher_stride"] % 8 == launch.arguments["student_stride"] % 8)
    if backend == "hip":  # no loops are told apart: loads of whole rows are 128 bits wide, ends and labels are not
        assert not is_aligned or made.loads[128] >= 4, made.loads
        return
    per_thread = launch.arguments["LANES"] * launch.arguments["WIDTH"] / (32 * launch.num_warps)
    reading = [loop for loop in made.loops if loop.loads]
    assert len(reading) == 2, "two passes over a row"
    for loop in reading:
        assert loop.num_barriers == 0 and loop.num_shuffles == 0
        if is_aligned:
            assert set(loop.loads) == {128} and set(loop.stores) <= {64, 128}, (loop.loads, loop.stores)
            assert loop.num_instructions / per_thread <= INSTRUCTIONS_PER_ELEMENT
