"""The promises to autograd again, on Triton in its interpreter."""

import interpreter  # noqa: F401, I001 - first: mends Triton's interpreter, or skips

from test_kernels_autograd import *  # noqa: F403
