"""The ways to evaluate an operator, on tensors grouped by key head.

Axes are `(batch, key heads, group, length, dim)`; a group is the query heads
that share one key head, and has size 1 for keys and values. Log-decays have
the axes `(batch, key heads, group, length)`, each of the first three of size 1
where they do not differ. Every form takes and returns the tuple of states of
the operator, where `None` is zero, and returns `(outputs, states)`. The two
forms without states, `matrix` and `unordered`, take and return `None`.
"""

from keras import ops

from keras_hla.backend.loops import scan_serially
from keras_hla.backend.tensors import (
    DEFAULT_CHUNK_SIZE,
    entries_to_loop_over,
    is_known,
    pad_axis,
    size_at_run_time,
)
from keras_hla.distributed_scan import DistributedScan
from keras_hla.grouping import group
from keras_hla.scan import (
    ChunkedScan,
    SingleScan,
    UnorderedScan,
    causal_mask,
    decay_products,
    merge_axis,
    split_axis,
)


def chunked(operator, query, key, value, log_decay, state, chunk_size=None, devices=None):
    """The parallel form, of a whole sequence or of the shard of each device."""
    length = ops.shape(query)[-2]
    if is_known(length) and length == 1 and state is not None and devices is None:
        return step(operator, query, key, value, log_decay, state)
    inputs = query, key, value
    scan, (query, key, value) = _cut_in_chunks(inputs, log_decay, chunk_size, devices)
    state = state or (None,) * len(operator.state_names)
    output, state = operator.chain(scan, state, query, key, value)
    return output if isinstance(scan, SingleScan) else merge_axis(output, length, axis=-2), state


def summarize(operator, query, key, value, log_decay):
    """The tuple that `operator.summarize` makes of the whole length."""
    scan, inputs = _cut_in_chunks((query, key, value), log_decay, None)
    return operator.summarize(scan, *inputs)


def _cut_in_chunks(inputs, log_decay, chunk_size, devices=None):
    length = ops.shape(inputs[0])[-2]
    size = _balanced_chunk_size(length, chunk_size or DEFAULT_CHUNK_SIZE)
    if is_known(length) and length == size and devices is None:
        return SingleScan(log_decay, size, inputs[0].dtype), inputs
    if log_decay is not None:
        log_decay = split_axis(log_decay, size, axis=-1)
    arguments = log_decay, size, inputs[0].dtype
    scan = DistributedScan(*arguments, devices) if devices else ChunkedScan(*arguments)
    return scan, [split_axis(x, size, axis=-2) for x in inputs]


def unordered(operator, query, key, value, log_decay, state):
    """The operator over the whole sequence, with the future as well."""
    state = (None,) * len(operator.state_names)
    output, _ = operator.chain(UnorderedScan(), state, query, key, value)
    return output, None


def recurrent(operator, query, key, value, log_decay, state):
    """The serial form."""
    state = state or _zero_state(operator, query, value, log_decay)
    length = ops.shape(query)[-2]
    # A token of zeros leaves the states as they are.
    filling = entries_to_loop_over(length) - length
    inputs = [ops.moveaxis(pad_axis(x, 0, filling, -2), -2, 0) for x in (query, key, value)]
    if log_decay is not None:
        inputs.append(ops.moveaxis(pad_axis(log_decay, 0, filling, -1), -1, 0))

    def one_token(state, token):
        return _step(operator, state, *token)

    output, state = scan_serially(one_token, state, tuple(inputs))
    return ops.moveaxis(output[:length], 0, -2), state


def step(operator, query, key, value, log_decay, state):
    """The serial form for a length of one."""
    if log_decay is not None:
        log_decay = log_decay[..., 0]
    query, key, value = (x[..., 0, :] for x in (query, key, value))
    output, state = _step(operator, state, query, key, value, log_decay)
    return output[..., None, :], state


def matrix(operator, query, key, value, log_decay, state, causal=True):
    """The definition, with its length x length weights."""
    return weights(operator, query, key, log_decay, causal) @ value, None


def weights(operator, query, key, log_decay, causal=True):
    """The weights of the definition, `(batch, key heads, group, length, length)`."""
    if log_decay is not None:
        return operator.weights(query, key, decay_products(log_decay))
    length = ops.shape(query)[-2]
    decay = causal_mask(length) if causal else ops.ones((length, length))
    return operator.weights(query, key, ops.cast(decay, query.dtype))


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
    if not is_known(length):
        return size_at_run_time(length, largest)
    chunks = max(1, -(-length // largest))
    return max(1, -(-length // chunks))
