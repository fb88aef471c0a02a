"""What a task is: how its batches are drawn, what is measured on them, and the model it is for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax


class Batch(NamedTuple):
    """What a model reads and what it should answer.

    Args:
        inputs: tokens, `(batch, length)`, or numbers, `(batch, length, features)`.
        targets: what is asked: tokens, or numbers, `(batch, places)`.
        weights: `(batch, places)`: one for targets that are asked, else zero.
        places: where in the sequence they are asked, `(batch, places)`. `None` is everywhere.
        mask: true at unmasked tokens, `(batch, length)`, or `None`.
    """

    inputs: Any
    targets: Any
    weights: Any
    places: Any = None
    mask: Any = None


class Split(NamedTuple):
    """A kind of batch.

    Args:
        shape: tuple of integers, the batch size first. Each shape is compiled separately.
        choice: tuple of numbers that are not compiled in.
        batches: number of batches of a test.
    """

    shape: tuple
    choice: tuple = ()
    batches: int = 4


@dataclass(frozen=True)
class Task:
    """A task in one size.

    Args:
        name: its name.
        metric: `"accuracy"`, `"bits"` or `"error"`, the mean square.
        draw: `draw(key, shape, choice)` returns a `Batch`; JAX traces it.
        train: the `Split` of the steps.
        valid: the `Split` by which learning rates are compared.
        tests: the `Split`s that are reported, by name.
        inputs: number of different tokens; or of features, for an error.
        outputs: number of different answers, or of numbers.
        steps: number of training steps.
        rates: the learning rates that are tried.
        width: features of the model.
        heads: number of heads.
        layers: number of blocks.
        mlp: whether a block has an MLP.
        masked: whether batches have a mask.
        train_length: longest sequence of training.
        placed: whether batches have places.
    """

    name: str
    metric: str
    draw: Callable
    train: Split
    valid: Split
    tests: dict
    inputs: int
    outputs: int
    steps: int
    rates: tuple = (1e-3, 2e-3, 4e-3, 8e-3)
    width: int = 64
    heads: int = 1
    layers: int = 2
    mlp: bool = True
    train_length: int = 256
    masked: bool = False
    placed: bool = True


def at_lengths(batch, length, *rest):
    """Tests at a length and at two and four times it, by name."""
    return {f"{n * length}": Split((batch, n * length, *rest)) for n in (1, 2, 4)}


def draw_distinct(key, count, limit, sequences):
    """`count` different integers below `limit` for each sequence, in random order."""
    noise = jax.random.uniform(key, (sequences, limit))
    return jax.lax.top_k(noise, count)[1]
