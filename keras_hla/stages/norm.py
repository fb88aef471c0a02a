"""Division by the root mean square of the last axis."""

from keras import ops

from keras_hla.backend.tensors import gradients_are_recorded
from keras_hla.precision import state_dtype

LARGEST = 8192  # features that the kernel holds at once


def rms_norm(x, scale, epsilon, fused=False):
    """Returns `x / sqrt(mean(x²) + epsilon) ⊙ scale`, of the shape and dtype of `x`.

    Args:
        x: tensor of shape `(..., features)`.
        scale: tensor of shape `(features,)`, in the dtype to compute in.
        epsilon: positive number.
        fused: whether kernels compute it.
    """
    if fused and x.shape[-1] <= LARGEST:
        from keras_hla.kernels.stages.norm import NORM

        (output,) = NORM((epsilon,), x=x, scale=scale)
        return output
    if gradients_are_recorded(x) and x.is_cpu and x.dtype == scale.dtype:
        from keras_hla.backend.torch_gradients import RootMeanSquareNorm

        return RootMeanSquareNorm.apply(x, scale, epsilon)
    dtype = state_dtype(x.dtype)
    if dtype == "float64":  # which Keras' own is not
        mean = ops.sum(ops.square(x), axis=-1, keepdims=True) / x.shape[-1]
        return x * (mean + epsilon) ** -0.5 * scale  # `ops.rsqrt` rounds more
    return ops.rms_normalization(x, scale, axis=-1, epsilon=epsilon)
