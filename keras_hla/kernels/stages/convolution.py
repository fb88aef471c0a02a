"""The short convolution, in Triton: `keras_hla.stages.convolve`."""

import functools
import math

import triton
import triton.language as tl

from keras_hla.kernels.launching import KernelFunction, Launch, block_of
from keras_hla.kernels.stages.tiles import dtype_of, like, shapes_of_x, silu, silu_gradient

_TOKENS, _FEATURES = 64, 64  # of a tile


@triton.jit
def mix(
    x,
    kernel,
    segments,
    token,
    feature,
    end,
    length,
    FEATURES: tl.constexpr,
    SIZE: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """`Σ_i w_i ⊙ x_{t-n+1+i}` for a tile of tokens and features up to `end`, else zero."""
    total = tl.zeros((token.shape[0], feature.shape[0]), tl.float32)
    for i in tl.static_range(SIZE):
        tap = load_token(
            x, segments, token, token - (SIZE - 1 - i), feature, end, length, FEATURES, SEGMENTS
        )
        w = tl.load(kernel + i * FEATURES + feature, mask=feature < end, other=0.0)
        total += w[None, :].to(tl.float32) * tap
    return total


@triton.jit
def load_token(
    x,
    segments,
    token,
    source,
    feature,
    end,
    length,
    FEATURES: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """A tile of the tokens `source`, zero where they are not in the segment of `token`."""
    inside = (source >= 0) & (source < length) & (token < length) & (token >= 0)
    if SEGMENTS:
        own = tl.load(segments + token, mask=inside, other=0)
        inside = inside & (tl.load(segments + source, mask=inside, other=0) == own)
    mask = inside[:, None] & (feature < end)[None, :]
    return tl.load(x + (source[:, None] * FEATURES + feature[None, :]), mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def _locate(length, FEATURES: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """The sequence, the tokens and the features of a program, and the index of its tile."""
    blocks = tl.cdiv(FEATURES, BLOCK)
    program = tl.program_id(0)
    tile = program // blocks
    tiles = tl.cdiv(length, TOKENS)
    token = tile % tiles * TOKENS + tl.arange(0, TOKENS)
    feature = program % blocks * BLOCK + tl.arange(0, BLOCK)
    return (tile // tiles).to(tl.int64), token, feature, tile.to(tl.int64)


@triton.jit(do_not_specialize=("length",))
def convolution_kernel(
    x,
    kernel,
    segments,
    length,
    output,
    FEATURES: tl.constexpr,
    SIZE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SILU: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, token, feature, _ = _locate(length, FEATURES, TOKENS, BLOCK)
    x += row * length * FEATURES
    segments += row * length
    y = mix(x, kernel, segments, token, feature, FEATURES, length, FEATURES, SIZE, SEGMENTS)
    if SILU:
        y = silu(y)
    mask = (token < length)[:, None] & (feature < FEATURES)[None, :]
    place = output + row * length * FEATURES + (token[:, None] * FEATURES + feature[None, :])
    tl.store(place, y.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("length",))
def convolution_gradient_kernel(
    x,
    kernel,
    segments,
    gradient,
    length,
    dx,
    dkernel,
    FEATURES: tl.constexpr,
    SIZE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SILU: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of `x`, and the gradient of the kernel for each tile of tokens.

    The convolution is recomputed for each token that reads a token.
    """
    row, token, feature, tile = _locate(length, FEATURES, TOKENS, BLOCK)
    start = row * length * FEATURES
    x += start
    gradient += start
    segments += row * length
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for j in tl.static_range(SIZE):
        reader = token + j
        g = load_token(
            gradient, segments, token, reader, feature, FEATURES, length, FEATURES, SEGMENTS
        )
        if SILU:
            y = mix(
                x, kernel, segments, reader, feature, FEATURES, length, FEATURES, SIZE, SEGMENTS
            )
            g *= silu_gradient(y)
        w = tl.load(
            kernel + (SIZE - 1 - j) * FEATURES + feature, mask=feature < FEATURES, other=0.0
        )
        total += w[None, :].to(tl.float32) * g
        if j == 0:
            for i in tl.static_range(SIZE):
                source = token - (SIZE - 1 - i)
                tap = load_token(
                    x, segments, token, source, feature, FEATURES, length, FEATURES, SEGMENTS
                )
                place = dkernel + (tile * SIZE + i) * FEATURES + feature
                tl.store(place, tl.sum(g * tap, 0), mask=feature < FEATURES)
    mask = (token < length)[:, None] & (feature < FEATURES)[None, :]
    place = dx + start + (token[:, None] * FEATURES + feature[None, :])
    tl.store(place, total.to(dx.dtype.element_ty), mask=mask)


@functools.lru_cache(maxsize=256)
def _launch(shape, dtype, size, segments, is_silu, backward):
    batch, length, *features = shape
    features = math.prod(features)
    block = min(_FEATURES, block_of(features))
    tiles = batch * -(-length // _TOKENS)
    outputs = [(shape, dtype)]
    if backward:
        outputs.append(((tiles, size, features), "float32"))
    constants = {
        "FEATURES": features,
        "SIZE": size,
        "SEGMENTS": segments,
        "SILU": is_silu,
        "TOKENS": _TOKENS,
        "BLOCK": block,
    }
    kernel = convolution_gradient_kernel if backward else convolution_kernel
    grid = (tiles * -(-features // block),)
    return Launch(kernel, grid, (length,), tuple(outputs), constants)


def _evaluate(run, options, tensors, save):
    x, kernel, segments = tensors["x"], tensors["kernel"], tensors.get("segments")
    launch = _launch(
        tuple(x.shape), dtype_of(x), kernel.shape[0], segments is not None, *options, False
    )
    return run(launch, (x, kernel, segments)), ()


def _gradients(run, options, tensors, saved, results, wanted):
    x, kernel, segments = tensors["x"], tensors["kernel"], tensors.get("segments")
    launch = _launch(
        tuple(x.shape), dtype_of(x), kernel.shape[0], segments is not None, *options, True
    )
    dx, dkernel = run(launch, (x, kernel, segments, *results))
    found = {"x": dx}
    if "kernel" in wanted:
        found["kernel"] = like(dkernel.sum(0), kernel)
    return found


#: Options: whether the activation is `silu`. Tensors: `x`, `kernel`, `segments`.
CONVOLUTION = KernelFunction("convolution", _evaluate, _gradients, shapes_of_x)
