"""What a layer does before and after its operator: pure functions of tensors.

Each takes and gives tensors of one dtype, and computes in that of the states inside. It has a
portable form, in `keras.ops`, and with `fused=True` one by kernels, that computes the same.
"""

from keras_hla.stages.convolution import convolve, last_window
from keras_hla.stages.gate import gate
from keras_hla.stages.norm import rms_norm
from keras_hla.stages.rotary import rotate

__all__ = ["convolve", "gate", "last_window", "rms_norm", "rotate"]
