"""Kernels for the stages before and after an operator, each the same as in `keras_hla.stages`."""
