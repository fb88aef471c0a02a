"""The states that shards leave from zero, and the states between shards, in Triton.

A shard is what a device holds of a sequence in context parallelism: `H_{m+1} = a_m^p H_m + sum_m`
over the shards `m`, as over the spans of each. `sum_m` of all rows and then `a_m^p` of all rows
are one array, which is all that devices gather. A program computes a block of features of a row.
"""

import triton
import triton.language as tl

NUMBERS = ("rows", "spans", "count", "stride")  # whose values change no instruction


@triton.jit(do_not_specialize=NUMBERS)
def shard_kernel(
    span_states,
    span_decays,
    rows,
    spans,
    shard,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    DECAYS: tl.constexpr,
):
    """The state that all spans leave from zero, and `a^p` over them, in one array.

    If `REVERSE`, spans are in reverse order, as for gradients.
    """
    row, feature, inside = _locate(SIZE, BLOCK)
    state, decay = tl.zeros((BLOCK,), tl.float32), 1.0
    for i in range(spans):
        place = row * spans + (spans - 1 - i if REVERSE else i)
        if DECAYS:
            a = tl.load(span_decays + place)
            state *= a
            decay *= a
        state += tl.load(span_states + place * SIZE + feature, mask=inside, other=0.0)
    tl.store(shard + row * SIZE + feature, state, mask=inside)
    if DECAYS:  # by all programs of the row, as it is the same
        tl.store(shard + rows.to(tl.int64) * SIZE + row, decay)


@triton.jit(do_not_specialize=NUMBERS)
def between_kernel(
    shards,
    entering,
    rows,
    count,
    stride,
    before,
    last,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    DECAYS: tl.constexpr,
    ENTERING: tl.constexpr,
):
    """The states before each of `count` shards, at a `stride`, and the state after all.

    If `REVERSE`, shards are in reverse order; "before" then means "after".
    """
    row, feature, inside = _locate(SIZE, BLOCK)
    size = rows.to(tl.int64) * SIZE  # of the states of a shard
    place = row * SIZE + feature
    state = tl.zeros((BLOCK,), tl.float32)
    if ENTERING:
        state = tl.load(entering + place, mask=inside, other=0.0)
    for i in range(count):
        m = count - 1 - i if REVERSE else i
        tl.store(before + m * stride + place, state, mask=inside)
        shard = shards + m * size
        if DECAYS:
            shard += m * rows
            state *= tl.load(shard + size + row)
        state += tl.load(shard + place, mask=inside, other=0.0)
    tl.store(last + place, state, mask=inside)


@triton.jit
def _locate(SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The row of batch and head of a program, its features, and which of them there are."""
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    feature = program % blocks * BLOCK + tl.arange(0, BLOCK)
    return (program // blocks).to(tl.int64), feature, feature < SIZE
