"""Rotary position embedding (Su et al., arXiv:2104.09864), pairs of features being halves apart."""

import math

from keras import ops
import numpy as np

# Tokens of a block, in which positions are counted so that angles stay exact far out in float32.
_BLOCK = 1024


def rotation(position, dim, max_wavelength):
    """What `rotate` takes: cosines and sines of `position * max_wavelength ** (-2 i / dim)`.

    Args:
        position: Tensor of shape `(...,)`, whole numbers in floating point.
        dim: Size of a head, even.
        max_wavelength: The longest period, in tokens times `2 π`.

    Returns:
        Two tensors of shape `(..., 1, dim / 2)`.
    """
    half = dim // 2
    frequency = max_wavelength ** (-np.arange(half) / half)
    block_angle = np.mod(_BLOCK * frequency, 2 * math.pi)

    position = position[..., None, None]
    block = ops.floor(position / _BLOCK)
    rest = position - block * _BLOCK
    dtype = position.dtype
    angle = block * ops.cast(block_angle, dtype) + rest * ops.cast(frequency, dtype)
    return ops.cos(angle), ops.sin(angle)


def rotate(x, cos, sin):
    """Rotates each pair `(x_i, x_{i+dim/2})` of a tensor `(..., heads, dim)` by its angle."""
    first, second = ops.split(x, 2, axis=-1)
    return ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
