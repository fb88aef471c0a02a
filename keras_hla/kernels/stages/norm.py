"""Division by the root mean square, in Triton: `keras_hla.stages.rms_norm`."""

import functools
import math

import triton
import triton.language as tl

from keras_hla.kernels.launching import KernelFunction, Launch, block_of
from keras_hla.kernels.stages.tiles import dtype_of, like, rows_of, shapes_of_x


@triton.jit
def _load(
    x,
    scale,
    rows,
    DIM: tl.constexpr,
    EPSILON: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The addresses and the mask of a tile, its normalized rows, their factors, the scale."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    place = row[:, None] * DIM + column[None, :]
    inside = (row < rows)[:, None] & (column < DIM)[None, :]
    x = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, 1) / DIM + EPSILON)
    scale = tl.load(scale + column, mask=column < DIM, other=0.0).to(tl.float32)
    return place, inside, x * factor[:, None], factor, scale


@triton.jit(do_not_specialize=("rows",))
def norm_kernel(
    x,
    scale,
    rows,
    output,
    DIM: tl.constexpr,
    EPSILON: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place, inside, x, _, scale = _load(x, scale, rows, DIM, EPSILON, ROWS, BLOCK)
    y = x * scale[None, :]
    tl.store(output + place, y.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("rows",))
def norm_gradient_kernel(
    x,
    scale,
    gradient,
    rows,
    dx,
    dscale,
    DIM: tl.constexpr,
    EPSILON: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of `x`, and the gradient of the scale for each program."""
    place, inside, x, factor, scale = _load(x, scale, rows, DIM, EPSILON, ROWS, BLOCK)
    g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    column = tl.arange(0, BLOCK)
    tl.store(
        dscale + tl.program_id(0).to(tl.int64) * DIM + column, tl.sum(g * x, 0), mask=column < DIM
    )
    g *= scale[None, :]
    g = factor[:, None] * (g - x * (tl.sum(g * x, 1) / DIM)[:, None])
    tl.store(dx + place, g.to(dx.dtype.element_ty), mask=inside)


@functools.lru_cache(maxsize=256)
def _launch(shape, dtype, epsilon, backward):
    *lead, dim = shape
    rows, block = math.prod(lead), block_of(dim)
    programs = -(-rows // rows_of(block))
    outputs = ((shape, dtype), ((programs, dim), "float32"))
    constants = {"DIM": dim, "EPSILON": epsilon, "ROWS": rows_of(block), "BLOCK": block}
    kernel = norm_gradient_kernel if backward else norm_kernel
    return Launch(kernel, (programs,), (rows,), outputs[: 1 + backward], constants)


def _evaluate(run, options, tensors, save):
    x = tensors["x"]
    return run(_launch(tuple(x.shape), dtype_of(x), *options, False), (x, tensors["scale"])), ()


def _gradients(run, options, tensors, saved, results, wanted):
    x, scale = tensors["x"], tensors["scale"]
    launch = _launch(tuple(x.shape), dtype_of(x), *options, True)
    dx, dscale = run(launch, (x, scale, *results))
    found = {"x": dx}
    if "scale" in wanted:
        found["scale"] = like(dscale.sum(0), scale)
    return found


#: Options: the epsilon. Tensors: `x`, `scale`.
NORM = KernelFunction("rms_norm", _evaluate, _gradients, shapes_of_x)
