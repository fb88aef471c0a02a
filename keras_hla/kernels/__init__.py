"""Fused kernels for GPUs, in Triton, under PyTorch and JAX."""

from keras_hla.backend.cuda_graphs import (
    disable_cuda_graphs,
    enable_cuda_graphs,
    is_cuda_graphs_enabled,
)
from keras_hla.kernels.choice import IMPLEMENTATIONS, Choice, choose

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "choose",
    "disable_cuda_graphs",
    "enable_cuda_graphs",
    "is_cuda_graphs_enabled",
]
