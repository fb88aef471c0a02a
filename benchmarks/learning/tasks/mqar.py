"""Multi-query associative recall, as Arora et al. define it in "Zoology" (arXiv:2312.04927).

A sequence starts with pairs of a key and a value: different keys, drawn from the lower half of the
vocabulary without token 0, and different values from its upper half. After them each key is asked
once: it stands at an even distance `2 g` from the end of the pairs, and the answer at that place is
its value. The distances differ; `g` is drawn with probability proportional to
`(g + 1) ** (0.01 - 1)`, as in the published experiments. All other places hold token 0.

The batches of training mix sequences of several lengths and numbers of pairs, those with many pairs
more often. Shorter sequences end with token 0.
"""

import jax
import jax.numpy as jnp

from benchmarks.learning.tasks.task import Batch, Split, Task, draw_distinct

POWER = 0.01
KINDS = (64, 4), (128, 8), (256, 16), (256, 64)  # lengths and pairs


def make(name, size):
    kinds: tuple
    beyond: tuple
    if size == "small":
        kinds, beyond = ((16, 2), (32, 4)), ((64, 8),)
        shares = [0.5, 0.5]
        vocabulary, batch, tested, steps = 64, 16, 32, 300
    else:
        kinds, beyond = KINDS, ((512, 128), (1024, 256))
        shares = [0.125, 0.125, 0.25, 0.5]
        vocabulary, batch, tested, steps = 8192, 128, 128, 1000
    shape = (batch, vocabulary, kinds)
    tests = {
        f"{length}/{pairs}": Split((tested, vocabulary, kinds), _only(n, len(kinds)))
        for n, (length, pairs) in enumerate(kinds)
    } | {
        f"{length}/{pairs}": Split((tested // 2, vocabulary, ((length, pairs),)), (1.0,))
        for length, pairs in beyond
    }
    return Task(
        name,
        "accuracy",
        draw,
        train=Split(shape, tuple(shares)),
        valid=Split((tested, vocabulary, kinds), tuple(shares)),
        tests=tests,
        inputs=vocabulary,
        outputs=vocabulary,
        steps=steps,
        rates=(2e-3, 5e-3, 1e-2, 2e-2) if size == "small" else (5e-4, 1e-3, 2e-3, 5e-3),
        train_length=max(length for length, _ in kinds),
        width=64 if size == "small" else 128,
        heads=1 if size == "small" else 2,
        mlp=False,
    )


def draw(key, shape, choice):
    """A batch of `shape`: sequences, vocabulary, and kinds `(length, pairs)`.

    `choice` are the probabilities of the kinds.
    """
    sequences, vocabulary, kinds = shape
    longest, most = max(x for x, _ in kinds), max(x for _, x in kinds)
    of_kind, of_keys, of_values, of_gaps = jax.random.split(key, 4)
    chances = jnp.log(jnp.asarray(choice))
    kind = jax.random.categorical(of_kind, chances, shape=(sequences,))
    lengths, pairs = jnp.asarray(kinds)[kind].T[:, :, None]
    half = vocabulary // 2
    keys = 1 + draw_distinct(of_keys, most, half - 1, sequences)
    values = half + draw_distinct(of_values, most, vocabulary - half, sequences)
    gaps = _draw_gaps(of_gaps, (lengths - 2 * pairs) // 2, most, longest // 2)
    number = jnp.arange(most)
    there = number < pairs
    places = jnp.where(there, 2 * (pairs + gaps), longest)  # which no sequence has
    tokens = jnp.zeros((sequences, longest), "int32")
    row = jnp.arange(sequences)[:, None]
    for place, token in (
        (jnp.where(there, 2 * number, longest), keys),
        (jnp.where(there, 2 * number + 1, longest), values),
        (places, keys),
    ):
        tokens = tokens.at[row, place].set(token, mode="drop")
    places = jnp.where(there, places, 0)
    return Batch(tokens, values, there.astype("float32"), places)


def _draw_gaps(key, spaces, count, largest):
    """`count` different gaps for each sequence, below its `spaces` first."""
    gap = jnp.arange(largest)
    chances = jnp.where(gap < spaces, (POWER - 1) * jnp.log(gap + 1.0), -jnp.inf)
    noise = jax.random.gumbel(key, chances.shape)  # the largest sums are draws one after another
    return jax.lax.top_k(chances + noise, count)[1]


def _only(n, count):
    return tuple(float(i == n) for i in range(count))
