"""Projections that stay in float64 under a float64 policy, unlike those of Keras under PyTorch."""

import keras
from keras import ops


def make_dense(units, dtype, **kwargs):
    """A `keras.layers.Dense` without an activation."""
    # Not our own for every dtype: Keras quantizes no subclass.
    is_float64 = keras.dtype_policies.get(dtype).compute_dtype == "float64"
    return (_Dense64 if is_float64 else keras.layers.Dense)(units, dtype=dtype, **kwargs)


class _Dense64(keras.layers.Dense):
    def call(self, inputs, training=None):
        output = inputs @ ops.convert_to_tensor(self.kernel)
        return output if self.bias is None else output + self.bias
