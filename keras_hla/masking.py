"""Masks and packed sequences: tensors of `(batch, length)`, and what follows from them."""

import math

from keras import ops

from keras_hla.backend.tensors import at_least, count_up, cumulative_sum, pad_axis, where

_LARGEST = 2**31 - 1  # of the integers that count tokens


def segment_starts(segment_ids, mask, devices=None):
    """Where a segment starts, `(batch, length)`, but for the first one, which goes on.

    Tokens where `mask` is false belong to no segment. In a shard of a sequence the first segment
    goes on if it is the last one of the shards before.
    """
    if devices is None:
        return _starts(segment_ids, mask)
    mask = ops.ones_like(segment_ids, dtype="bool") if mask is None else mask
    last = devices.gather(ops.stack(_last_unmasked(segment_ids, mask), axis=-1), axis=1)
    earlier = count_up(last.shape[1]) < devices.index
    before, is_known = _last_unmasked(last[..., 0], (last[..., 1] > 0) & earlier)
    # As a token in front of the shard.
    segment_ids = ops.concatenate([before[:, None], segment_ids], axis=1)
    mask = ops.concatenate([is_known[:, None] > 0, mask], axis=1)
    return _starts(segment_ids, mask)[:, 1:]


def _last_unmasked(x, mask):
    """The last entry of each row of `x` where `mask` is true, and 1 if there is one or 0."""
    positions = where(mask, count_up(ops.shape(x)[1]) + 1, 0)
    last = ops.max(pad_axis(positions, 1, 0, axis=1), axis=1)  # 0 of no token, too
    entry = ops.take_along_axis(pad_axis(x, 1, 0, axis=1), last[:, None], axis=1)[:, 0]
    return entry, ops.cast(last > 0, x.dtype)


def _starts(segment_ids, mask):
    before, both_unmasked = segment_ids, True
    if mask is not None:
        before, is_known = fill_forward(segment_ids, mask)
        both_unmasked = is_known[:, :-1] & mask[:, 1:]
    starts = (segment_ids[:, 1:] != before[:, :-1]) & both_unmasked
    first = ops.zeros_like(segment_ids[:, :1], dtype="bool")
    return ops.concatenate([first, starts], axis=1)


def count_tokens(mask):
    """The number of unmasked tokens, up to each, `(batch, length)`."""
    return cumulative_sum(ops.cast(mask, "int32"))


def last_count(counts):
    """The last of each row's counts, `(batch, length)`, or zero if there is none: `(batch, 1)`."""
    return pad_axis(counts, 1, 0, axis=1)[:, -1:]


def compact(x, mask):
    """The entries of `x`, `(batch, length, ...)`, those first where `mask` is true."""
    return take(x, _counting_first(mask))


def compacted_places(mask):
    """The index of each token where the unmasked ones come first, each kind in order."""
    count = count_tokens(mask)
    of_masked = last_count(count) + count_up(ops.shape(mask)[1]) - count
    return where(mask, count - 1, of_masked)


def take(x, index):
    """The entries of `x`, `(batch, length, ...)`, at each row's indices, `(batch, n)`."""
    index = ops.reshape(index, (*ops.shape(index), *[1] * (len(x.shape) - 2)))
    return ops.take_along_axis(x, index, axis=1)


def fill_forward(x, mask):
    """Each entry of `x`, or where `mask` is false the last one before it where it is true.

    Args:
        x: shape `(batch, length, ...)`.
        mask: boolean, shape `(batch, length)`.

    Returns:
        A tensor of the shape of `x`, and where it holds such an entry, `(batch, length)`.
    """
    count = count_tokens(mask)
    last = take(_counting_first(mask), at_least(count - 1, 0))
    return take(x, last), count > 0


def _counting_first(mask):
    """The indices of each row, in order, those first where `mask` is true."""
    steps = count_up(ops.shape(mask)[1])
    return ops.argsort(where(mask, steps, _LARGEST), axis=1)


def apply_mask(mask, query, key, value):
    """Makes the tokens where `mask` is false leave every state as it is and output zero.

    `where` rather than a product: such tokens may hold NaN.
    """
    return [where(mask[..., None, None], x, 0) for x in (query, key, value)]


def forget_at(starts, log_decay, dtype):
    """The log-decay with which tokens at `starts` forget all before them."""
    log_decay = 0.0 if log_decay is None else log_decay
    return ops.cast(where(starts, -math.inf, log_decay), dtype)
