"""The kernels in order, for one call of an operator: what is alike on all backends.

`run(step, inputs)` launches a `Step`, and returns the tuple of its outputs. Inputs are tensors or
`None`; kernels neither read nor write what is `None`, but compute with an address for it.
States are in the order of the operator's, as in `Geometry.state`, float32.
"""

from keras import ops

from keras_hla.kernels import steps


def evaluate(run, geometry, query, key, value, log_decay, states, save, return_state):
    """Returns the output, the states after it, and if `save` what `gradients` needs.

    Args:
        run: as above.
        geometry: a `Geometry`.
        query, key, value: `(batch, length, heads, dim)`.
        log_decay: `(batch or 1, length, heads or 1)`, float32, or `None`.
        states: the states before the first token; `None` is zero.
        save: whether to save the states before each chunk, and what one pass gives another.
        return_state: whether the states after it are wanted; without they are `None`.
    """
    decays = _decays(run, geometry, log_decay)
    tensors = {"query": query, "key": key, "value": value}
    leaving, chunk_states = list(states), []
    for one in geometry.passes:
        state, a, b = states[one.state], tensors[one.key], tensors[one.value]
        step = steps.forward(geometry, one, state is not None, save, return_state)
        inputs = (query, a, b, decays, state, *_sums(run, geometry, one, a, b, decays, False))
        tensors[one.output], leaving[one.state], saved = run(step, inputs)
        chunk_states.append(saved)
    exchanged = tuple(tensors[one.output] for one in geometry.passes[:-1])
    saved = (exchanged, tuple(chunk_states)) if save else None
    return tensors[geometry.passes[-1].output], tuple(leaving), saved


def gradients(run, geometry, query, key, value, log_decay, saved, gradient, states, wanted):
    """Returns the gradients of query, key, value and log-decay, and of the states before.

    Args:
        saved: from `evaluate`.
        gradient: that of the output.
        states: those of the states after the last token; `None` is zero.
        wanted: for each of the states before, whether its gradient is; others are `None`.
    """
    decays = _decays(run, geometry, log_decay)
    exchanged, chunk_states = saved
    tensors = {"query": query, "key": key, "value": value}
    tensors |= zip((one.output for one in geometry.passes[:-1]), exchanged, strict=True)
    found = {geometry.passes[-1].output: gradient}
    entering, flows, inners = list(states), None, None
    for one, before in reversed(list(zip(geometry.passes, chunk_states, strict=True))):
        state, a, b = states[one.state], tensors[one.key], tensors[one.value]
        g = found.pop(one.output)
        earlier = found.get("query"), found.get(one.key)
        adds = (x is not None for x in earlier)
        step = steps.backward(geometry, one, state is not None, *adds, wanted[one.state])
        after = _sums(run, geometry, one, query, g, decays, True)
        inputs = (query, a, b, decays, g, before, state, *after, *earlier)
        dquery, dkey, dvalue, flow, inner, entering[one.state] = run(step, inputs)
        found |= {"query": dquery, one.key: dkey}
        if dvalue is not None:
            found[one.value] = _add(found.get(one.value), dvalue)
        flows, inners = _add(flows, flow), _add(inners, inner)
    dkey, dvalue = (_like_input(found[name], tensors[name]) for name in ("key", "value"))
    dlog_decay = None
    if log_decay is not None:
        (dlog_decay,) = run(steps.decay_gradient(geometry), (flows, inners))
        axes = tuple(i for i in (0, 2) if log_decay.shape[i] < dlog_decay.shape[i])
        dlog_decay = ops.sum(dlog_decay, axis=axes, keepdims=True) if axes else dlog_decay
    return found["query"], dkey, dvalue, dlog_decay, tuple(entering)


def _decays(run, geometry, log_decay):
    if log_decay is None:
        return None
    return run(steps.decays(geometry, tuple(log_decay.shape)), (log_decay,))[0]


def _sums(run, geometry, one, key, value, decays, reverse):
    """What each segment leaves to those after it, or backwards to those before it."""
    if geometry.segments == 1:
        return None, None
    return run(steps.sums(geometry, one, reverse), (key, value, decays))


def _add(x, y):
    return y if x is None else x + y


def _like_input(x, like):
    """From one gradient for each query head to one for each head that there is, in its dtype."""
    if x.shape[2] != like.shape[2]:
        batch, length, heads, _ = like.shape
        x = ops.sum(ops.reshape(x, (batch, length, heads, -1, x.shape[-1])), axis=3)
    return x if x.dtype == like.dtype else ops.cast(x, like.dtype)
