"""The operators by kernels in JAX, with their gradients."""

import functools

import jax
import jax_triton

from keras_hla.kernels import launch


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 6))
def attention(geometry, query, key, value, log_decay, states, return_state):
    """As in `keras_hla.kernels.torch_kernels`."""
    output, states, _ = launch.evaluate(
        _run, geometry, query, key, value, log_decay, states, False, return_state
    )
    return output, states


def _forward(geometry, query, key, value, log_decay, states, return_state):
    output, last, saved = launch.evaluate(
        _run, geometry, query, key, value, log_decay, states, True, return_state
    )
    return (output, last), (query, key, value, log_decay, states, saved)


def _backward(geometry, return_state, residuals, gradients):
    query, key, value, log_decay, states, saved = residuals
    gradient, state_gradients = gradients
    wanted = [x is not None for x in states]
    *found, dstates = launch.gradients(
        _run, geometry, query, key, value, log_decay, saved, gradient, state_gradients, wanted
    )
    return *found, dstates


attention.defvjp(_forward, _backward)


def _run(step, inputs):
    # Without `step.in_place`: from 0.4 on jax-triton's kernels have no parameter for an output that
    # takes the place of an input.
    inputs = [inputs[0] if x is None else x for x in inputs]
    shapes = [jax.ShapeDtypeStruct(*(x or ((1,), "float32"))) for x in step.outputs]
    results = jax_triton.triton_call(
        *inputs,
        *step.numbers,
        kernel=step.kernel,
        out_shape=shapes,
        grid=step.grid,
        **step.constants,
        **step.options,
    )
    return tuple(None if x is None else r for x, r in zip(step.outputs, results, strict=True))
