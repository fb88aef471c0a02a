"""Regression of ragged time series with gaps, a common use of a GRU.

A series has a random number of places, from a quarter of the longest to the longest. Each holds a
number of a normal distribution; a fifth of the places, drawn at random, is masked, as are those
after the end. With `x_1 … x_n` the numbers that are left, the answer to the whole series, of
variance close to 1, is

    y = √(1 - 0.8²) Σ_i 0.8^(n-i) x_{i-1} x_i

an exponentially weighted autocovariance. It is asked at the last unmasked place. Tests are
at the lengths of training and at four times these.
"""

import jax
import jax.numpy as jnp

from benchmarks.learning.tasks.task import Batch, Split, Task

KEPT, FADING = 0.8, 0.8


def make(name, size):
    small = size == "small"
    batch, length, steps = (32, 24, 300) if small else (256, 96, 1500)
    return Task(
        name,
        "error",
        draw,
        train=Split((batch, length)),
        valid=Split((8 * batch, length)),
        tests={
            f"{length // 4} to {length}": Split((8 * batch, length)),
            f"{length} to {4 * length}": Split((2 * batch, 4 * length), batches=8),
        },
        inputs=1,
        outputs=1,
        steps=steps,
        width=32 if small else 64,
        heads=2,
        layers=1,
        train_length=length,
        masked=True,
    )


def draw(key, shape, choice):
    """A batch of `shape`: series, and the longest length."""
    del choice
    series, longest = shape
    of_length, of_mask, of_numbers = jax.random.split(key, 3)
    lengths = jax.random.randint(of_length, (series, 1), longest // 4, longest + 1)
    place = jnp.arange(longest)
    there = jax.random.bernoulli(of_mask, KEPT, (series, longest)) | (place == 0)
    mask = there & (place < lengths)
    numbers = jax.random.normal(of_numbers, (series, longest))
    last = jnp.max(jnp.where(mask, place, 0), axis=1, keepdims=True)
    answer = _answers(numbers, mask)[:, None]
    return Batch(numbers[..., None], answer, jnp.ones((series, 1)), last, mask)


def _answers(numbers, mask):
    def one_place(carry, place):
        before, total = carry
        number, unmasked = place
        total = jnp.where(unmasked, FADING * total + before * number, total)
        return (jnp.where(unmasked, number, before), total), None

    zeros = jnp.zeros(len(numbers))
    (_, total), _ = jax.lax.scan(one_place, (zeros, zeros), (numbers.T, mask.T))
    return (1 - FADING**2) ** 0.5 * total
