"""From the arguments of the public functions to what `keras_hla.forms` takes."""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_hla.checks import (
    check_attention_inputs,
    check_log_decay,
    check_mask,
    check_segment_ids,
    check_states,
)
from keras_hla.layout import apply_mask, group, group_log_decay, group_sequence, segment_starts
from keras_hla.scan import zero_decay


class Inputs(NamedTuple):
    """Checked tensors, in the dtype of the states and grouped by key head."""

    query: Any
    key: Any
    value: Any
    log_decay: Any


def prepare(query, key, value, log_decay, mask, segment_ids=None):
    """Checks `(batch, length, heads, dim)` tensors, and returns `Inputs`."""
    query, key, value = (ops.convert_to_tensor(x) for x in (query, key, value))
    check_attention_inputs(query, key, value)
    batch, length, heads, _ = query.shape
    key_heads = key.shape[2]
    log_decay = check_log_decay(log_decay, batch, length, (heads, key_heads))
    if mask is not None:
        check_mask(mask, batch, length)
        mask = ops.cast(mask, "bool")
    if segment_ids is not None:
        check_segment_ids(segment_ids, batch, length)

    dtype = state_dtype(query.dtype)
    query, key, value = (group_sequence(ops.cast(x, dtype), key_heads) for x in (query, key, value))
    if log_decay is not None:
        log_decay = group_log_decay(log_decay, ops.shape(query)[-2], key_heads, dtype)
    if mask is not None:
        query, key, value, log_decay = apply_mask(mask, query, key, value, log_decay)
    if segment_ids is not None:
        starts = segment_starts(ops.convert_to_tensor(segment_ids), mask)
        log_decay = forget_at(starts[:, None, None, :], log_decay, dtype)
    return Inputs(query, key, value, log_decay)


def prepare_state(name, state, operator, inputs):
    """Checks the argument `name`, a list of states, and returns it grouped as `inputs`."""
    batch, key_heads, size, _, dim = inputs.query.shape
    own_moments = inputs.log_decay is not None and inputs.log_decay.shape[2] > 1
    moments = key_heads * size if own_moments else key_heads
    shapes = operator.state_shapes(moments, key_heads * size, dim, inputs.value.shape[-1])
    check_states(name, state, batch, shapes, operator.state_names)
    return tuple(group(ops.cast(x, inputs.query.dtype), key_heads) for x in state)


def forget_at(starts, log_decay, dtype):
    """The log-decay with which tokens at `starts` forget all before them."""
    log_decay = 0.0 if log_decay is None else log_decay
    return ops.cast(ops.where(starts, zero_decay(dtype), log_decay), dtype)


def state_dtype(dtype):
    """The dtype of states for inputs of `dtype`: float32, or float64 for float64."""
    dtype = keras.backend.standardize_dtype(dtype)
    return "float64" if dtype == "float64" else "float32"
