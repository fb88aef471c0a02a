"""Running products in a group, as Liu et al. (arXiv:2210.10749) and Merrill et al. (2404.08819).

A sequence holds elements of a group, drawn uniformly: of two elements (parity), or all permutations
of three (S3) or five (S5) objects. At each place the answer is the product of all elements so far:
the first permutation, then the second, and so on. Trained on short sequences; a test is the mean
over the places of a range, so that each tells how far the product is followed.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.learning.tasks.task import Batch, Split, Task

THINGS = {"parity": 2, "s3": 3, "s5": 5}


def make(name, size):
    small = size == "small"
    products = product_table(THINGS[name])
    batch, length, steps = (64, 16, 300) if small else (256, 32, 2000)
    ends = [0, length, 2 * length, 4 * length, 8 * length]
    tested = (batch, ends[-1])
    return Task(
        name,
        "accuracy",
        functools.partial(draw, jnp.asarray(products)),
        train=Split((batch, length), (0, length)),
        valid=Split((batch, length), (0, length)),
        tests={
            f"{begin + 1} to {end}": Split(tested, (begin, end), 2)
            for begin, end in itertools.pairwise(ends)
        },
        inputs=len(products),
        outputs=len(products),
        steps=steps,
        width=64 if small else 128,
        heads=1 if small else 2,
        train_length=length,
        placed=False,
    )


def product_table(things):
    """At `[a, b]` the number of the permutation that is `a` and then `b`."""
    elements = list(itertools.permutations(range(things)))
    number = {element: n for n, element in enumerate(elements)}
    table = [[number[tuple(b[i] for i in a)] for b in elements] for a in elements]
    return np.array(table, "int32")


def draw(products, key, shape, choice):
    """A batch of `shape`: sequences and their length; `choice`: the range of what is asked."""
    begin, end = choice
    tokens = jax.random.randint(key, shape, 0, len(products))
    answers = jax.lax.associative_scan(lambda a, b: products[a, b], tokens, axis=1)
    place = jnp.arange(shape[1])
    asked = jnp.broadcast_to((place >= begin) & (place < end), shape)
    return Batch(tokens, answers, asked.astype("float32"))
