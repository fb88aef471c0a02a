"""The kernels in order, for one call of an operator: what is alike on all backends.

`run(kernel, grid, inputs, numbers, outputs, constants, options)` launches one. Inputs are
tensors or `None`, outputs are pairs `(shape, dtype)` or `None`; it returns the tuple of outputs.
Kernels neither read nor write what is `None`, but compute with an address for it.
States are tuples `(S, P, F)` as in `Geometry.states`, float32.
"""

import math

from keras import ops
import triton.language as tl

from keras_hla.kernels.backward import backward_kernel
from keras_hla.kernels.combine import combine_kernel
from keras_hla.kernels.decays import decay_kernel
from keras_hla.kernels.forward import forward_kernel

_NONE = (None, None, None)
_COMBINE_BLOCK = 1024


def evaluate(run, geometry, query, key, value, log_decay, states, save):
    """Returns the output, the states after it, and if `save` those before each chunk.

    Args:
        run: as above.
        geometry: a `Geometry`.
        query, key, value: `(batch, length, heads, dim)`.
        log_decay: `(batch or 1, length, heads or 1)`, float32, or `None`.
        states: the states before the first token; `None` is zero.
        save: whether to return what `gradients` needs.
    """
    decays = sum_decays(run, geometry, log_decay)
    inputs = (query, key, value, *decays)

    def level(level, entering, outputs, save=False):
        constants = {"LEVEL": level, "SAVE": save, "ENTERING": entering != _NONE}
        return _run_level(run, geometry, forward_kernel, (*inputs, *entering), outputs, constants)

    if geometry.segments > 1:
        S_sums, P_sums, F_sums = geometry.states(geometry.segments)
        between = _Between(run, geometry, decays, states, reverse=False)
        _, S_sums, P_sums, *_ = level(1, _NONE, (None, S_sums, P_sums, None, *_NONE))
        S, P = between(S_sums, 0), between(P_sums, 1)
        _, _, _, F_sums, *_ = level(2, (S, P, None), (None, None, None, F_sums, *_NONE))
        states = (S, P, between(F_sums, 2))
    saved = geometry.states(geometry.chunks, geometry.product_dtype) if save else _NONE
    output = geometry.sequence(geometry.value_dim)
    output, *rest = level(3, states, (output, *geometry.states(1), *saved), save)
    return output, tuple(rest[:3]), tuple(rest[3:])


def gradients(run, geometry, query, key, value, log_decay, saved, gradient, states):
    """Returns the gradients of query, key, value and log-decay, and of the states before.

    Args:
        saved: from `evaluate`.
        gradient: that of the output.
        states: those of the states after the last token, of all that the operator has.
    """
    decays = sum_decays(run, geometry, log_decay)
    inputs = (query, key, value, *decays, gradient, *saved)

    def level(level, entering, outputs):
        constants = {"LEVEL": level, "ENTERING": entering != _NONE}
        return _run_level(run, geometry, backward_kernel, (*inputs, *entering), outputs, constants)

    if geometry.segments > 1:
        S_sums, P_sums, F_sums = geometry.states(geometry.segments)
        between = _Between(run, geometry, decays, states, reverse=True)
        *_, F_sums = level(1, _NONE, (None, *_NONE, None, None, F_sums))
        F = between(F_sums, 2)
        *_, S_sums, P_sums, _ = level(2, (None, None, F), (None, *_NONE, S_sums, P_sums, None))
        states = (between(S_sums, 0), between(P_sums, 1), F)
    dim, value_dim = geometry.dim, geometry.value_dim
    # Where heads share keys, their gradients are yet to be summed.
    shared = "float32" if geometry.heads > geometry.key_heads else None
    outputs = [geometry.sequence(dim), *(geometry.sequence(x, shared) for x in (dim, value_dim))]
    decays = (geometry.batch, geometry.length, geometry.heads), "float32"
    outputs += [decays if geometry.decays else None, *geometry.states(1)]
    dquery, dkey, dvalue, dlog_decay, *states = level(3, states, outputs)
    if geometry.heads > geometry.key_heads:
        dkey, dvalue = (_sum_groups(x, key) for x in (dkey, dvalue))
    if log_decay is not None:
        axes = tuple(i for i in (0, 2) if log_decay.shape[i] < dlog_decay.shape[i])
        dlog_decay = ops.sum(dlog_decay, axis=axes, keepdims=True) if axes else dlog_decay
    return dquery, dkey, dvalue, dlog_decay, tuple(states)


def _sum_groups(x, key):
    """From one gradient for each query head to one for each key head, as `key` has them."""
    batch, length, key_heads, _ = key.shape
    x = ops.reshape(x, (batch, length, key_heads, -1, x.shape[-1]))
    return ops.cast(ops.sum(x, axis=3), key.dtype)


def sum_decays(run, geometry, log_decay):
    """The sums of log-decays up to each token of a chunk, in two parts, or twice `None`."""
    if log_decay is None:
        return None, None
    batch, length, heads = log_decay.shape
    strides = (length * heads if batch > 1 else 0, heads, 1 if heads > 1 else 0)
    shape = (geometry.rows, geometry.chunks, geometry.chunk)
    grid = (geometry.rows * geometry.chunks,)
    numbers = (geometry.length, geometry.heads, *strides)
    outputs = [(shape, "float32")] * 2
    return run(decay_kernel, grid, (log_decay,), numbers, outputs, {"CHUNK": geometry.chunk}, {})


def _run_level(run, geometry, kernel, inputs, outputs, constants):
    constants = geometry.constants | constants | {"PRODUCT": getattr(tl, geometry.product_dtype)}
    options = geometry.options(backward=kernel is backward_kernel)
    return run(kernel, geometry.grid, inputs, geometry.numbers, outputs, constants, options)


class _Between:
    """From the sums over segments to the states before them, backwards to those after them."""

    def __init__(self, run, geometry, decays, initial, reverse):
        self._run, self._geometry, self._decays = run, geometry, decays
        self._initial, self._reverse = initial, reverse

    def __call__(self, sums, which):
        """Of one of the states, by its place among `S`, `P` and `F`."""
        if sums is None:
            return None
        rows, segments, *shape = sums.shape
        initial = self._initial[which]
        size = math.prod(shape)
        constants = {
            "SIZE": size,
            "POWER": self._geometry.powers[which],
            "REVERSE": self._reverse,
            "DECAYS": self._geometry.decays,
            "CHUNK": self._geometry.chunk,
            "LAST": 1 << (self._geometry.chunks_of_segment - 1).bit_length(),
            "INITIAL": initial is not None,
            "BLOCK": _COMBINE_BLOCK,
        }
        grid = (rows, -(-size // _COMBINE_BLOCK))
        inputs = (sums, *self._decays, initial)
        numbers = (segments, self._geometry.chunks, self._geometry.chunks_of_segment)
        outputs = ((tuple(sums.shape), "float32"),)
        return self._run(combine_kernel, grid, inputs, numbers, outputs, constants, {})[0]
