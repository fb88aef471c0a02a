"""Recall of tokens from thousands of tokens before.

A few tokens of one alphabet stand at random places among the first hundred or so; all other places
hold tokens of a second alphabet, at random. At the end stand as many tokens that ask, at which the
answers are the tokens of the first alphabet, in order. Tests are at the length of training and at
four times that.
"""

import jax
import jax.numpy as jnp

from benchmarks.learning.tasks.task import Batch, Split, Task, draw_distinct

ALPHABET = 16
ASKING = 2 * ALPHABET  # after the two alphabets


def make(name, size):
    small = size == "small"
    batch, length, early, count, steps = (16, 128, 16, 3, 300) if small else (16, 4096, 128, 8, 800)
    return Task(
        name,
        "accuracy",
        draw,
        train=Split((batch, length, early, count)),
        valid=Split((batch, length, early, count)),
        tests={
            f"{longer}": Split((batch * length // longer, longer, early, count), batches=16)
            for longer in (length, 4 * length)
        },
        inputs=ASKING + 1,
        outputs=ALPHABET,
        steps=steps,
        train_length=length,
    )


def draw(key, shape, choice):
    """A batch of `shape`: sequences, their length, and how many places are early and are asked."""
    del choice
    sequences, length, early, count = shape
    of_noise, of_tokens, of_places = jax.random.split(key, 3)
    tokens = jax.random.randint(of_noise, (sequences, length), ALPHABET, 2 * ALPHABET)
    asked = jax.random.randint(of_tokens, (sequences, count), 0, ALPHABET)

    found = jnp.sort(draw_distinct(of_places, count, early, sequences), axis=-1)
    tokens = tokens.at[jnp.arange(sequences)[:, None], found].set(asked)
    tokens = tokens.at[:, length - count :].set(ASKING)
    places = jnp.broadcast_to(length - count + jnp.arange(count), asked.shape)
    return Batch(tokens, asked, jnp.ones(asked.shape), places)
