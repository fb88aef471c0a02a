"""The gate, in Triton: `keras_hla.stages.gate` with the activation `silu`."""

import functools
import math

import triton
import triton.language as tl

from keras_hla.kernels.launching import KernelFunction, Launch
from keras_hla.kernels.stages.tiles import dtype_of, shapes_of_x, silu, silu_gradient

_ELEMENTS = 2048  # of a program


@triton.jit  # for a count of a multiple of 16, where loads are of vectors, and others
def gate_kernel(x, gates, count, output, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x + place, mask=place < count).to(tl.float32)
    g = tl.load(gates + place, mask=place < count).to(tl.float32)
    tl.store(output + place, (silu(g) * x).to(output.dtype.element_ty), mask=place < count)


@triton.jit  # for a count of a multiple of 16, where loads are of vectors, and others
def gate_gradient_kernel(x, gates, gradient, count, dx, dgates, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x + place, mask=place < count).to(tl.float32)
    g = tl.load(gates + place, mask=place < count).to(tl.float32)
    d = tl.load(gradient + place, mask=place < count).to(tl.float32)
    tl.store(dx + place, (d * silu(g)).to(dx.dtype.element_ty), mask=place < count)
    dg = d * x * silu_gradient(g)
    tl.store(dgates + place, dg.to(dgates.dtype.element_ty), mask=place < count)


@functools.lru_cache(maxsize=256)
def _launch(shape, dtype, backward):
    count = math.prod(shape)
    kernel = gate_gradient_kernel if backward else gate_kernel
    outputs = ((shape, dtype),) * (2 if backward else 1)
    return Launch(kernel, (-(-count // _ELEMENTS),), (count,), outputs, {"BLOCK": _ELEMENTS})


def _evaluate(run, options, tensors, save):
    x = tensors["x"]
    return run(_launch(tuple(x.shape), dtype_of(x), False), (x, tensors["gates"])), ()


def _gradients(run, options, tensors, saved, results, wanted):
    x = tensors["x"]
    launch = _launch(tuple(x.shape), dtype_of(x), True)
    dx, dgates = run(launch, (x, tensors["gates"], *results))
    return {"x": dx, "gates": dgates}


#: No options. Tensors: `x`, `gates`.
GATE = KernelFunction("gate", _evaluate, _gradients, shapes_of_x)
