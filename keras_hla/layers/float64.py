"""Layers of Keras that stay in float64 under a policy of it.

Keras' own compute in float32 there, products under PyTorch and norms on every backend.
"""

import keras
from keras import ops


def make_dense(units, dtype, **kwargs):
    """A `keras.layers.Dense` without an activation."""
    return _layer(keras.layers.Dense, _Dense64, dtype)(units, dtype=dtype, **kwargs)


def make_rms_norm(dtype, **kwargs):
    """A `keras.layers.RMSNormalization` of the last axis."""
    return _layer(keras.layers.RMSNormalization, _RMSNormalization64, dtype)(dtype=dtype, **kwargs)


def _layer(of_keras, of_float64, dtype):
    # Not for every dtype: Keras quantizes no subclass.
    is_float64 = keras.dtype_policies.get(dtype).compute_dtype == "float64"
    return of_float64 if is_float64 else of_keras


class _Dense64(keras.layers.Dense):
    def call(self, inputs, training=None):
        output = inputs @ ops.convert_to_tensor(self.kernel)
        return output if self.bias is None else output + self.bias


class _RMSNormalization64(keras.layers.RMSNormalization):
    def call(self, x):
        mean = ops.sum(ops.square(x), axis=-1, keepdims=True) / x.shape[-1]
        return x * (mean + self.epsilon) ** -0.5 * self.scale  # `ops.rsqrt` rounds more
