"""Argument checks of the functions and the layers; each raises `ValueError`."""

import math
import numbers

import keras
from keras import ops
import numpy as np


def check_positive_int(name, value, optional=False):
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        allowed = "a positive integer" + (" or None" if optional else "")
        raise ValueError(f"Argument `{name}` must be {allowed}. Received: {name}={value!r}")


def check_number(name, value, allowed, valid=lambda value: True):
    """Checks a finite real number; `allowed` says in words what `valid` checks besides."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not valid(value):
        raise ValueError(f"Argument `{name}` must be {allowed}. Received: {name}={value!r}")


def check_choice(name, value, allowed):
    if value not in allowed:
        raise ValueError(
            f"Argument `{name}` must be one of {list(allowed)}. Received: {name}={value!r}"
        )


def as_tensor(name, x, optional=False, dtype=None):
    """Returns a tensor or an array as it is, and of lists and numbers a tensor of the dtype."""
    if (optional and x is None) or (hasattr(x, "shape") and hasattr(x, "dtype")):
        return x
    try:
        tensor = ops.convert_to_tensor(x, dtype)
        if keras.backend.standardize_dtype(tensor.dtype) == "string":  # of TensorFlow
            raise TypeError("Strings are no numbers.")
        return tensor
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Argument `{name}` must be a tensor, or nested lists of numbers. "
            f"Received: {name} of {type(x)}"
        ) from error


def check_rank(rank, axes, **tensors):
    """Returns the list of them, as `as_tensor` does."""
    tensors = {name: as_tensor(name, x) for name, x in tensors.items()}
    for name, tensor in tensors.items():
        if len(tensor.shape) != rank:
            raise ValueError(
                f"Argument `{name}` must have shape {axes}. "
                f"Received: {name}.shape={tuple(tensor.shape)}"
            )
    return list(tensors.values())


def check_features(name, shape, axes):
    """Checks the shape with which a layer is built."""
    if len(shape) != axes.count(",") + 1 or not isinstance(shape[-1], int):
        raise ValueError(
            f"Argument `{name}` must have shape {axes}, with a known number of features. "
            f"Received: {name}.shape={tuple(shape)}"
        )


def check_head_groups(num_heads, num_key_value_heads):
    if num_heads % num_key_value_heads:
        raise ValueError(
            "The number of key and value heads must divide the number of query heads "
            f"(`num_heads`). Received: num_heads={num_heads}, "
            f"num_key_value_heads={num_key_value_heads}"
        )


def check_attention_inputs(query, key, value):
    """Checks that `(batch, length, heads, dim)` tensors fit together."""
    if not _equal(query.shape[0], key.shape[0], value.shape[0]):
        wrong = "Arguments `query`, `key` and `value` must have the same batch size"
    elif not _equal(query.shape[1], key.shape[1], value.shape[1]):
        wrong = "Arguments `query`, `key` and `value` must have the same length"
    elif query.shape[3] != key.shape[3]:
        wrong = "Arguments `query` and `key` must have the same last dimension"
    elif key.shape[2] != value.shape[2]:
        wrong = "Arguments `key` and `value` must have the same number of heads"
    elif None in (*query.shape[2:], *key.shape[2:], *value.shape[2:]):
        wrong = "Arguments `query`, `key` and `value` must have known numbers of heads and dims"
    else:
        wrong = None
    if wrong:
        received = ", ".join(
            f"{name}.shape={tuple(x.shape)}"
            for name, x in (("query", query), ("key", key), ("value", value))
        )
        raise ValueError(f"{wrong}. Received: {received}")
    check_head_groups(query.shape[2], key.shape[2])
    dtypes = [keras.backend.standardize_dtype(x.dtype) for x in (query, key, value)]
    if len(set(dtypes)) > 1 or "float" not in dtypes[0]:
        raise ValueError(
            "Arguments `query`, `key` and `value` must have the same floating dtype. "
            f"Received: query, key and value of dtypes {dtypes}"
        )


def check_log_decay(log_decay, batch, length, heads, dtype):
    """Returns `log_decay` as an array or tensor that broadcasts to `(batch, length, heads)`.

    Args:
        log_decay: a number, an array, a tensor, or `None`.
        batch: batch size, or `None` if unknown.
        length: length, or `None` if unknown.
        heads: tuple of the allowed numbers of heads.
        dtype: dtype of the tensor that numbers become.
    """
    if log_decay is None:
        return None
    received, log_decay = log_decay, as_tensor("log_decay", log_decay, dtype=dtype)
    if not _at_most_zero(received):
        raise ValueError(
            "Argument `log_decay` must be finite and <= 0, or -inf: decays lie in [0, 1]. "
            f"Received: log_decay={received}"
        )
    shape = tuple(log_decay.shape)
    padded = (1,) * (3 - len(shape)) + shape
    allowed = ((1, batch), (1, length), (1, *heads))
    if len(padded) != 3 or not all(
        any(_equal(size, option) for option in options)
        for size, options in zip(padded, allowed, strict=True)
    ):
        raise ValueError(
            "Argument `log_decay` must be broadcastable to (batch, length, heads) = "
            f"({batch}, {length}, {' or '.join(map(str, dict.fromkeys(heads)))}). "
            f"Received: log_decay.shape={shape}"
        )
    return log_decay


def _at_most_zero(x):
    """Whether numbers and arrays are at most zero, NaN not; of tensors it is not known."""
    if isinstance(x, list | tuple):
        return all(map(_at_most_zero, x))
    if isinstance(x, np.ndarray):
        return bool(np.all(x <= 0))
    return x <= 0 if isinstance(x, numbers.Real) else True


def check_mask(mask, batch, length):
    dtype = keras.backend.standardize_dtype(mask.dtype)
    if dtype != "bool" and "int" not in dtype:
        raise ValueError(f"Argument `mask` must be boolean. Received: mask.dtype={dtype}")
    shape = tuple(mask.shape)
    if not fits(shape, (batch, length)):
        raise ValueError(
            f"Argument `mask` must have shape (batch, length) = ({batch}, {length}). "
            f"Received: mask.shape={shape}"
        )


def check_segment_ids(segment_ids, batch, length):
    dtype = keras.backend.standardize_dtype(segment_ids.dtype)
    shape = tuple(segment_ids.shape)
    if "int" not in dtype or not fits(shape, (batch, length)):
        raise ValueError(
            f"Argument `segment_ids` must be integers of shape (batch, length) = ({batch}, "
            f"{length}). Received: segment_ids.shape={shape}, segment_ids.dtype={dtype}"
        )


def check_noncausal(operator, log_decay, masked):
    """Checks what goes with `causal=False`."""
    if log_decay is not None or not masked:
        raise ValueError(
            "With `causal=False` tokens have no order: it goes with `log_decay=None`, and there "
            f"is no mask for `masked=False` to leave out. Received: log_decay={log_decay}, "
            f"masked={masked}"
        )
    if operator.exclusive:
        raise ValueError(
            f"Operator {type(operator).__name__} is defined by its causal recurrence, without a "
            "form for `causal=False`. Received: causal=False"
        )


def check_segments_allowed(operator, causal):
    """Checks what goes with `segment_ids`."""
    if operator.exclusive or not causal:
        raise ValueError(
            "Argument `segment_ids` needs causal=True and an operator that reads no state from "
            f"before a token. Received: causal={causal}, operator={type(operator).__name__}"
        )


def check_states(name, states, batch, shapes, state_names):
    """Checks a list of states against the shapes that follow the batch axis, and returns it."""
    if not isinstance(states, list | tuple) or len(states) != len(shapes):
        what = f"{len(states)} values" if isinstance(states, list | tuple) else type(states)
        raise ValueError(
            f"Argument `{name}` must be a list of the states {list(state_names)}. Received: {what}"
        )
    states = [as_tensor(name, state) for state in states]
    for state, shape, state_name in zip(states, shapes, state_names, strict=True):
        expected, received = (batch, *shape), tuple(ops.shape(state))
        if not fits(received, expected):
            raise ValueError(
                f"The state {state_name} in argument `{name}` must have shape {expected}. "
                f"Received: shape {received}"
            )
    return states


def check_shape(name, x, expected):
    """Checks a shape against one in which `None` is any size."""
    received = tuple(ops.shape(x))
    if not fits(received, expected):
        raise ValueError(
            f"Argument `{name}` must have shape {tuple(expected)}. Received: shape {received}"
        )


def fits(shape, expected):
    """Whether a shape is the expected one, as far as both are known at trace time."""
    return len(shape) == len(expected) and all(map(_equal, shape, expected))


def _equal(*sizes):
    """Whether sizes are equal, as far as they are known at trace time."""
    return len({size for size in sizes if isinstance(size, int)}) <= 1
