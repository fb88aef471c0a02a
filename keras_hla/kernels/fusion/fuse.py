"""A sequence of stages as one function of PyTorch, with the gradients of each in reverse."""

import functools
from typing import Any, NamedTuple

import torch

from keras_hla.kernels.launching.torch_launcher import as_kernels_take_it, refuse_second_gradients
from keras_hla.kernels.launching.torch_launcher import run as run_kernel


class Stage(NamedTuple):
    """One function of tensors that have names.

    `function` has `evaluate`, `gradients` and `reads` as a `KernelFunction` has. `tensors` are
    pairs of the name of an argument and that of a tensor; `results` are names.

    The gradients of later stages read results. Where these are cheap to compute again they are
    not kept until then, if `recompute`.
    """

    function: Any
    tensors: tuple
    results: tuple
    options: tuple = ()
    recompute: bool = False


def fuse(stages, tensors):
    """Evaluates stages in order, and returns the one result of the last, differentiably.

    Args:
        stages: tuple of `Stage`s.
        tensors: dictionary of the tensors that they read and do not make. A stage leaves out an
            argument whose tensor is not there.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values()):
        return _Fused.apply(stages, tuple(tensors), *tensors.values())
    tensors = {name: as_kernels_take_it(x) for name, x in tensors.items()}
    return _evaluate(stages, tensors, False)[0]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stages, names, *tensors):
        values = dict(zip(names, map(as_kernels_take_it, tensors), strict=True))
        result, kept, saved = _evaluate(stages, values, True)
        ctx.stages, ctx.names, ctx.kept = stages, names, tuple(kept)
        ctx.counts = [len(x) for x in saved]
        inputs = [values[name] for name in names]
        ctx.save_for_backward(*inputs, *kept.values(), *(x for some in saved for x in some))
        return result

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():  # with `create_graph=True`
            refuse_second_gradients()
        tensors = iter(ctx.saved_tensors)
        values = {name: next(tensors) for name in (*ctx.names, *ctx.kept)}
        saved = [tuple(next(tensors) for _ in range(count)) for count in ctx.counts]
        wanted = {x for x, n in zip(ctx.names, ctx.needs_input_grad[2:], strict=True) if n}
        found = _gradients(ctx.stages, values, saved, as_kernels_take_it(gradient), wanted)
        return None, None, *map(found.get, ctx.names)


def _evaluate(stages, tensors, save):
    """The result, and if `save` the values that gradients read, and what stages save for them."""
    values, kept, saved = dict(tensors), {}, []
    for stage, (dropped, is_kept) in zip(stages, _lives(stages), strict=True):
        results, own = stage.function.evaluate(
            run_kernel, stage.options, _given(stage, values), save
        )
        values |= zip(stage.results, results, strict=True)
        if save:
            saved.append(own)
            kept |= {name: values[name] for name in is_kept}
        for name in dropped:
            values.pop(name, None)
    return values[stages[-1].results[0]], kept, saved


def _gradients(stages, values, saved, gradient, wanted):
    """The gradients of the wanted tensors, by their names."""
    values, found = dict(values), {stages[-1].results[0]: gradient}
    makers = {name: stage for stage in stages for name in stage.results}
    needed = set(wanted)
    for stage in stages:
        if any(name in needed for _, name in stage.tensors):
            needed.update(stage.results)
    for stage, own in reversed(list(zip(stages, saved, strict=True))):
        of_results = tuple(found.pop(name, None) for name in stage.results)
        arguments = [x for x, name in stage.tensors if name in needed]
        if not arguments or all(x is None for x in of_results):
            continue
        for name in _read(stage):
            _recompute(name, makers, values)
        given = {x: values[name] for x, name in stage.tensors if name in values}
        some = stage.function.gradients(
            run_kernel, stage.options, given, own, of_results, arguments
        )
        for x, name in stage.tensors:
            if some.get(x) is not None and name in needed:
                found[name] = some[x] if name not in found else found[name] + some[x]
    return found


def _recompute(name, makers, values):
    """Adds a value that was not kept, and those that it is made of."""
    if name in values or name not in makers:
        return
    stage = makers[name]
    for _, other in stage.tensors:
        _recompute(other, makers, values)
    results, _ = stage.function.evaluate(run_kernel, stage.options, _given(stage, values), False)
    values |= zip(stage.results, results, strict=True)


def _given(stage, values):
    return {x: values[name] for x, name in stage.tensors if name in values}


def _read(stage):
    """The names of the tensors that the gradients of a stage read."""
    reads = stage.function.reads
    return [name for x, name in stage.tensors if reads is None or x in reads]


@functools.lru_cache(maxsize=256)
def _lives(stages):
    """For each stage, the values that no later one reads, and those of its results to be kept."""
    read = {name for stage in stages for name in _read(stage)}
    for stage in reversed(stages):
        if stage.recompute and read.intersection(stage.results):
            read.update(name for _, name in stage.tensors)
    last = {name: i for i, stage in enumerate(stages) for _, name in stage.tensors}
    made = {name for stage in stages for name in stage.results}
    return [
        (
            tuple(name for name in made if last.get(name) == i),
            () if stage.recompute else tuple(read.intersection(stage.results)),
        )
        for i, stage in enumerate(stages)
    ]
