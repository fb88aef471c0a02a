"""Small cases of what the kernels compute, for kernels and for the portable implementation.

Together they cover each branch of the kernels: one span of a sequence and several, states
before and after it, keys that heads share, and more than one tile of tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import keras
from keras import ops
import numpy as np

from keras_hla import stages
from keras_hla.evaluate import evaluate
from keras_hla.inputs import arrange
from keras_hla.precision import state_dtype

_HEADS = 2


class SmallCase(NamedTuple):
    """A function of floating-point tensors.

    Args:
        function: `function(by_kernels, *tensors)` returns a list of tensors.
        inputs: arrays that take the compute dtype of a layer.
        exact: arrays that stay float32; they come after the inputs.
    """

    function: Callable
    inputs: list
    exact: list


def of_operator(operator, dims, decays):
    """The `SmallCase`s of an operator, for `dims` of keys and values, with or without decays."""
    yield _attention(operator, dims, decays, length=100, key_heads=_HEADS, states=False)
    yield _attention(operator, dims, decays, length=520, key_heads=1, states=True)


def _attention(operator, dims, decays, length, key_heads, states):
    dim, value_dim = dims
    rng = np.random.default_rng(0)  # leaves the global seeds of users alone
    inputs = [
        rng.standard_normal((1, length, _HEADS, dim)) * dim**-0.5,
        rng.standard_normal((1, length, key_heads, dim)) * dim**-0.5,
        rng.standard_normal((1, length, key_heads, value_dim)),
    ]
    exact = [np.log(rng.uniform(0.9, 1, (1, length, _HEADS)))] if decays else []
    if states:
        moments = _HEADS if decays else key_heads
        shapes = operator.state_shapes(moments, _HEADS, dim, value_dim)
        exact += [rng.standard_normal((1, *shape)) for shape in shapes]

    def function(by_kernels, query, key, value, *rest):
        log_decay, rest = (rest[0], rest[1:]) if decays else (None, rest)
        output, last = evaluate(
            operator,
            arrange(query, key, value, log_decay),
            list(rest) or None,
            return_state=states,
            implementation="triton" if by_kernels else "portable",
        )
        return [output, *last] if states else [output]

    return SmallCase(function, inputs, exact)


def of_stages(dims):
    """The `SmallCase`s of the stages around an operator, for `dims` of keys and values."""
    dim, value_dim = dims
    dim -= dim % 2  # as features are rotated in pairs
    rng = np.random.default_rng(0)
    length, silu = 70, keras.activations.silu
    sizes = [_HEADS * dim, _HEADS * dim, _HEADS * value_dim]
    angles = rng.uniform(0, 2 * np.pi, (1, length, dim // 2))
    taps = rng.standard_normal((4, sum(sizes)))
    x = rng.standard_normal((1, length, sum(sizes)))
    queries = rng.standard_normal((1, length, _HEADS, dim))
    values, gates = (rng.standard_normal((1, length, _HEADS, value_dim)) for _ in range(2))

    def starts():
        return ops.convert_to_tensor(np.arange(length)[None] == length // 2)

    def cos_and_sin(x):
        dtype = state_dtype(x.dtype)
        return (ops.convert_to_tensor(f(angles), dtype) for f in (np.cos, np.sin))

    def operands(by_kernels, x, taps):
        if by_kernels:
            from keras_hla.kernels.stages.operands import OPERANDS

            options = True, 0.5, _HEADS, _HEADS, dim, value_dim, 0
            segments = ops.cumsum(ops.cast(starts(), "int32"), axis=1)
            cos, sin = cos_and_sin(x)
            return [*OPERANDS(options, x=x, kernel=taps, segments=segments, cos=cos, sin=sin)]
        x = stages.convolve(x, taps, silu, starts=starts())
        query, key, value = (
            ops.reshape(part, (1, length, _HEADS, -1))
            for part in ops.split(x, np.cumsum(sizes)[:2].tolist(), axis=-1)
        )
        cos, sin = cos_and_sin(x)
        return [stages.rotate(query, cos, sin, 0.5), stages.rotate(key, cos, sin), value]

    def convolution(by_kernels, x, taps):
        return [stages.convolve(x, taps, silu, starts=starts(), fused=by_kernels)]

    def rotation(by_kernels, x):
        cos, sin = cos_and_sin(x)
        return [stages.rotate(x, cos, sin, 0.5, fused=by_kernels)]

    def norm(by_kernels, x, scale):
        return [stages.rms_norm(x, scale, 1e-6, fused=by_kernels)]

    def gate(by_kernels, x, gates):
        return [stages.gate(x, gates, silu, fused=by_kernels)]

    yield SmallCase(operands, [x], [taps])
    yield SmallCase(convolution, [x], [taps])
    yield SmallCase(rotation, [queries], [])
    yield SmallCase(norm, [values], [rng.standard_normal(value_dim)])
    yield SmallCase(gate, [values, gates], [])
