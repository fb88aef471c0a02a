"""Which dtype tensors have: states, what stages hand on, and what they compute in."""

import keras


def state_dtype(dtype):
    """The dtype of states for inputs of `dtype`: float32, or float64 for float64.

    It is also what every stage and every operator computes in.
    """
    dtype = keras.backend.standardize_dtype(dtype)
    return "float64" if dtype == "float64" else "float32"


def exchanged_dtype(dtype):
    """The dtype in which stages of a layer of compute dtype `dtype` hand tensors on.

    In float16 they would overflow, as the outputs of an operator grow with the length.
    """
    dtype = keras.backend.standardize_dtype(dtype)
    return dtype if dtype == "bfloat16" else state_dtype(dtype)
