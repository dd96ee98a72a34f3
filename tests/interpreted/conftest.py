"""Triton's kernels in its interpreter, on CPU tensors: a process of its own (`make test` starts it), because whether a
kernel is compiled or interpreted is decided when it is imported.

Two things differ from a GPU, and nothing else that these tests look at: the interpreter rounds a fused multiply-add
twice (mended here), and it truncates what it casts to bf16 (allowed for in the tolerances).
"""

import os
from typing import Any

import numpy as np
import pytest

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not IS_INTERPRETED:
        for item in items:
            if "interpreted" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1: make test runs it by itself"))


if IS_INTERPRETED:
    from triton.runtime import interpreter

    def _fma_with_one_rounding(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(exact.astype(x.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = _fma_with_one_rounding
