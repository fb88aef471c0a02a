"""Rotary position embedding (Su et al., arXiv:2104.09864), pairs of features being halves apart."""

import math

from keras import ops
import numpy as np

from keras_hla.backend import cos_and_sin

# A position is two numbers, blocks of tokens and the tokens besides: one number of float32 would
# count no further than 2**24.
_BLOCK = 2**16
# What an integer of 32 bits takes for a whole turn: products of it wrap where angles do.
_TURN = 2**32


def split_position(position):
    """The whole blocks of a position `(batch, 2)`, and the tokens besides; `(batch, 1)` each."""
    return _carry(position[:, :1], position[:, 1:])


def join_position(block, rest):
    """Undoes `split_position`, where there may be more tokens than a block has."""
    return ops.concatenate(_carry(block, rest), axis=1)


def _carry(block, rest):
    full = ops.cast(ops.floor(rest / _BLOCK), rest.dtype)  # or float32 of float64
    return block + full, rest - full * _BLOCK


def rotation(block, rest, dim, max_wavelength):
    """What `rotate` takes: cosines and sines of `position * max_wavelength ** (-2 i / dim)`.

    Args:
        block: Tensor of shape `(batch, 1)`, whole numbers in floating point.
        rest: Tensor of shape `(batch, length)`, likewise.
        dim: Size of a head, even.
        max_wavelength: The longest period, in tokens times `2 π`.

    Returns:
        Two tensors of shape `(batch, length, 1, dim / 2)`.
    """
    half = dim // 2
    turns = max_wavelength ** (-np.arange(half) / half) / (2 * math.pi)  # per token
    wrapped, lost = _turn(rest, turns)
    of_blocks = _turn(block, turns * _BLOCK)
    angle = ops.cast(wrapped + of_blocks[0], rest.dtype) + (lost + of_blocks[1])
    return cos_and_sin(angle * (2 * math.pi / _TURN))


def _turn(count, turns):
    """Parts of a whole turn, as integers that wrap; and what these lose by rounding."""
    count = count[..., None, None]
    parts = turns % 1 * _TURN
    whole = np.round(parts)
    in_32_bits = ops.convert_to_tensor(whole.astype("int64").astype("int32"))
    wrapped = ops.cast(count, "int32") * in_32_bits
    return wrapped, count * ops.cast(parts - whole, count.dtype)


def rotate(x, cos, sin):
    """Rotates each pair `(x_i, x_{i+dim/2})` of a tensor `(..., heads, dim)` by its angle."""
    first, second = ops.split(x, 2, axis=-1)
    return ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
