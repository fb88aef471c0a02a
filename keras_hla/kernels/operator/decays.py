"""The decays within chunks, in Triton."""

import triton
import triton.language as tl


@triton.jit
def decay_kernel(
    log_decay,
    length,
    heads,
    batch_stride,
    token_stride,
    head_stride,
    decays,
    CHUNK: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Stores the decays of a chunk as the kernels read them, `(batch * heads, chunks, 4, CHUNK)`.

    First the sums `b_t` of the log-decays up to a token, as two numbers like in
    `keras_hla.scan`: a sum of whole 256ths, which is exact, and a sum of the remainders, which is
    small. So differences are accurate however long the sums are. Products of bfloat16 gain nothing
    by that: unless `EXACT`, the first number is the whole sum. Then `exp(b_t)` and, with `c` the
    last token, `exp(b_c - b_t)`.
    """
    program = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(length, CHUNK)
    row, chunk = program // chunks, program % chunks
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    start = log_decay + row // heads * batch_stride + row % heads * head_stride
    x = tl.load(start + token * token_stride, mask=token < length, other=0.0)
    whole = tl.floor(x * 256 + 0.5) / 256
    coarse, rest = tl.cumsum(whole, 0), tl.cumsum(x - whole, 0)
    to_end = tl.sum(whole, 0) - coarse + (tl.sum(x - whole, 0) - rest)
    total = coarse + rest
    place = decays + program * 4 * CHUNK + tl.arange(0, CHUNK)
    tl.store(place, coarse if EXACT else total)
    tl.store(place + CHUNK, rest if EXACT else tl.zeros((CHUNK,), tl.float32))
    tl.store(place + 2 * CHUNK, tl.exp(total))
    tl.store(place + 3 * CHUNK, tl.exp(to_end))


@triton.jit
def decay_gradient_kernel(
    flows,
    inners,
    length,
    heads,
    dlog_decay,
    CHUNK: tl.constexpr,
):
    """Stores the gradient of log-decays, of shape `(batch, length, heads)`.

    A log-decay gets what the sums `b_t` from its token on get, and the last states. A pass gives
    to `b_t` its flow, `p` times the product of the query and its gradient less that of the key
    and its own; and to those of a chunk and after it together its inner, `p` times the product of
    the state before the chunk and its gradient. So no error adds up over the chunks.
    `flows`, `(batch * heads, chunks, CHUNK)`, and `inners` are sums over the passes.
    """
    program = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(length, CHUNK)
    row, chunk = program // chunks, program % chunks
    index = tl.arange(0, CHUNK)
    flow = tl.load(flows + program * CHUNK + index)
    dlog = tl.load(inners + program) - (tl.cumsum(flow, 0) - flow)
    token = chunk * CHUNK + index
    start = dlog_decay + row // heads * length * heads + row % heads
    tl.store(start + token * heads, dlog, mask=token < length)
