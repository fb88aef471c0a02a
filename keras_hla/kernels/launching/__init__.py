"""Kernel launches, and functions made of them, under PyTorch and JAX."""

from keras_hla.kernels.launching.kernel_function import KernelFunction
from keras_hla.kernels.launching.launch import Launch, block_of

__all__ = ["KernelFunction", "Launch", "block_of"]
