"""Language models of blocks, and a step of their training: as a user's training loop runs it."""

from collections.abc import Callable
from typing import NamedTuple

import keras
from keras import layers
import numpy as np

from benchmarks import runtime
from benchmarks.trainees import Announced, policy, width

LEARNING_RATE = 1e-4


class Training(NamedTuple):
    """A model and its text: `step()` trains it once and returns the loss."""

    step: Callable
    announced: Announced


def block_count():
    return 12 if runtime.current().on_gpu() else 2


def text(case):
    """Random tokens and those after them, `(batch, length)`."""
    shape = (case.batch, case.length + 1)
    tokens = np.random.default_rng(0).integers(0, case.vocabulary, shape).astype("int32")
    return tokens[:, :-1], tokens[:, 1:]


def of_keras(make_block, case, jit):
    """`train_on_batch` of a model with Adam, and the list of its blocks.

    The caller fills in the announcement, which is empty.
    """
    dtype = policy(case)
    tokens = keras.Input((None,), dtype="int32")
    x = layers.Embedding(case.vocabulary, width(case), dtype=dtype)(tokens)
    blocks = [make_block() for _ in range(block_count())]
    for block in blocks:
        x = block(x)
    x = layers.RMSNormalization(dtype=dtype)(x)
    model = keras.Model(tokens, layers.Dense(case.vocabulary, use_bias=False, dtype=dtype)(x))
    model.compile(
        keras.optimizers.Adam(LEARNING_RATE),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile={"on": True, "off": False}.get(jit, "auto"),
    )
    step = runtime.current().train_on_batch(model, *text(case))
    return Training(step, Announced("")), blocks
