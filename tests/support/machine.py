"""What this machine can do, for tests that are too slow elsewhere."""

import pytest
import torch

needs_bfloat16_kernels = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="without AVX-512, a model of 135M parameters takes minutes here",
)
