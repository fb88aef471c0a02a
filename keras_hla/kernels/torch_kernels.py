"""The operators by kernels in PyTorch, with their gradients."""

import torch
import triton.language as tl

from keras_hla.kernels import launch
from keras_hla.kernels.backward import backward_kernel
from keras_hla.kernels.combine import combine_kernel
from keras_hla.kernels.decays import decay_kernel
from keras_hla.kernels.forward import forward_kernel

_KERNELS = {
    "forward": forward_kernel,
    "backward": backward_kernel,
    "combine": combine_kernel,
    "decay": decay_kernel,
}


@torch.compiler.disable  # which breaks the graph here: the kernels are compiled already
def attention(geometry, query, key, value, log_decay, states):
    """Returns the output and the states after it, `(S, P, F)`.

    Args:
        geometry: a `Geometry`.
        query, key, value: `(batch, length, heads, dim)`.
        log_decay: `(batch or 1, length, heads or 1)`, float32, or `None`.
        states: `(S, P, F)`, each float32 `(batch * heads, 1, rows, columns)` or `None`.
    """
    output, *states = _Attention.apply(geometry, query, key, value, log_decay, *states)
    return output, tuple(states)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, geometry, query, key, value, log_decay, *states):
        ctx.set_materialize_grads(False)
        query, key, value, log_decay = map(_contiguous, (query, key, value, log_decay))
        save = any(ctx.needs_input_grad)
        output, last, saved = launch.evaluate(
            _run, geometry, query, key, value, log_decay, states, save
        )
        ctx.geometry = geometry
        ctx.save_for_backward(query, key, value, log_decay, *saved)
        return output, *last

    @staticmethod
    def backward(ctx, gradient, *state_gradients):
        if torch.is_grad_enabled():  # with `create_graph=True`
            raise RuntimeError(
                "The kernels have no gradients of gradients. Use implementation='portable'."
            )
        geometry = ctx.geometry
        query, key, value, log_decay, *saved = ctx.saved_tensors
        if gradient is None:
            shape, _ = geometry.sequence(geometry.value_dim)
            gradient = query.new_zeros(shape)
        dquery, dkey, dvalue, dlog_decay, states = launch.gradients(
            _run,
            geometry,
            query,
            key,
            value,
            log_decay,
            saved,
            gradient,
            state_gradients,
            lambda shape, dtype: query.new_zeros(shape, dtype=getattr(torch, dtype)),
        )
        dkey, dvalue = (_sum_groups(x, key) for x in (dkey, dvalue))
        if dlog_decay is not None:
            dlog_decay = dlog_decay.sum_to_size(log_decay.shape)
        needs = ctx.needs_input_grad[1:]
        found = (dquery, dkey, dvalue, dlog_decay, *states)
        return None, *(x if n else None for x, n in zip(found, needs, strict=True))


def _contiguous(x):
    return None if x is None else x.contiguous()


def _sum_groups(x, key):
    """From one gradient for each query head to one for each key head, as `key` has them."""
    batch, length, key_heads, _ = key.shape
    if x.shape[2] == key_heads:
        return x
    return x.reshape(batch, length, key_heads, -1, x.shape[-1]).sum(3).to(key.dtype)


def _run(kernel, grid, inputs, numbers, outputs, constants, options):
    if "PRODUCT" in constants:
        constants = constants | {"PRODUCT": getattr(tl, constants["PRODUCT"])}
    some = inputs[0]
    results = [
        None if x is None else torch.empty(x[0], dtype=getattr(torch, x[1]), device=some.device)
        for x in outputs
    ]
    # Kernels neither read nor write what is None, but compute with its address.
    arguments = [some if x is None else x for x in (*map(_contiguous, inputs), *numbers, *results)]
    with torch.cuda.device_of(some):
        _KERNELS[kernel][grid](*arguments, **constants, **options)
    return tuple(results)
