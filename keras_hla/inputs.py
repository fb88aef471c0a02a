"""What every way to evaluate an operator takes: checked tensors, masked, with bounded decays."""

from typing import Any, NamedTuple

from keras import ops

from keras_hla.backend.tensors import where
from keras_hla.checks import (
    as_tensor,
    check_attention_inputs,
    check_log_decay,
    check_mask,
    check_segment_ids,
    check_states,
)
from keras_hla.grouping import group, group_sequence, spread_log_decay
from keras_hla.masking import apply_mask, forget_at, segment_starts
from keras_hla.precision import state_dtype
from keras_hla.scan import bound


class Inputs(NamedTuple):
    """Query, key, value and log-decay.

    The first three are `(batch, length, heads, dim)`, in their own dtype; the log-decay
    is `(batch or 1, length, heads, key heads or 1)`, in the dtype of the states, or `None`.
    """

    query: Any
    key: Any
    value: Any
    log_decay: Any

    @property
    def moments(self):
        """The number of heads of the states that keys alone make: more than theirs with decays."""
        key_heads = self.key.shape[2]
        return key_heads if self.log_decay is None else max(key_heads, self.log_decay.shape[2])

    def state_shapes(self, operator, normalize=False):
        """The shapes `(heads, rows, columns)` of the states, with a denominator or not."""
        _, _, heads, dim = self.query.shape
        return operator.state_shapes(self.moments, heads, dim, self.value.shape[-1] + normalize)

    def grouped(self):
        """These in the dtype of the states and grouped by key head, as `keras_hla.forms` takes."""
        dtype, key_heads = state_dtype(self.query.dtype), self.key.shape[2]
        query, key, value = (group_sequence(ops.cast(x, dtype), key_heads) for x in self[:3])
        log_decay = self.log_decay
        if log_decay is not None:
            log_decay = group(ops.swapaxes(log_decay, 1, 2), key_heads)
        return query, key, value, log_decay


def prepare(query, key, value, log_decay, mask, segment_ids=None, devices=None):
    """Checks the arguments of the public functions, and returns `Inputs`."""
    query, key, value = (ops.convert_to_tensor(x) for x in (query, key, value))
    check_attention_inputs(query, key, value)
    batch, length, heads, _ = query.shape
    log_decay = check_log_decay(
        log_decay, batch, length, (heads, key.shape[2]), state_dtype(query.dtype)
    )
    mask = as_tensor("mask", mask, optional=True)
    segment_ids = as_tensor("segment_ids", segment_ids, optional=True)
    starts = None
    if mask is not None:
        check_mask(mask, batch, length)
        mask = ops.cast(mask, "bool")
    if segment_ids is not None:
        check_segment_ids(segment_ids, batch, length)
        starts = segment_starts(ops.convert_to_tensor(segment_ids), mask, devices)
    return arrange(query, key, value, log_decay, mask, starts)


def arrange(query, key, value, log_decay, mask=None, starts=None):
    """`Inputs` of what has been checked.

    Args:
        query, key, value: tensors of shape `(batch, length, heads, dim)`.
        log_decay: anything broadcastable to `(batch, length, heads)`, or `None`.
        mask: boolean tensor of shape `(batch, length)`. `None` masks nothing.
        starts: boolean tensor of shape `(batch, length)`, true where all before is forgotten.
    """
    dtype = state_dtype(query.dtype)
    log_decay = arrange_log_decay(log_decay, ops.shape(query)[1], dtype, mask, starts)
    if mask is not None:
        query, key, value = apply_mask(mask, query, key, value)
    return Inputs(query, key, value, log_decay)


def arrange_log_decay(log_decay, length, dtype, mask=None, starts=None):
    """The log-decay of `Inputs`."""
    if log_decay is not None:
        log_decay = spread_log_decay(log_decay, length, dtype)
        if mask is not None:
            log_decay = where(mask[..., None], log_decay, 0)
    if starts is not None:
        log_decay = forget_at(starts[..., None], log_decay, dtype)
    return None if log_decay is None else bound(log_decay)


def prepare_state(name, state, operator, shapes, inputs):
    """Checks the argument `name`, a list of states, and returns it in the dtype of states."""
    state = check_states(name, state, inputs.query.shape[0], shapes, operator.state_names)
    dtype = state_dtype(inputs.query.dtype)
    return [ops.cast(x, dtype) for x in state]
