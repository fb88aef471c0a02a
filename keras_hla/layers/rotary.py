"""Rotary position embedding (Su et al., arXiv:2104.09864), pairs of features being halves apart."""

import math

from keras import ops
import numpy as np

# Tokens of a block, in which positions are counted so that angles stay exact far out in float32.
_BLOCK = 1024


def rotary_embedding(x, position, max_wavelength):
    """Rotates each pair `(x_i, x_{i+dim/2})` by `position * max_wavelength ** (-2 i / dim)`.

    Args:
        x: Tensor of shape `(..., heads, dim)`, `dim` even.
        position: Tensor of shape `(...,)`, whole numbers in floating point.
        max_wavelength: The longest period, in tokens times `2 π`.

    Returns:
        Tensor of the shape of `x`.
    """
    half = x.shape[-1] // 2
    frequency = max_wavelength ** (-np.arange(half) / half)
    block_angle = np.mod(_BLOCK * frequency, 2 * math.pi)

    position = position[..., None, None]
    block = ops.floor(position / _BLOCK)
    rest = position - block * _BLOCK
    angle = block * ops.cast(block_angle, x.dtype) + rest * ops.cast(frequency, x.dtype)
    cos, sin = ops.cos(angle), ops.sin(angle)
    first, second = ops.split(x, 2, axis=-1)
    return ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
