"""What a layer does before and after its operator: pure functions of tensors.

Each takes and gives tensors of one dtype, and computes in that of the states inside. It has a
portable form, in `keras.ops`, and with `fused=True` one by kernels, that computes the same.
"""

import keras

from keras_hla.stages.convolution import convolve, last_window, of_last_segment
from keras_hla.stages.gate import gate
from keras_hla.stages.norm import rms_norm
from keras_hla.stages.rotary import rotate

__all__ = ["are_fused", "convolve", "gate", "last_window", "of_last_segment", "rms_norm", "rotate"]


def are_fused(implementation):
    """Whether kernels compute the stages beside an operator that has this implementation.

    XLA makes kernels of the portable ones that are as fast.
    """
    return implementation == "triton" and keras.config.backend() == "torch"
