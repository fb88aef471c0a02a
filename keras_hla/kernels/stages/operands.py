"""From joint projections to queries, keys and values, in Triton.

Convolution, activation, scale and rotation, as in `keras_hla.stages`. The projections are read
once, and the results are written once.
"""

import functools

import triton
import triton.language as tl

from keras_hla.kernels.launching import KernelFunction, Launch, block_of
from keras_hla.kernels.stages.convolution import load_token, mix
from keras_hla.kernels.stages.tiles import dtype_of, like, silu, silu_gradient

_TOKENS = 32  # of a tile


@triton.jit
def _locate(
    length,
    tokens,
    query,
    key,
    value,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Where a program is: its tile of so many tokens, its sequence, its first token, and its head.

    Of the head: its first feature in the projections, its address in the tensor of queries, keys
    or values, the stride from token to token there, its size, the factor of its features, and
    the number of pairs of features that are rotated.
    """
    heads = HEADS + 2 * KEY_HEADS
    program = tl.program_id(0)
    head = program % heads
    tile = (program // heads).to(tl.int64)
    tiles = tl.cdiv(tokens, TOKENS - SIZE + 1)
    row = tile // tiles
    token = (tile % tiles).to(tl.int32) * (TOKENS - SIZE + 1)
    of_query, of_value = head < HEADS, head >= HEADS + KEY_HEADS
    before = tl.where(of_query, 0, tl.where(of_value, HEADS + KEY_HEADS, HEADS))
    dim = tl.where(of_value, VALUE_DIM, DIM)
    stride = tl.where(of_query, HEADS, KEY_HEADS) * dim
    start = before * DIM + (head - before) * dim
    place = tl.where(of_query, query, tl.where(of_value, value, key))
    place += row * length * stride + (head - before) * dim
    factor = tl.where(of_query, SCALE, 1.0)
    turned = tl.where(of_value, 0, DIM // 2)
    return tile, row, token, start, place, stride, dim, factor, turned


@triton.jit
def _load_angles(
    cos,
    sin,
    row,
    token,
    column,
    half,
    length,
    factor,
    turned,
    ROTATE: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Cosines and sines times the factor; those of an angle of zero where nothing is rotated."""
    c, s = factor, 0.0
    if ROTATE:
        start = token if SHARED else row * length + token
        place = start[:, None] * half + column[None, :]
        inside = ((token >= 0) & (token < length))[:, None] & (column < turned)[None, :]
        c = factor * tl.load(cos + place, mask=inside, other=1.0)
        s = factor * tl.load(sin + place, mask=inside, other=0.0)
    return c, s


@triton.jit(do_not_specialize=("length",))
def operands_kernel(
    x,
    kernel,
    segments,
    cos,
    sin,
    length,
    query,
    key,
    value,
    CONVOLVE: tl.constexpr,
    SIZE: tl.constexpr,
    PAST: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SILU: tl.constexpr,
    ROTATE: tl.constexpr,
    SHARED: tl.constexpr,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Queries, keys and values of the tokens after the first `PAST`, which are read alone."""
    features = HEADS * DIM + KEY_HEADS * (DIM + VALUE_DIM)
    _, row, token, start, place, stride, dim, factor, turned = _locate(
        length, length, query, key, value, 1, HEADS, KEY_HEADS, DIM, VALUE_DIM, TOKENS, SCALE
    )
    total = length + PAST
    x += row * total * features
    segments += row * total
    token += tl.arange(0, TOKENS)
    source = token + PAST
    column, half = tl.arange(0, BLOCK), (dim + 1) // 2
    # Each half of the features, of which the second may have one less.
    first, second = start + column, start + half + column
    end = start + half, start + dim
    if CONVOLVE:
        a = mix(x, kernel, segments, source, first, end[0], total, features, SIZE, SEGMENTS)
        b = mix(x, kernel, segments, source, second, end[1], total, features, SIZE, SEGMENTS)
        if SILU:
            a, b = silu(a), silu(b)
    else:
        a = load_token(x, segments, source, source, first, end[0], total, features, False)
        b = load_token(x, segments, source, source, second, end[1], total, features, False)
    c, s = _load_angles(cos, sin, row, token, column, half, length, factor, turned, ROTATE, SHARED)
    place += token.to(tl.int64)[:, None] * stride + column[None, :]
    inside = (token < length)[:, None]
    dtype = query.dtype.element_ty
    tl.store(place, (a * c - b * s).to(dtype), mask=inside & (column < half)[None, :])
    tl.store(place + half, (b * c + a * s).to(dtype), mask=inside & (column < dim - half)[None, :])


@triton.jit(do_not_specialize=("length",))
def operands_gradient_kernel(
    x,
    kernel,
    segments,
    cos,
    sin,
    dquery,
    dkey,
    dvalue,
    length,
    dx,
    dkernel,
    CONVOLVE: tl.constexpr,
    SIZE: tl.constexpr,
    PAST: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SILU: tl.constexpr,
    ROTATE: tl.constexpr,
    SHARED: tl.constexpr,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of the projections, and the gradient of the kernel for each tile of tokens.

    Tiles are of all projections, with those of the first `PAST` tokens, which have no results.
    The last `SIZE - 1` tokens of a tile are read here, but their gradients are of the next tile.
    """
    features = HEADS * DIM + KEY_HEADS * (DIM + VALUE_DIM)
    total = length + PAST
    tile, row, source, start, place, stride, dim, factor, turned = _locate(
        length, total, dquery, dkey, dvalue, SIZE, HEADS, KEY_HEADS, DIM, VALUE_DIM, TOKENS, SCALE
    )
    x += row * total * features
    segments += row * total
    source += tl.arange(0, TOKENS)
    token = source - PAST
    column, half = tl.arange(0, BLOCK), (dim + 1) // 2
    first, second = start + column, start + half + column
    end = start + half, start + dim
    c, s = _load_angles(cos, sin, row, token, column, half, length, factor, turned, ROTATE, SHARED)
    place += token.to(tl.int64)[:, None] * stride + column[None, :]
    inside = ((token >= 0) & (token < length))[:, None]
    ga = tl.load(place, mask=inside & (column < half)[None, :], other=0.0).to(tl.float32)
    gb = tl.load(place + half, mask=inside & (column < dim - half)[None, :], other=0.0)
    gb = gb.to(tl.float32)
    ga, gb = ga * c + gb * s, gb * c - ga * s
    own = tl.arange(0, TOKENS) < TOKENS - SIZE + 1
    if CONVOLVE:
        if SILU:
            a = mix(x, kernel, segments, source, first, end[0], total, features, SIZE, SEGMENTS)
            b = mix(x, kernel, segments, source, second, end[1], total, features, SIZE, SEGMENTS)
            ga, gb = ga * silu_gradient(a), gb * silu_gradient(b)
        dkernel += tile * SIZE * features
        _kernel_gradient(
            ga, x, segments, source, first, end[0], own, total, dkernel, features, SIZE, SEGMENTS
        )
        _kernel_gradient(
            gb, x, segments, source, second, end[1], own, total, dkernel, features, SIZE, SEGMENTS
        )
        ga = _gather(ga, kernel, segments, source, first, end[0], total, features, SIZE, SEGMENTS)
        gb = _gather(gb, kernel, segments, source, second, end[1], total, features, SIZE, SEGMENTS)
    dx += row * total * features
    inside = (own & (source < total))[:, None]
    tokens = source[:, None] * features
    dtype = dx.dtype.element_ty
    tl.store(dx + tokens + first[None, :], ga.to(dtype), mask=inside & (first < end[0])[None, :])
    tl.store(dx + tokens + second[None, :], gb.to(dtype), mask=inside & (second < end[1])[None, :])


@triton.jit
def _kernel_gradient(
    g,
    x,
    segments,
    token,
    feature,
    end,
    own,
    length,
    dkernel,
    FEATURES: tl.constexpr,
    SIZE: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    g = tl.where(own[:, None], g, 0.0)
    for i in tl.static_range(SIZE):
        source = token - (SIZE - 1 - i)
        tap = load_token(x, segments, token, source, feature, end, length, FEATURES, SEGMENTS)
        tl.store(dkernel + i * FEATURES + feature, tl.sum(g * tap, 0), mask=feature < end)


@triton.jit
def _gather(
    g,
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
    """The gradient of tokens from the tokens of the tile that read them."""
    TOKENS: tl.constexpr = token.shape[0]
    index = tl.arange(0, TOKENS)
    total = tl.zeros(g.shape, tl.float32)
    for j in tl.static_range(SIZE):
        later = g
        if j > 0:
            # The last rows are wrong here. They belong to the next tile.
            row = tl.minimum(index + j, TOKENS - 1)[:, None]
            later = tl.gather(g, tl.broadcast_to(row, g.shape), 0)
        if SEGMENTS:
            own = tl.load(segments + token, mask=token < length, other=-1)
            other = tl.load(segments + token + j, mask=token + j < length, other=-1)
            later = tl.where((own == other)[:, None], later, 0.0)
        w = tl.load(kernel + (SIZE - 1 - j) * FEATURES + feature, mask=feature < end, other=0.0)
        total += w[None, :].to(tl.float32) * later
    return total


@functools.lru_cache(maxsize=256)
def _launch(shape, dtype, size, segments, shared, options, backward):
    is_silu, scale, heads, key_heads, dim, value_dim, past = options
    batch, total, features = shape
    length = total - past
    operands = [
        ((batch, length, count, d), dtype)
        for count, d in ((heads, dim), (key_heads, dim), (key_heads, value_dim))
    ]
    # A tile of the gradient has the tokens that read its own as well.
    tokens = max(_TOKENS, block_of(2 * (size or 1)))
    constants = {
        "CONVOLVE": size is not None,
        "SIZE": size or 1,
        "PAST": past,
        "SEGMENTS": segments and size is not None,
        "SILU": is_silu,
        "ROTATE": shared is not None,
        "SHARED": bool(shared),
        "SCALE": scale,
        "HEADS": heads,
        "KEY_HEADS": key_heads,
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "TOKENS": tokens,
        "BLOCK": block_of((max(dim, value_dim) + 1) // 2),
    }
    own = tokens - (constants["SIZE"] - 1 if backward else 0)
    tiles = batch * -(-(total if backward else length) // own)
    grid = (tiles * (heads + 2 * key_heads),)
    if not backward:
        options = {"num_warps": 2}
        return Launch(operands_kernel, grid, (length,), tuple(operands), constants, options)
    partial = ((tiles, size, features), "float32") if size else None
    outputs, options = ((shape, dtype), partial), {"num_warps": 1}
    return Launch(operands_gradient_kernel, grid, (length,), outputs, constants, options)


def _arguments(options, tensors, backward):
    """The launch, and the inputs that both kernels read."""
    x, kernel, segments, cos = (tensors.get(n) for n in ("x", "kernel", "segments", "cos"))
    size = None if kernel is None else kernel.shape[0]
    shared = None if cos is None else cos.shape[0] == 1
    shape, dtype = tuple(x.shape), dtype_of(x)
    launch = _launch(shape, dtype, size, segments is not None, shared, options, backward)
    return launch, (x, kernel, segments, cos, tensors.get("sin"))


def _evaluate(run, options, tensors, save):
    launch, inputs = _arguments(options, tensors, backward=False)
    return run(launch, inputs), ()


def _gradients(run, options, tensors, saved, results, wanted):
    launch, inputs = _arguments(options, tensors, backward=True)
    dx, dkernel = run(launch, (*inputs, *results))
    found = {"x": dx}
    if "kernel" in wanted:
        found["kernel"] = like(dkernel.sum(0), tensors["kernel"])
    return found


def _shapes(options, tensors, save):
    launch, _ = _arguments(options, tensors, backward=False)
    return launch.outputs, ()


#: Options: whether the activation is `silu`, the factor of the queries, the numbers of heads of
#: queries and of keys, the sizes of keys and of values, and the number of tokens that come before
#: those of the results, which the convolution alone reads. Tensors: `x`, `(batch, length,
#: features)`; `kernel` and `segments`, of a convolution; `cos` and `sin`, of a rotation.
OPERANDS = KernelFunction("operands", _evaluate, _gradients, _shapes, count=lambda options: 3)
