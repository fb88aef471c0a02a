"""Selective copying, as Poli et al. define it in MAD (arXiv:2403.17844).

Some tokens of a small vocabulary stand in order among blanks: each blank was put before one of
them, drawn uniformly. Then come a token that asks for the copy, and as many blanks as there are
tokens; at these the answers are the tokens, in order. The vocabulary is 16, with the blank and the
token that asks. Tests are at the length of training and with more blanks.
"""

import jax
import jax.numpy as jnp

from benchmarks.learning.tasks.task import Batch, Split, Task, at_lengths

VOCABULARY = 16
BLANK, COPY = VOCABULARY - 2, VOCABULARY - 1


def make(name, size):
    small = size == "small"
    batch, length, count, steps = (32, 48, 6, 300) if small else (64, 256, 16, 1500)
    return Task(
        name,
        "accuracy",
        draw,
        train=Split((batch, length, count)),
        valid=Split((batch, length, count)),
        tests=at_lengths(batch, length, count),
        inputs=VOCABULARY,
        outputs=VOCABULARY,
        steps=steps,
        train_length=length,
    )


def draw(key, shape, choice):
    """A batch of `shape`: sequences, their length, and how many tokens are copied."""
    del choice
    sequences, length, count = shape
    of_tokens, of_blanks = jax.random.split(key)
    copied = jax.random.randint(of_tokens, (sequences, count), 0, BLANK)
    before = jax.random.randint(of_blanks, (sequences, length - 2 * count - 1), 0, count)
    number = jnp.arange(count)
    blanks = jnp.sum(before[:, None] <= number[:, None], axis=-1)  # before each token
    tokens = jnp.full((sequences, length), BLANK)
    tokens = tokens.at[jnp.arange(sequences)[:, None], number + blanks].set(copied)
    tokens = tokens.at[:, length - count - 1].set(COPY)
    places = jnp.broadcast_to(length - count + number, copied.shape)
    return Batch(tokens, copied, jnp.ones(copied.shape), places)
