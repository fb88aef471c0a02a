"""Stands for jax-triton on CPUs: each kernel of the operators is what it is to compute, in JAX.

To be imported before the package is, in a fresh process.
"""

import importlib.machinery
import sys
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp

launched: list[tuple] = []  # the name of a kernel, and the shape of its first input


def triton_call(*arguments, kernel, grid, out_shape, **constants):
    """The outputs of a kernel."""
    name = kernel.fn.__name__
    launched.append((name, arguments[0].shape))
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    results = KERNELS[name](SimpleNamespace(**given, **constants, shapes=out_shape))
    return [
        jnp.zeros(like.shape, like.dtype) if x is None else x.reshape(like.shape).astype(like.dtype)
        for x, like in zip(results, out_shape, strict=True)
    ]


def attend(query, key, value, log_decay, state, power):
    """The output of a pass and the state after it, `(batch, heads, value_dim, dim)`."""
    total, exp = sums_of(log_decay, power)
    between = total[..., :, None] - total[..., None, :]
    causal = jnp.tril(jnp.ones(between.shape[-2:], bool))
    weights = jnp.where(causal, exp(jnp.where(causal, between, 0)), 0)
    scores = jnp.einsum("bthd,bshd->bhts", query, key) * weights
    output = jnp.einsum("bhts,bshe->bthe", scores, value)
    output += jnp.einsum("bthd,bhed,bht->bthe", query, state, exp(total))
    to_end = exp(total[..., -1:] - total)
    last = jnp.einsum("bshd,bshe,bhs->bhed", key, value, to_end)
    return output, last + exp(total[..., -1])[..., None, None] * state


def sums_of(log_decay, power):
    """Sums of log-decays, which may be large, in float64 where that is on; and a function of such.

    It gives exponentials of float32.
    """
    total = power * jnp.cumsum(log_decay.astype(float), axis=-1)
    return total, lambda x: jnp.exp(x).astype("float32")


def operands(x, state):
    """The arguments of `attend`, with a key for each query head."""
    query = jnp.repeat(x.query, x.QUERY_GROUP, axis=2)
    batch, length, heads, _ = query.shape
    key = jnp.repeat(x.key, x.KEY_GROUP, axis=2)
    value = jnp.repeat(x.value, x.VALUE_GROUP, axis=2)
    log_decay = decays_of(x, batch, length)
    if state is None:
        state = jnp.zeros((batch, heads, x.VALUE_DIM, x.DIM), "float32")
    return query, key, value, log_decay, state


def decays_of(x, batch, length):
    """The log-decays, `(batch, heads, length)`."""
    if not x.DECAYS:
        return jnp.zeros((batch, x.heads, length), "float32")
    return x.decays[:, :, 0].reshape(batch, x.heads, -1)[..., :length]


def forward_kernel(x):
    """Of the states before chunks it returns only the first."""
    arguments = operands(x, x.entering[:, :, 0] if x.ENTERING else None)
    output, last = attend(*arguments, x.POWER)
    output *= x.SCALE
    if x.FACTOR:
        output += x.FACTOR * jnp.repeat(x.added, x.ADDED_GROUP, axis=2)
    chunk_states = None
    if x.SAVE:
        chunk_states = jnp.zeros(x.shapes[2].shape, "float32").at[:, :, 0].set(arguments[-1])
    return output, last if x.LEAVING else None, chunk_states


def backward_kernel(x):
    """Where keys are the values, or the queries, the gradient is that of both."""
    arguments = operands(x, x.chunk_states[:, :, 0])
    (_, last), pull = jax.vjp(lambda *tensors: attend(*tensors, x.POWER), *arguments)
    of_last = x.entering.reshape(last.shape) if x.ENTERING else jnp.zeros_like(last)
    dquery, dkey, dvalue, dlog_decay, dstate = pull((x.SCALE * x.gradient, of_last))
    if x.SAME:
        dkey, dvalue = dkey + dvalue, None
    if x.KEY_IS_QUERY:
        dquery, dkey = dquery + dkey, None
    if x.QUERY_FACTOR:
        dquery += x.QUERY_FACTOR * x.SCALE * x.gradient
    dquery = dquery + x.dquery_before if x.ADD_QUERY else dquery
    dkey = dkey + x.dkey_before if x.ADD_KEY else dkey
    flows = in_chunks(dlog_decay, x.shapes[3].shape) if x.DECAYS else None
    return dquery, dkey, dvalue, flows, None, dstate if x.LEAVING else None


def decay_kernel(x):
    """In the place of their sums the log-decays."""
    rows, chunks, _, chunk = x.shapes[0].shape
    log_decay = jnp.broadcast_to(x.log_decay, (rows // x.heads, x.length, x.heads))
    log_decay = in_chunks(log_decay.swapaxes(1, 2), (rows, chunks, chunk))
    return [jnp.zeros(x.shapes[0].shape, "float32").at[:, :, 0].set(log_decay)]


def decay_gradient_kernel(x):
    """From gradients in the place of flows."""
    batch, length, heads = x.shapes[0].shape
    return [x.flows.reshape(batch, heads, -1)[..., :length].swapaxes(1, 2)]


def in_chunks(x, shape):
    """From `(batch, heads, length)` to `(batch * heads, chunks, chunk)`."""
    x = x.reshape(shape[0], -1)
    return jnp.pad(x, ((0, 0), (0, shape[1] * shape[2] - x.shape[1]))).reshape(shape)


def span_kernel(x):
    """Of the only span of a short shard; without shards nothing, as spans are then not separate."""
    if not x.ALL:
        return [None] * len(x.shapes)
    key, value = x.key, x.key if x.SAME else x.value
    log_decay = decays_of(x, key.shape[0], key.shape[1])
    total, exp = sums_of(log_decay, x.POWER)
    weights = exp(total if x.REVERSE else total[..., -1:] - total)
    key = jnp.repeat(key, x.heads // key.shape[2], axis=2)
    value = jnp.repeat(value, x.heads // value.shape[2], axis=2)
    if x.REVERSE:
        value = x.SCALE * value
    whole = exp(total[..., -1]) if x.DECAYS else None
    return jnp.einsum("bshd,bshe,bhs->bhed", key, value, weights), whole


def shard_kernel(x):
    """Of one span."""
    decays = jnp.ravel(x.span_decays)[: x.rows if x.DECAYS else 0]
    return [jnp.concatenate([jnp.ravel(x.span_states), decays])]


def between_kernel(x):
    size, rows = x.rows * x.SIZE, x.rows
    state = jnp.ravel(x.entering) if x.ENTERING else jnp.zeros(size)
    before, shards = [None] * len(x.shards), list(enumerate(x.shards))
    for m, shard in shards[::-1] if x.REVERSE else shards:
        before[m] = jnp.pad(state, (0, x.stride - size))
        decay = shard[size:, None] if x.DECAYS else 1.0
        state = jnp.ravel(state.reshape(rows, -1) * decay) + shard[:size]
    return jnp.stack(before), state


KERNELS = {
    x.__name__: x
    for x in (
        forward_kernel,
        backward_kernel,
        decay_kernel,
        decay_gradient_kernel,
        span_kernel,
        shard_kernel,
        between_kernel,
    )
}

stand_in = ModuleType("jax_triton")  # of which a type checker knows no attribute
stand_in.triton_call = triton_call  # type: ignore[attr-defined]
stand_in.__spec__ = importlib.machinery.ModuleSpec("jax_triton", None)
sys.modules["jax_triton"] = stand_in
