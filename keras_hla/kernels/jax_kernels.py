"""The operators by kernels in JAX, with their gradients."""

import functools

import jax
import jax_triton

from keras_hla.kernels import launch


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
    *found, dstates = launch.gradients(
        _run, geometry, query, key, value, log_decay, saved, gradient, state_gradients
    )
    given = (None if x is None else dx for x, dx in zip(states, dstates, strict=True))
    return *found, tuple(given)


attention.defvjp(_forward, _backward)


def _run(kernel, grid, inputs, numbers, outputs, constants, options):
    inputs = [inputs[0] if x is None else x for x in inputs]
    shapes = [jax.ShapeDtypeStruct(*(x or ((1,), "float32"))) for x in outputs]
    results = jax_triton.triton_call(
        *inputs,
        *numbers,
        kernel=kernel,
        out_shape=shapes,
        grid=grid,
        **constants,
        **options,
    )
    return tuple(None if x is None else r for x, r in zip(outputs, results, strict=True))
