"""The next token, drawn from logits."""

from keras import ops
import numpy as np

from keras_hla.backend.tensors import at_least, where

_SMALLEST = 2.0**-126  # of float32: compilers take smaller numbers for zero


def inverse(temperature):
    """Two numbers of float32 whose product is `1 / temperature`, which need not be one.

    Logits times the first, a power of two, have finite differences where these matter.
    """
    first = 0.5 if temperature < 1 else 2.0**-24
    second = 1 / max(first * temperature, _SMALLEST)
    return np.array([first, max(second, _SMALLEST)], "float32")


def sample(logits, uniform, inverse, top_p, top_k):
    """One token per row, as a function of logits and one random number per row.

        p = softmax(logits / temperature),   token = the first with Σ_{i ≤ token} p_i > uniform

    Logits of +∞ share the whole probability, whatever the others are.

    Args:
        logits: tensor of shape `(batch, vocabulary)`, float32 or float64, as is computed in.
        uniform: tensor of shape `(batch,)`, in [0, 1).
        inverse: tensor of shape `(2,)`, that of the temperature; or `(2, batch, 1)`, of each row.
        top_p: scalar tensor in (0, 1], or of shape `(batch, 1)`: only the most likely tokens that
            together reach it.
        top_k: number of the most likely tokens to draw from; 1 is greedy, `None` is all, in the
            order of the vocabulary, where `top_p` is not looked at.

    Returns:
        int32 tensor of shape `(batch,)`: -1 where a logit is NaN or all of them are -∞.
    """
    uniform, inverse, top_p = (ops.cast(x, logits.dtype) for x in (uniform, inverse, top_p))
    largest = ops.max(logits, axis=-1, keepdims=True)
    none = ops.any(ops.isnan(logits), axis=-1) | (largest[:, 0] == -np.inf)
    if top_k == 1:
        token = ops.argmax(logits, axis=-1)
    elif top_k is None:
        token = _draw(_weights(logits, largest, inverse), uniform)
    else:
        logits, tokens = ops.top_k(logits, top_k)
        weights = _most_likely(_weights(logits, largest, inverse), top_p)
        place = _draw(weights, uniform)[:, None]
        token = ops.take_along_axis(tokens, place, axis=-1)[:, 0]
    return where(none, -1, ops.cast(token, "int32"))


def _weights(logits, largest, inverse):
    """`exp((logits - largest) / temperature)`: the probabilities, but for their sum."""
    first, second = inverse[0], inverse[1]
    difference = where(logits == largest, 0.0, logits * first - largest * first)
    return ops.exp(difference * second)


def _most_likely(weights, top_p):
    """The weights, in falling order, but 0 for those not needed to reach the share `top_p`."""
    sums = ops.cumsum(weights, axis=-1)
    before = ops.pad(sums[:, :-1], ((0, 0), (1, 0)))
    return where(before < at_least(top_p, _SMALLEST) * sums[:, -1:], weights, 0.0)


def _draw(weights, uniform):
    """For each row the first index at which the sum of the weights exceeds `uniform`'s share."""
    sums, possible = ops.cumsum(weights, axis=-1), weights > 0
    reached = possible & (sums > uniform[:, None] * sums[:, -1:])
    # By rounding, none may reach a share close to 1.
    last = ops.shape(weights)[-1] - 1 - ops.argmax(ops.flip(possible, axis=-1), axis=-1)
    return where(ops.any(reached, axis=-1), ops.argmax(reached, axis=-1), last)
