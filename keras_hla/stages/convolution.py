"""Short causal convolution: each feature alone over the last tokens, then an activation.

y_t = activation(Σ_i w_i ⊙ x_{t-n+1+i}),   i = 0 … n-1,   n the size of the kernel
"""

import keras
from keras import ops

from keras_hla.backend.tensors import (
    activate,
    at_least,
    count_up,
    is_known,
    is_single_token,
    pad_axis,
    where,
)
from keras_hla.masking import compact, count_tokens, last_count, take


def convolve(x, kernel, activation=None, window=None, mask=None, starts=None, fused=False):
    """Returns the outputs, of the shape and dtype of `x`.

    Args:
        x: tensor of shape `(batch, length, features)`.
        kernel: tensor of shape `(size, features)`, in the dtype to compute in.
        activation: function of the sums, or `None`.
        window: the tokens before, `(batch, size - 1, features)`. `None` is zeros.
        mask: boolean, `(batch, length)`; tokens where it is false are skipped.
        starts: boolean, `(batch, length)`, true where a segment starts; no token
            reads another segment.
        fused: whether kernels compute it.
    """
    if window is not None and mask is None and starts is None and is_single_token(x):
        output = ops.sum(kernel * _row(ops.cast(x, kernel.dtype), None, window), 1, keepdims=True)
        return _activate(output, activation, x.dtype)
    tokens = x if mask is None else compact(x, mask)
    segments = None if starts is None else _segments(mask, starts)
    if fused:
        output = _fused(tokens, kernel, activation, window, segments)
    else:
        output = _portable(tokens, kernel, activation, window, segments)
    return output if mask is None else take(output, at_least(count_tokens(mask) - 1, 0))


def last_window(x, size, window=None, mask=None, starts=None):
    """The last `size - 1` tokens that a token after `x` reads, with zeros for other segments.

    Arguments are those of `convolve`, but for `size`, that of its kernel.
    """
    if mask is None and is_known(x.shape[1]) and x.shape[1] >= size - 1:
        end = x[:, 1 - size :]
    else:
        end = _end(_row(x if mask is None else compact(x, mask), size, window), size, mask)
    if starts is None:
        return end
    segments = _end(_row(_segments(mask, starts), size, None), size, mask)
    return of_last_segment(end, segments)


def of_last_segment(x, segments):
    """`x`, but zeros where a token is of another segment than the last one."""
    return where((segments == segments[:, -1:])[..., None], x, 0)


def _portable(x, kernel, activation, window, segments):
    size = kernel.shape[0]
    taps = _taps(ops.cast(_row(x, size, window), kernel.dtype), size)
    if segments is not None:
        of_taps = _taps(_row(segments, size, None), size)
        taps = [
            where((of_tap == segments)[..., None], tap, 0)
            for of_tap, tap in zip(of_taps, taps, strict=True)
        ]
    output = sum(kernel[i] * tap for i, tap in enumerate(taps))
    return _activate(output, activation, x.dtype)


def _activate(output, activation, dtype):
    return ops.cast(output if activation is None else activate(activation, output), dtype)


def _fused(x, kernel, activation, window, segments):
    from keras_hla.kernels.stages.convolution import CONVOLUTION

    size, length = kernel.shape[0], x.shape[1]
    if window is not None:
        x = _row(x, size, window)
        segments = None if segments is None else _row(segments, size, None)
    is_silu = activation is keras.activations.silu
    after = None if is_silu else activation
    tokens = x if after is None else ops.cast(x, kernel.dtype)  # or sums are rounded before it
    (output,) = CONVOLUTION((is_silu,), x=tokens, kernel=kernel, segments=segments)
    return _activate(output if window is None else output[:, -length:], after, x.dtype)


def _segments(mask, starts):
    """The number of the segment of each token, those first that are unmasked."""
    segments = count_tokens(starts)
    return segments if mask is None else compact(segments, mask)


def _row(x, size, window):
    """The window, or zeros, and then `x`."""
    if window is None:
        return pad_axis(x, size - 1, 0, axis=1)
    return ops.concatenate([ops.cast(window, x.dtype), x], axis=1)


def _taps(row, size):
    """What each token reads, the oldest first: `size` tensors of the length."""
    before = size - 1
    return [row[:, i : i - before or None] for i in range(size)]


def _end(row, size, mask):
    """The last `size - 1` entries that are unmasked."""
    if mask is None:
        return row[:, 1 - size :]
    return take(row, last_count(count_tokens(mask)) + count_up(size - 1))
