"""From the public layout of tensors to the grouped one of the operators, and back.

Public tensors are `(batch, length, heads, dim)`, states `(batch, heads, rows,
columns)`. Inside, heads are two axes, `(key heads, group)`, so that query heads
which share a key head broadcast against it.
"""

from keras import ops

from keras_hla.backend.tensors import contiguous


def group(x, key_heads, axis=1):
    """Splits the axis of the heads into `(key_heads, group)`; a single head stays one."""
    shape = ops.shape(x)
    axis = axis % len(shape)
    heads = shape[axis]
    split = (key_heads, heads // key_heads) if heads % key_heads == 0 else (1, heads)
    return ops.reshape(x, (*shape[:axis], *split, *shape[axis + 1 :]))


def ungroup(x, axis=1):
    """Undoes `group`, `axis` being that of the key heads."""
    shape = ops.shape(x)
    axis = axis % len(shape)
    heads = shape[axis] * shape[axis + 1]
    return ops.reshape(x, (*shape[:axis], heads, *shape[axis + 2 :]))


def group_sequence(x, key_heads):
    """`(batch, length, heads, dim)` to `(batch, key_heads, group, length, dim)`."""
    return group(contiguous(ops.swapaxes(x, 1, 2)), key_heads)


def ungroup_sequence(x):
    """`(batch, key heads, group, length, dim)` to `(batch, length, heads, dim)`."""
    return ops.swapaxes(ungroup(x), 1, 2)


def spread_log_decay(log_decay, length, dtype):
    """Anything broadcastable to `(batch, length, heads)`, over the length.

    Batch and heads keep the size 1 where they do not differ.
    """
    log_decay = ops.cast(ops.convert_to_tensor(log_decay), dtype)
    missing = 3 - len(log_decay.shape)
    log_decay = ops.reshape(log_decay, (*[1] * missing, *ops.shape(log_decay)))
    batch, _, heads = ops.shape(log_decay)
    return ops.broadcast_to(log_decay, (batch, length, heads))
