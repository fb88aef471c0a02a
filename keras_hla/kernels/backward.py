"""The gradients of the operators, from the last token to the first, in Triton."""

import triton
import triton.language as tl

from keras_hla.kernels.primitive import advance, load_decays, load_rows, mix, scores, store_rows


@triton.jit
def backward_kernel(
    # inputs
    query,
    key,
    value,
    coarse,
    rest,
    gradient,
    S_chunks,
    P_chunks,
    F_chunks,
    dS_entering,
    dP_entering,
    dF_entering,
    # numbers
    length,
    heads,
    segments,
    segment_chunks,
    # outputs
    dquery,
    dkey,
    dvalue,
    dlog_decay,
    dS_leaving,
    dP_leaving,
    dF_leaving,
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
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One segment of one head, chunk by chunk from its end.

    Level 1 sums the gradient of `F` over the segment; level 2 sums those of `S` and
    `P`, given that of `F` after the segment; level 3 computes the gradients of the
    inputs, given those of all states after it. States are named as in `forward_kernel`.
    """
    program = tl.program_id(0)
    segment = program % segments
    row = (program // segments).to(tl.int64)
    batch, head = row // heads, row % heads
    key_heads = heads // GROUP

    # In the place of the first token of the last chunk of the segment.
    chunks = tl.cdiv(length, CHUNK)
    steps = tl.minimum(segment_chunks, chunks - segment * segment_chunks)
    last = segment * segment_chunks + steps - 1
    token = batch * length + last * CHUNK
    query += (token * heads + head) * DIM
    key += (token * key_heads + head // GROUP) * DIM
    value += (token * key_heads + head // GROUP) * VALUE_DIM
    gradient += (token * heads + head) * VALUE_DIM
    dquery += (token * heads + head) * DIM
    dkey += (token * heads + head) * DIM
    dvalue += (token * heads + head) * VALUE_DIM
    dlog_decay += token * heads + head
    chunk = row * chunks + last
    coarse += chunk * CHUNK
    rest += chunk * CHUNK
    S_chunks += chunk * DIM * DIM
    P_chunks += chunk * DIM * VALUE_DIM
    F_chunks += chunk * DIM * VALUE_DIM
    place = program.to(tl.int64)
    dS = tl.zeros((BLOCK, BLOCK), tl.float32)
    dP = tl.zeros((VALUE_BLOCK, BLOCK), tl.float32)
    dF = tl.zeros((VALUE_BLOCK, BLOCK), tl.float32)
    if ENTERING and LEVEL > 1:
        start = dF_entering + place * DIM * VALUE_DIM
        dF = load_rows(start, DIM, VALUE_DIM, DIM, VALUE_BLOCK, BLOCK)
        if S_USED and LEVEL == 3:
            dS = load_rows(dS_entering + place * DIM * DIM, DIM, DIM, DIM, BLOCK, BLOCK)
        if P_USED and LEVEL == 3:
            start = dP_entering + place * DIM * VALUE_DIM
            dP = load_rows(start, DIM, VALUE_DIM, DIM, VALUE_BLOCK, BLOCK)

    zero = tl.zeros((BLOCK, CHUNK), tl.float32)
    value_zero = tl.zeros((VALUE_BLOCK, CHUNK), tl.float32)
    for _ in range(steps):
        count = length - last * CHUNK  # of tokens from here on
        q = load_rows(query, heads * DIM, count, DIM, CHUNK, BLOCK).to(PRODUCT)
        stride = heads * VALUE_DIM
        g = load_rows(gradient, stride, count, VALUE_DIM, CHUNK, VALUE_BLOCK).to(PRODUCT)
        qT, gT = tl.trans(q), tl.trans(g)
        sums, rests, from_start, to_end, total = load_decays(coarse, rest, DECAYS, CHUNK)
        if LEVEL > 1:
            k = load_rows(key, key_heads * DIM, count, DIM, CHUNK, BLOCK).to(PRODUCT)
            v = load_rows(value, key_heads * VALUE_DIM, count, VALUE_DIM, CHUNK, VALUE_BLOCK)
            v = v.to(PRODUCT)
            kT, vT = tl.trans(k), tl.trans(v)
            leftT, rightT = kT, vT
            A = scores(q, k, sums, rests, 1, True, DECAYS, PRECISION)
            if S_USED:
                S = load_rows(S_chunks, DIM, DIM, DIM, BLOCK, BLOCK)
                leftT = mix(kT, tl.trans(A), S, qT, zero, from_start, 1, False, DECAYS, PRECISION)
                leftT = leftT.to(PRODUCT)
            if P_USED:
                P = load_rows(P_chunks, DIM, VALUE_DIM, DIM, VALUE_BLOCK, BLOCK)
                rightT = mix(
                    vT, tl.trans(A), P, qT, value_zero, from_start, 1, False, DECAYS, PRECISION
                )
                rightT = rightT.to(PRODUCT)
            # Of the last pass.
            left, right = tl.trans(leftT), tl.trans(rightT)
            dB = scores(g, right, sums, rests, F_POWER, True, DECAYS, PRECISION)
            dleftT = mix(
                qT, dB, tl.trans(dF), rightT, zero, to_end, F_POWER, True, DECAYS, PRECISION
            )
            if LEVEL == 3 or P_USED:
                B = scores(q, left, sums, rests, F_POWER, True, DECAYS, PRECISION)
                drightT = mix(
                    gT, B, dF, leftT, value_zero, to_end, F_POWER, True, DECAYS, PRECISION
                )
            if LEVEL == 3:
                if not P_USED:
                    dv = tl.trans(drightT)
                    store_rows(dvalue, stride, count, dv, VALUE_DIM, CHUNK, VALUE_BLOCK)
                F = load_rows(F_chunks, DIM, VALUE_DIM, DIM, VALUE_BLOCK, BLOCK)
                dqT = mix(
                    leftT, tl.trans(dB), tl.trans(F), gT, zero, from_start, F_POWER, False, DECAYS,
                    PRECISION,
                )  # fmt: skip
        dF = advance(dF, gT, q, from_start, total, F_POWER, DECAYS, PRECISION)
        if LEVEL == 3 and DECAYS:
            # In a pass the sum of log-decays up to a token gets what queries get of it, less what
            # keys get; and all of the chunk together what the state before it sees of a shift.
            qdq = tl.sum(qT * dqT, 0)
            flow = F_POWER * (qdq - tl.sum(leftT * dleftT, 0))
            inner = F_POWER * tl.sum(tl.sum(F * dF, 1), 0)
        if LEVEL > 1 and S_USED:
            duT = dleftT.to(PRODUCT)
            du = tl.trans(duT)
            if LEVEL == 3:
                dA = scores(k, du, sums, rests, 1, False, DECAYS, PRECISION)
                dqT = mix(kT, dA, S, duT, dqT, from_start, 1, False, DECAYS, PRECISION)
                dkT = mix(qT, tl.trans(dA), dS, kT, zero, to_end, 1, False, DECAYS, PRECISION)
                if DECAYS:
                    flow -= tl.sum(kT * dkT, 0)
                dkT = mix(duT, A, tl.trans(dS), kT, dkT, to_end, 1, False, DECAYS, PRECISION)
            dS = advance(dS, qT, du, from_start, total, 1, DECAYS, PRECISION)
            if LEVEL == 3 and DECAYS:
                before, qdq = qdq, tl.sum(qT * dqT, 0)
                flow += qdq - before
                inner += tl.sum(tl.sum(S * dS, 1), 0)
        if LEVEL > 1 and P_USED:
            drT = drightT.to(PRODUCT)
            if LEVEL == 3:
                dA = scores(v, tl.trans(drT), sums, rests, 1, False, DECAYS, PRECISION)
                dqT = mix(kT, dA, tl.trans(P), drT, dqT, from_start, 1, False, DECAYS, PRECISION)
                dkT = dkT if S_USED else dleftT
                if DECAYS:
                    flow += tl.sum(kT * dkT, 0)
                dkT = mix(
                    qT, tl.trans(dA), tl.trans(dP), vT, dkT, to_end, 1, False, DECAYS, PRECISION
                )
                if DECAYS:
                    flow -= tl.sum(kT * dkT, 0)
                dvT = mix(drT, A, dP, kT, value_zero, to_end, 1, False, DECAYS, PRECISION)
                dv = tl.trans(dvT)
                store_rows(dvalue, stride, count, dv, VALUE_DIM, CHUNK, VALUE_BLOCK)
            dP = advance(dP, drT, q, from_start, total, 1, DECAYS, PRECISION)
            if LEVEL == 3 and DECAYS:
                before, qdq = qdq, tl.sum(qT * dqT, 0)
                flow += qdq - before
                inner += tl.sum(tl.sum(P * dP, 1), 0)
        if LEVEL == 3:
            store_rows(dquery, heads * DIM, count, tl.trans(dqT), DIM, CHUNK, BLOCK)
            store_rows(dkey, heads * DIM, count, tl.trans(dkT), DIM, CHUNK, BLOCK)
            if DECAYS:
                # A log-decay gets what the sums from its token on get.
                dlog = inner - (tl.cumsum(flow, 0) - flow)
                index = tl.arange(0, CHUNK)
                tl.store(dlog_decay + index * heads, dlog, mask=index < count)
        last -= 1
        query -= CHUNK * heads * DIM
        key -= CHUNK * key_heads * DIM
        value -= CHUNK * key_heads * VALUE_DIM
        gradient -= CHUNK * heads * VALUE_DIM
        dquery -= CHUNK * heads * DIM
        dkey -= CHUNK * heads * DIM
        dvalue -= CHUNK * heads * VALUE_DIM
        dlog_decay -= CHUNK * heads
        coarse -= CHUNK
        rest -= CHUNK
        S_chunks -= DIM * DIM
        P_chunks -= DIM * VALUE_DIM
        F_chunks -= DIM * VALUE_DIM

    if LEVEL == 3:  # the gradients of the states before the first token
        place = row
    if LEVEL < 3 or segment == 0:
        if LEVEL != 2:
            start = dF_leaving + place * DIM * VALUE_DIM
            store_rows(start, DIM, VALUE_DIM, dF, DIM, VALUE_BLOCK, BLOCK)
        if S_USED and LEVEL != 1:
            store_rows(dS_leaving + place * DIM * DIM, DIM, DIM, dS, DIM, BLOCK, BLOCK)
        if P_USED and LEVEL != 1:
            start = dP_leaving + place * DIM * VALUE_DIM
            store_rows(start, DIM, VALUE_DIM, dP, DIM, VALUE_BLOCK, BLOCK)
