"""Trains replicates of a model, each with a learning rate and a seed, in one compiled program."""

from functools import partial
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np

from benchmarks.learning import model as models
from benchmarks.learning import optimizer

LEARNED = 0.99  # the accuracy of which the first step is noted
VALID_SEED, TEST_SEED = 1_000_000, 2_000_000  # apart from those of training


class Replicate(NamedTuple):
    """A learning rate and a seed: of the first weights and of the batches."""

    rate: float
    seed: int


class Outcome(NamedTuple):
    """The result of a replicate; `values` are columns of its record."""

    replicate: Replicate
    values: dict


class Trainer:
    """Trains and tests a mixer on a task, some replicates at once.

    Programs are compiled once, for one number of replicates.

    Args:
        task: `Task`.
        mixer: its name.
        at_once: number of replicates. With 1 nothing is vectorized, and the package chooses the
            implementation; else it is the portable one.
        dispatched: steps of one call of the compiled program.
    """

    def __init__(self, task, mixer, at_once=4, dispatched=50):
        self.task, self.mixer, self.at_once = task, mixer, at_once
        self.dispatched = min(dispatched, task.steps)
        self.implementation = "auto" if at_once == 1 else "portable"
        self.hidden = models.hidden_size(task, mixer)
        self.model = self._make(0)
        self.fixed = [x.value for x in self.model.non_trainable_variables]
        side_by_side = partial(replicated, at_once)
        self._train = jax.jit(side_by_side(self._many_steps, (0, None, 0, 0)), donate_argnums=0)
        self._tests = {
            kind: jax.jit(side_by_side(partial(self._one_test, *kind), (0, None, None)))
            for kind in {(x.shape, x.batches) for x in (task.valid, *task.tests.values())}
        }

    def describe(self):
        """Columns that all replicates share."""
        return {
            "weights": self.model.count_params(),
            "state": models.state_size(self.model, self.task.train_length),
            "hidden": self.hidden,
        }

    def run(self, replicates):
        """Returns an `Outcome` of each; the last one is repeated up to `at_once`."""
        begin = time.perf_counter()
        filled = [*replicates, *[replicates[-1]] * (self.at_once - len(replicates))]
        rates = jnp.asarray([x.rate for x in filled], "float32")
        seeds = jnp.asarray([x.seed for x in filled], "uint32")
        weights = self._first_weights(filled)
        carry, seen = (weights, optimizer.start(weights)), []
        for first in range(0, self.task.steps, self.dispatched):
            carry, means = self._train(carry, first, rates, seeds)
            seen.append(np.asarray(means, "float64"))  # (replicates, 2): loss and metric
        columns = self._measure(carry[0])
        seconds = time.perf_counter() - begin  # of all together, with the time of compiling
        curve = np.stack(seen, axis=1)
        return [
            Outcome(
                replicate,
                self._losses(curve[n])
                | {name: float(values[n]) for name, values in columns.items()}
                | {"seconds": seconds},
            )
            for n, replicate in enumerate(replicates)
        ]

    def _make(self, seed):
        keras.utils.set_random_seed(seed)
        return models.make(self.task, self.mixer, self.hidden, self.implementation)

    def _first_weights(self, replicates):
        drawn = {
            seed: [x.value for x in self._make(seed).trainable_variables]
            for seed in {x.seed for x in replicates}
        }
        return [jnp.stack(x) for x in zip(*(drawn[x.seed] for x in replicates), strict=True)]

    def _many_steps(self, carry, first, rate, seed):
        """Some steps of one replicate; and the means of its losses and metrics."""

        def one_step(carry, number):
            weights, moments = carry
            key = jax.random.fold_in(jax.random.key(seed), number)
            batch = self.task.draw(key, self.task.train.shape, self.task.train.choice)
            measure = partial(self._measures, batch=batch)
            (_, seen), gradients = jax.value_and_grad(measure, has_aux=True)(weights)
            now = optimizer.rate_at(number, self.task.steps, rate)
            return optimizer.update(weights, moments, gradients, number, now), seen

        carry, seen = jax.lax.scan(one_step, carry, first + jnp.arange(self.dispatched))
        return carry, jnp.mean(seen, axis=0)

    def _measures(self, weights, batch):
        """The loss; and the loss and the metric."""
        outputs, _ = self.model.stateless_call(weights, self.fixed, models.inputs_of(batch))
        outputs = outputs.astype("float32")
        loss, metric = _errors(self.task.metric, outputs, batch.targets)
        share = batch.weights / jnp.maximum(jnp.sum(batch.weights), 1.0)
        loss, metric = jnp.sum(loss * share), jnp.sum(metric * share)
        return loss, jnp.stack([loss, metric])

    def _measure(self, weights):
        """Columns: loss and metric of validation, and the metric of each test."""
        valid = self._evaluate(weights, self.task.valid, VALID_SEED)
        columns = {"valid loss": valid[:, 0], f"valid {self.task.metric}": valid[:, 1]}
        for name, split in self.task.tests.items():
            tested = self._evaluate(weights, split, TEST_SEED)
            columns[f"{self.task.metric} {name}"] = tested[:, 1]
        return columns

    def _evaluate(self, weights, split, seed):
        test = self._tests[split.shape, split.batches]
        return np.asarray(test(weights, jnp.asarray(split.choice), seed), "float64")

    def _one_test(self, shape, batches, weights, choice, seed):
        """The means of the loss and the metric of one replicate."""

        def one_batch(_, number):
            key = jax.random.fold_in(jax.random.key(seed), number)
            return None, self._measures(weights, self.task.draw(key, shape, choice))[1]

        return jnp.mean(jax.lax.scan(one_batch, None, jnp.arange(batches))[1], axis=0)

    def _losses(self, curve):
        """Columns that are computed from a curve, `(points, 2)`."""
        losses, metrics = curve.T
        finite = losses[np.isfinite(losses)]
        columns: dict[str, Any] = {
            "diverged": int(finite.size < losses.size),
            "last loss": losses[-1],
            "best loss": finite.min() if finite.size else np.nan,
        }
        if self.task.metric == "accuracy":
            passed = np.flatnonzero(metrics >= LEARNED)
            columns["steps to 0.99"] = (passed[0] + 1) * self.dispatched if passed.size else ""
        return columns | {"curve": " ".join(f"{x:.4g}" for x in metrics)}


def replicated(count, function, axes):
    """`function` of `count` replicates, for arguments that have a first axis where `axes` is 0.

    They are distributed over the devices, if the number of devices divides theirs.
    """
    if count == 1:
        return _alone(function, axes)
    devices = jax.devices()
    function = jax.vmap(function, axes)
    if len(devices) == 1 or count % len(devices):
        return function
    mesh = jax.sharding.Mesh(np.array(devices), ("replicates",))
    ours, everyones = jax.P("replicates"), jax.P()
    specs = tuple(ours if axis == 0 else everyones for axis in axes)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=ours, check_vma=False)


def _alone(function, axes):
    def call(*arguments):
        first = [
            jax.tree.map(lambda x: x[0], value) if axis == 0 else value
            for value, axis in zip(arguments, axes, strict=True)
        ]
        return jax.tree.map(lambda x: x[None], function(*first))

    return call


def _errors(metric, outputs, targets):
    """Loss and metric of each place; NaN where the output is."""
    if metric == "error":
        error = jnp.square(outputs[..., 0] - targets)
        return error, error
    nats = -jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[..., None], axis=-1)[..., 0]
    if metric == "bits":
        return nats, nats / jnp.log(2.0)
    right = (jnp.argmax(outputs, axis=-1) == targets).astype("float32")
    return nats, jnp.where(jnp.isfinite(nats), right, jnp.nan)
