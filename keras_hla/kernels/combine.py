"""From the sums over segments to the states between them, in Triton."""

import triton
import triton.language as tl


@triton.jit
def combine_kernel(
    sums,
    decays,
    initial,
    segments,
    chunks,
    segment_chunks,
    entering,
    SIZE: tl.constexpr,
    POWER: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    LAST: tl.constexpr,
    DECAYS: tl.constexpr,
    INITIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`H_{m+1} = exp(p b_m) H_m + sums_m`: stores `H_m`, for a block of its entries.

    `b_m` is the sum of the log-decays of the segment, whose chunks `LAST` is not less than.

    Backwards the order of the segments is reversed.
    """
    row = tl.program_id(0).to(tl.int64)
    entries = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = entries < SIZE
    state = tl.zeros((BLOCK,), tl.float32)
    if INITIAL:
        state = tl.load(initial + row * SIZE + entries, mask=inside, other=0.0)
    for step in range(segments):
        segment = row * segments + (segments - 1 - step if REVERSE else step)
        added = tl.load(sums + segment * SIZE + entries, mask=inside, other=0.0)
        tl.store(entering + segment * SIZE + entries, state, mask=inside)
        if DECAYS:
            first = (segment - row * segments) * segment_chunks
            index = first + tl.arange(0, LAST)
            last = tl.minimum(first + segment_chunks, chunks)
            place = decays + (row * chunks + index) * 4 * CHUNK + CHUNK - 1
            total = tl.load(place, mask=index < last, other=0.0)
            total += tl.load(place + CHUNK, mask=index < last, other=0.0)
            state *= tl.exp(POWER * tl.sum(total, 0))
        state += added
