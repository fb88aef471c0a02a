"""One pass of an operator from the first token to the last, in Triton."""

import triton
import triton.language as tl

from keras_hla.kernels.operator.primitive import (
    NUMBERS,
    advance,
    at_token,
    load_decays,
    load_rows,
    locate,
    mix,
    scaled,
    scores,
    store_rows,
)
from keras_hla.kernels.operator.spans import state_between


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    # inputs
    query,
    key,
    value,
    added,
    decays,
    entering,
    span_states,
    span_decays,
    # numbers
    length,
    heads,
    spans,
    span_chunks,
    # outputs
    output,
    leaving,
    chunk_states,
    # known when compiled
    POWER: tl.constexpr,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    ADDED_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SAME: tl.constexpr,
    DECAYS: tl.constexpr,
    WIDE: tl.constexpr,
    ENTERING: tl.constexpr,
    SEVERAL_SPANS: tl.constexpr,
    SAVE: tl.constexpr,
    LEAVING: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The outputs of one span of one head, chunk by chunk.

    Reads the state before the first token, if `ENTERING`, and with `SEVERAL_SPANS` what
    `span_kernel` stores. Stores the state before each chunk as well, if `SAVE`, and the state
    after the last token, if `LEAVING`. `SAME` means that the keys are also the values. Outputs are
    those of the primitive times `SCALE`, and `FACTOR` times `added`, unless that is zero.
    """
    span, row, batch, head = locate(spans, heads)

    # In the place of the first token of the span.
    first = span * span_chunks
    token = batch * length + first * CHUNK
    query, query_stride = at_token(query, token, head, heads, QUERY_GROUP, DIM)
    key, key_stride = at_token(key, token, head, heads, KEY_GROUP, DIM)
    value, value_stride = at_token(value, token, head, heads, VALUE_GROUP, VALUE_DIM)
    added, added_stride = at_token(added, token, head, heads, ADDED_GROUP, VALUE_DIM)
    output += (token * heads + head) * VALUE_DIM
    chunks = tl.cdiv(length, CHUNK)
    decays += (row * chunks + first) * 4 * CHUNK
    chunk_states += (row * chunks + first) * DIM * VALUE_DIM
    state = tl.zeros((VALUE_BLOCK, BLOCK), tl.float32)
    if ENTERING:
        start = entering + row * DIM * VALUE_DIM
        state = load_rows(start, DIM, VALUE_DIM, DIM, VALUE_BLOCK, BLOCK)
    if SEVERAL_SPANS:
        place = row * spans
        state = state_between(
            state, span_states, span_decays, place, span, 1, DIM, VALUE_DIM, DECAYS
        )

    chunk_count = tl.minimum(span_chunks, chunks - first)
    for _ in range(chunk_count):
        coarse, rest, from_start, to_end, total = load_decays(decays, DECAYS, CHUNK, PRODUCT)
        count = length - first * CHUNK  # of tokens left
        if SAVE:
            store_rows(chunk_states, DIM, VALUE_DIM, state, DIM, VALUE_BLOCK, BLOCK)
        q = load_rows(query, query_stride, count, DIM, CHUNK, BLOCK).to(PRODUCT)
        k = load_rows(key, key_stride, count, DIM, CHUNK, BLOCK).to(PRODUCT)
        v = k
        if not SAME:
            v = load_rows(value, value_stride, count, VALUE_DIM, CHUNK, VALUE_BLOCK).to(PRODUCT)
        A = scores(q, k, coarse, rest, POWER, DECAYS, PRECISION)
        o = mix(A, v, q, state, from_start, POWER, DECAYS, WIDE, PRECISION)
        o = scaled(o, SCALE)
        if FACTOR != 0.0:
            x = load_rows(added, added_stride, count, VALUE_DIM, CHUNK, VALUE_BLOCK)
            o += scaled(x, FACTOR)
        store_rows(output, heads * VALUE_DIM, count, o, VALUE_DIM, CHUNK, VALUE_BLOCK)
        state = advance(state, v, k, to_end, total, POWER, DECAYS, PRECISION)
        first += 1
        query += CHUNK * query_stride
        key += CHUNK * key_stride
        value += CHUNK * value_stride
        added += CHUNK * added_stride
        output += CHUNK * heads * VALUE_DIM
        decays += 4 * CHUNK
        chunk_states += DIM * VALUE_DIM

    if LEAVING and span == spans - 1:
        start = leaving + row * DIM * VALUE_DIM
        store_rows(start, DIM, VALUE_DIM, state, DIM, VALUE_BLOCK, BLOCK)
