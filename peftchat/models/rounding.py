"""Stochastic rounding to bfloat16: up or down, with the probability that keeps the mean.

The weights of a base lie on bfloat16's grid. An update of less than half the distance between two values is lost where
the sum is rounded to the nearest one, in all weights alike. Rounded up or down, it is there on average.
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

_PER_COUNTER = 16
"""Numbers of 16 bits that Philox gives for each value of its counter."""


def round_with_noise(values: Tensor, noise: Tensor) -> Tensor:
    """Return float32 values in bfloat16, rounded up or down.

    A bfloat16 number is the upper half of a float32 one. The noise is added to the lower half, which is then cut off.

    Args:
        values: float32.
        noise: random numbers from 0 to 2^16 - 1, int32, of the same shape; overwritten.
    """
    bits = values.contiguous().view(torch.int32)
    # Cutting off rounds toward zero for both signs, so the carry of the sum alone rounds away from it.
    rounded = noise.add_(bits).bitwise_and_(-(2**16)).view(torch.float32)
    # The sum of a NaN can be the bits of a number.
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def noise_of_rows(name: str, start: int, shape: torch.Size) -> Tensor:
    """Return the noise of some rows of a tensor: the same for a row, whatever other rows are asked for with it.

    The numbers are Philox's (Salmon et al., 2011), whose counter says the row.

    Args:
        name: of the tensor.
        start: number of the first row.
        shape: of the rows.

    Returns:
        int32, of that shape, from 0 to 2^16 - 1.
    """
    rows = shape[0] if shape else 1
    width = math.prod(shape[1:])
    counters = -(-width // _PER_COUNTER)
    key = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:16], "little")
    numbers = np.random.Philox(key=key, counter=start * counters).random_raw(rows * counters * 4)
    noise = numbers.view(np.uint16).reshape(rows, -1)[:, :width].astype(np.int32)
    return torch.from_numpy(noise).reshape(shape)
