"""The backend in use, as a module of the same few functions for each.

    device_name()                     name of the device
    on_gpu()
    tensor(array, dtype)              on the device
    to_numpy(x)                       in float64
    forward(function, jit)            f(inputs, constants) -> output
    training(function, jit)           f(inputs, constants, cotangent) -> (output, their gradients)
    time_calls(call, argument_sets)   list of milliseconds
    added_memory(call, arguments)     MB that a call needs beside its arguments, or None
    kernels(call, arguments)          names of the kernels of a call on a GPU, or None if unknown
    train_on_batch(model, x, y)       function without arguments that does it, and gives the loss

Functions take tensors, inputs first, then constants. `jit` is "on", "off", or "auto": XLA where
the backend has it.
"""

import importlib

import keras

GPU_BYTES = 150e6  # more than a GPU's cache, so that no call finds its arguments there
GPU_CALLS = 10


def current():
    return importlib.import_module(f"benchmarks.runtime_{keras.config.backend()}")


def copies(runtime, arguments_bytes):
    """The number of sets of arguments that calls use alternately."""
    return min(GPU_CALLS, 1 + int(GPU_BYTES // arguments_bytes)) if runtime.on_gpu() else 1


def calls(runtime, argument_sets):
    """The sets of one sample: repeated to as many calls as it makes."""
    return (argument_sets * GPU_CALLS)[:GPU_CALLS] if runtime.on_gpu() else argument_sets[:1]
