"""Copying, and copying of more than what was trained, as Jelassi et al. (arXiv:2402.01032).

A sequence holds random tokens, a separator, and the same tokens again. The answer at the separator
is the first token, and at each token of the copy the one after it. In training the number of tokens
is drawn uniformly up to a largest; tests have a fixed number, up to four times that.
"""

import jax
import jax.numpy as jnp

from benchmarks.learning.tasks.task import Batch, Split, Task

VOCABULARY = 32  # tokens to copy; the separator and what follows the end come after them
SEPARATOR, END = VOCABULARY, VOCABULARY + 1


def make(name, size):
    small = size == "small"
    batch, most, steps = (32, 12, 300) if small else (128, 48, 2000)
    fewest = 4
    return Task(
        name,
        "accuracy",
        draw,
        train=Split((batch, most), (fewest, most)),
        valid=Split((batch, most), (fewest, most)),
        tests={
            f"{count}": Split((batch, 4 * most), (count, count))
            for count in (most, 2 * most, 4 * most)
        },
        inputs=VOCABULARY + 2,
        outputs=VOCABULARY,
        steps=steps,
        train_length=2 * most,
    )


def draw(key, shape, choice):
    """A batch of `shape`: sequences, and the largest count; `choice`: the range of the counts."""
    sequences, most = shape
    of_tokens, of_counts = jax.random.split(key)
    fewest, largest = jnp.asarray(choice, "int32")
    counts = jax.random.randint(of_counts, (sequences, 1), fewest, largest + 1)
    copied = jax.random.randint(of_tokens, (sequences, most), 0, VOCABULARY)
    place, number = jnp.arange(2 * most), jnp.arange(most)
    again = jnp.take_along_axis(copied, jnp.clip(place - counts - 1, 0, most - 1), axis=1)
    first = jnp.take_along_axis(copied, jnp.clip(place, 0, most - 1)[None], axis=1)
    tokens = jnp.where(place < counts, first, jnp.where(place == counts, SEPARATOR, again))
    tokens = jnp.where(place <= 2 * counts, tokens, END)
    places = jnp.minimum(counts + number, 2 * most - 1)
    return Batch(tokens, copied, (number < counts).astype("float32"), places)
