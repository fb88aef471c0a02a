"""The next token, drawn from logits."""

from keras import ops


def sample(logits, uniform, temperature, top_p, top_k):
    """One token per row, as a function of logits and one random number per row.

        p = softmax(logits / temperature),   token = the first with Σ_{i ≤ token} p_i > uniform

    Args:
        logits: tensor of shape `(batch, vocabulary)`.
        uniform: tensor of shape `(batch,)`, in [0, 1).
        temperature: positive scalar tensor.
        top_p: scalar tensor in (0, 1]: only the likeliest tokens that together reach it.
        top_k: number of the likeliest tokens to draw from; 1 is greedy, `None` is all, in the
            order of the vocabulary, where `top_p` is not looked at.

    Returns:
        int32 tensor of shape `(batch,)`.
    """
    if top_k == 1:
        return ops.cast(ops.argmax(logits, axis=-1), "int32")
    logits = ops.cast(logits, "float32")
    tokens = None
    if top_k is not None:
        logits, tokens = ops.top_k(logits, top_k)
    weights = ops.softmax(logits / temperature)
    if top_k is not None:
        before = ops.cumsum(weights, axis=-1) - weights
        weights = ops.where(before < top_p, weights, 0.0)
    sums = ops.cumsum(weights, axis=-1)
    index = ops.sum(ops.cast(sums <= uniform[:, None] * sums[:, -1:], "int32"), axis=-1)
    # By rounding, the last sum may not exceed a number close to 1.
    last = ops.shape(logits)[-1] - 1 - ops.argmax(ops.flip(weights, axis=-1) > 0, axis=-1)
    index = ops.minimum(index, ops.cast(last, "int32"))
    if tokens is None:
        return ops.cast(index, "int32")
    return ops.cast(ops.take_along_axis(tokens, index[:, None], axis=-1)[:, 0], "int32")
