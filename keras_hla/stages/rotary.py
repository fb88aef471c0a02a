"""Rotary position embedding (Su et al., arXiv:2104.09864), pairs of features being halves apart."""

import math
from typing import NamedTuple

from keras import ops

from keras_hla.backend.tensors import constant, cos_and_sin, gradients_are_recorded, kept
from keras_hla.precision import state_dtype

# A position is two numbers, blocks of tokens and the tokens besides: one number of float32 would
# count no further than 2**24.
_BLOCK = 2**16
# What an integer of 32 bits takes for a whole turn: products of it wrap where angles do.
_TURN = 2**32


class Turns(NamedTuple):
    """The parts of a whole turn that each feature turns by, as integers; and what these lose."""

    of_token: tuple
    lost_of_token: tuple
    of_block: tuple
    lost_of_block: tuple


def turns_of(dim, max_wavelength):
    """The `Turns` of heads of `dim` features, for angles `max_wavelength ** (-2 i / dim)`."""
    half = dim // 2
    turns = [max_wavelength ** (-i / half) / (2 * math.pi) for i in range(half)]  # per token
    return Turns(*_as_integers(turns), *_as_integers([x * _BLOCK for x in turns]))


def _as_integers(turns):
    parts = [x % 1 * _TURN for x in turns]
    whole = [round(x) for x in parts]
    # As signed integers, of which NumPy and all backends have those of 32 bits.
    signed = [(x + _TURN // 2) % _TURN - _TURN // 2 for x in whole]
    return tuple(signed), tuple(x - y for x, y in zip(parts, whole, strict=True))


def split_position(position):
    """The whole blocks of a position `(batch, 2)`, and the tokens besides; `(batch, 1)` each."""
    return _carry(position[:, :1], position[:, 1:])


def join_position(block, rest):
    """Undoes `split_position`, where there may be more tokens than a block has."""
    return ops.concatenate(_carry(block, rest), axis=1)


def moved_on(position, count):
    """The position after so many more tokens, integers `(batch, 1)`."""
    block, rest = split_position(position)
    more, besides = (ops.cast(x, rest.dtype) for x in (count // _BLOCK, count % _BLOCK))
    return join_position(block + more, rest + besides)


def _carry(block, rest):
    full = ops.cast(ops.floor(rest / _BLOCK), rest.dtype)  # or float32 of float64
    return block + full, rest - full * _BLOCK


def rotation(block, rest, turns):
    """What `rotate` takes: cosines and sines of the angles at positions.

    Args:
        block: Tensor of shape `(batch, 1)`, whole numbers in floating point, or `None` for
            zeros.
        rest: Tensor of shape `(batch, length)`, likewise.
        turns: `Turns`.

    Returns:
        Two tensors of shape `(batch, length, dim / 2)`.
    """
    angle, lost = _turn(rest, turns.of_token, turns.lost_of_token)
    if block is not None:
        of_blocks = _turn(block, turns.of_block, turns.lost_of_block)
        angle, lost = angle + of_blocks[0], lost + of_blocks[1]
    return cos_and_sin((ops.cast(angle, rest.dtype) + lost) * (2 * math.pi / _TURN))


def rotation_from_start(length, turns, dtype):
    """`rotation` of the first tokens. Under PyTorch the last few are kept."""

    def make():
        rest = ops.cast(ops.arange(length), dtype)[None]
        return rotation(None, rest, turns)

    # Tables of long sequences take more memory than they save time.
    return kept(("rotation", length, turns, dtype), make) if length <= _BLOCK else make()


def _turn(count, whole, lost):
    """Parts of a whole turn, as integers that wrap; and what these lose by rounding."""
    count = count[..., None]
    wrapped = ops.cast(count, "int32") * constant(whole, "int32")
    return wrapped, count * constant(lost, count.dtype)


def rotate(x, cos, sin, scale=1.0, fused=False):
    """Rotates each pair `(x_i, x_{i+dim/2})` by its angle, and multiplies it by `scale`.

    Args:
        x: tensor of shape `(batch, length, heads, dim)`.
        cos, sin: tensors of shape `(batch or 1, length, dim / 2)`, in the dtype to compute in.
        scale: number.
        fused: whether kernels compute it.

    Returns:
        A tensor of the shape and dtype of `x`.
    """
    if fused:
        from keras_hla.kernels.stages.rotary import ROTARY

        return ROTARY((scale,), x=x, cos=cos, sin=sin)[0]
    cos, sin = cos[:, :, None], sin[:, :, None]
    return ops.cast(_rotate(ops.cast(x, state_dtype(x.dtype)), cos, sin, scale), x.dtype)


def _rotate(x, cos, sin, scale):
    if gradients_are_recorded(x, cos, sin):
        from keras_hla.backend.torch_gradients import Rotation

        return Rotation.apply(x, scale * cos, scale * sin)
    # Not the angles: XLA would compute those of queries and of keys again and again.
    x = x if scale == 1.0 else scale * x
    first, second = ops.split(x, 2, axis=-1)
    halves = [first * cos - second * sin, second * cos + first * sin]
    return ops.concatenate(halves, axis=-1)
