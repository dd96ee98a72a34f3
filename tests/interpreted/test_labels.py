"""tests/test_kernels_labels.py again, on Triton in its interpreter."""

import interpreter  # noqa: F401, I001 - first: patches Triton's interpreter, or skips

from test_kernels_labels import *  # noqa: F403
