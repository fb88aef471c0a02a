"""A byte model of real text: the modules of Python's standard library.

The files `*.py` of the folder of the standard library, in the order of their names, are shuffled by
a fixed seed and joined. The last 5 % of the files are held out: learning rates are compared on the
first half of their bytes, and tests read the second half. The windows of a batch start at random
places, one in each of as many equal parts of the text, so that tests of all lengths read much the
same bytes. Every byte is to be predicted from those before it.

The text depends on the version of Python, which the records hold.
"""

import functools
from pathlib import Path
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.learning.tasks.task import Batch, Split, Task

HELD_OUT = 0.05  # share of the files
SHUFFLE_SEED = 0


def make(name, size):
    text, cut = corpus()
    middle, end = (cut + len(text)) // 2, len(text)
    small = size == "small"
    batch, length, steps = (8, 128, 300) if small else (32, 512, 800)
    windows = batch * length  # the bytes of a batch, of all lengths
    tests = {
        f"{longer}": Split((max(1, windows // longer), longer), (middle, end), 4 if small else 8)
        for longer in (length, 4 * length, 16 * length)
    }
    return Task(
        name,
        "bits",
        functools.partial(draw, jnp.asarray(text)),
        train=Split((batch, length), (0, cut)),
        valid=Split((batch, length), (cut, middle), 4 if small else 8),
        tests=tests,
        inputs=256,
        outputs=256,
        steps=steps,
        rates=(2e-3, 4e-3, 8e-3, 1.6e-2),
        width=64 if small else 256,
        heads=2 if small else 4,
        layers=2 if small else 4,
        train_length=length,
        placed=False,
    )


@functools.cache
def corpus():
    """The bytes, and how many of them are for training."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(paths))
    files = [paths[n].read_bytes() for n in order]
    train = files[: len(files) - max(1, round(HELD_OUT * len(files)))]
    return np.frombuffer(b"".join(files), "uint8"), sum(map(len, train))


def draw(text, key, shape, choice):
    """A batch of `shape`: windows and their length; `choice`: where the part begins and ends."""
    windows, length = shape
    begin, end = jnp.asarray(choice, "int32")
    part = (jnp.arange(windows) + jax.random.uniform(key, (windows,))) / windows
    starts = begin + jnp.asarray(part * (end - begin - length - 1), "int32")
    window = text[starts[:, None] + jnp.arange(length + 1)].astype("int32")
    return Batch(window[:, :-1], window[:, 1:], jnp.ones((windows, length)))
