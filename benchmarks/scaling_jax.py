"""Training on a mesh of devices under JAX: see `scaling.py`."""

import time

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np

from benchmarks import collectives
from benchmarks.scaling import RATE, STEPS, draw, make_model, mean_loss
from keras_hla.distribution import split_sequence


def train(arguments, rows, shards):
    """The device, seconds of a step, bytes in memory and exchanged, and how the loss differs."""
    devices = jax.devices()
    if len(devices) < rows * shards:
        raise ValueError(f"There must be {rows * shards} devices of a kind. Received: {devices}")
    mesh = Mesh(np.array(devices[: rows * shards]).reshape(rows, shards), ("rows", "shards"))
    model, loss_of = make_model(arguments)
    weights, batch = [w.value for w in model.trainable_variables], draw(arguments, rows, shards)
    loss_alone = jax.jit(lambda x, y: loss_of(y, model.stateless_call(weights, [], x)[0]))
    expected = mean_loss(arguments, batch, loss_alone)
    split_sequence(model, "shards" if shards > 1 else None)
    place, same = jax.P("rows", "shards"), jax.P()
    logits = jax.shard_map(
        lambda weights, tokens: model.stateless_call(weights, [], tokens)[0],
        mesh=mesh,
        in_specs=(same, place),
        out_specs=place,
    )

    def update(weights, tokens, targets):
        def loss(weights):
            return loss_of(targets, logits(weights, tokens))

        value, gradients = jax.value_and_grad(loss)(weights)
        return [w - RATE * g for w, g in zip(weights, gradients, strict=True)], value

    weights = jax.device_put(weights, NamedSharding(mesh, same))
    batch = [jax.device_put(x, NamedSharding(mesh, place)) for x in batch]
    program = jax.jit(update, donate_argnums=0).lower(weights, *batch).compile()
    weights, first = program(weights, *batch)
    jax.block_until_ready(weights)
    begin = time.perf_counter()
    for _ in range(STEPS):
        weights, _ = program(weights, *batch)
    jax.block_until_ready(weights)
    seconds = (time.perf_counter() - begin) / STEPS
    memory = program.memory_analysis()
    held = memory and memory.temp_size_in_bytes + memory.argument_size_in_bytes
    difference = abs(float(first) - expected) / expected
    exchanged = collectives.of_program(program.as_text())
    return devices[0].device_kind, seconds, held, exchanged, difference
