"""The operators by kernels."""
