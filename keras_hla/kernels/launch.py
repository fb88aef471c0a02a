"""The kernels in order, for one call of an operator: what is alike on all backends.

`run(kernel, grid, inputs, numbers, outputs, constants, options)` launches one. Inputs are
tensors or `None`, outputs are pairs `(shape, dtype)` or `None`; it returns the tuple of outputs.
Kernels neither read nor write what is `None`, but compute with an address for it.
States are in the order of the operator's, as in `Geometry.state`, float32.
"""

import functools
import math

from keras import ops
import triton.language as tl

from keras_hla.kernels.backward import backward_kernel
from keras_hla.kernels.combine import combine_kernel
from keras_hla.kernels.decays import decay_gradient_kernel, decay_kernel
from keras_hla.kernels.forward import forward_kernel
from keras_hla.kernels.sums import sum_kernel

_COMBINE_BLOCK = 1024


def evaluate(run, geometry, query, key, value, log_decay, states, save):
    """Returns the output, the states after it, and if `save` what `gradients` needs.

    Args:
        run: as above.
        geometry: a `Geometry`.
        query, key, value: `(batch, length, heads, dim)`.
        log_decay: `(batch or 1, length, heads or 1)`, float32, or `None`.
        states: the states before the first token; `None` is zero.
        save: whether to save the states before each chunk, and what one pass gives another.
    """
    launch = _Launch(run, geometry, log_decay)
    tensors = {"query": query, "key": key, "value": value}
    leaving, chunk_states = list(states), []
    for one in geometry.passes:
        final = one is geometry.passes[-1]
        output = geometry.sequence(one.output, geometry.dtype if final else geometry.product_dtype)
        tensors[one.output], leaving[one.state], saved = launch.forward(
            one, tensors, states[one.state], output, save
        )
        chunk_states.append(saved)
    exchanged = tuple(tensors[one.output] for one in geometry.passes[:-1])
    saved = (exchanged, tuple(chunk_states)) if save else None
    return tensors[geometry.passes[-1].output], tuple(leaving), saved


def gradients(run, geometry, query, key, value, log_decay, saved, gradient, states):
    """Returns the gradients of query, key, value and log-decay, and of the states before.

    Args:
        saved: from `evaluate`.
        gradient: that of the output.
        states: those of the states after the last token.
    """
    launch = _Launch(run, geometry, log_decay)
    exchanged, chunk_states = saved
    tensors = {"query": query, "key": key, "value": value}
    tensors |= zip((one.output for one in geometry.passes[:-1]), exchanged, strict=True)
    found = {geometry.passes[-1].output: gradient}
    entering, flows, inners = list(states), [], []
    for one, before in reversed(list(zip(geometry.passes, chunk_states, strict=True))):
        flow, inner, entering[one.state] = launch.backward(
            one, tensors, before, found, states[one.state]
        )
        flows.append(flow)
        inners.append(inner)
    dkey, dvalue = (_sum_groups(found[name], tensors[name]) for name in ("key", "value"))
    dlog_decay = None
    if log_decay is not None:
        dlog_decay = launch.decay_gradient(sum(flows), sum(inners))
        axes = tuple(i for i in (0, 2) if log_decay.shape[i] < dlog_decay.shape[i])
        dlog_decay = ops.sum(dlog_decay, axis=axes, keepdims=True) if axes else dlog_decay
    return found["query"], dkey, dvalue, dlog_decay, tuple(entering)


@functools.lru_cache(maxsize=1024)
def _constants(kernel, geometry, one):
    """Those of a pass that the kernel has."""
    constants = geometry.constants(one) | {"PRODUCT": getattr(tl, geometry.product_dtype)}
    return {k: x for k, x in constants.items() if k in kernel.arg_names}


def _sum_groups(x, like):
    """From one gradient for each query head to one for each head that there is."""
    if x.shape[2] == like.shape[2]:
        return x
    batch, length, heads, _ = like.shape
    x = ops.reshape(x, (batch, length, heads, -1, x.shape[-1]))
    return ops.cast(ops.sum(x, axis=3), like.dtype)


class _Launch:
    """The kernels on the inputs and decays of one call."""

    def __init__(self, run, geometry, log_decay):
        self._run, self._geometry = run, geometry
        self._decays = None if log_decay is None else self._prepare(log_decay)

    def _prepare(self, log_decay):
        geometry = self._geometry
        batch, length, heads = log_decay.shape
        strides = (length * heads if batch > 1 else 0, heads, 1 if heads > 1 else 0)
        shape = (geometry.rows, geometry.chunks, 4, geometry.chunk)
        return self._run_chunks(
            decay_kernel, (log_decay,), strides, shape, EXACT=geometry.product_dtype == "float32"
        )

    def decay_gradient(self, flows, inners):
        geometry = self._geometry
        shape = (geometry.batch, geometry.length, geometry.heads)
        return self._run_chunks(decay_gradient_kernel, (flows, inners), (), shape)

    def _run_chunks(self, kernel, inputs, numbers, shape, **constants):
        """A program for each chunk of each row."""
        geometry = self._geometry
        grid = (geometry.rows * geometry.chunks,)
        numbers = (geometry.length, geometry.heads, *numbers)
        constants["CHUNK"] = geometry.chunk
        return self._run(kernel, grid, inputs, numbers, ((shape, "float32"),), constants, {})[0]

    def _run_pass(self, kernel, one, inputs, outputs, **constants):
        geometry = self._geometry
        constants = _constants(kernel, geometry, one) | constants
        options = geometry.options(one, backward=kernel is backward_kernel)
        return self._run(
            kernel, geometry.grid, inputs, geometry.numbers, outputs, constants, options
        )

    def forward(self, one, tensors, state, output, save):
        """The output, the state after it, and if `save` those before each chunk."""
        geometry = self._geometry
        key, value = tensors[one.key], tensors[one.value]
        if geometry.segments > 1:
            state = self._between(one, key, value, state, reverse=False)
        inputs = (tensors["query"], key, value, self._decays, state)
        saved = geometry.state(one, geometry.chunks, geometry.product_dtype) if save else None
        outputs = (output, geometry.state(one, 1), saved)
        return self._run_pass(
            forward_kernel, one, inputs, outputs, ENTERING=state is not None, SAVE=save
        )

    def backward(self, one, tensors, chunk_states, found, state):
        """Puts gradients into `found`; returns what decays need, and that of the state before."""
        geometry = self._geometry
        query, key, value = tensors["query"], tensors[one.key], tensors[one.value]
        gradient = found.pop(one.output)
        if geometry.segments > 1:
            state = self._between(one, query, gradient, state, reverse=True)
        before = found.get("query"), found.get(one.key)
        inputs = (query, key, value, self._decays, gradient, chunk_states, state, *before)
        names = ["query", one.key] + ([one.value] if one.value != one.key else [])
        earlier = geometry.passes[: geometry.passes.index(one)]
        outputs = [geometry.sequence(x, self._dtype_of_gradient(x, earlier)) for x in names]
        outputs += [None] * (3 - len(outputs))
        count = (geometry.rows, geometry.chunks)
        decay_outputs = [((*count, geometry.chunk), "float32"), (count, "float32")]
        outputs += decay_outputs if geometry.decays else [None, None]
        *results, flow, inner, state = self._run_pass(
            backward_kernel,
            one,
            inputs,
            [*outputs, geometry.state(one, 1)],
            ENTERING=state is not None,
            ADD_QUERY=before[0] is not None,
            ADD_KEY=before[1] is not None,
        )
        found |= zip(names, results[: len(names)], strict=True)
        return flow, inner, state

    def _dtype_of_gradient(self, name, earlier):
        """That of the products for what `earlier` passes add to or take, else that of the input."""
        geometry = self._geometry
        if any(name in ("query", one.key, one.value, one.output) for one in earlier):
            return geometry.product_dtype
        # Where heads share keys, their gradients are yet to be summed.
        shared = geometry.heads > geometry.key_heads and name != "query"
        return "float32" if shared else geometry.dtype

    def _between(self, one, key, value, initial, reverse):
        """The states before the segments, backwards those after them, from the sums over each."""
        geometry = self._geometry
        shape, dtype = geometry.state(one, geometry.segments)
        constants = {"REVERSE": reverse}
        if reverse:  # the queries, and the gradients of outputs
            constants |= {"KEY_GROUP": 1, "VALUE_GROUP": 1, "SAME": False}
        inputs = (key, value, self._decays)
        (sums,) = self._run_pass(sum_kernel, one, inputs, ((shape, dtype),), **constants)
        size = math.prod(shape[2:])
        constants = {
            "SIZE": size,
            "POWER": one.power,
            "REVERSE": reverse,
            "DECAYS": geometry.decays,
            "CHUNK": geometry.chunk,
            "LAST": 1 << (geometry.chunks_of_segment - 1).bit_length(),
            "INITIAL": initial is not None,
            "BLOCK": _COMBINE_BLOCK,
        }
        grid = (geometry.rows, -(-size // _COMBINE_BLOCK))
        inputs = (sums, self._decays, initial)
        numbers = (geometry.segments, geometry.chunks, geometry.chunks_of_segment)
        outputs = ((shape, dtype),)
        return self._run(combine_kernel, grid, inputs, numbers, outputs, constants, {})[0]
