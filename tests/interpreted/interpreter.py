"""Triton's interpreter, patched where it differs from a GPU. Import this before the kernels.

Two differences affect the loss: the interpreter rounds a fused multiply-add twice (patched here), and it truncates in
casts to bf16 (allowed for by the tolerances).
"""

import os
from typing import Any

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own: make test runs it", allow_module_level=True)

from triton.runtime import interpreter


def _fma_with_one_rounding(self: Any, x: Any, y: Any, z: Any) -> Any:
    exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return interpreter.TensorHandle(exact.astype(x.data.dtype), z.dtype.scalar)


interpreter.InterpreterBuilder.create_fma = _fma_with_one_rounding
