"""The states between the shards of a sequence, from the states of their spans."""

from keras import ops


def states_between(devices, span_states, span_decays, state, reverse):
    """The state before the shard of this device, and the state after all shards.

    All devices gather the state that each shard leaves from zero, and `a^p` over the shard: the
    only collective of a pass. `H_{m+1} = a_m^p H_m + sum_m` over the shards `m`.

    Args:
        devices: as `keras_hla.backend.devices.devices_of` returns them.
        span_states: as `span_kernel` stores them for all spans, `(batch, heads, spans, ...)`.
        span_decays: the same, `(batch * heads, spans)`, or `None` without decays.
        state: state before all shards, `(batch, heads, 1, ...)`, or `None`, which is zero.
        reverse: whether spans and shards are in reverse order, as for gradients; "before" then
            means "after".

    Returns:
        Two states of the shape of `state`.
    """
    batch, heads, spans, *shape = span_states.shape
    own = ops.reshape(span_states, (batch, heads, spans, -1))
    if span_decays is None:
        shards = devices.gather(ops.sum(own, axis=2), axis=0)
        decays = [1.0] * len(shards)
    else:
        later, whole = _decays_after(ops.reshape(span_decays, (batch, heads, spans)), reverse)
        own = ops.sum(own * later[..., None], axis=2)
        both = devices.gather(ops.concatenate([own, whole], axis=-1), axis=0)
        shards, decays = both[..., :-1], both[..., -1:]
    order = range(len(shards))
    state = ops.zeros_like(shards[0]) if state is None else ops.reshape(state, shards[0].shape)
    before = [state] * len(shards)
    for i in reversed(order) if reverse else order:
        before[i] = state
        state = decays[i] * state + shards[i]
    own = devices.own(ops.stack(before), axis=0)
    return tuple(ops.reshape(x, (batch, heads, 1, *shape)) for x in (own, state))


def _decays_after(decays, reverse):
    """The decay over the spans after each span, and over all spans, `(..., 1)`; may be zero."""
    logs = ops.log(decays)
    logs = logs if reverse else ops.flip(logs, axis=-1)
    sums = ops.cumsum(ops.concatenate([ops.zeros_like(logs[..., :1]), logs], axis=-1), axis=-1)
    later, whole = ops.exp(sums[..., :-1]), ops.exp(sums[..., -1:])
    return later if reverse else ops.flip(later, axis=-1), whole
