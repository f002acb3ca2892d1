"""What this machine can do, for tests that are too slow elsewhere."""

import pytest

from peftchat.models.loading import has_bfloat16_kernels

needs_bfloat16_kernels = pytest.mark.skipif(
    not has_bfloat16_kernels(),
    reason="without AVX-512, a model of 135M parameters takes minutes here",
)
