"""The stages before and after an operator by kernels: each the same as in `keras_hla.stages`."""
