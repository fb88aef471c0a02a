"""The training step of a layer or block: forward, and the gradients of the input and all weights.

There is no optimizer. The layer and its input have the width heads times dim.
"""

import time

import keras
import numpy as np

from benchmarks import memory, runtime, timing, trainees
from benchmarks.report import Row

TOLERANCE = {"float32": 1e-2, "bfloat16": 5e-2, "float16": 5e-2}
LONG = 5  # seconds, for a step that is compiled
COLUMN = "training step"


def measure(kind, case, which, options):
    """Returns a row for each trainee, on one case; `kind` is "layers" or "blocks"."""
    backend = runtime.current()
    keras.utils.set_random_seed(0)
    title = f"{kind.removesuffix('s')}, {case}"
    rows, samples = {}, {}
    chosen = {trainee.name: trainee for trainee in trainees.choose(kind, case, which, options.jit)}
    for name, trainee in chosen.items():
        row = rows[name] = Row(title, name, note=trainee.unavailable)
        if trainee.unavailable:
            continue
        try:
            call, arguments = _checked(trainee, case, row)
            if row.note:
                continue
            row.megabytes = backend.added_memory(call, arguments)
            if row.megabytes is None and options.process_memory:
                row.megabytes = memory.added(
                    fresh_step,
                    (kind, name, case.short(), which, options.jit),
                    (kind, name, case, which, options.jit),
                )
        except Exception as error:  # any exception of a peer is the note of its row
            row.give_up(error, failed=trainee.ours)
            continue
        sets = runtime.calls(backend, [arguments])
        samples[name] = lambda call=call, sets=sets: backend.time_calls(call, sets)
    for name, times in timing.in_turns(samples, options.seconds).items():
        if isinstance(times, Exception):
            rows[name].give_up(times, failed=chosen[name].ours)
        else:
            rows[name].times[COLUMN] = times
    return list(rows.values())


def _checked(trainee, case, row):
    """The function to be timed and its arguments; nothing if the result is wrong."""
    step = trainee.build(case)
    call, arguments = training_step(step, case, trainee.jit)
    if trainee.jit == "on":
        _compile(call, arguments)
    row.errors = step.check(call, arguments, trainee.jit)
    if not row.refuse(TOLERANCE[case.dtype]):
        step.announced.confirm(runtime.current().kernels(call, arguments))
        row.implementation = step.announced.text
    return call, arguments


def _compile(call, arguments):
    """Compiles a step; raises if each call compiles it again, which takes minutes."""
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        runtime.current().time_calls(call, [arguments])
        seconds.append(time.perf_counter() - begin)
    if seconds[1] > max(LONG, seconds[0] / 5):
        raise RuntimeError(f"compiled again at each call, which takes {seconds[1]:.1f} s")


def training_step(step, case, jit):
    """The function and its arguments; what it returns is for `time_calls`."""
    backend = runtime.current()
    shape = (case.batch, case.length, trainees.width(case))
    x, cotangent = np.random.default_rng(0).standard_normal((2, *shape), "float32")
    call = backend.training(step.function, jit if step.jit or jit == "on" else "off")
    inputs = [backend.tensor(x, "float32"), *step.weights]
    return call, (inputs, [], backend.tensor(cotangent, case.dtype))


def fresh_step(kind, name, case, which, jit):
    """One step as a function without arguments, in a process that has not built the layer."""
    (trainee,) = (t for t in trainees.choose(kind, case, which, jit) if t.name == name)
    call, arguments = training_step(trainee.build(case), case, trainee.jit)
    return lambda: runtime.current().time_calls(call, [arguments])
