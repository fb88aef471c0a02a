"""A sequence of stages as one function of PyTorch, with the gradients of each in reverse."""

import functools
from typing import Any, NamedTuple

import torch

from keras_hla.kernels.fusion.recordings import Recordings, Replayed
from keras_hla.kernels.launching.torch_launcher import as_kernels_take_it, refuse_second_gradients
from keras_hla.kernels.launching.torch_launcher import run as run_kernel

# Among the options of a stage: the devices of a call that hold shards of the sequence, or `None`.
DEVICES = "devices"


class Stage(NamedTuple):
    """One function of tensors that have numbers.

    `function` has `evaluate`, `gradients` and `reads` as a `KernelFunction` has. `tensors` are
    pairs of the name of an argument and the number of a tensor; `results` are numbers.

    The gradients of later stages read results. With `recompute`, which is for cheap stages, the
    results are not kept until then but rematerialized.
    """

    function: Any
    tensors: tuple
    results: tuple
    options: tuple = ()
    recompute: bool = False


class Program:
    """Evaluates stages in order, and gives some of their results, differentiably.

    Args:
        stages: tuple of `Stage`s.
        results: tuple of the numbers of the results.
        variables: dictionary of the `keras.Variable`s that they read, by number.
        inputs: dictionary of the numbers of the other tensors that they read, by name. The first
            is the sequences.
        constants: the numbers of those inputs that are the same tensors from call to call.
    """

    def __init__(self, stages, results, variables, inputs, constants=()):
        self.stages = stages
        self.results = results
        self.sequences = next(iter(inputs.values()))
        self.changing_inputs = frozenset(inputs.values()).difference(constants)
        self._variables = variables
        self._inputs = inputs
        self._makers = {number: stage for stage in stages for number in stage.results}
        self._of_stages = _lives(stages, results)
        self._needed = functools.cache(self._find_needed)
        self._recordings = Recordings()

    def __call__(self, devices=None, **inputs):
        """The tuple of the results for the inputs.

        Args:
            devices: the devices that hold shards of the sequence, or `None`.
            **inputs: tensors by name.
        """
        tensors = {number: x.value for number, x in self._variables.items()}
        tensors |= {number: inputs[name] for name, number in self._inputs.items()}
        wanted = tuple(number for number, x in tensors.items() if x.requires_grad)
        wanted = wanted if torch.is_grad_enabled() else ()
        recording = None
        if devices is None and len(self.results) == 1:  # as graphs hold no collectives
            recording = self._recordings.find(self, tensors, wanted)
        if recording is not None:
            values = tuple(tensors.values())
            return (Replayed.apply(recording, *values) if wanted else recording(values),)
        if wanted:
            return _Fused.apply(self, devices, tuple(tensors), *tensors.values())
        tensors = {number: as_kernels_take_it(x) for number, x in tensors.items()}
        return self.evaluate(tensors, False, devices)[0]

    def evaluate(self, tensors, save, devices=None):
        """The results, and if `save` the values that gradients read and what stages save."""
        values, kept, saved = dict(tensors), {}, []
        for stage, (dropped, is_kept) in zip(self.stages, self._of_stages, strict=True):
            own = _evaluate(stage, values, save, devices)
            if save:
                saved.append(own)
                for number in is_kept:
                    kept[number] = values[number]
            for number in dropped:
                values.pop(number, None)
        return tuple(values[number] for number in self.results), kept, saved

    def gradients(self, values, saved, gradients, wanted, devices=None):
        """The gradients of the wanted tensors, by number.

        Args:
            values: dictionary of the tensors, and of what `evaluate` kept.
            saved: as `evaluate` returns it.
            gradients: those of the results, or `None`.
            wanted: tuple of numbers.
            devices: those of the call.
        """
        pairs = zip(self.results, gradients, strict=True)
        found = {number: x for number, x in pairs if x is not None}
        for stage, own, arguments in zip(
            reversed(self.stages), reversed(saved), self._needed(wanted), strict=True
        ):
            of_results = tuple(found.pop(number, None) for number in stage.results)
            for number in stage.results:  # which no stage reads from here on
                values.pop(number, None)
            if not arguments or all(x is None for x in of_results):
                continue
            for number in _read(stage):
                self._recompute(number, values)
            given = {name: values[x] for name, x in stage.tensors if x in values}
            options = _options(stage, devices)
            some = stage.function.gradients(run_kernel, options, given, own, of_results, arguments)
            for name, number in arguments.items():
                x = some.get(name)
                if x is not None:
                    found[number] = found[number] + x if number in found else x
        return found

    def _recompute(self, number, values):
        """Adds a value that was not kept, and the values that it is computed from."""
        if number in values or number not in self._makers:
            return
        stage = self._makers[number]
        for _, other in stage.tensors:
            self._recompute(other, values)
        _evaluate(stage, values, False, None)

    def _find_needed(self, wanted):
        """The arguments of each stage, the last first, that have gradients, and their numbers."""
        needed = set(wanted)
        for stage in self.stages:
            if any(number in needed for _, number in stage.tensors):
                needed.update(stage.results)
        return [
            {name: number for name, number in stage.tensors if number in needed}
            for stage in reversed(self.stages)
        ]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, program, devices, numbers, *tensors):
        tensors = tuple(map(as_kernels_take_it, tensors))
        values = dict(zip(numbers, tensors, strict=True))
        results, kept, saved = program.evaluate(values, True, devices)
        ctx.program, ctx.devices, ctx.numbers, ctx.kept = program, devices, numbers, tuple(kept)
        ctx.counts = [len(x) for x in saved]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *kept.values(), *(x for some in saved for x in some))
        return results

    @staticmethod
    def backward(ctx, *gradients):
        if torch.is_grad_enabled():  # with `create_graph=True`
            refuse_second_gradients()
        tensors = iter(ctx.saved_tensors)
        values = {number: next(tensors) for number in (*ctx.numbers, *ctx.kept)}
        saved = [tuple(next(tensors) for _ in range(count)) for count in ctx.counts]
        wanted = tuple(x for x, n in zip(ctx.numbers, ctx.needs_input_grad[3:], strict=True) if n)
        gradients = tuple(x if x is None else as_kernels_take_it(x) for x in gradients)
        found = ctx.program.gradients(values, saved, gradients, wanted, ctx.devices)
        return None, None, None, *map(found.get, ctx.numbers)


def _evaluate(stage, values, save, devices):
    """Adds the results of a stage to the values, and returns what it saves."""
    given = {name: values[number] for name, number in stage.tensors if number in values}
    results, saved = stage.function.evaluate(run_kernel, _options(stage, devices), given, save)
    values.update(zip(stage.results, results, strict=True))
    return saved


def _options(stage, devices):
    return tuple(devices if x is DEVICES else x for x in stage.options)


def _read(stage):
    """The numbers of the tensors that the gradients of a stage read."""
    reads = stage.function.reads
    return [number for name, number in stage.tensors if reads is None or name in reads]


def _lives(stages, results):
    """For each stage, the values that nothing later reads, and its results that are kept."""
    read = {number for stage in stages for number in _read(stage)}
    for stage in reversed(stages):
        if stage.recompute and read.intersection(stage.results):
            read.update(number for _, number in stage.tensors)
    last = {number: i for i, stage in enumerate(stages) for _, number in stage.tensors}
    made = {number for stage in stages for number in stage.results}.difference(results)
    return [
        (
            tuple(number for number in made if last.get(number) == i),
            () if stage.recompute else tuple(read.intersection(stage.results)),
        )
        for i, stage in enumerate(stages)
    ]
