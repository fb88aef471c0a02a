"""Attention and its block in JAX, for `plain_attention`: functions of an input and weights."""

from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.runtime_jax import on_gpu


def announced():
    if on_gpu():
        return 'cudnn (implementation="cudnn")', "*cudnn"
    return 'xla (implementation="xla")', ""


def cast(x, dtype):
    return x.astype(dtype)


def block(x, norm, qkv, out, mlp_norm, gate, up, down, cosines, sines):
    x = x + attention(_rms_norm(x, norm), qkv, out, cosines, sines)
    y = _rms_norm(x, mlp_norm)
    return x + (jax.nn.silu(y @ gate) * (y @ up)) @ down


def attention(x, qkv, out, cosines, sines):
    """Tensors `(batch, length, width)`, and the angles' cosines and sines, `(length, dim)`."""
    dim = cosines.shape[-1]
    q, k, v = jnp.moveaxis((x @ qkv).reshape(*x.shape[:2], 3, -1, dim), 2, 0)
    q, k = (y * cosines[:, None] + _turned(y) * sines[:, None] for y in (q, k))
    attend = partial(jax.nn.dot_product_attention, q, k, v, is_causal=True)
    output = attend(implementation="cudnn") if on_gpu() else attend(implementation="xla")
    return output.reshape(x.shape) @ out


def _turned(x):
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([-b, a], axis=-1)


def _rms_norm(x, scale):
    y = x.astype("float32")
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
    return y.astype(x.dtype) * scale
