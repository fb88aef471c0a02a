"""The primitive on one chunk, in Triton: what `keras_hla.scan` computes for all chunks.

    o_t = q_tᵀ H_t,   H_t = a_t^p H_{t-1} + k_t v_tᵀ

Tiles of sequences are `(tokens, features)`, as they lie in memory; states are transposed,
`(value features, key features)`, so that with many features they are the left factors of
products, which tensor cores take from registers. Factors have the dtype of the tiles;
products are summed, and states kept, in float32.

With `b_t` the sum of the log-decays of the chunk up to token `t`, and `c` its last
token, a token `t` reads `j` with the weight `exp(p (b_t - b_j))`, the state before the
chunk with `exp(p b_t)`, and is held in that after it with `exp(p (b_c - b_t))`.
"""

import triton
import triton.language as tl

# Arguments without a specialization of their own: their values change no instruction.
NUMBERS = ("length", "heads", "span_chunks")


@triton.jit
def scores(x, y, coarse, rest, POWER: tl.constexpr, DECAYS: tl.constexpr, PRECISION: tl.constexpr):
    """`X Yᵀ` times the weights, `(tokens, tokens)`; the rows read the columns."""
    product = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    index = tl.arange(0, x.shape[0])
    past = index[:, None] >= index[None, :]
    if DECAYS:
        exponent = coarse[:, None] - coarse[None, :]
        if x.dtype == tl.float32:
            exponent += rest[:, None] - rest[None, :]
        product *= tl.exp2(POWER * 1.4426950408889634 * tl.minimum(exponent, 0.0))
    return tl.where(past, product, 0.0)


@triton.jit
def mix(
    scores,
    z,
    x,
    state,
    factor,
    POWER: tl.constexpr,
    DECAYS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`scores Z + diag(factor^p) X stateᵀ`, `(tokens, features)`, float32.

    All outputs and gradients of the primitive have this form. If `WIDE` it is computed as its
    transpose, of which more features have more rows.
    """
    if WIDE:
        product = _times(state, tl.trans(x), None, False, PRECISION)
        if DECAYS:
            product *= power(factor, POWER)[None, :]
        return tl.trans(_times(tl.trans(scores), tl.trans(z), product, True, PRECISION))
    else:
        product = _times(tl.trans(state), x, None, True, PRECISION)
        if DECAYS:
            product *= power(factor, POWER)[:, None]
        return _times(scores, z, product, False, PRECISION)


@triton.jit
def _times(x, y, added, RIGHT: tl.constexpr, PRECISION: tl.constexpr):
    """`X Y + added`, or if `RIGHT` `Y X + added`.

    A float32 `x` is truncated to bfloat16, the dtype of `y`; a second product adds the remainder.
    """
    if x.dtype == y.dtype:
        return _product(x, y, added, RIGHT, PRECISION)
    else:
        # Truncated, not rounded: one instruction for two numbers.
        cut = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        added = _product(cut.to(y.dtype), y, added, RIGHT, PRECISION)
        return _product((x - cut).to(y.dtype), y, added, RIGHT, PRECISION)


@triton.jit
def _product(x, y, added, RIGHT: tl.constexpr, PRECISION: tl.constexpr):
    if RIGHT:
        return tl.dot(y, x, added, input_precision=PRECISION)
    else:
        return tl.dot(x, y, added, input_precision=PRECISION)


@triton.jit
def advance(
    state,
    x,
    y,
    factor,
    total,
    POWER: tl.constexpr,
    DECAYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`total^p state + Xᵀ diag(factor^p) Y`: over the chunk, or back over it."""
    if DECAYS:
        state *= power(total, POWER)
        x = (x * power(factor, POWER)[:, None]).to(x.dtype)
    return tl.dot(tl.trans(x), y, state, input_precision=PRECISION)


@triton.jit
def inner_products(x, y, PRECISION: tl.constexpr):
    """The products of the rows of `x` with the same rows of `y`.

    They are the diagonal of a product. `y` need not be in registers for them, which are few.
    """
    product = tl.dot(x.to(y.dtype), tl.trans(y), input_precision=PRECISION)
    index = tl.arange(0, x.shape[0])
    return tl.sum(tl.where(index[:, None] == index[None, :], product, 0.0), 1)


@triton.jit
def scaled(x, SCALE: tl.constexpr):
    """`SCALE x`, in float32 unless it is `x`."""
    if SCALE == 1.0:
        return x
    else:
        return SCALE * x.to(tl.float32)


@triton.jit
def power(x, POWER: tl.constexpr):
    result = x
    for _ in tl.static_range(POWER - 1):
        result *= x
    return result


@triton.jit
def locate(spans, heads):
    """The span that a program evaluates, its row of batch and head, and their numbers."""
    program = tl.program_id(0)
    span = program % spans
    row = (program // spans).to(tl.int64)
    return span, row, row // heads, row % heads


@triton.jit
def at_token(tensor, token, head, heads, GROUP: tl.constexpr, DIM: tl.constexpr):
    """The offset of a head's features at a token, and the stride from token to token.

    `tensor` has a head for each `GROUP` of the query heads.
    """
    stride = heads // GROUP * DIM
    return tensor + (token * stride + head // GROUP * DIM), stride


@triton.jit
def load_decays(start, DECAYS: tl.constexpr, CHUNK: tl.constexpr, PRODUCT: tl.constexpr):
    """The sums `b_t`, in two numbers; `exp` of `b_t`, `b_c - b_t`, `b_c`: see `decay_kernel`."""
    coarse, rest, from_start, to_end, total = 0.0, 0.0, 0.0, 0.0, 0.0
    if DECAYS:
        index = tl.arange(0, CHUNK)
        coarse = tl.load(start + index)
        if PRODUCT is tl.float32:
            rest = tl.load(start + CHUNK + index)
        from_start = tl.load(start + 2 * CHUNK + index)
        to_end = tl.load(start + 3 * CHUNK + index)
        total = tl.load(start + 3 * CHUNK - 1)
    return coarse, rest, from_start, to_end, total


@triton.jit
def load_rows(start, stride, count, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A `(ROWS, BLOCK)` tile of `DIM` features in `count` rows, padded with zeros."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = rows < count
    if DIM != BLOCK:
        inside = inside & (columns < DIM)
    return tl.load(start + (rows * stride + columns), mask=inside, other=0.0)


@triton.jit
def store_rows(start, stride, count, x, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = rows < count
    if DIM != BLOCK:
        inside = inside & (columns < DIM)
    tl.store(start + (rows * stride + columns), x.to(start.dtype.element_ty), mask=inside)
