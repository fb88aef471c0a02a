"""Each contender on each case: checked against the definition first, then timed."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks import contenders, memory, reference, runtime, timing
from benchmarks.chains import CHAINS
from benchmarks.report import Row

# Largest relative errors. By default GPUs multiply float32 with 10 bits of mantissa.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2, "float64": 1e-10}
GPU_TOLERANCE = {**TOLERANCE, "float32": 1e-2}


@dataclass(frozen=True)
class Options:
    """How to measure: see the arguments of `python -m benchmarks`."""

    seconds: float = 1.0
    jit: str = "auto"
    process_memory: bool = False


def measure(case, chosen, options):
    """Returns a row for each contender."""
    backend = runtime.current()
    arrays = case.arrays()
    size = sum(x.nbytes for x in arrays[0]) + arrays[1].nbytes
    others = (case.arrays(seed) for seed in range(1, runtime.copies(backend, size)))
    sets = [_tensors(backend, case, x) for x in (arrays, *others)]
    sets = runtime.calls(backend, sets)

    rows: dict[str, Row] = {}
    samples: dict[str, dict[str, Callable]] = {"forward": {}, "forward+backward": {}}
    for contender in chosen:
        row = rows[contender.name] = Row(str(case), contender.name, operator=contender.operator)
        calls = _checked(case, contender, sets[0], options, row)
        if calls:
            forward, training = calls
            samples["forward"][contender.name] = _sample(forward, [s[:2] for s in sets])
            samples["forward+backward"][contender.name] = _sample(training, sets)
    ours = {contender.name for contender in chosen if contender.ours}
    for column, functions in samples.items():
        running = {name: f for name, f in functions.items() if not rows[name].note}
        for name, times in timing.in_turns(running, options.seconds).items():
            if isinstance(times, Exception):
                rows[name].give_up(times, failed=name in ours)
            else:
                rows[name].times[column] = times
    return list(rows.values())


def _checked(case, contender, tensors, options, row):
    """The functions to be timed, forward and training; nothing, with a note, if there are none."""
    backend = runtime.current()
    if contender.unavailable:
        row.note = contender.unavailable
        return None
    calls = [make(contender.function, options.jit) for make in (backend.forward, backend.training)]
    try:
        row.errors = check(case, contender, calls)
        row.errors["output at the shape"] = _check_at_shape(contender, calls[0], tensors)
        if row.refuse(_tolerance(case)):
            return None
        row.megabytes = backend.added_memory(calls[1], tensors)
        if row.megabytes is None and options.process_memory:
            row.megabytes = _process_memory(case, contender, options.jit)
    except Exception as error:  # any exception of a peer is the note of its row
        row.give_up(error, failed=contender.ours)
        return None
    return calls


def check(case, contender, calls):
    """Relative errors of outputs and gradients on a short case, against matrices in float64."""
    backend = runtime.current()
    inputs, constants, cotangent = _tensors(backend, case.short(), case.short().arrays())
    q, k, v, do = (_heads_first(backend.to_numpy(x)) for x in (*inputs, cotangent))
    g = _heads_first(backend.to_numpy(constants[0])) if constants else None
    expected, gradients = reference.by_matrices(contender.operator, q, k, v, g, do)
    forward, training = calls
    output, found = training(inputs, constants, cotangent)
    errors = {}
    for name, x, y in zip(
        ("forward", "output", "dquery", "dkey", "dvalue"),
        (forward(inputs, constants), output, *found),
        (expected, expected, *gradients),
        strict=True,
    ):
        errors[name] = reference.relative_error(_heads_first(backend.to_numpy(x)), y)
    return errors


def _check_at_shape(contender, forward, tensors):
    """The relative error of one head's outputs, at the shape that is timed."""
    backend = runtime.current()
    inputs, constants, _ = tensors
    output = backend.to_numpy(forward(inputs, constants)[-1, :, -1])
    q, k, v = (backend.to_numpy(x[-1, :, -1]) for x in inputs)
    g = backend.to_numpy(constants[0][-1, :, -1]) if constants else None
    expected = reference.on_long_sequence(contender.operator, q, k, v, g)
    return reference.relative_error(output[-len(expected) :], expected)


def fresh_step(case, name, operator, implementation, jit):
    """One training step as a function without arguments, of a contender found by its name."""
    backend = runtime.current()
    operators = [operator] if operator in CHAINS else []
    implementations = [implementation] if implementation else []
    found = contenders.choose(case, operators, implementations, None)
    (function,) = (contender.function for contender in found if contender.name == name)
    call, arguments = backend.training(function, jit), _tensors(backend, case, case.arrays())
    return lambda: backend.time_calls(call, [arguments])


def _process_memory(case, contender, jit):
    which = (contender.name, contender.operator, contender.implementation, jit)
    return memory.added(fresh_step, (case.short(), *which), (case, *which))


def _tensors(backend, case, arrays):
    inputs, cotangent, log_decay = arrays
    constants = [] if log_decay is None else [backend.tensor(log_decay, "float32")]
    return (
        [backend.tensor(x, case.dtype) for x in inputs],
        constants,
        backend.tensor(cotangent, case.dtype),
    )


def _heads_first(x):
    return np.moveaxis(x, 2, 1)


def _tolerance(case):
    return (GPU_TOLERANCE if runtime.current().on_gpu() else TOLERANCE)[case.dtype]


def _sample(call, sets):
    return lambda: runtime.current().time_calls(call, sets)
