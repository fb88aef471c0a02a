"""The operators from the first token to the last, in Triton."""

import triton
import triton.language as tl

from keras_hla.kernels.primitive import advance, load_decays, load_rows, mix, scores, store_rows


@triton.jit
def forward_kernel(
    # inputs
    query,
    key,
    value,
    coarse,
    rest,
    S_entering,
    P_entering,
    F_entering,
    # numbers
    length,
    heads,
    segments,
    segment_chunks,
    # outputs
    output,
    S_leaving,
    P_leaving,
    F_leaving,
    S_chunks,
    P_chunks,
    F_chunks,
    # known when compiled
    S_USED: tl.constexpr,
    P_USED: tl.constexpr,
    F_POWER: tl.constexpr,
    LEVEL: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    DECAYS: tl.constexpr,
    ENTERING: tl.constexpr,
    SAVE: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One segment of one head, chunk by chunk.

    `S` is the moment of the keys (`hla2`, `hla3`), `P` that of keys and values
    (`ahla`, `hla3`), `F` the last state of each operator (`E` in `ahla`).

    Level 1 sums `S` and `P` over the segment; level 2 sums `F`, given `S` and `P`
    before the segment; level 3 computes outputs, given all states before it.
    """
    program = tl.program_id(0)
    segment = program % segments
    row = (program // segments).to(tl.int64)  # of batch and head
    batch, head = row // heads, row % heads
    key_heads = heads // GROUP

    # In the place of the first token of the segment.
    first = segment * segment_chunks
    token = batch * length + first * CHUNK
    query += (token * heads + head) * DIM
    key += (token * key_heads + head // GROUP) * DIM
    value += (token * key_heads + head // GROUP) * VALUE_DIM
    output += (token * heads + head) * VALUE_DIM
    chunks = tl.cdiv(length, CHUNK)
    chunk = row * chunks + first
    coarse += chunk * CHUNK
    rest += chunk * CHUNK
    S_chunks += chunk * DIM * DIM
    P_chunks += chunk * DIM * VALUE_DIM
    F_chunks += chunk * DIM * VALUE_DIM
    place = program.to(tl.int64)  # of the segment's states
    S = tl.zeros((BLOCK, BLOCK), tl.float32)
    P = tl.zeros((VALUE_BLOCK, BLOCK), tl.float32)
    F = tl.zeros((VALUE_BLOCK, BLOCK), tl.float32)
    if ENTERING and LEVEL > 1:
        if S_USED:
            S = load_rows(S_entering + place * DIM * DIM, DIM, DIM, DIM, BLOCK, BLOCK)
        if P_USED:
            start = P_entering + place * DIM * VALUE_DIM
            P = load_rows(start, DIM, VALUE_DIM, DIM, VALUE_BLOCK, BLOCK)
        if LEVEL == 3:
            start = F_entering + place * DIM * VALUE_DIM
            F = load_rows(start, DIM, VALUE_DIM, DIM, VALUE_BLOCK, BLOCK)

    zero = tl.zeros((BLOCK, CHUNK), tl.float32)
    value_zero = tl.zeros((VALUE_BLOCK, CHUNK), tl.float32)
    for _ in range(tl.minimum(segment_chunks, chunks - first)):
        count = length - first * CHUNK  # of tokens left
        if SAVE:
            if S_USED:
                store_rows(S_chunks, DIM, DIM, S, DIM, BLOCK, BLOCK)
            if P_USED:
                store_rows(P_chunks, DIM, VALUE_DIM, P, DIM, VALUE_BLOCK, BLOCK)
            store_rows(F_chunks, DIM, VALUE_DIM, F, DIM, VALUE_BLOCK, BLOCK)
        k = load_rows(key, key_heads * DIM, count, DIM, CHUNK, BLOCK).to(PRODUCT)
        sums, rests, from_start, to_end, total = load_decays(coarse, rest, DECAYS, CHUNK)
        if P_USED or LEVEL > 1:
            v = load_rows(value, key_heads * VALUE_DIM, count, VALUE_DIM, CHUNK, VALUE_BLOCK)
            v = v.to(PRODUCT)
        if LEVEL > 1:
            q = load_rows(query, heads * DIM, count, DIM, CHUNK, BLOCK).to(PRODUCT)
            qT = tl.trans(q)
            # Keys and values of the last pass: `moved` and `answer` in `keras_hla.operators`.
            left, rightT = k, tl.trans(v)
            A = tl.trans(scores(q, k, sums, rests, 1, True, DECAYS, PRECISION))
            if S_USED:
                uT = mix(tl.trans(k), A, S, qT, zero, from_start, 1, False, DECAYS, PRECISION)
                left = tl.trans(uT.to(PRODUCT))
            if P_USED:
                rT = mix(tl.trans(v), A, P, qT, value_zero, from_start, 1, False, DECAYS, PRECISION)
                rightT = rT.to(PRODUCT)
            if LEVEL == 3:
                B = tl.trans(scores(q, left, sums, rests, F_POWER, True, DECAYS, PRECISION))
                oT = mix(rightT, B, F, qT, value_zero, from_start, F_POWER, True, DECAYS, PRECISION)
                stride = heads * VALUE_DIM
                store_rows(output, stride, count, tl.trans(oT), VALUE_DIM, CHUNK, VALUE_BLOCK)
            F = advance(F, rightT, left, to_end, total, F_POWER, DECAYS, PRECISION)
        if S_USED:
            S = advance(S, tl.trans(k), k, to_end, total, 1, DECAYS, PRECISION)
        if P_USED:
            P = advance(P, tl.trans(v), k, to_end, total, 1, DECAYS, PRECISION)
        first += 1
        query += CHUNK * heads * DIM
        key += CHUNK * key_heads * DIM
        value += CHUNK * key_heads * VALUE_DIM
        output += CHUNK * heads * VALUE_DIM
        coarse += CHUNK
        rest += CHUNK
        S_chunks += DIM * DIM
        P_chunks += DIM * VALUE_DIM
        F_chunks += DIM * VALUE_DIM

    if LEVEL == 3:  # the states after the last token
        place = row
    if LEVEL < 3 or segment == segments - 1:
        if S_USED and LEVEL != 2:
            store_rows(S_leaving + place * DIM * DIM, DIM, DIM, S, DIM, BLOCK, BLOCK)
        if P_USED and LEVEL != 2:
            start = P_leaving + place * DIM * VALUE_DIM
            store_rows(start, DIM, VALUE_DIM, P, DIM, VALUE_BLOCK, BLOCK)
        if LEVEL != 1:
            start = F_leaving + place * DIM * VALUE_DIM
            store_rows(start, DIM, VALUE_DIM, F, DIM, VALUE_BLOCK, BLOCK)
