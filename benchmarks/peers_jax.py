"""Peers on JAX: attention by cuDNN and by XLA, and a minimal chunked form."""

import jax
import jax.numpy as jnp

from benchmarks import chains
from benchmarks.contenders import Contender
from benchmarks.minimal import minimal_peers
from benchmarks.runtime_jax import on_gpu

CHUNK = 64


def peers(case, operators):
    """All peers, also those that cannot run here."""
    found = minimal_peers(case, operators, minimal)
    if on_gpu():
        found.append(Contender("jax cudnn", "softmax", _attention("cudnn"), peer="jax_cudnn"))
    else:
        found.append(Contender("jax cudnn", "softmax", unavailable="needs a GPU", peer="jax_cudnn"))
    found.append(Contender("jax xla", "softmax", _attention("xla"), peer="jax_xla"))
    return found


def minimal(operator, query, key, value):
    """The chunked form of a chain, and nothing else."""
    batch, length, heads, _ = query.shape
    padding = -length % CHUNK

    def chunks(x):
        """Shape (batch, heads, chunks, tokens, dim)."""
        x = jnp.pad(x.astype("float32"), ((0, 0), (0, padding), (0, 0), (0, 0)))
        return x.reshape(batch, -1, CHUNK, heads, x.shape[-1]).transpose(0, 3, 1, 2, 4)

    mask = jnp.tri(CHUNK)

    def attend(a, b, c, power):
        sums = b.mT @ c
        # Faster than `jnp.cumsum`, the more so for its gradient.
        before = jax.lax.associative_scan(jnp.add, sums, axis=2) - sums
        return ((a @ b.mT) * mask) @ c + a @ before

    output = chains.run(operator, chunks(query), chunks(key), chunks(value), attend)
    output = output.transpose(0, 2, 3, 1, 4).reshape(batch, length + padding, heads, -1)
    return output[:, :length].astype(query.dtype)


def _attention(implementation):
    def function(query, key, value, log_decay=None):
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation=implementation
        )

    return function
