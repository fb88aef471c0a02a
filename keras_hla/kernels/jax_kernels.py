"""The operators by kernels in JAX, with their gradients."""

import functools

import jax
import jax.numpy as jnp
import jax_triton
import triton.language as tl

from keras_hla.kernels import launch
from keras_hla.kernels.backward import backward_kernel
from keras_hla.kernels.combine import combine_kernel
from keras_hla.kernels.decays import decay_kernel
from keras_hla.kernels.forward import forward_kernel

_KERNELS = {
    "forward": forward_kernel,
    "backward": backward_kernel,
    "combine": combine_kernel,
    "decay": decay_kernel,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(geometry, query, key, value, log_decay, states):
    """As in `keras_hla.kernels.torch_kernels`."""
    inputs = (query, key, value, log_decay)
    output, states, _ = launch.evaluate(_run, geometry, *inputs, states, save=False)
    return output, states


def _forward(geometry, query, key, value, log_decay, states):
    inputs = (query, key, value, log_decay)
    output, last, saved = launch.evaluate(_run, geometry, *inputs, states, save=True)
    return (output, last), (*inputs, states, saved)


def _backward(geometry, residuals, gradients):
    query, key, value, log_decay, states, saved = residuals
    gradient, state_gradients = gradients
    dquery, dkey, dvalue, dlog_decay, dstates = launch.gradients(
        _run,
        geometry,
        query,
        key,
        value,
        log_decay,
        saved,
        gradient,
        state_gradients,
        jnp.zeros,
    )
    dkey, dvalue = (_sum_groups(x, key) for x in (dkey, dvalue))
    if dlog_decay is not None:
        shared = tuple(i for i in (0, 2) if log_decay.shape[i] < dlog_decay.shape[i])
        dlog_decay = jnp.sum(dlog_decay, axis=shared, keepdims=True)
    given = (None if x is None else dx for x, dx in zip(states, dstates, strict=True))
    return dquery, dkey, dvalue, dlog_decay, tuple(given)


attention.defvjp(_forward, _backward)


def _sum_groups(x, key):
    """From one gradient for each query head to one for each key head, as `key` has them."""
    batch, length, key_heads, _ = key.shape
    if x.shape[2] == key_heads:
        return x
    x = x.reshape(batch, length, key_heads, -1, x.shape[-1])
    return jnp.sum(x, axis=3).astype(key.dtype)


def _run(kernel, grid, inputs, numbers, outputs, constants, options):
    if "PRODUCT" in constants:
        constants = constants | {"PRODUCT": getattr(tl, constants["PRODUCT"])}
    # Kernels neither read nor write what is None, but compute with its address.
    inputs = [inputs[0] if x is None else x for x in inputs]
    shapes = [jax.ShapeDtypeStruct(*(x or ((1,), "float32"))) for x in outputs]
    results = jax_triton.triton_call(
        *inputs,
        *numbers,
        kernel=_KERNELS[kernel],
        out_shape=shapes,
        grid=grid,
        **constants,
        **options,
    )
    return tuple(None if x is None else r for x, r in zip(outputs, results, strict=True))
