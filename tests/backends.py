"""The little that differs between backends in tests."""

import functools

import keras
import numpy as np


def to_numpy(x):
    return np.asarray(keras.ops.convert_to_numpy(x), "float64")


def relative_error(actual, expected):
    """RMS of the difference over RMS of the expected values."""
    actual, expected = to_numpy(actual), to_numpy(expected)
    assert actual.shape == expected.shape
    scale = np.sqrt(np.mean(expected**2))
    return np.sqrt(np.mean((actual - expected) ** 2)) / scale if scale else np.abs(actual).max()


def rounded(array, dtype):
    """A float32 array of numbers of `dtype`."""
    ops = keras.ops
    return ops.convert_to_numpy(ops.cast(ops.cast(array, dtype), "float32"))


def compiled(function):
    """The function, compiled under JAX, where op by op is slow."""
    if keras.config.backend() == "jax":
        import jax

        return jax.jit(function)
    return function


def run(function, *arrays):
    """The function of float32 arrays."""
    return compiled(function)(*(keras.ops.convert_to_tensor(x, "float32") for x in arrays))


def call(layer, sequences, states=(), **options):
    """A built layer on arrays."""

    def function(sequences, *states):
        return layer(sequences, initial_state=list(states) or None, **options)

    return run(function, sequences, *states)


def gradients(function, arrays):
    """The gradients of a scalar function of float32 arrays."""
    return value_and_gradients(lambda *tensors: (function(*tensors), []), arrays)[1]


def value_and_gradients(function, arrays, constants=()):
    """Of a function that returns a scalar and a list: the list, and the scalar's gradients.

    Args:
        function: takes the tensors of `arrays`, then those of `constants`.
        arrays: float32 arrays, with respect to which gradients are taken.
        constants: float32 arrays.
    """
    backend = keras.config.backend()
    tensors, rest = (
        [keras.ops.convert_to_tensor(x, "float32") for x in some] for some in (arrays, constants)
    )
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors)
            scalar, values = function(*tensors, *rest)
        found = tape.gradient(scalar, tensors)
    elif backend == "jax":
        (_, values), found = _compiled_gradients(function, len(tensors))(*tensors, *rest)
    else:
        import torch

        for tensor in tensors:
            tensor.requires_grad_(True)
        scalar, values = function(*tensors, *rest)
        found = torch.autograd.grad(scalar, tensors)
    return [to_numpy(x) for x in values], [to_numpy(x) for x in found]


@functools.cache
def _compiled_gradients(function, count):
    import jax

    return jax.jit(jax.value_and_grad(function, argnums=tuple(range(count)), has_aux=True))


def run_with_unknown_length(function, *arrays):
    """As `run`, but traced without knowing the size of axis 1, where the backend can."""
    if keras.config.backend() != "tensorflow":
        return run(function, *arrays)
    import tensorflow as tf

    signature = [tf.TensorSpec([x.shape[0], None, *x.shape[2:]], "float32") for x in arrays]
    return tf.function(function, input_signature=signature)(*arrays)


def run_with_xla(function, *arrays):
    """As `run`, but under XLA where the backend has it."""
    if keras.config.backend() != "tensorflow":
        return run(function, *arrays)
    import tensorflow as tf

    return tf.function(function, jit_compile=True)(*map(tf.constant, arrays))
