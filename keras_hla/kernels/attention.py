"""The operators by kernels, in the layout of the public functions."""

import keras
from keras import ops

from keras_hla.kernels.choice import kernel_name
from keras_hla.kernels.geometry import Geometry


def attention(operator, inputs, state):
    """Evaluates an operator.

    Args:
        operator: One of those that the kernels know.
        inputs: `keras_hla.ops.inputs.Inputs`.
        state: List of states, or `None`. `S` is taken as symmetric, as sums of `k kᵀ` are.

    Returns:
        The output, `(batch, length, heads, value_dim)`, and the list of states.
    """
    query, key, value, log_decay = inputs
    if log_decay is not None and 1 < log_decay.shape[2] < query.shape[2]:
        log_decay = ops.repeat(log_decay, query.shape[2] // log_decay.shape[2], axis=2)
    batch, length, heads, dim = query.shape
    geometry = Geometry(
        operator=kernel_name(operator),
        batch=batch,
        length=length,
        heads=heads,
        key_heads=key.shape[2],
        dim=dim,
        value_dim=value.shape[-1],
        dtype=keras.backend.standardize_dtype(query.dtype),
        decays=log_decay is not None,
    )
    names = operator.state_names
    states = dict.fromkeys("SPF")
    for name, x in zip(names, state or (None,) * len(names), strict=True):
        states[_slot(name)] = x if x is None else _to_kernel(name, x, heads)
    output, last = _backend().attention(
        geometry, query, key, value, log_decay, tuple(states.values())
    )
    last = dict(zip(states, last, strict=True))
    shapes = operator.state_shapes(inputs.moments, heads, dim, value.shape[-1])
    last = [
        _from_kernel(name, last[_slot(name)], batch, heads, shape[0])
        for name, shape in zip(names, shapes, strict=True)
    ]
    return output, last


def _slot(name):
    """The kernels' name of a state."""
    return "F" if name == "E" else name


def _to_kernel(name, x, heads):
    """`(batch, heads, rows, columns)` for each query head, transposed except for `S`."""
    x = ops.repeat(x, heads // x.shape[1], axis=1) if x.shape[1] < heads else x
    x = x if name == "S" else ops.swapaxes(x, -1, -2)
    return ops.reshape(x, (-1, 1, *x.shape[2:]))


def _from_kernel(name, x, batch, heads, count):
    """Undoes `_to_kernel`, for `count` heads."""
    x = ops.reshape(x, (batch, heads, *x.shape[2:]))[:, :: heads // count]
    return x if name == "S" else ops.swapaxes(x, -1, -2)


def _backend():
    if keras.config.backend() == "jax":
        from keras_hla.kernels import jax_kernels

        return jax_kernels
    from keras_hla.kernels import torch_kernels

    return torch_kernels
