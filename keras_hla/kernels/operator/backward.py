"""The gradients of one pass of an operator, from the last token to the first, in Triton."""

import triton
import triton.language as tl

from keras_hla.kernels.operator.primitive import (
    NUMBERS,
    advance,
    at_token,
    inner_products,
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
def backward_kernel(
    # inputs
    query,
    key,
    value,
    decays,
    gradient,
    chunk_states,
    entering,
    span_states,
    span_decays,
    dquery_before,
    dkey_before,
    # numbers
    length,
    heads,
    spans,
    span_chunks,
    # outputs
    dquery,
    dkey,
    dvalue,
    flows,
    inners,
    leaving,
    # known when compiled
    POWER: tl.constexpr,
    SCALE: tl.constexpr,
    QUERY_FACTOR: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SAME: tl.constexpr,
    KEY_IS_QUERY: tl.constexpr,
    ADD_QUERY: tl.constexpr,
    ADD_KEY: tl.constexpr,
    DECAYS: tl.constexpr,
    WIDE: tl.constexpr,
    REFINE: tl.constexpr,
    ENTERING: tl.constexpr,
    SEVERAL_SPANS: tl.constexpr,
    LEAVING: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients in one span of one head, chunk by chunk from its end.

    Reads the states before the chunks, which `forward_kernel` stores, the gradient of the state
    after the last token, if `ENTERING`, and with `SEVERAL_SPANS` what `span_kernel` stores if
    `REVERSE`. Stores the gradient of the state before the first token, if `LEAVING`.

    Gradients of queries and keys are added to `before`, the gradients from later passes. Where
    the keys are also the values, or the queries, their gradient is the sum of both. Queries that
    are added to the outputs get `QUERY_FACTOR` times the gradient of `queryᵀ H` as well. For
    `flows` and `inners` see `decay_gradient_kernel`. `REFINE` means that scores are not rounded.
    """
    span, row, batch, head = locate(spans, heads)

    # In the place of the first token of the last chunk of the span.
    chunks = tl.cdiv(length, CHUNK)
    chunk_count = tl.minimum(span_chunks, chunks - span * span_chunks)
    last = span * span_chunks + chunk_count - 1
    token = batch * length + last * CHUNK
    stride, vstride = heads * DIM, heads * VALUE_DIM
    place, vplace = token * stride + head * DIM, token * vstride + head * VALUE_DIM
    query, query_stride = at_token(query, token, head, heads, QUERY_GROUP, DIM)
    key, key_stride = at_token(key, token, head, heads, KEY_GROUP, DIM)
    value, value_stride = at_token(value, token, head, heads, VALUE_GROUP, VALUE_DIM)
    gradient += vplace
    dquery_before += place
    dkey_before += place
    dquery += place
    dkey += place
    dvalue += vplace
    chunk = row * chunks + last
    decays += chunk * 4 * CHUNK
    chunk_states += chunk * DIM * VALUE_DIM
    flows += chunk * CHUNK
    inners += chunk
    dstate = tl.zeros((VALUE_BLOCK, BLOCK), tl.float32)
    if ENTERING:
        start = entering + row * DIM * VALUE_DIM
        dstate = load_rows(start, DIM, VALUE_DIM, DIM, VALUE_BLOCK, BLOCK)
    if SEVERAL_SPANS:
        place, after = row * spans + spans - 1, spans - 1 - span
        dstate = state_between(
            dstate, span_states, span_decays, place, after, -1, DIM, VALUE_DIM, DECAYS
        )

    for _ in range(chunk_count):
        coarse, rest, from_start, to_end, total = load_decays(decays, DECAYS, CHUNK, PRODUCT)
        count = length - last * CHUNK  # of tokens from here on
        q = load_rows(query, query_stride, count, DIM, CHUNK, BLOCK).to(PRODUCT)
        k = load_rows(key, key_stride, count, DIM, CHUNK, BLOCK).to(PRODUCT)
        v = k
        if not SAME:
            v = load_rows(value, value_stride, count, VALUE_DIM, CHUNK, VALUE_BLOCK).to(PRODUCT)
        g = load_rows(gradient, vstride, count, VALUE_DIM, CHUNK, VALUE_BLOCK)
        g = scaled(g, SCALE).to(PRODUCT)
        state = load_rows(chunk_states, DIM, VALUE_DIM, DIM, VALUE_BLOCK, BLOCK)
        A = scores(q, k, coarse, rest, POWER, DECAYS, PRECISION)
        dA = scores(g, v, coarse, rest, POWER, DECAYS, PRECISION)
        if not REFINE:
            A, dA = A.to(PRODUCT), dA.to(PRODUCT)
        dv = mix(tl.trans(A), g, k, dstate, to_end, POWER, DECAYS, WIDE, PRECISION)
        if not SAME:
            store_rows(dvalue, vstride, count, dv, VALUE_DIM, CHUNK, VALUE_BLOCK)
        dk = mix(tl.trans(dA), q, v, tl.trans(dstate), to_end, POWER, DECAYS, WIDE, PRECISION)
        if DECAYS:
            flow = inner_products(dk, k, PRECISION)
        if SAME:
            dk += dv
        if ADD_KEY:
            dk += load_rows(dkey_before, stride, count, DIM, CHUNK, BLOCK)
        if not KEY_IS_QUERY:
            store_rows(dkey, stride, count, dk, DIM, CHUNK, BLOCK)
        dq = mix(dA, k, g, tl.trans(state), from_start, POWER, DECAYS, WIDE, PRECISION)
        if DECAYS:
            flow = inner_products(dq, q, PRECISION) - flow
            tl.store(flows + tl.arange(0, CHUNK), POWER * flow)
        if KEY_IS_QUERY:
            dq += dk
        if QUERY_FACTOR != 0.0:
            dq += scaled(g, QUERY_FACTOR)
        if ADD_QUERY:
            dq += load_rows(dquery_before, stride, count, DIM, CHUNK, BLOCK)
        store_rows(dquery, stride, count, dq, DIM, CHUNK, BLOCK)
        dstate = advance(dstate, g, q, from_start, total, POWER, DECAYS, PRECISION)
        if DECAYS:
            tl.store(inners, POWER * tl.sum(inner_products(dstate, state, PRECISION), 0))
        last -= 1
        query -= CHUNK * query_stride
        key -= CHUNK * key_stride
        value -= CHUNK * value_stride
        gradient -= CHUNK * vstride
        dquery_before -= CHUNK * stride
        dkey_before -= CHUNK * stride
        dquery -= CHUNK * stride
        dkey -= CHUNK * stride
        dvalue -= CHUNK * vstride
        decays -= 4 * CHUNK
        chunk_states -= DIM * VALUE_DIM
        flows -= CHUNK
        inners -= 1

    if LEAVING and span == 0:
        start = leaving + row * DIM * VALUE_DIM
        store_rows(start, DIM, VALUE_DIM, dstate, DIM, VALUE_BLOCK, BLOCK)
