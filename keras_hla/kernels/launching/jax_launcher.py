"""Launches under JAX, by jax-triton."""

import functools
import inspect

import jax
import jax_triton
import keras

from keras_hla.backend.jax_axes import differing_along, differing_axes, summed_as
from keras_hla.kernels.launching.jax_partitioning import on_own_rows

# The name that jax-triton has for the shapes of outputs: the first from 0.4 on.
_PARAMETERS = inspect.signature(jax_triton.triton_call).parameters
_OUTPUTS = "out_type" if "out_type" in _PARAMETERS else "out_shape"


def register(function):
    """Does nothing: JAX traces what a `KernelFunction` does."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def call(function, options, tensors):
    """Evaluates a `KernelFunction`, differentiably."""
    results, _ = _evaluate(function, options, False, tensors)
    return results


def _forward(function, options, tensors):
    results, saved = _evaluate(function, options, True, tensors)
    return results, (tensors, saved)


def _backward(function, options, residuals, results):
    tensors, _ = residuals
    wanted = tuple(name for name, x in tensors.items() if keras.backend.is_float_dtype(x.dtype))
    found = _gradients(function, options, wanted, (*residuals, results))
    found = {name: summed_as(x, tensors[name]) for name, x in found.items()}
    return ({name: found.get(name) for name in tensors},)


call.defvjp(_forward, _backward)


@on_own_rows
def _evaluate(function, options, save, tensors):
    return function.evaluate(run, options, tensors, save)


@on_own_rows
def _gradients(function, options, wanted, tensors):
    return function.gradients(run, options, *tensors, wanted)


def run(launch, inputs):
    """Launches a kernel, and returns its outputs."""
    # Without `launch.in_place`: from 0.4 on jax-triton's kernels have no parameter for an output
    # that takes the place of an input.
    inputs = [inputs[0] if x is None else x for x in inputs]
    shapes = [jax.ShapeDtypeStruct(*(x or ((1,), "float32"))) for x in launch.outputs]
    results = jax_triton.triton_call(
        *inputs,
        *launch.numbers,
        kernel=launch.kernel,
        grid=launch.grid,
        **{_OUTPUTS: shapes},
        **launch.constants,
        **launch.options,
    )
    results = differing_along(differing_axes(inputs), results)
    return tuple(None if x is None else r for x, r in zip(launch.outputs, results, strict=True))
