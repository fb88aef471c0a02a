"""Many stages as one function of PyTorch, which takes a fraction of the host's time."""

from keras_hla.kernels.fusion.recorder import Recorder

__all__ = ["Recorder"]
