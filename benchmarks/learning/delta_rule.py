"""The gated delta rule (Yang et al., arXiv:2412.06464), in chunks, for JAX.

    S_t = a_t (I - b_t k_t k_tᵀ) S_{t-1} + b_t k_t v_tᵀ,   o_t = q_tᵀ S_t

A token writes `u_t = b_t (v_t - a_t S_{t-1}ᵀ k_t)` at its key: what its value differs by from what
is read there. So `S_t = a_t S_{t-1} + k_t u_tᵀ`. Within a chunk `u` solves a triangular system,
whose right side is linear in the state before the chunk.
"""

import jax
import jax.numpy as jnp

CHUNK_SIZE = 64


def gated_delta_rule(query, key, value, log_decay, rate, chunk_size=CHUNK_SIZE):
    """The outputs, `(batch, length, heads, dim)`.

    Args:
        query, key, value: `(batch, length, heads, dim)`.
        log_decay: `log a_t`, `(batch, length, heads)`.
        rate: `b_t`, likewise.
        chunk_size: largest number of tokens of a chunk.
    """
    length = query.shape[1]
    size = min(chunk_size, length)
    query, key, value = (_cut(x, size) for x in (query, key, value))
    log_decay, rate = (_cut(x[..., None], size)[..., 0] for x in (log_decay, rate))
    total = jnp.cumsum(log_decay, axis=-1)
    order = jnp.arange(size)
    past = order[:, None] >= order
    within = jnp.exp(jnp.where(past, total[..., :, None] - total[..., None, :], -jnp.inf))
    from_start = jnp.exp(total)[..., None]
    rate = rate[..., None]
    read = rate * within * (key @ key.swapaxes(-1, -2))
    inverse = _inverse(read)
    written, erased = inverse @ (rate * value), inverse @ (rate * from_start * key)
    scores = within * (query @ key.swapaxes(-1, -2))

    def one_chunk(state, chunk):
        written, erased, scores, query, key, decay = chunk
        update = written - erased @ state
        return decay * state + key.swapaxes(-1, -2) @ update, query @ state + scores @ update

    to_end = within[..., -1, :, None]
    chunks = written, erased, scores, query * from_start, key * to_end, from_start[..., -1:, :]
    state = jnp.zeros((*key.shape[1:3], key.shape[-1], value.shape[-1]), key.dtype)
    output = jax.lax.scan(one_chunk, state, chunks)[1]
    return _join(output)[:, :length]


def _inverse(lower):
    """The inverse of `I` plus what `lower`, `(..., n, n)`, holds below its diagonal.

    From blocks of one row on, two blocks and what is left of the lower one are inverted together:
    products alone, as stable as substitution.
    """
    size = lower.shape[-1]
    inverse, rows = jnp.eye(size), 1
    with jax.default_matmul_precision("highest"):
        while rows < size:
            block = jnp.arange(size) // rows
            joins = (block[:, None] == block + 1) & (block % 2 == 0)
            inverse = inverse - inverse @ jnp.where(joins, lower, 0.0) @ inverse
            rows *= 2
    return inverse


def _cut(x, size):
    """From `(batch, length, heads, dim)` to `(chunks, batch, heads, size, dim)`, with zeros."""
    batch, length, heads, dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % size), (0, 0), (0, 0)))
    return jnp.transpose(x.reshape(batch, -1, size, heads, dim), (1, 0, 3, 2, 4))


def _join(x):
    chunks, batch, heads, size, dim = x.shape
    return jnp.transpose(x, (1, 0, 3, 2, 4)).reshape(batch, chunks * size, heads, dim)
