"""Kernels for the operators."""
