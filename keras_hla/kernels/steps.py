"""The launches of kernels that a geometry asks for, as far as they are known before their inputs.

They are found once for each geometry, as kernels take no longer than it takes to find them.
"""

import dataclasses
import functools
from typing import Any

import triton.language as tl

from keras_hla.kernels.backward import backward_kernel
from keras_hla.kernels.decays import decay_gradient_kernel, decay_kernel
from keras_hla.kernels.forward import forward_kernel
from keras_hla.kernels.sums import sum_kernel

_cached = functools.lru_cache(maxsize=4096)


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One launch. Its arguments are the inputs, `numbers` and what is allocated for `outputs`."""

    kernel: Any
    grid: tuple
    numbers: tuple
    outputs: tuple  # of pairs `(shape, dtype)`, or `None` for what the kernel does not store
    constants: dict
    options: dict = dataclasses.field(default_factory=dict)
    in_place: dict = dataclasses.field(default_factory=dict)  # outputs: the inputs they overwrite
    compiled: dict = dataclasses.field(default_factory=dict)  # by device, for the backend


@_cached
def forward(geometry, one, entering, save, leaving):
    """Gives the output, the state after it if `leaving`, and if `save` those before each chunk."""
    dtype = geometry.dtype if one is geometry.passes[-1] else geometry.product_dtype
    outputs = (
        geometry.sequence(one.output, dtype),
        geometry.state(one, 1) if leaving else None,
        geometry.state(one, geometry.chunks, geometry.product_dtype) if save else None,
    )
    return _of_pass(
        forward_kernel, geometry, one, outputs, ENTERING=entering, SAVE=save, LEAVING=leaving
    )


@_cached
def backward(geometry, one, entering, add_query, add_key, leaving):
    """Gives the gradients of query, key, and value; `flows` and `inners`; that of the state."""
    names = ["query", one.key] + ([one.value] if one.value != one.key else [])
    outputs = [geometry.sequence(x, _dtype_of_gradient(geometry, one, x)) for x in names]
    outputs += [None] * (3 - len(outputs))
    count = (geometry.rows, geometry.chunks)
    decay_outputs = [((*count, geometry.chunk), "float32"), (count, "float32")]
    outputs += decay_outputs if geometry.decays else [None, None]
    outputs.append(geometry.state(one, 1) if leaving else None)
    step = _of_pass(
        backward_kernel,
        geometry,
        one,
        outputs,
        ENTERING=entering,
        LEAVING=leaving,
        ADD_QUERY=add_query,
        ADD_KEY=add_key,
    )
    # A gradient that is added to has the dtype of the products, and is not needed after it.
    for place, (name, added) in enumerate({"dquery": add_query, "dkey": add_key}.items()):
        if added and outputs[place][1] == geometry.product_dtype:
            step.in_place[place] = backward_kernel.arg_names.index(f"{name}_before")
    return step


@_cached
def sums(geometry, one, reverse):
    """Gives the states of segments and the decays over them."""
    constants: dict[str, Any] = {"REVERSE": reverse}
    if reverse:  # the queries, and the gradients of outputs
        constants |= {"KEY_GROUP": 1, "VALUE_GROUP": 1, "SAME": False}
    totals = ((geometry.rows, geometry.segments), "float32") if geometry.decays else None
    outputs = (geometry.state(one, geometry.segments), totals)
    return _of_pass(sum_kernel, geometry, one, outputs, **constants)


@_cached
def decays(geometry, shape):
    """Gives what the kernels need of log-decays of `shape`: see `decay_kernel`."""
    batch, length, heads = shape
    strides = (length * heads if batch > 1 else 0, heads, 1 if heads > 1 else 0)
    output = ((geometry.rows, geometry.chunks, 4, geometry.chunk), "float32")
    exact = geometry.product_dtype == "float32"
    return _of_chunks(decay_kernel, geometry, strides, output, EXACT=exact)


@_cached
def decay_gradient(geometry):
    """Gives the gradient of log-decays, for each head."""
    output = ((geometry.batch, geometry.length, geometry.heads), "float32")
    return _of_chunks(decay_gradient_kernel, geometry, (), output)


def _of_pass(kernel, geometry, one, outputs, **constants):
    """A program for each segment of each row."""
    constants = geometry.constants(one) | constants
    constants["PRODUCT"] = getattr(tl, geometry.product_dtype)
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    grid = (geometry.rows * geometry.segments,)
    numbers = (geometry.length, geometry.heads, geometry.segments, geometry.chunks_of_segment)
    options = geometry.options(one, backward=kernel is backward_kernel)
    return Step(kernel, grid, numbers, tuple(outputs), constants, options)


def _of_chunks(kernel, geometry, numbers, output, **constants):
    """A program for each chunk of each row."""
    grid = (geometry.rows * geometry.chunks,)
    numbers = (geometry.length, geometry.heads, *numbers)
    return Step(kernel, grid, numbers, (output,), {"CHUNK": geometry.chunk, **constants})


def _dtype_of_gradient(geometry, one, name):
    """That of the products for what earlier passes add to or take, else that of the input."""
    earlier = geometry.passes[: geometry.passes.index(one)]
    if any(name in ("query", other.key, other.value, other.output) for other in earlier):
        return geometry.product_dtype
    # Where heads share keys, their gradients are yet to be summed.
    shared = geometry.heads > geometry.key_heads and name != "query"
    return "float32" if shared else geometry.dtype
