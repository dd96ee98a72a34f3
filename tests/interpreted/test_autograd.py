"""tests/test_kernels_autograd.py again, on Triton in its interpreter."""

import interpreter  # noqa: F401, I001 - first: patches Triton's interpreter, or skips

from test_kernels_autograd import *  # noqa: F403
