"""The states of segments, each from zero, and from these the states between them, in Triton."""

import triton
import triton.language as tl

from keras_hla.kernels.primitive import (
    NUMBERS,
    advance,
    at_token,
    load_decays,
    load_rows,
    locate,
    power,
    store_rows,
)


@triton.jit(do_not_specialize=NUMBERS)
def sum_kernel(
    # inputs
    key,
    value,
    decays,
    # numbers
    length,
    heads,
    segments,
    segment_chunks,
    # outputs
    sums,
    totals,
    # known when compiled
    POWER: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SAME: tl.constexpr,
    REVERSE: tl.constexpr,
    DECAYS: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state that one segment of one head leaves, from zero, and `a^p` over it.

    If `REVERSE`, the gradient of the state before it: `key` has the queries, `value` the
    gradients of the outputs.
    """
    segment, row, batch, head = locate(segments, heads)

    # In the place of the first token of the first chunk, or of the last.
    chunks = tl.cdiv(length, CHUNK)
    steps = tl.minimum(segment_chunks, chunks - segment * segment_chunks)
    chunk = segment * segment_chunks
    # What the last leaves, or backwards the first, none needs.
    if segment == (0 if REVERSE else segments - 1):
        steps = 0
    step = 1
    if REVERSE:
        chunk += steps - 1
        step = -1
    token = batch * length + chunk * CHUNK
    key, key_stride = at_token(key, token, head, heads, KEY_GROUP, DIM)
    value, value_stride = at_token(value, token, head, heads, VALUE_GROUP, VALUE_DIM)
    decays += (row * chunks + chunk) * 4 * CHUNK
    state, decay = tl.zeros((VALUE_BLOCK, BLOCK), tl.float32), 1.0
    for _ in range(steps):
        _, _, from_start, to_end, total = load_decays(decays, DECAYS, CHUNK, PRODUCT)
        count = length - chunk * CHUNK
        k = load_rows(key, key_stride, count, DIM, CHUNK, BLOCK).to(PRODUCT)
        v = k
        if not SAME:
            v = load_rows(value, value_stride, count, VALUE_DIM, CHUNK, VALUE_BLOCK).to(PRODUCT)
        factor = from_start if REVERSE else to_end
        state = advance(state, v, k, factor, total, POWER, DECAYS, PRECISION)
        if DECAYS:
            decay *= power(total, POWER)
        chunk += step
        key += step * CHUNK * key_stride
        value += step * CHUNK * value_stride
        decays += step * 4 * CHUNK

    program = tl.program_id(0)
    start = sums + program.to(tl.int64) * DIM * VALUE_DIM
    store_rows(start, DIM, VALUE_DIM, state, DIM, VALUE_BLOCK, BLOCK)
    if DECAYS:
        tl.store(totals + program, decay)


@triton.jit
def state_between(
    state,
    sums,
    totals,
    place,
    count,
    step,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DECAYS: tl.constexpr,
):
    """From the state at an end of the sequence to that beyond `count` segments.

    `H_{m+1} = a_m^p H_m + sums_m`; the first has its sum at `place`, the next at `place + step`.
    """
    for _ in range(count):
        if DECAYS:
            state *= tl.load(totals + place)
        start = sums + place * DIM * VALUE_DIM
        state += load_rows(start, DIM, VALUE_DIM, DIM, state.shape[0], state.shape[1])
        place += step
    return state
