"""A gate: one tensor times an activation of another."""

import keras
from keras import ops

from keras_hla.backend.tensors import activate
from keras_hla.precision import state_dtype


def gate(x, gates, activation, fused=False):
    """Returns `activation(gates) ⊙ x`, of the shape and dtype of `x`.

    Args:
        x: tensor.
        gates: tensor of the shape and dtype of `x`.
        activation: function of the gates.
        fused: whether kernels compute it, where they know the activation: `silu`.
    """
    if fused and activation is keras.activations.silu:
        from keras_hla.kernels.stages.gate import GATE

        (output,) = GATE((), x=x, gates=gates)
        return output
    dtype = state_dtype(x.dtype)
    return ops.cast(activate(activation, ops.cast(gates, dtype)) * ops.cast(x, dtype), x.dtype)
