"""Rematerialization: long sequences in small memory, each part recomputed for its gradients."""

from keras import ops

from keras_hla.backend.loops import scan_recomputed


def scan_rematerialized(function, states, inputs, longest, variables):
    """`function(states, **inputs)` for one part of the inputs after the other.

    The backward pass keeps the states between the parts, and what `function`
    computes inside of the one part at which it is.

    Args:
        function: returns outputs `(batch, length, ...)` and a tuple of states.
        states: states before the first part.
        inputs: dictionary of tensors `(batch, length, ...)`, or `None`, by name.
        longest: largest length of a part.
        variables: list of the variables that `function` reads.

    Returns:
        What `function` would return for the whole length.
    """
    inputs = {name: x for name, x in inputs.items() if x is not None}

    def one_part(states, part):
        return function(states, **dict(zip(inputs, part, strict=True)))

    def scan(start, end, size):
        parts = tuple(_cut(x[:, start:end], size) for x in inputs.values())
        output, last = scan_recomputed(one_part, states, parts, variables)
        return _join(output), last

    length = next(iter(inputs.values())).shape[1]
    count = -(-length // longest)
    size = -(-length // count)
    rest = length % size
    states = tuple(states)
    output, states = scan(0, length - rest, size)
    if rest:
        rest_output, states = scan(length - rest, length, rest)
        output = ops.concatenate([output, rest_output], axis=1)
    return output, states


def _cut(x, size):
    """`(batch, length, ...)` to `(parts, batch, size, ...)`."""
    batch, length, *rest = ops.shape(x)
    return ops.swapaxes(ops.reshape(x, (batch, length // size, size, *rest)), 0, 1)


def _join(x):
    """Undoes `_cut`."""
    parts, batch, size, *rest = ops.shape(x)
    return ops.reshape(ops.swapaxes(x, 0, 1), (batch, parts * size, *rest))
