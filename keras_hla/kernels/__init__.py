"""Fused kernels for GPUs, in Triton, under PyTorch and JAX."""

from keras_hla.kernels.choice import IMPLEMENTATIONS, Choice, choose

__all__ = ["IMPLEMENTATIONS", "Choice", "choose"]
