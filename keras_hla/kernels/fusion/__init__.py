"""Many stages as one function of PyTorch, with a fraction of the CPU overhead."""

from keras_hla.kernels.fusion.recorder import Recorder

__all__ = ["Recorder"]
