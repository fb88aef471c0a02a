"""The Triton kernel of `keras_hla.kernels.token`."""

import triton
import triton.language as tl

from keras_hla.kernels.stages.tiles import silu


@triton.jit
def _rounded(x, like):
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _normalized(x, scale, column, inside, like, DIM: tl.constexpr, EPSILON: tl.constexpr):
    scale = tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
    return _rounded(x * tl.rsqrt(tl.sum(x * x, 0) / DIM + EPSILON) * scale, like)


@triton.jit
def _operand(
    x,
    window,
    kernel,
    scale,
    start,
    column,
    inside,
    FEATURES: tl.constexpr,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    SILU: tl.constexpr,
    NORM: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """The features `column` of a query, key or value before the rotation."""
    feature = start + column
    y = tl.load(x + feature, mask=inside, other=0.0).to(tl.float32)
    if SIZE > 1:
        y *= tl.load(kernel + (SIZE - 1) * FEATURES + feature, mask=inside, other=0.0)
        for i in tl.static_range(SIZE - 1):
            w = tl.load(kernel + i * FEATURES + feature, mask=inside, other=0.0)
            y += w * tl.load(window + i * FEATURES + feature, mask=inside, other=0.0)
        if SILU:
            y = silu(y)
        y = _rounded(y, x)
    if NORM:
        y = _normalized(y, scale, column, inside, x, DIM, EPSILON)
    return y


@triton.jit
def _turn(position, after, turns, lost, live, store, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Cosines and sines at a position; stores the next one. See `keras_hla.stages.rotary`."""
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    pair = tl.where(column < DIM // 2, column, column - DIM // 2)
    rest = tl.load(position + 1)
    full = tl.floor(rest / 65536.0)
    block, rest = tl.load(position) + full, rest - full * 65536.0
    angle = rest.to(tl.int32) * tl.load(turns + pair, mask=inside, other=0)
    angle += block.to(tl.int32) * tl.load(turns + DIM // 2 + pair, mask=inside, other=0)
    rounded = rest * tl.load(lost + pair, mask=inside, other=0.0)
    rounded += block * tl.load(lost + DIM // 2 + pair, mask=inside, other=0.0)
    angle = (angle.to(tl.float32) + rounded) * 1.4629180792671596e-09  # 2 π / 2³²
    rest += tl.where(live, 1.0, 0.0)
    full = tl.floor(rest / 65536.0)
    tl.store(after, block + full, mask=store)
    tl.store(after + 1, rest - full * 65536.0, mask=store)
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _rotated(
    x,
    window,
    kernel,
    scale,
    cos,
    sin,
    start,
    FEATURES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    SILU: tl.constexpr,
    NORM: tl.constexpr,
    EPSILON: tl.constexpr,
    ROTATE: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """A query or key times a factor."""
    column, half = tl.arange(0, BLOCK), DIM // 2
    inside, first = column < DIM, column < half
    y = _operand(
        x, window, kernel, scale, start, column, inside, FEATURES, DIM, SIZE, SILU, NORM, EPSILON
    )
    if FACTOR != 1.0:
        y *= FACTOR
    if ROTATE:
        other = tl.where(first, column + half, column - half)
        z = FACTOR * _operand(
            x, window, kernel, scale, start, other, inside, FEATURES, DIM, SIZE, SILU, NORM, EPSILON
        )
        y = y * cos + tl.where(first, -z, z) * sin
    return _rounded(y, x)


@triton.jit
def _shift(
    x,
    window,
    after,
    start,
    live,
    store,
    FEATURES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Stores the last tokens that the next one reads."""
    column = tl.arange(0, BLOCK)
    feature, inside = start + column, column < tl.where(store, DIM, 0)
    old = tl.load(window + feature, mask=inside, other=0.0)
    for i in tl.static_range(SIZE - 1):
        if i + 2 < SIZE:
            new = tl.load(window + (i + 1) * FEATURES + feature, mask=inside, other=0.0)
        else:
            new = tl.load(x + feature, mask=inside, other=0.0).to(tl.float32)
        tl.store(after + i * FEATURES + feature, tl.where(live, new, old), mask=inside)
        old = new


@triton.jit
def _source(SOURCE: tl.constexpr, query, key, value, first, second):
    if SOURCE == 0:
        x = query
    elif SOURCE == 1:
        x = key
    elif SOURCE == 2:
        x = value
    elif SOURCE == 3:
        x = first
    else:
        x = second
    return x


@triton.jit
def _pass(
    query,
    key,
    value,
    first,
    second,
    decay,
    state,
    after,
    row,
    head,
    HEADS: tl.constexpr,
    QUERY: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    ADDED: tl.constexpr,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    POWER: tl.constexpr,
    OWN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A `keras_hla.kernels.passes.Pass`, of whose states there are `OWN` for all heads."""
    q = _source(QUERY, query, key, value, first, second)
    k = _source(KEY, query, key, value, first, second)
    v = _source(VALUE, query, key, value, first, second)
    i, j = tl.arange(0, k.shape[0])[:, None], tl.arange(0, v.shape[0])[None, :]
    place = (row * OWN + head * OWN // HEADS) * (ROWS * COLUMNS) + i * COLUMNS + j
    inside = (i < ROWS) & (j < COLUMNS)
    h = tl.load(state + place, mask=inside, other=0.0)
    for _ in tl.static_range(POWER):
        h *= decay
    h += k[:, None] * v[None, :]
    stored = tl.where(head % (HEADS // OWN) == 0, ROWS, 0)
    tl.store(after + place, h, mask=inside & (i < stored))
    output = SCALE * tl.sum(q[:, None] * h, 0)
    if FACTOR != 0.0:
        output += FACTOR * _source(ADDED, query, key, value, first, second)
    return output


@triton.jit
def token_kernel(
    x,
    window,
    kernel,
    query_scale,
    key_scale,
    position,
    turns,
    lost,
    decays,
    mask,
    scale,
    gates,
    state0,
    state1,
    state2,
    output,
    window_after,
    position_after,
    after0,
    after1,
    after2,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    SILU: tl.constexpr,
    QK_NORM: tl.constexpr,
    QK_EPSILON: tl.constexpr,
    ROTATE: tl.constexpr,
    FACTOR: tl.constexpr,
    DECAY_ROWS: tl.constexpr,
    DECAY_HEADS: tl.constexpr,
    LOGITS: tl.constexpr,
    LEAST: tl.constexpr,
    MASK: tl.constexpr,
    NORM: tl.constexpr,
    EPSILON: tl.constexpr,
    GATE: tl.constexpr,
    PASSES: tl.constexpr,
    QUERY0: tl.constexpr,
    KEY0: tl.constexpr,
    VALUE0: tl.constexpr,
    ADDED0: tl.constexpr,
    SCALE0: tl.constexpr,
    FACTOR0: tl.constexpr,
    POWER0: tl.constexpr,
    OWN0: tl.constexpr,
    ROWS0: tl.constexpr,
    COLUMNS0: tl.constexpr,
    QUERY1: tl.constexpr,
    KEY1: tl.constexpr,
    VALUE1: tl.constexpr,
    ADDED1: tl.constexpr,
    SCALE1: tl.constexpr,
    FACTOR1: tl.constexpr,
    POWER1: tl.constexpr,
    OWN1: tl.constexpr,
    ROWS1: tl.constexpr,
    COLUMNS1: tl.constexpr,
    QUERY2: tl.constexpr,
    KEY2: tl.constexpr,
    VALUE2: tl.constexpr,
    ADDED2: tl.constexpr,
    SCALE2: tl.constexpr,
    FACTOR2: tl.constexpr,
    POWER2: tl.constexpr,
    OWN2: tl.constexpr,
    ROWS2: tl.constexpr,
    COLUMNS2: tl.constexpr,
):
    """A program is a query head of a row of the batch."""
    FEATURES: tl.constexpr = HEADS * DIM + KEY_HEADS * (DIM + VALUE_DIM)
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    row, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    leads = head % GROUP == 0  # stores what heads share
    of_query = head * DIM
    of_key = HEADS * DIM + (head // GROUP) * DIM
    of_value = (HEADS + KEY_HEADS) * DIM + (head // GROUP) * VALUE_DIM
    x += row * FEATURES
    window += row * (SIZE - 1) * FEATURES
    window_after += row * (SIZE - 1) * FEATURES
    live = head >= 0
    if MASK:
        live = tl.load(mask + row) != 0
    cos, sin = 1.0, 0.0
    if ROTATE:
        place = position + 2 * row
        after = position_after + 2 * row
        cos, sin = _turn(place, after, turns, lost, live, head == 0, DIM, BLOCK)
    query = _rotated(
        x, window, kernel, query_scale, cos, sin, of_query,
        FEATURES, DIM, BLOCK, SIZE, SILU, QK_NORM, QK_EPSILON, ROTATE, FACTOR,
    )  # fmt: skip
    key = _rotated(
        x, window, kernel, key_scale, cos, sin, of_key,
        FEATURES, DIM, BLOCK, SIZE, SILU, QK_NORM, QK_EPSILON, ROTATE, 1.0,
    )  # fmt: skip
    column = tl.arange(0, VALUE_BLOCK)
    inside = column < VALUE_DIM
    value = _operand(
        x, window, kernel, scale, of_value, column, inside,
        FEATURES, VALUE_DIM, SIZE, SILU, False, EPSILON,
    )  # fmt: skip
    if SIZE > 1:
        _shift(x, window, window_after, of_query, live, head >= 0, FEATURES, DIM, BLOCK, SIZE)
        _shift(x, window, window_after, of_key, live, leads, FEATURES, DIM, BLOCK, SIZE)
        _shift(
            x, window, window_after, of_value, live, leads, FEATURES, VALUE_DIM, VALUE_BLOCK, SIZE
        )
    decay = 1.0
    if DECAY_HEADS > 0:
        place = row * DECAY_ROWS * DECAY_HEADS + head * DECAY_HEADS // HEADS
        log_decay = tl.load(decays + place)
        if LOGITS:
            log_decay = tl.maximum(_log_sigmoid(log_decay), LEAST)
        decay = tl.exp(log_decay)
    if MASK:  # a token of zeros leaves the states as they are
        query, key = tl.where(live, query, 0.0), tl.where(live, key, 0.0)
        value = tl.where(live, value, 0.0)
        decay = tl.where(live, decay, 1.0)
    first = _pass(
        query, key, value, key, key, decay, state0, after0, row, head, HEADS,
        QUERY0, KEY0, VALUE0, ADDED0, SCALE0, FACTOR0, POWER0, OWN0, ROWS0, COLUMNS0,
    )  # fmt: skip
    y = first
    if PASSES > 1:
        second = _pass(
            query, key, value, first, key, decay, state1, after1, row, head, HEADS,
            QUERY1, KEY1, VALUE1, ADDED1, SCALE1, FACTOR1, POWER1, OWN1, ROWS1, COLUMNS1,
        )  # fmt: skip
        y = second
    if PASSES > 2:
        y = _pass(
            query, key, value, first, second, decay, state2, after2, row, head, HEADS,
            QUERY2, KEY2, VALUE2, ADDED2, SCALE2, FACTOR2, POWER2, OWN2, ROWS2, COLUMNS2,
        )  # fmt: skip
    y = _rounded(y, x)
    if NORM:
        y = _normalized(y, scale, column, inside, x, VALUE_DIM, EPSILON)
    place = (row * HEADS + head) * VALUE_DIM + column
    if GATE:
        g = tl.load(gates + place, mask=inside, other=0.0).to(tl.float32)
        y = _rounded(y, output) * silu(g)
    tl.store(output + place, y.to(output.dtype.element_ty), mask=inside)
