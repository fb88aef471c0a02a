"""The states that spans leave from zero, and the states between spans, in Triton."""

import triton
import triton.language as tl

from keras_hla.kernels.operator.primitive import (
    NUMBERS,
    advance,
    at_token,
    load_decays,
    load_rows,
    locate,
    power,
    scaled,
    store_rows,
)


@triton.jit(do_not_specialize=NUMBERS)
def span_kernel(
    # inputs
    key,
    value,
    decays,
    # numbers
    length,
    heads,
    spans,
    span_chunks,
    # outputs
    span_states,
    span_decays,
    # known when compiled
    POWER: tl.constexpr,
    SCALE: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SAME: tl.constexpr,
    REVERSE: tl.constexpr,
    ALL: tl.constexpr,
    DECAYS: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state that one span of one head leaves, from zero, and `a^p` over it.

    Unless `ALL`, the last span is skipped; if `REVERSE`, the first.

    If `REVERSE`, the gradient of the state before the span: `key` holds the queries, `value` the
    gradients of the outputs, which are times `SCALE`.
    """
    span, row, batch, head = locate(spans, heads)

    # In the place of the first token of the first chunk, or of the last.
    chunks = tl.cdiv(length, CHUNK)
    chunk_count = tl.minimum(span_chunks, chunks - span * span_chunks)
    chunk = span * span_chunks
    if not ALL and span == (0 if REVERSE else spans - 1):
        chunk_count = 0
    direction = 1
    if REVERSE:
        chunk += chunk_count - 1
        direction = -1
    token = batch * length + chunk * CHUNK
    key, key_stride = at_token(key, token, head, heads, KEY_GROUP, DIM)
    value, value_stride = at_token(value, token, head, heads, VALUE_GROUP, VALUE_DIM)
    decays += (row * chunks + chunk) * 4 * CHUNK
    state, decay = tl.zeros((VALUE_BLOCK, BLOCK), tl.float32), 1.0
    for _ in range(chunk_count):
        _, _, from_start, to_end, total = load_decays(decays, DECAYS, CHUNK, PRODUCT)
        count = length - chunk * CHUNK
        k = load_rows(key, key_stride, count, DIM, CHUNK, BLOCK).to(PRODUCT)
        v = k
        if not SAME:
            v = load_rows(value, value_stride, count, VALUE_DIM, CHUNK, VALUE_BLOCK)
            v = scaled(v, SCALE).to(PRODUCT)
        factor = from_start if REVERSE else to_end
        state = advance(state, v, k, factor, total, POWER, DECAYS, PRECISION)
        if DECAYS:
            decay *= power(total, POWER)
        chunk += direction
        key += direction * CHUNK * key_stride
        value += direction * CHUNK * value_stride
        decays += direction * 4 * CHUNK

    program = tl.program_id(0)
    start = span_states + program.to(tl.int64) * DIM * VALUE_DIM
    store_rows(start, DIM, VALUE_DIM, state, DIM, VALUE_BLOCK, BLOCK)
    if DECAYS:
        tl.store(span_decays + program, decay)


@triton.jit
def state_between(
    state,
    span_states,
    span_decays,
    place,
    count,
    step,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DECAYS: tl.constexpr,
):
    """The state beyond `count` spans, from the state at an end of the sequence.

    `H_{m+1} = a_m^p H_m + span_states_m`; the first is at `place`, the next at `place + step`.
    """
    for _ in range(count):
        if DECAYS:
            state *= tl.load(span_decays + place)
        start = span_states + place * DIM * VALUE_DIM
        state += load_rows(start, DIM, VALUE_DIM, DIM, state.shape[0], state.shape[1])
        place += step
    return state
