"""See `benchmarks.runtime`."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing


def on_gpu():
    return jax.default_backend() == "gpu"


def device_name():
    return jax.devices()[0].device_kind


def tensor(array, dtype):
    return jnp.asarray(array, dtype)


def to_numpy(x):
    return np.asarray(x.astype("float32") if x.dtype != "float64" else x, "float64")


def forward(function, jit):
    del jit  # always
    return jax.jit(lambda inputs, constants: function(*inputs, *constants))


def training(function, jit):
    del jit

    @jax.jit
    def call(inputs, constants, cotangent):
        output, pull_back = jax.vjp(lambda *inputs: function(*inputs, *constants), *inputs)
        return output, pull_back(cotangent)

    return call


def time_calls(call, argument_sets):
    if on_gpu():
        return timing.on_gpu(call, argument_sets, jax.block_until_ready)
    return timing.on_cpu(call, argument_sets[0], jax.block_until_ready)


def added_memory(call, arguments):
    analysis = call.lower(*arguments).compile().memory_analysis()
    if analysis is None:
        return None
    return (analysis.temp_size_in_bytes + analysis.output_size_in_bytes) / 2**20


def kernels(call, arguments):
    """Names of the kernels that XLA does not generate itself."""
    if not on_gpu():
        return None
    return custom_calls(call.lower(*arguments))


def train_on_batch(model, x, y):
    return _TrainOnBatch(model, x, y)


def custom_calls(lowered):
    return set(re.findall(r'custom_call @"?([\w$.]+)', lowered.as_text()))


class _TrainOnBatch:
    """A function with the text that it lowers to."""

    def __init__(self, model, x, y):
        self.model, self.data = model, (x, y)

    def __call__(self):
        return self.model.train_on_batch(*self.data)

    def lower(self):
        model = self.model
        variables = (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
        state = tuple([variable.value for variable in group] for group in variables)
        return jax.jit(model.train_step, donate_argnums=0).lower(state, self.data)
