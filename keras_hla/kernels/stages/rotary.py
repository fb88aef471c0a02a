"""The rotary embedding and the scale, in Triton: `keras_hla.stages.rotate`."""

import functools

import triton
import triton.language as tl

from keras_hla.kernels.launching import KernelFunction, Launch, block_of
from keras_hla.kernels.stages.tiles import dtype_of, rows_of, shapes_of_x


@triton.jit(do_not_specialize=("rows", "length", "heads"))
def rotary_kernel(
    x,
    cos,
    sin,
    rows,
    length,
    heads,
    output,
    HALF: tl.constexpr,
    SHARED: tl.constexpr,
    BACK: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows are of batch, token and head; angles of batch and token, or if `SHARED` of token.

    If `BACK`, rotates in the opposite direction, which gives the gradient.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < HALF)[None, :]
    token = row // heads
    if SHARED:
        token = token % length
    angle = token[:, None] * HALF + column[None, :]
    c = tl.load(cos + angle, mask=inside, other=0.0) * SCALE
    s = tl.load(sin + angle, mask=inside, other=0.0) * SCALE
    if BACK:
        s = -s
    place = row[:, None] * (2 * HALF) + column[None, :]
    first = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + place + HALF, mask=inside, other=0.0).to(tl.float32)
    dtype = output.dtype.element_ty
    tl.store(output + place, (first * c - second * s).to(dtype), mask=inside)
    tl.store(output + place + HALF, (second * c + first * s).to(dtype), mask=inside)


@functools.lru_cache(maxsize=256)
def _launch(shape, dtype, shared, scale, back):
    batch, length, heads, dim = shape
    rows, block = batch * length * heads, block_of(dim // 2)
    constants = {
        "HALF": dim // 2,
        "SHARED": shared,
        "BACK": back,
        "SCALE": scale,
        "ROWS": rows_of(block),
        "BLOCK": block,
    }
    grid, numbers = (-(-rows // rows_of(block)),), (rows, length, heads)
    return Launch(rotary_kernel, grid, numbers, ((shape, dtype),), constants)


def _rotate(run, options, x, tensors, back):
    shared = tensors["cos"].shape[0] == 1
    launch = _launch(tuple(x.shape), dtype_of(x), shared, *options, back)
    return run(launch, (x, tensors["cos"], tensors["sin"]))


def _evaluate(run, options, tensors, save):
    return _rotate(run, options, tensors["x"], tensors, back=False), ()


def _gradients(run, options, tensors, saved, results, wanted):
    (dx,) = _rotate(run, options, results[0], tensors, back=True)
    return {"x": dx}


#: Options: the scale. Tensors: `x`; `cos` and `sin`, which have no gradients.
ROTARY = KernelFunction("rotary", _evaluate, _gradients, shapes_of_x, reads=("cos", "sin"))
