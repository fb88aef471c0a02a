"""The operators by kernels, in the layout of the public functions."""

import keras
from keras import ops

from keras_hla.kernels.geometry import geometry_of


def attention(operator, inputs, state, return_state=True):
    """Evaluates an operator.

    Args:
        operator: One of those that the kernels know.
        inputs: `keras_hla.ops.inputs.Inputs`.
        state: List of states, or `None`.
        return_state: whether the states after the last token are wanted.

    Returns:
        The output, `(batch, length, heads, value_dim)`, and the list of states or `None`.
    """
    query, key, value, log_decay = inputs
    if log_decay is not None and 1 < log_decay.shape[2] < query.shape[2]:
        log_decay = ops.repeat(log_decay, query.shape[2] // log_decay.shape[2], axis=2)
    batch, length, heads, dim = query.shape
    geometry = geometry_of(
        operator,
        batch,
        length,
        heads,
        key.shape[2],
        dim,
        value.shape[-1],
        keras.backend.standardize_dtype(query.dtype),
        log_decay is not None,
    )
    shapes = operator.state_shapes(inputs.moments, heads, dim, value.shape[-1])
    states = tuple(x if x is None else _to_kernel(x, heads) for x in state or (None,) * len(shapes))
    output, last = _backend().attention(
        geometry, query, key, value, log_decay, states, return_state
    )
    if not return_state:
        return output, None
    last = [_from_kernel(x, batch, heads, shape[0]) for x, shape in zip(last, shapes, strict=True)]
    return output, last


def _to_kernel(x, heads):
    """From `(batch, heads, rows, columns)` to a transposed one for each query head."""
    x = ops.repeat(x, heads // x.shape[1], axis=1) if x.shape[1] < heads else x
    x = ops.swapaxes(x, -1, -2)
    return ops.reshape(x, (-1, 1, *x.shape[2:]))


def _from_kernel(x, batch, heads, count):
    """Undoes `_to_kernel`, for `count` heads."""
    x = ops.reshape(x, (batch, heads, *x.shape[2:]))[:, :: heads // count]
    return ops.swapaxes(x, -1, -2)


def _backend():
    if keras.config.backend() == "jax":
        from keras_hla.kernels import jax_kernels

        return jax_kernels
    from keras_hla.kernels import torch_kernels

    return torch_kernels
