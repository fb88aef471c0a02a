"""The primitive over a sequence of which each device holds a contiguous shard.

Devices are one more level of blocks, above that of chunks: each scans its own chunks from zero, a
collective gathers the sums of all, and each adds the state that the shards before its own leave. A
pass has one collective, of a size that does not depend on the length.
"""

from keras import ops

from keras_hla.scan import ChunkedScan, decays_before, scan_chunks, total_log_decay


class DistributedScan(ChunkedScan):
    """`ChunkedScan` of the whole sequence, called on each device with its own shard.

    The state before the whole sequence comes in, and the state after it goes out: each is the same
    on all devices.

    Args:
        log_decay, size, dtype: as for `ChunkedScan`, of its own shard.
        devices: as `keras_hla.backend.devices.devices_of` returns them.
    """

    def __init__(self, log_decay, size, dtype, devices):
        super().__init__(log_decay, size, dtype)
        self._devices = devices

    def _scan_states(self, updates, log_chunk, state):
        entering, own = super()._scan_states(updates, log_chunk, None)
        parts, log_parts = self._gather(own, log_chunk)
        before, last = scan_chunks(parts, log_parts, state)
        before = self._devices.own(before, axis=-3)[..., None, :, :]
        if log_chunk is not None:
            before = decays_before(log_chunk)[..., None, None] * before
        return entering + before, self._devices.shared(last)

    def _gather(self, own, log_chunk):
        """The sums of all shards, `(..., devices, d, dv)`, and the log-decays of each."""
        if log_chunk is None:
            return self._devices.gather(own, axis=-3), None
        *lead, rows, columns = ops.shape(own)
        own = ops.reshape(own, (*lead, rows * columns))
        log_decay = ops.broadcast_to(total_log_decay(log_chunk), lead)[..., None]
        both = self._devices.gather(ops.concatenate([own, log_decay], axis=-1), axis=-2)
        parts, log_parts = both[..., :-1], both[..., -1]
        return ops.reshape(parts, (*ops.shape(log_parts), rows, columns)), log_parts
