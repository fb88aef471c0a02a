"""The kernels of a call of an operator in order, forward and backward.

States are in the order of the operator's, as in `Plan.state`, float32.
"""

from keras import ops

from keras_hla.backend.devices import restored
from keras_hla.kernels.launching import KernelFunction
from keras_hla.kernels.operator import launches
from keras_hla.kernels.operator.plan import Plan, plan_of
from keras_hla.kernels.passes import Pass


def evaluate(run, options, tensors, save):
    """Returns the output and the states after it; and for `gradients` more, if `save`.

    Args:
        run: as in `KernelFunction`, as are the others.
        options: the passes, as plain tuples; whether the states after it are wanted; and the
            devices that hold shards of the sequence, as `devices.kept` gives them, or `None`.
        tensors: `"query"`, `"key"` and `"value"`, `(batch, length, heads, dim)`; `"log_decay"`,
            `(batch or 1, length, heads or 1)`, float32; and the states before the first token,
            by their places.
        save: whether to return the outputs that later passes read, and the states before chunks.
    """
    _, return_state, devices = options
    plan = _plan(plan_of, options, tensors)
    devices = devices and restored(devices)
    decays = _decays(run, plan, tensors)
    known = {name: tensors[name] for name in ("query", "key", "value")}
    leaving, chunk_states = {}, []
    for pass_ in plan.passes:
        state, a, b = tensors.get(f"state {pass_.state}"), known[pass_.key], known[pass_.value]
        state, last, spans = _around(run, plan, pass_, (a, b, decays), state, devices, False)
        leaves = return_state and devices is None
        launch = launches.forward(plan, pass_, state is not None, save, leaves)
        inputs = (known[pass_.query], a, b, known.get(pass_.added), decays, state, *spans)
        known[pass_.output], own_last, saved = run(launch, inputs)
        leaving[pass_.state] = own_last if last is None else devices.shared(last)
        chunk_states.append(saved)
    results = [known[plan.passes[-1].output]]
    results += [leaving[i] for i in sorted(leaving)] if return_state else []
    kept = [known[name] for name in plan.kept]
    return tuple(results), (*kept, *chunk_states) if save else ()


def gradients(run, options, tensors, saved, results, wanted):
    """Returns the gradients of the wanted tensors, from those of the output and the states."""
    _, return_state, devices = options
    plan = _plan(plan_of, options, tensors)
    devices = devices and restored(devices)
    decays = _decays(run, plan, tensors)
    kept, chunk_states = saved[: len(plan.kept)], saved[len(plan.kept) :]
    known = {name: tensors[name] for name in ("query", "key", "value")}
    known |= zip(plan.kept, kept, strict=True)
    gradient, *of_states = results
    if gradient is None:  # of a loss that reads states alone
        gradient = ops.zeros(*plan.output(plan.passes[-1]))
    found = {plan.passes[-1].output: gradient}
    of_states = dict(zip(sorted(pass_.state for pass_ in plan.passes), of_states, strict=False))
    flows, inners = None, None
    for pass_, before in reversed(list(zip(plan.passes, chunk_states, strict=True))):
        state, a, b = of_states.get(pass_.state), known[pass_.key], known[pass_.value]
        query, g = known[pass_.query], found.pop(pass_.output)
        earlier = found.get(pass_.query), found.get(pass_.key)
        if pass_.key == pass_.query:
            earlier = earlier[0], None
        adds = (x is not None for x in earlier)
        if devices is not None and return_state:  # all of them, also where no loss reads it
            state = devices.total(ops.zeros(*plan.state(pass_, 1)) if state is None else state)
        state, first, spans = _around(run, plan, pass_, (query, g, decays), state, devices, True)
        name = f"state {pass_.state}"
        leaves = name in wanted and devices is None
        launch = launches.backward(plan, pass_, state is not None, *adds, leaves)
        inputs = (query, a, b, decays, g, before, state, *spans, *earlier)
        dquery, dkey, dvalue, flow, inner, found[name] = run(launch, inputs)
        if first is not None and name in wanted:  # which all devices have, and one of them gives
            found[name] = devices.of_first(first)
        found[pass_.query] = dquery
        if dkey is not None:
            found[pass_.key] = dkey
        if dvalue is not None:
            found[pass_.value] = _add(found.get(pass_.value), dvalue)
        if pass_.added and not pass_.query_factor:
            # A gradient that is returned is not one that was given.
            as_it_is = pass_.factor == 1 and pass_.added not in tensors
            own = g if as_it_is else pass_.factor * g
            found[pass_.added] = _add(found.get(pass_.added), own)
        flows, inners = _add(flows, flow), _add(inners, inner)
    found |= {name: _like_input(found[name], known[name]) for name in ("query", "key", "value")}
    if "log_decay" in wanted:
        (x,) = run(launches.decay_gradient(plan), (flows, inners))
        shape = tensors["log_decay"].shape
        axes = tuple(i for i in (0, 2) if shape[i] < x.shape[i])
        found["log_decay"] = ops.sum(x, axis=axes, keepdims=True) if axes else x
    return {name: found[name] for name in wanted}


def shapes(options, tensors, save):
    """Those of what `evaluate` returns, with their dtypes."""
    return_state = options[1]
    plan = _plan(Plan, options, tensors)
    results = [plan.sequence(plan.passes[-1].output, plan.dtype)]
    by_state = sorted(plan.passes, key=lambda pass_: pass_.state)
    results += [plan.state(pass_, 1) for pass_ in by_state] if return_state else []
    kept = [plan.sequence(name, plan.product_dtype) for name in plan.kept]
    chunk_states = [plan.state(pass_, plan.chunks, plan.product_dtype) for pass_ in plan.passes]
    return tuple(results), (*kept, *chunk_states) if save else ()


def count(options):
    """The number of results."""
    passes, return_state, _ = options
    return 1 + len(passes) * return_state


def rows(shape):
    """The axes of batch and heads: of states, and of sequences."""
    return (0, 1) if len(shape) == 5 else (0, 2)


ATTENTION = KernelFunction("attention", evaluate, gradients, shapes, count=count, rows=rows)


def _plan(make, options, tensors):
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    sizes = (*query.shape[:3], key.shape[2], query.shape[3], value.shape[3])
    dtype = str(query.dtype).removeprefix("torch.")
    passes = tuple(Pass(*x) for x in options[0])
    return make(passes, *sizes, dtype, "log_decay" in tensors)


def _decays(run, plan, tensors):
    log_decay = tensors.get("log_decay")
    if log_decay is None:
        return None
    return run(launches.decays(plan, tuple(log_decay.shape)), (log_decay,))[0]


def _around(run, plan, pass_, tensors, state, devices, reverse):
    """The states that a program of a pass reads: before its tokens, or if `reverse` after them.

    Args:
        tensors: keys and values, or queries and gradients of outputs, and the decays.
        state: state before all tokens, or `None`.
        devices: devices that hold shards of the sequence, or `None`.

    Returns:
        The state before the tokens of the device; that after the tokens of all devices, `None`
        where there is one; and what each span leaves to the others of the device.
    """
    alone = devices is None
    if alone and plan.spans == 1:
        return state, None, (None, None)
    spans = run(launches.span_states(plan, pass_, reverse, not alone), tensors)
    if alone:
        return state, None, spans
    (own,) = run(launches.shard(plan, pass_, reverse), spans)
    shards = devices.gather(own, axis=0)  # the only collective of a pass
    launch = launches.between(plan, pass_, len(shards), reverse, state is not None)
    before, last = run(launch, (shards, state))
    state = devices.own(before, axis=0)[: plan.rows * last.shape[-2] * last.shape[-1]]
    return ops.reshape(state, last.shape), last, spans if plan.spans > 1 else (None, None)


def _add(x, y):
    return y if x is None else x + y


def _like_input(x, like):
    """Sums the gradients of query heads that share a head, in the dtype of its tensor."""
    if x.shape[2] != like.shape[2]:
        batch, length, heads, _ = like.shape
        x = ops.sum(ops.reshape(x, (batch, length, heads, -1, x.shape[-1])), axis=3)
    return x if x.dtype == like.dtype else ops.cast(x, like.dtype)
