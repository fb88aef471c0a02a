"""The three ways to evaluate an operator, on tensors grouped by key head.

Axes are `(batch, key heads, group, length, dim)`; a group is the query heads
that share one key head, and has size 1 for keys and values. Log-decays have
the axes `(batch, key heads, group, length)`, each of the first three of size 1
where they do not differ. Every form takes and returns the tuple of states of
the operator, where `None` is zero, and returns `(outputs, states)`.
"""

import keras
from keras import ops

from keras_hla.layout import group
from keras_hla.loop import scan_tokens
from keras_hla.scan import ChunkedScan, causal_mask, decay_products, merge_axis, split_axis

# TensorFlow is slow at many small products on a CPU.
DEFAULT_CHUNK_SIZE = 128 if keras.config.backend() == "tensorflow" else 64


def chunked(operator, query, key, value, log_decay, state, chunk_size=None):
    """The parallel form."""
    length = ops.shape(query)[-2]
    size = _balanced_chunk_size(length, chunk_size or DEFAULT_CHUNK_SIZE)
    query, key, value = (split_axis(x, size, axis=-2) for x in (query, key, value))
    if log_decay is not None:
        log_decay = split_axis(log_decay, size, axis=-1)
    scan = ChunkedScan(log_decay, size, query.dtype)
    state = state or (None,) * len(operator.state_names)
    output, state = operator.chunked(scan, state, query, key, value)
    return merge_axis(output, length, axis=-2), state


def recurrent(operator, query, key, value, log_decay, state):
    """The serial form."""
    state = state or _zero_state(operator, query, value, log_decay)
    inputs = [ops.moveaxis(x, -2, 0) for x in (query, key, value)]
    if log_decay is not None:
        inputs.append(ops.moveaxis(log_decay, -1, 0))

    def one_token(state, token):
        return _step(operator, state, *token)

    output, state = scan_tokens(one_token, state, tuple(inputs))
    return ops.moveaxis(output, 0, -2), state


def step(operator, query, key, value, log_decay, state):
    """The serial form for a length of one."""
    if log_decay is not None:
        log_decay = log_decay[..., 0]
    query, key, value = (x[..., 0, :] for x in (query, key, value))
    output, state = _step(operator, state, query, key, value, log_decay)
    return output[..., None, :], state


def matrix(operator, query, key, value, log_decay, state):
    """The definition, with its length x length weights; it knows no state."""
    if log_decay is None:
        decay = ops.cast(causal_mask(ops.shape(query)[-2]), query.dtype)
    else:
        decay = decay_products(log_decay)
    return ops.matmul(operator.weights(query, key, decay), value), state


def _step(operator, state, query, key, value, log_decay=None):
    decay = 1.0 if log_decay is None else ops.exp(log_decay)[..., None, None]
    return operator.step(state, query, key, value, decay)


def _zero_state(operator, query, value, log_decay):
    batch, key_heads, size, _, dim = ops.shape(query)
    moments = key_heads * (1 if log_decay is None else log_decay.shape[2])
    shapes = operator.state_shapes(moments, key_heads * size, dim, value.shape[-1])
    zeros = (ops.zeros((batch, *shape), query.dtype) for shape in shapes)
    return tuple(group(x, key_heads) for x in zeros)


def _balanced_chunk_size(length, largest):
    """At most `largest`; less where that fills the last chunk better."""
    if not isinstance(length, int):  # unknown at trace time
        return largest
    chunks = max(1, -(-length // largest))
    return max(1, -(-length // chunks))
