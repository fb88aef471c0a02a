"""The operators by kernels in PyTorch, with their gradients."""

import torch

from keras_hla.kernels import launch

_ALIGNMENT = 16  # bytes, of the addresses that kernels are compiled for


@torch.compiler.disable  # which breaks the graph here: the kernels are compiled already
def attention(geometry, query, key, value, log_decay, states, return_state):
    """Returns the output and the states after it.

    Args:
        geometry: a `Geometry`.
        query, key, value: `(batch, length, heads, dim)`.
        log_decay: `(batch or 1, length, heads or 1)`, float32, or `None`.
        states: those of the operator, each as in `Geometry.state` or `None`.
        return_state: whether the states after it are wanted; without they are `None`.
    """
    output, *states = _Attention.apply(
        geometry, return_state, query, key, value, log_decay, *states
    )
    return output, tuple(states)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, geometry, return_state, *inputs):
        query, key, value, log_decay, *states = map(_contiguous, inputs)
        save = any(ctx.needs_input_grad)
        output, last, saved = launch.evaluate(
            _run, geometry, query, key, value, log_decay, states, save, return_state
        )
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        exchanged, chunk_states = saved if save else ((), ())
        ctx.save_for_backward(query, key, value, log_decay, *exchanged, *chunk_states)
        return output, *last

    @staticmethod
    def backward(ctx, *gradients):
        if torch.is_grad_enabled():  # with `create_graph=True`
            raise RuntimeError(
                "The kernels have no gradients of gradients. Use implementation='portable'."
            )
        gradient, *state_gradients = map(_contiguous, gradients)
        query, key, value, log_decay, *saved = ctx.saved_tensors
        passes = len(ctx.geometry.passes)
        saved = saved[: passes - 1], saved[passes - 1 :]
        if gradient is None:  # of a loss that reads states alone
            gradient = query.new_zeros((*query.shape[:3], value.shape[3]))
        needs = ctx.needs_input_grad[2:]
        *found, states = launch.gradients(
            _run,
            ctx.geometry,
            query,
            key,
            value,
            log_decay,
            saved,
            gradient,
            state_gradients,
            needs[4:],
        )
        found += states
        return None, None, *(x if n else None for x, n in zip(found, needs, strict=True))


def _contiguous(x):
    """As the kernels take it, which is as nearly all tensors are."""
    if x is None:
        return None
    x = x.contiguous()
    return x.clone() if x.data_ptr() % _ALIGNMENT else x


def _run(step, inputs):
    some = inputs[0]
    results = []
    for i, x in enumerate(step.outputs):
        if i in step.in_place:
            results.append(inputs[step.in_place[i]])
        else:
            results.append(None if x is None else some.new_empty(x[0], dtype=getattr(torch, x[1])))
    arguments = [some if x is None else x for x in (*inputs, *step.numbers, *results)]
    with torch.cuda.device_of(some):
        compiled = step.compiled.get(some.device)
        if compiled is None:
            compiled = step.kernel[step.grid](*arguments, **step.constants, **step.options)
            step.compiled[some.device] = compiled  # `None` if interpreted
        else:
            # Without asking again for what the arguments are like, which takes longer than the
            # kernel: the step has their dtypes and numbers, and addresses are aligned.
            compiled[(*step.grid, 1, 1)](*arguments, *step.constants.values())
    return tuple(results)
