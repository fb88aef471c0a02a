"""Launches under PyTorch: directly, or by PyTorch custom operators where a graph is compiled."""

import ast
import functools

import torch
from torch._subclasses.fake_tensor import FakeTensor

_ALIGNMENT = 16  # bytes, of the addresses that kernels are compiled for
_SCHEMA = "(Tensor[] tensors, str description) -> Tensor[]"
_GRADIENT_SCHEMA = (
    "(Tensor[] tensors, Tensor[] saved, Tensor[] gradients, str description) -> Tensor[]"
)


def call(function, options, tensors):
    """Evaluates a `KernelFunction`, differentiably."""
    needed = torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values())
    if torch.compiler.is_compiling() or any(isinstance(x, FakeTensor) for x in tensors.values()):
        names = tuple(tensors)
        count = function.count(options)
        description = repr((_as_numbers(options), names, needed, count))
        operator = getattr(torch.ops.keras_hla, function.name)
        return tuple(operator([*tensors.values()], description)[:count])
    if not needed:
        tensors = {name: as_kernels_take_it(x) for name, x in tensors.items()}
        return function.evaluate(run, options, tensors, False)[0]
    return _Differentiable.apply(function, options, tuple(tensors), *tensors.values())


def _as_numbers(options):
    """Options in which `torch.compile` has no symbols for numbers."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    if isinstance(options, tuple):
        return tuple(map(_as_numbers, options))
    return guard_scalar(options) if isinstance(options, float) else options


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, options, names, *tensors):
        tensors = tuple(map(as_kernels_take_it, tensors))
        results, saved = function.evaluate(
            run, options, dict(zip(names, tensors, strict=True)), True
        )
        ctx.call = function, options, names
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *saved)
        return results

    @staticmethod
    def backward(ctx, *gradients):
        if torch.is_grad_enabled():  # with `create_graph=True`
            refuse_second_gradients()
        function, options, names = ctx.call
        wanted = [x for x, n in zip(names, ctx.needs_input_grad[3:], strict=True) if n]
        found = ctx.saved_tensors  # once, as `torch.utils.checkpoint` allows
        tensors, saved = found[: len(names)], found[len(names) :]
        tensors = dict(zip(names, tensors, strict=True))
        gradients = tuple(x if x is None else as_kernels_take_it(x) for x in gradients)
        found = function.gradients(run, options, tensors, saved, gradients, wanted)
        return None, None, None, *map(found.get, names)


def register(function):
    """Registers the PyTorch custom operators of a `KernelFunction`: its results, and its gradients.

    The first also returns what is saved for the second.
    """

    def evaluate(tensors, description):
        options, names, save, _ = _parse(description)
        tensors = dict(zip(names, map(as_kernels_take_it, tensors), strict=True))
        results, saved = function.evaluate(run, options, tensors, save)
        return [*results, *saved]

    def shapes(tensors, description):
        options, names, save, _ = _parse(description)
        results, saved = function.shapes(options, dict(zip(names, tensors, strict=True)), save)
        return [_allocate(tensors[0], x) for x in (*results, *saved)]

    def gradients(tensors, saved, gradients, description):
        options, names, wanted, given = _parse(description)
        tensors = dict(zip(names, map(as_kernels_take_it, tensors), strict=True))
        gradients = iter(map(as_kernels_take_it, gradients))
        gradients = tuple(next(gradients) if x else None for x in given)
        found = function.gradients(run, options, tensors, saved, gradients, wanted)
        return [found[name] for name in wanted]

    def gradient_shapes(tensors, saved, gradients, description):
        _, names, wanted, _ = _parse(description)
        tensors = dict(zip(names, tensors, strict=True))
        return [torch.empty_like(tensors[x]).contiguous() for x in wanted]

    library, name = torch.library, f"keras_hla::{function.name}"
    operator = library.custom_op(name, evaluate, mutates_args=(), schema=_SCHEMA)
    operator.register_fake(shapes)
    of_gradients = library.custom_op(
        f"{name}_gradients", gradients, mutates_args=(), schema=_GRADIENT_SCHEMA
    )
    of_gradients.register_fake(gradient_shapes)
    of_gradients.register_autograd(lambda ctx, *_: refuse_second_gradients())

    def keep(ctx, inputs, output):
        tensors, description = inputs
        ctx.description = description
        _, names, _, count = _parse(description)
        ctx.set_materialize_grads(False)
        ctx.wanted = tuple(n for n, x in zip(names, tensors, strict=True) if x.requires_grad)
        ctx.save_for_backward(*tensors, *output[count:])

    def backward(ctx, gradients):
        options, names, _, count = _parse(ctx.description)
        found = ctx.saved_tensors
        tensors, saved = found[: len(names)], found[len(names) :]
        gradients = gradients[:count]
        given = tuple(x is not None for x in gradients)
        description = repr((options, names, ctx.wanted, given))
        some = [x for x in gradients if x is not None]
        found = of_gradients([*tensors], [*saved], some, description)
        found = dict(zip(ctx.wanted, found, strict=True))
        return [found.get(name) for name in names], None

    operator.register_autograd(backward, setup_context=keep)


_parse = functools.lru_cache(maxsize=1024)(ast.literal_eval)


def refuse_second_gradients():
    raise RuntimeError("The kernels have no gradients of gradients. Use implementation='portable'.")


def as_kernels_take_it(x):
    """A tensor with its elements in order, at an aligned address, as nearly all have."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % _ALIGNMENT else x


def _allocate(like, spec):
    shape, dtype = spec
    return like.new_empty(shape, dtype=getattr(torch, dtype))


def run(launch, inputs):
    """Launches a kernel, and returns its outputs."""
    some = inputs[0]
    results = []
    for i, x in enumerate(launch.outputs):
        if i in launch.in_place:
            results.append(inputs[launch.in_place[i]])
        else:
            results.append(None if x is None else _allocate(some, x))
    arguments = [some if x is None else x for x in (*inputs, *launch.numbers, *results)]
    key = some.device, *[None if x is None else x.dtype for x in inputs]
    if some.is_cuda and some.get_device() != torch.cuda.current_device():
        with torch.cuda.device(some.device):
            _launch(launch, key, arguments)
    else:  # without the context, which takes as long as a kernel
        _launch(launch, key, arguments)
    return tuple(results)


def _launch(launch, key, arguments):
    compiled = launch.compiled.get(key)
    if compiled is None:
        compiled = launch.kernel[launch.grid](*arguments, **launch.constants, **launch.options)
        launch.compiled[key] = compiled  # `None` if interpreted
    else:
        # Without looking up the specialization, which takes longer than the kernel: dtypes and
        # numbers are the same, and addresses are aligned.
        grid = (*launch.grid, 1, 1)[:3]
        compiled[grid](*arguments, *launch.constants.values())
