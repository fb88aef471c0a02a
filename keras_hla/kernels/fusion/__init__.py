"""Many stages as one function of PyTorch, with a fraction of the CPU overhead."""

from keras_hla.kernels.fusion.recorder import Recorder
from keras_hla.kernels.operator.attention import state_from_kernel, state_to_kernel

__all__ = ["Recorder", "state_from_kernel", "state_to_kernel"]
