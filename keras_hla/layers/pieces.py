"""Long sequences in small memory: piece by piece, each computed again for its gradients."""

from keras import ops

from keras_hla.backend import scan_recomputed


def scan_in_pieces(function, states, inputs, longest, variables):
    """`function(states, **inputs)` for one piece of the inputs after the other.

    The backward pass keeps the states between the pieces, and what `function`
    computes inside of the one piece at which it is.

    Args:
        function: returns outputs `(batch, length, ...)` and a tuple of states.
        states: states before the first piece.
        inputs: dictionary of tensors `(batch, length, ...)`, or `None`, by name.
        longest: largest length of a piece.
        variables: list of the variables that `function` reads.

    Returns:
        What `function` would return for the whole length.
    """
    inputs = {name: x for name, x in inputs.items() if x is not None}

    def one_piece(states, piece):
        return function(states, **dict(zip(inputs, piece, strict=True)))

    def scan(start, end, size):
        pieces = tuple(_cut(x[:, start:end], size) for x in inputs.values())
        output, last = scan_recomputed(one_piece, states, pieces, variables)
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
    """`(batch, length, ...)` to `(pieces, batch, size, ...)`."""
    batch, length, *rest = ops.shape(x)
    return ops.swapaxes(ops.reshape(x, (batch, length // size, size, *rest)), 0, 1)


def _join(x):
    """Undoes `_cut`."""
    pieces, batch, size, *rest = ops.shape(x)
    return ops.reshape(ops.swapaxes(x, 0, 1), (batch, pieces * size, *rest))
