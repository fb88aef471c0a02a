"""The primitive: chunked causal linear attention with one decay per head and token.

    LA_p(q, k, v)_t = q_tᵀ H_t,   H_t = a_t^p H_{t-1} + k_t v_tᵀ

Every operator of the package is a short chain of it. The length is cut into
chunks. Inside a chunk the output is a masked product of queries and keys, all
chunks at once; only the states between chunks are scanned, by a product with a
small triangular matrix. There is no loop.

Shapes are written `(..., n, c, d)`: batch and head axes, chunks, tokens of a
chunk, features. Decays are used only as `exp` of sums of logarithms, which never
overflows.
"""

import math

import keras
from keras import ops

from keras_hla.backend.tensors import (
    at_least,
    count_up,
    cumulative_sum,
    filled_up,
    first_entries,
    is_known,
    pad_axis,
    size_at_run_time,
    where,
)

# Up to this many states are scanned in one product, more in blocks.
_DIRECT = 64
# The size of a block where the number of states is unknown at trace time.
_BLOCK = 32
# Log-decays are summed as whole numbers of the fraction 1 / 256, and their remainders.
_FRACTIONS = 256


class ChunkedScan:
    """`LA_p` for the decays and the chunk size of one call.

    Args:
        log_decay: `log a_t`, shape `(..., n, c)`, or `None` for no decay.
        size: the chunk size `c`.
        dtype: dtype of the tensors to be scanned.
    """

    def __init__(self, log_decay, size, dtype):
        self._decays = log_decay is not None
        if self._decays:
            whole, rest = _cumulative_sums(log_decay)
            self._total = _to_nats(whole, rest.dtype) + rest
            self._within = _products(whole, rest)
        else:
            self._within = ops.cast(causal_mask(size), dtype)

    def __call__(self, query, key, value, state=None, power=1, exclusive=False):
        """Returns the outputs, `(..., n, c, dv)`, and the last state, `(..., d, dv)`.

        Args:
            query: shape `(..., n, c, d)`.
            key: shape `(..., n, c, d)`.
            value: shape `(..., n, c, dv)`.
            state: the state before the first token, `(..., d, dv)`; `None` is zero.
            power: `p`, a small positive integer.
            exclusive: whether a token reads the state as it was before it: `q_tᵀ H_{t-1}`.
        """
        within, total = self._within, self._total if self._decays else None
        if exclusive:
            within = before(within)
            total = total if total is None else pad_axis(total[..., :-1], 1, 0, axis=-1)
        scores = query @ ops.swapaxes(key, -1, -2)
        entering, last = self._carry(key, value, state, power)
        if self._decays:
            scores = scores * _power(within, power)
            query = query * _power(ops.exp(total)[..., None], power)
        else:
            scores *= within  # torch saves the memory of a second tensor
        if entering is None:
            return scores @ value, last
        output = query @ entering
        output += scores @ value  # likewise
        return output, last

    def last_state(self, key, value, power=1):
        """The last state alone, `(..., d, dv)`, from zero; a `power` of 0 is no decay."""
        return self._carry(key, value, None, power)[1]

    def _carry(self, key, value, state, power):
        """The states entering the chunks, `(..., n, d, dv)`, and the last one."""
        log_chunk = None
        if self._decays:
            to_end = self._within[..., -1, :][..., None]
            key = key * _power(to_end, power)
            log_chunk = bound(self._total[..., -1]) * power
        return self._scan_states(ops.swapaxes(key, -1, -2) @ value, log_chunk, state)

    def _scan_states(self, updates, log_chunk, state):
        return scan_chunks(updates, log_chunk, state)


class SingleScan(ChunkedScan):
    """`ChunkedScan` where one chunk holds all tokens, and has no axis: `(..., c, d)`."""

    def _scan_states(self, updates, log_chunk, state):
        if state is None:
            return None, updates
        decay = 1.0 if log_chunk is None else ops.exp(log_chunk)[..., None, None]
        return state, decay * state + updates


class UnorderedScan:
    """The primitive without an order: every token reads the sum over all of them.

    A chain of it is the operator with full matrices in the place of causal ones.
    """

    def __call__(self, query, key, value, state=None, power=1):
        total = ops.swapaxes(key, -1, -2) @ value
        return query @ total, total


def causal_mask(n):
    """The `(n, n)` boolean matrix that is true where the column is not after the row."""
    index = count_up(n)
    return index[:, None] >= index[None, :]


def decay_products(log_decay):
    """The decay from each token to each later one.

    Args:
        log_decay: shape `(..., n)`.

    Returns:
        The product of the decays after token `j` up to token `i` where `j <= i`,
        zero elsewhere; shape `(..., n, n)`.
    """
    return _products(*_cumulative_sums(log_decay))


def _cumulative_sums(log_decay):
    """The sums up to each token, in two parts: whole 256ths, as integers, and the remainders.

    Differences of the first are exact and those of the second, which stay small, accurate,
    however long the sums have become.
    """
    whole = ops.cast(ops.round(ops.stop_gradient(log_decay) * _FRACTIONS), "int32")
    return cumulative_sum(whole), cumulative_sum(log_decay - _to_nats(whole, log_decay.dtype))


def _to_nats(whole, dtype):
    return ops.cast(whole, dtype) / _FRACTIONS


def _products(whole, rest):
    past = causal_mask(ops.shape(rest)[-1])
    exponent = _to_nats(_differences(whole), rest.dtype) + _differences(rest)
    return ops.exp(where(past, exponent, -math.inf))


def before(within):
    """The decays up to the token before, from those up to each token, `(..., n, n)`."""
    return pad_axis(within[..., :-1, :], 1, 0, axis=-2)


def _differences(total):
    return total[..., :, None] - total[..., None, :]


def bound(log_decay):
    """The log-decay, with a finite number for each, -inf included, whose decay is zero anyway.

    So sums stay finite. NaN stays NaN.
    """
    return at_least(log_decay, least_log_decay(log_decay.dtype))


def least_log_decay(dtype):
    """A log-decay of a dtype whose decay is zero."""
    return -1024.0 if keras.backend.standardize_dtype(dtype) == "float64" else -128.0


def _power(decay, power):
    # Products of a few factors: cheaper than another `exp`, exact for zeros.
    return math.prod([decay] * power, start=1)


def scan_chunks(updates, log_decay, state):
    """`H_{i+1} = exp(log_decay_i) H_i + updates_i` over chunks; updates `(..., n, d, dv)`.

    Returns the states entering the chunks and the one leaving the last.
    """
    *lead, n, rows, columns = ops.shape(updates)
    flat = ops.reshape(updates, (*lead, n, rows * columns))
    if state is not None:
        state = ops.reshape(state, (*ops.shape(state)[:-2], rows * columns))
    entering, last = _scan(flat, log_decay, state)
    lead = ops.shape(last)[:-1]  # decays may have more heads than the updates
    entering = ops.reshape(entering, (*lead, n, rows, columns))
    return entering, ops.reshape(last, (*lead, rows, columns))


def _scan(updates, log_decay, state=None):
    """`scan_chunks` on flat states: `(..., n, f)`, log_decay `(..., n)`, state `(..., f)`."""
    n = ops.shape(updates)[-2]
    if isinstance(n, int) and n <= _DIRECT:  # which `torch.compile` asks of a symbol, too
        return _scan_directly(updates, log_decay, state)
    return _scan_in_blocks(updates, log_decay, state)


def _scan_directly(updates, log_decay, state=None):
    """`_scan` as one product with a triangular matrix.

    The last state is a second product, which compilers leave out where nobody reads it.
    """
    if log_decay is None:
        n = ops.shape(updates)[-2]
        weights = ops.cast(causal_mask(n + 1), updates.dtype)
    else:
        weights = decay_products(pad_axis(log_decay, 1, 0, axis=-1))
    from_state, weights = weights[..., :1], weights[..., 1:]
    entering, last = weights[..., :-1, :] @ updates, weights[..., -1:, :] @ updates
    if state is not None:
        state = state[..., None, :]
        entering = entering + from_state[..., :-1, :] * state
        last = last + from_state[..., -1:, :] * state
    return entering, last[..., 0, :]


def _scan_in_blocks(updates, log_decay, state):
    """`_scan` in two levels: within blocks from zero, then over the blocks."""
    n = ops.shape(updates)[-2]
    size = _block_size(n) if is_known(n) else size_at_run_time(n, _BLOCK)
    log_block = None
    updates = split_axis(updates, size, axis=-2)
    if log_decay is not None:
        log_decay = split_axis(log_decay, size, axis=-1)
        log_block = total_log_decay(log_decay)
    # With a number that is unknown at trace time there is no telling how deep to go.
    scan = _scan if is_known(n) else _scan_directly
    entering, block_updates = scan(updates, log_decay)
    entering_block, last = scan(block_updates, log_block, state)
    entering_block = entering_block[..., None, :]
    if log_decay is not None:
        entering_block = entering_block * decays_before(log_decay)[..., None]
    return merge_axis(entering + entering_block, n, axis=-2), last


def total_log_decay(log_decay):
    """The log-decay of several chunks, from those of each along the last axis."""
    return bound(ops.sum(log_decay, axis=-1))


def decays_before(log_decay):
    """The decay of all chunks before each, from the log-decays of each along the last axis."""
    # Not the sums less their last terms: what follows a chunk would round what comes before.
    return ops.exp(cumulative_sum(pad_axis(log_decay[..., :-1], 1, 0, axis=-1)))


def _block_size(n):
    """About the square root of `n`, and where possible a divisor, which saves filling up."""
    root = math.isqrt(n)
    return min(range(root, 2 * root), key=lambda size: -n % size)


def split_axis(x, size, axis):
    """Cuts a (negative) axis into entries of `size`, the last one filled up with zeros."""
    shape = ops.shape(x)
    whole = filled_up(shape[axis], size)
    x = pad_axis(x, 0, whole - shape[axis], axis)
    after = shape[axis + 1 :] if axis != -1 else ()
    return ops.reshape(x, (*shape[:axis], whole // size, size, *after))


def merge_axis(x, n, axis):
    """Undoes `split_axis`: joins `axis - 1` and `axis` and keeps the first `n` entries."""
    shape = ops.shape(x)
    after = shape[axis + 1 :] if axis != -1 else ()
    # Not the product of both sizes, of which JAX cannot tell that it is at least a symbolic `n`.
    x = ops.reshape(x, (*shape[: axis - 1], filled_up(n, shape[axis]), *after))
    return first_entries(x, n, axis)
