"""The operators by kernels in PyTorch, with their gradients."""

import torch

from keras_hla.kernels import launch


@torch.compiler.disable  # which breaks the graph here: the kernels are compiled already
def attention(geometry, query, key, value, log_decay, states):
    """Returns the output and the states after it.

    Args:
        geometry: a `Geometry`.
        query, key, value: `(batch, length, heads, dim)`.
        log_decay: `(batch or 1, length, heads or 1)`, float32, or `None`.
        states: those of the operator, each as in `Geometry.state` or `None`.
    """
    output, *states = _Attention.apply(geometry, query, key, value, log_decay, *states)
    return output, tuple(states)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, geometry, query, key, value, log_decay, *states):
        query, key, value, log_decay = map(_contiguous, (query, key, value, log_decay))
        save = any(ctx.needs_input_grad)
        output, last, saved = launch.evaluate(
            _run, geometry, query, key, value, log_decay, states, save
        )
        ctx.geometry = geometry
        exchanged, chunk_states = saved if save else ((), ())
        ctx.save_for_backward(query, key, value, log_decay, *exchanged, *chunk_states)
        return output, *last

    @staticmethod
    def backward(ctx, gradient, *state_gradients):
        if torch.is_grad_enabled():  # with `create_graph=True`
            raise RuntimeError(
                "The kernels have no gradients of gradients. Use implementation='portable'."
            )
        query, key, value, log_decay, *saved = ctx.saved_tensors
        passes = len(ctx.geometry.passes)
        saved = saved[: passes - 1], saved[passes - 1 :]
        *found, states = launch.gradients(
            _run, ctx.geometry, query, key, value, log_decay, saved, gradient, state_gradients
        )
        needs = ctx.needs_input_grad[1:]
        found += states
        return None, *(x if n else None for x, n in zip(found, needs, strict=True))


def _contiguous(x):
    return None if x is None else x.contiguous()


def _run(kernel, grid, inputs, numbers, outputs, constants, options):
    some = inputs[0]
    results = [
        None if x is None else torch.empty(x[0], dtype=getattr(torch, x[1]), device=some.device)
        for x in outputs
    ]
    arguments = [some if x is None else x for x in (*map(_contiguous, inputs), *numbers, *results)]
    with torch.cuda.device_of(some):
        kernel[grid](*arguments, **constants, **options)
    return tuple(results)
