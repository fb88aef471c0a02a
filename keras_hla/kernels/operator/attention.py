"""The operators, evaluated by kernels, in the layout of the public functions."""

from keras import ops

from keras_hla.kernels.operator.chain import ATTENTION
from keras_hla.kernels.passes import passes_of


def attention(operator, inputs, state, return_state=True, devices=None):
    """Evaluates an operator.

    Args:
        operator: One of those that the kernels know.
        inputs: `keras_hla.inputs.Inputs`.
        state: List of states, or `None`.
        return_state: Whether the states after the last token are wanted.
        devices: The devices that hold shards of the sequence, or `None`.

    Returns:
        The output, `(batch, length, heads, value_dim)`, and the list of states or `None`.
    """
    if inputs.query.shape[1] == 0:  # of a shard; it takes part in the collectives
        inputs = type(inputs)(*(x if x is None else _with_a_token(x) for x in inputs))
        output, state = attention(operator, inputs, state, return_state, devices)
        return output[:, :0], state
    query, key, value, log_decay = inputs
    if log_decay is not None and 1 < log_decay.shape[2] < query.shape[2]:
        log_decay = ops.repeat(log_decay, query.shape[2] // log_decay.shape[2], axis=2)
    heads, dim = query.shape[2:]
    states = {f"state {i}": state_to_kernel(x, heads) for i, x in enumerate(state or ())}
    passes = tuple(tuple(x) for x in passes_of(operator))
    output, *last = ATTENTION(
        (passes, return_state, devices and devices.kept),
        query=query,
        key=key,
        value=value,
        log_decay=log_decay,
        **states,
    )
    if not return_state:
        return output, None
    shapes = operator.state_shapes(inputs.moments, heads, dim, value.shape[-1])
    last = [state_from_kernel(x, heads, shape[0]) for x, shape in zip(last, shapes, strict=True)]
    return output, last


def _with_a_token(x):
    """Of zeros, which leaves states as they are."""
    return ops.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (len(x.shape) - 2))


def state_to_kernel(x, heads):
    """From `(batch, heads, rows, columns)` to a transposed one for each query head."""
    x = ops.repeat(x, heads // x.shape[1], axis=1) if x.shape[1] < heads else x
    return ops.swapaxes(x, -1, -2)[:, :, None]


def state_from_kernel(x, heads, count):
    """Undoes `state_to_kernel`, for `count` heads."""
    return ops.swapaxes(x[:, :: heads // count, 0], -1, -2)
