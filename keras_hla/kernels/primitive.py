"""The primitive on one chunk, in Triton: what `keras_hla.scan` computes for all chunks at once.

    o_t = q_tᵀ H_t,   H_t = a_t^p H_{t-1} + k_t v_tᵀ

Tiles of sequences come as they lie in memory, `(tokens, features)`, and go as their
transposes, names of which end in `T`. States that mix keys and values are transposed
too, `(value features, key features)`. So the left factors of all large products are
what the tensor cores take from registers, where products leave it, or from memory as
it is. Factors have the dtype of the tiles, which is float32 with decays; products are
summed, and states kept, in float32.

With `b_t` the sum of the log-decays of the chunk up to token `t`, and `c` its last
token, a token `t` reads `j` with the weight `exp(p (b_t - b_j))`, the state before the
chunk with `exp(p b_t)`, and is held in that after it with `exp(p (b_c - b_t))`.
"""

import triton
import triton.language as tl


@triton.jit
def scores(
    x,
    y,
    coarse,
    rest,
    POWER: tl.constexpr,
    ROWS_READ: tl.constexpr,
    DECAYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`X Yᵀ` times the weights, `(tokens, tokens)`; the rows read columns, or else are read."""
    product = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    index = tl.arange(0, x.shape[0])
    past = index[:, None] >= index[None, :]
    if not ROWS_READ:
        past = index[:, None] <= index[None, :]
    if DECAYS:
        exponent = coarse[:, None] - coarse[None, :] + (rest[:, None] - rest[None, :])
        exponent = exponent if ROWS_READ else -exponent
        product = tl.where(past, product * tl.exp(POWER * tl.minimum(exponent, 0.0)), 0.0)
    else:
        product = tl.where(past, product, 0.0)
    return product.to(x.dtype)


@triton.jit
def mix(
    zT,
    scores,
    state,
    xT,
    added,
    log_factor,
    POWER: tl.constexpr,
    REFINE: tl.constexpr,
    DECAYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`Zᵀ scores + state Xᵀ diag(exp(p log_factor)) + added`, `(features, tokens)`, float32.

    All outputs and gradients of the primitive have this form. To refine is to take in what the
    state loses to rounding, if it is rounded, by a product of its own.
    """
    rounded = state.to(xT.dtype)
    if DECAYS:
        product = tl.dot(rounded, xT, input_precision=PRECISION)
        added += product * tl.exp(POWER * log_factor)[None, :]
    else:
        added = tl.dot(rounded, xT, added, input_precision=PRECISION)
        if REFINE and xT.dtype != tl.float32:
            lost = (state - rounded.to(tl.float32)).to(xT.dtype)
            added = tl.dot(lost, xT, added, input_precision=PRECISION)
    return tl.dot(zT, scores, added, input_precision=PRECISION)


@triton.jit
def advance(
    state,
    xT,
    y,
    log_factor,
    total,
    POWER: tl.constexpr,
    DECAYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`exp(p total) state + Xᵀ diag(exp(p log_factor)) Y`: over the chunk, or back over it."""
    if DECAYS:
        state *= tl.exp(POWER * total)
        y = y * tl.exp(POWER * log_factor)[:, None]
    return tl.dot(xT, y, state, input_precision=PRECISION)


@triton.jit
def load_decays(coarse_start, rest_start, DECAYS: tl.constexpr, CHUNK: tl.constexpr):
    """The sums `b_t` in two parts, see `decay_kernel`; `b_t`, `b_c - b_t`, and `b_c`."""
    index = tl.arange(0, CHUNK)
    if DECAYS:
        coarse, rest = tl.load(coarse_start + index), tl.load(rest_start + index)
        coarse_total = tl.load(coarse_start + CHUNK - 1)
        rest_total = tl.load(rest_start + CHUNK - 1)
        to_end = coarse_total - coarse + (rest_total - rest)
        return coarse, rest, coarse + rest, to_end, coarse_total + rest_total
    else:
        return 0.0, 0.0, 0.0, 0.0, 0.0


@triton.jit
def load_rows(start, stride, count, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A `(ROWS, BLOCK)` tile of `DIM` features in `count` rows, filled up with zeros."""
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
