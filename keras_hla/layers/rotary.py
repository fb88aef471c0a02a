"""Rotary position embedding (Su et al., arXiv:2104.09864), pairs of features being halves apart."""

import math

from keras import ops
import numpy as np

from keras_hla.backend import cos_and_sin

# A position is two numbers, whole blocks of tokens and the tokens after them: one number of float32
# would count no further than 2**24.
_BLOCK = 2**16
# What an integer of 32 bits takes for a whole turn: products of it wrap where angles do.
_TURN = 2**32


def advance(position, count):
    """The positions that lie `count` tokens further.

    Args:
        position: Tensor of shape `(batch, 2)`, whole numbers in floating point.
        count: Number, or tensor of shape `(batch or 1, n)`.

    Returns:
        A tensor of shape `(batch, n, 2)`.
    """
    block, rest = _carry(position[:, :1], position[:, 1:])  # where a user has set it
    return ops.stack(_carry(block, rest + count), axis=-1)


def _carry(block, rest):
    full = ops.cast(ops.floor(rest / _BLOCK), rest.dtype)  # or float32 of float64
    return block + full, rest - full * _BLOCK


def rotation(position, dim, max_wavelength):
    """What `rotate` takes: cosines and sines of `position * max_wavelength ** (-2 i / dim)`.

    Args:
        position: Tensor of shape `(..., 2)`, whole numbers in floating point.
        dim: Size of a head, even.
        max_wavelength: The longest period, in tokens times `2 π`.

    Returns:
        Two tensors of shape `(..., 1, dim / 2)`.
    """
    half = dim // 2
    frequency = max_wavelength ** (-np.arange(half) / half) / (2 * math.pi)  # turns per token
    wrapped, rest = 0, ops.zeros((), position.dtype)
    for place, tokens in enumerate((_BLOCK, 1)):
        turns = frequency * tokens
        turns -= np.round(turns)
        whole = np.round(turns * _TURN)
        number = position[..., place, None, None]
        wrapped += ops.cast(number, "int32") * ops.convert_to_tensor(_wrap(whole))
        rest = rest + number * ops.cast(turns - whole / _TURN, number.dtype)
    angle = ops.cast(wrapped, rest.dtype) * (2 * math.pi / _TURN) + rest * (2 * math.pi)
    return cos_and_sin(angle)


def _wrap(x):
    return x.astype("int64").astype("int32")


def rotate(x, cos, sin):
    """Rotates each pair `(x_i, x_{i+dim/2})` of a tensor `(..., heads, dim)` by its angle."""
    first, second = ops.split(x, 2, axis=-1)
    return ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
