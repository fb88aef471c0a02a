"""In-context recall of several queries, as Poli et al. define it in MAD (arXiv:2403.17844).

A sequence is pairs of a key and its value: keys are drawn uniformly, again and again, from the
lower half of a small vocabulary, and each has a value of the upper half, drawn once a sequence.
Where a key has been there before, the answer is its value. Here the loss is that of these answers
alone. Tests are at the length of training and at longer ones.
"""

import jax
import jax.numpy as jnp

from benchmarks.learning.tasks.task import Batch, Split, Task, at_lengths


def make(name, size):
    small = size == "small"
    batch, length, vocabulary, steps = (32, 32, 16, 300) if small else (64, 256, 128, 1500)
    return Task(
        name,
        "accuracy",
        draw,
        train=Split((batch, length, vocabulary)),
        valid=Split((batch, length, vocabulary)),
        tests=at_lengths(batch, length, vocabulary),
        inputs=vocabulary,
        outputs=vocabulary,
        steps=steps,
        train_length=length,
    )


def draw(key, shape, choice):
    """A batch of `shape`: sequences, their length, and the vocabulary."""
    del choice
    sequences, length, vocabulary = shape
    half, pairs = vocabulary // 2, length // 2
    of_keys, of_values = jax.random.split(key)
    keys = jax.random.randint(of_keys, (sequences, pairs), 0, half)
    value_of = jax.random.randint(of_values, (sequences, half), half, vocabulary)
    values = jnp.take_along_axis(value_of, keys, axis=1)
    tokens = jnp.stack([keys, values], axis=-1).reshape(sequences, length)
    number = jnp.arange(pairs)
    same = (keys[:, :, None] == keys[:, None]) & (number[:, None] > number)
    places = jnp.broadcast_to(2 * number, keys.shape)
    return Batch(tokens, values, jnp.any(same, axis=-1).astype("float32"), places)
