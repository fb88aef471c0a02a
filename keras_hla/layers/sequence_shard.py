"""The shard of a sequence that a device holds in context parallelism."""

from keras import ops

from keras_hla.backend.tensors import at_least, count_up, where
from keras_hla.stages import last_window
from keras_hla.stages.rotary import moved_on


class SequenceShard:
    """What a layer reads of the shards before its own, and what is left after all of them.

    The size of its collectives does not depend on the length.

    Args:
        devices: as `keras_hla.backend.devices.devices_of` returns them.
        length: number of tokens of the own shard.
        mask: boolean tensor of the own shard, `(batch, length)`, or `None`.
        starts: boolean tensor of the own shard, `(batch, length)`, true where a segment starts, or
            `None`.
    """

    def __init__(self, devices, length, mask, starts):
        self.devices = devices
        if mask is None and starts is None and devices.are_shards_equal:
            self._tokens = ops.zeros((1, devices.size), "int32") + length  # `(rows, devices)`
            self._begun = ops.zeros_like(self._tokens)
        else:
            tokens = ops.zeros((1,), "int32") + length if mask is None else _count(mask)
            begun = ops.zeros_like(tokens) if starts is None else _count(starts)
            rows = ops.zeros_like(tokens + begun)  # of the batch, or one
            facts = devices.gather(ops.stack([tokens + rows, begun + rows], axis=-1), axis=1)
            self._tokens, self._begun = facts[..., 0], facts[..., 1]
        self._is_earlier = count_up(self._tokens.shape[1]) < devices.index

    def positions(self, position):
        """The positions `(batch, 2)` before the own shard and after all, from that before all."""
        before = ops.sum(where(self._is_earlier, self._tokens, 0), axis=1, keepdims=True)
        total = ops.sum(self._tokens, axis=1, keepdims=True)
        after = self.devices.shared(moved_on(position, total))
        return moved_on(position, before), after

    def last_tokens(self, own, window=None, segmented=False, return_end=True):
        """The last tokens before the own shard, and those at the end of all shards.

        Args:
            own: tensor of shape `(batch, n, features)`, the last `n` unmasked tokens of the own
                shard, and zeros before them if it has fewer.
            window: tensor of that shape, the tokens before all parts. `None` is zeros.
            segmented: whether those of other segments than the last are zero, as in `own`.
            return_end: whether those at the end of all shards are wanted; else they are `None`.

        Returns:
            Two tensors of the shape and dtype of `own`.
        """
        batch, slots, features = ops.shape(own)
        parts = self.devices.gather(own, axis=1)
        row = ops.reshape(parts, (batch, -1, features))
        first = at_least(slots - self._tokens, 0)[..., None]
        slot = count_up(slots)

        def of_row(marked):
            return ops.reshape(ops.broadcast_to(marked, parts.shape[:-1]), (batch, -1))

        starts = of_row((slot == first) & (self._begun[..., None] > 0)) if segmented else None

        def last(are_read):
            mask = of_row((slot >= first) & are_read)
            return last_window(row, slots + 1, window, mask, starts)

        end = self.devices.shared(last(True)) if return_end else None
        return last(self._is_earlier[:, None]), end


def _count(mask):
    return ops.sum(ops.cast(mask, "int32"), axis=1)
