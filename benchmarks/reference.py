"""The definition of the operators and softmax attention, in float64 NumPy, without package code.

`by_matrices` has the definition with its length x length matrices, and the gradients by the
formulas for products of matrices. `on_long_sequence` has outputs of one head by a recurrence over
chunks, or for attention the last rows. Arrays are `(..., length, dim)`, log-decays `(..., length)`.
`attention` and `block` are layers, of arrays `(batch, length, width)`.
"""

import numpy as np

from benchmarks.chains import CHAINS

CHUNK = 64
ROWS = 64  # of softmax attention on a long sequence


def by_matrices(operator, q, k, v, log_decay, cotangent):
    """The outputs, and the gradients of query, key and value."""
    if operator == "softmax":
        return _softmax_by_matrices(q, k, v, cotangent)
    arrays = {"q": q, "k": k, "v": v}
    for step in CHAINS[operator]:
        a, b, c = (arrays[name] for name in (step.a, step.b, step.c))
        mask = step.sign * _decays(q.shape[-2], log_decay, step)
        result = ((a @ _t(b)) * mask) @ c
        arrays[step.target] = arrays.get(step.target, 0) + result
    gradients = {name: np.zeros_like(x) for name, x in arrays.items()} | {"o": cotangent}
    for step in reversed(CHAINS[operator]):
        a, b, c = (arrays[name] for name in (step.a, step.b, step.c))
        mask = step.sign * _decays(q.shape[-2], log_decay, step)
        weights = (a @ _t(b)) * mask
        outer = gradients[step.target]
        scores = (outer @ _t(c)) * mask
        for name, gradient in zip(
            (step.a, step.b, step.c), (scores @ b, _t(scores) @ a, _t(weights) @ outer), strict=True
        ):
            gradients[name] = gradients[name] + gradient
    return arrays["o"], [gradients[name] for name in "qkv"]


def on_long_sequence(operator, q, k, v, log_decay):
    """The outputs at the last positions, all of them for the operators."""
    if operator == "softmax":
        rows = min(ROWS, len(q))
        return _softmax(q[-rows:], k) @ v
    arrays = {"q": q, "k": k, "v": v}
    for step in CHAINS[operator]:
        a, b, c = (arrays[name] for name in (step.a, step.b, step.c))
        result = step.sign * _by_chunks(a, b, c, log_decay, step)
        arrays[step.target] = arrays.get(step.target, 0) + result
    return arrays["o"]


def attention(x, qkv, out, cosines, sines):
    """A layer of causal attention, with the cosines and sines of `angles`."""
    heads = x.shape[-1] // cosines.shape[-1]
    q, k, v = np.moveaxis((x @ qkv).reshape(*x.shape[:2], 3, heads, -1), (2, 3), (0, 2))
    q, k = (_rotate(y, cosines, sines) for y in (q, k))
    output = np.swapaxes(_softmax(q, k) @ v, 1, 2)
    return output.reshape(x.shape) @ out


def block(x, mix, norm, mlp_norm, gate, up, down):
    """The function `mix` and a gated MLP, each with a norm before it, and added to its input."""
    x = x + mix(_rms_norm(x) * norm)
    y = _rms_norm(x) * mlp_norm
    gates = y @ gate
    return x + (gates / (1 + np.exp(-gates)) * (y @ up)) @ down


def angles(length, dim):
    """Float32 arrays of cosines and sines, `(length, dim)`: the two halves of `dim` are alike."""
    turns = 10_000.0 ** (-np.arange(dim // 2) / (dim // 2))
    found = np.tile(np.arange(length)[:, None] * turns, 2)
    return np.cos(found).astype("float32"), np.sin(found).astype("float32")


def relative_error(actual, expected):
    """Norm of the difference over the norm of what is expected; infinite for NaN."""
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    return float(error) if np.isfinite(error) else float("inf")


def _t(x):
    return np.swapaxes(x, -1, -2)


def _decays(length, log_decay, step):
    """The decay from token `j` to what token `t` reads, to the pass's power; `(..., t, j)`."""
    past = np.tri(length, k=-1 if step.exclusive else 0, dtype=bool)
    if log_decay is None:
        return past.astype("float64")
    total = np.cumsum(log_decay, axis=-1)
    read = total - log_decay if step.exclusive else total
    exponent = read[..., :, None] - total[..., None, :]
    return np.exp(np.where(past, step.power * exponent, -np.inf))


def _by_chunks(a, b, c, log_decay, step):
    state = np.zeros((b.shape[1], c.shape[1]))
    outputs = []
    for begin in range(0, len(a), CHUNK):
        piece = slice(begin, begin + CHUNK)
        x, y, z = a[piece], b[piece], c[piece]
        g = np.zeros(len(x)) if log_decay is None else step.power * log_decay[piece]
        total = np.cumsum(g)
        read = total - g if step.exclusive else total
        # The pass's power is in `log_decay` already, and multiplies it there.
        within = _decays(len(x), None if log_decay is None else log_decay[piece], step)
        outputs.append(((x @ y.T) * within) @ z + np.exp(read)[:, None] * (x @ state))
        state = np.exp(total[-1]) * state + (y * np.exp(total[-1] - total)[:, None]).T @ z
    return np.concatenate(outputs)


def _softmax(q, k):
    """The causal attention weights of the last queries, scaled by dim**-0.5."""
    scores = q @ _t(k) * q.shape[-1] ** -0.5
    rows, columns = scores.shape[-2:]
    scores = np.where(np.tri(rows, columns, columns - rows, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _rotate(x, cosines, sines):
    """Rotates each feature of the first half with that of the second, as a complex number."""
    real, imaginary = np.split(x, 2, axis=-1)
    turned = (real + 1j * imaginary) * np.split(cosines + 1j * sines, 2, axis=-1)[0]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _rms_norm(x):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def _softmax_by_matrices(q, k, v, cotangent):
    weights = _softmax(q, k)
    dweights = cotangent @ _t(v)
    dscores = weights * (dweights - np.sum(dweights * weights, axis=-1, keepdims=True))
    dscores = dscores * q.shape[-1] ** -0.5
    return weights @ v, [dscores @ k, _t(dscores) @ q, _t(weights) @ cotangent]
