"""A training step of language models: next-token loss, and Adam."""

import math

import keras

from benchmarks import language_model, runtime, timing, trainees
from benchmarks.report import Row

COLUMN = "training step"


def measure(case, which, options):
    """Returns a row for each model, on one case."""
    backend = runtime.current()
    keras.utils.set_random_seed(0)
    count = language_model.block_count()
    title = f"model of {count} blocks, vocabulary of {case.vocabulary:,}, {case}"
    rows, samples, losses = {}, {}, {}
    listed = trainees.choose("models", case, which, options.jit)
    chosen = {trainee.name: trainee for trainee in listed}
    calls = runtime.calls(backend, [()])
    for name, trainee in chosen.items():
        row = rows[name] = Row(title, name, note=trainee.unavailable)
        if trainee.unavailable:
            continue
        try:
            training = trainee.build(case, trainee.jit)
            losses[name] = training.step, _first_loss(training.step, case.vocabulary)
            training.announced.confirm(backend.kernels(training.step, ()))
            row.implementation = training.announced.text
            row.megabytes = backend.added_memory(training.step, ())
        except Exception as error:  # any exception of a peer is the note of its row
            row.give_up(error, failed=trainee.ours)
            continue
        samples[name] = lambda step=training.step: backend.time_calls(step, calls)
    for name, times in timing.in_turns(samples, options.seconds).items():
        if isinstance(times, Exception):
            rows[name].give_up(times, failed=chosen[name].ours)
            continue
        rows[name].times[COLUMN] = times
        step, first = losses[name]
        if not step() < first:
            stuck = ValueError(f"the loss of {first:.3f} does not fall")
            rows[name].give_up(stuck, failed=chosen[name].ours)
    return list(rows.values())


def _first_loss(step, vocabulary):
    """Checks that the first loss is that of an untrained model."""
    loss = step()
    if not abs(loss - math.log(vocabulary)) < 1:
        raise ValueError(f"the first loss is {loss:.3f}, not about {math.log(vocabulary):.3f}")
    return loss
