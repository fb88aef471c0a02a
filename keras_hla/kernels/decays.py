"""The sums of log-decays within chunks, in Triton."""

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
    coarse,
    rest,
    CHUNK: tl.constexpr,
):
    """Stores the sums up to each token of a chunk, `(batch * heads, chunks * CHUNK)`.

    They come in two parts, as in `keras_hla.scan`: sums of whole 256ths are exact, those
    of the rests small, so that differences are accurate however long the sums are.
    """
    program = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(length, CHUNK)
    row, chunk = program // chunks, program % chunks
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    start = log_decay + row // heads * batch_stride + row % heads * head_stride
    x = tl.load(start + token * token_stride, mask=token < length, other=0.0)
    whole = tl.floor(x * 256 + 0.5) / 256
    place = row * chunks * CHUNK + token
    tl.store(coarse + place, tl.cumsum(whole, 0))
    tl.store(rest + place, tl.cumsum(x - whole, 0))
