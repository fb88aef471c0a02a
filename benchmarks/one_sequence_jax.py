"""Context parallelism under JAX: see `one_sequence.py`."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np

from benchmarks import collectives
from benchmarks.one_sequence import attend, median_time, relative


def run(arguments):
    """Yields the rows of `one_sequence.report`."""
    devices, most = jax.devices(), max(arguments.devices)
    if len(devices) < most:
        raise ValueError(f"There must be {most} devices of a kind. Received: {devices}")
    tensors, expected = draw(arguments), None
    for count in arguments.devices:
        mesh, part = Mesh(np.array(devices[:count]), ("parts",)), jax.P(None, "parts")
        placed = [jax.device_put(x, NamedSharding(mesh, part)) for x in tensors]
        program = jax.jit(step(arguments, mesh, part)).lower(*placed).compile()
        found = [jax.device_put(x, devices[0]) for x in program(*placed)]
        expected = expected or found
        differences = [float(difference_of(x, y)) for x, y in zip(found, expected, strict=True)]
        del found
        seconds = median_time(functools.partial(program, *placed), jax.block_until_ready)
        memory = getattr(program.memory_analysis(), "temp_size_in_bytes", None)
        exchanged = collectives.of_program(program.as_text())
        yield count, devices[0].device_kind, seconds, memory, differences, exchanged


@jax.jit
def difference_of(x, y):
    """`relative` in float32, without arrays in between."""
    return relative(x.astype("float32"), y.astype("float32"))


def draw(arguments):
    """Query, key, value, log-decay, and the weights of the output in the loss."""
    shape = 1, arguments.length, arguments.heads, arguments.dim
    *keys, last = jax.random.split(jax.random.key(0), 5)
    query, key, value, weights = (jax.random.normal(x, shape, arguments.dtype) for x in keys)
    log_decay = jnp.log(jax.random.uniform(last, shape[:3], minval=0.99, maxval=1.0))
    scale = arguments.dim**-0.5
    return query * scale, key * scale, value, log_decay, weights


def step(arguments, mesh, part):
    """The output, and the gradients of the inputs."""

    def own(*inputs):
        return attend(arguments, inputs, "parts" if mesh.size > 1 else None)

    of_parts = jax.shard_map(own, mesh=mesh, in_specs=part, out_specs=part)

    def evaluate(*tensors):
        *inputs, weights = tensors
        output, pull = jax.vjp(of_parts, *inputs)
        return output, *pull(weights)

    return evaluate
