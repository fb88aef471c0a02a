"""Text for the examples: a corpus that every Python has, batches, and what n-gram models score."""

import collections
from pathlib import Path
import sysconfig

import keras
import numpy as np

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def standard_library(limit):
    """Returns the first `limit` characters of Python's own modules, and the modules' names."""
    text, names = "", []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if len(text) >= limit:
            break
        text += path.read_text(encoding="utf-8", errors="replace")
        names.append(path.name)
    return text[:limit], names


def vocabulary(text, min_share):
    """Returns the characters with that share of the text, after the one that replaces others."""
    counts = collections.Counter(text)
    del counts[REPLACEMENT]
    min_count = min_share * len(text)
    return REPLACEMENT + "".join(sorted(c for c, count in counts.items() if count >= min_count))


def encode(text, characters):
    """Returns the characters' indices in the vocabulary, zero for those outside of it."""
    index = {character: i for i, character in enumerate(characters)}
    return np.array([index.get(character, 0) for character in text], dtype="int32")


def windows(tokens, starts, length):
    """Sequences that start at `starts`, and as targets the same one character later."""
    index = starts[:, None] + np.arange(length)
    return tokens[index], tokens[index + 1]


class RandomWindows(keras.utils.PyDataset):
    """Batches of sequences from random places of the text, new ones in every epoch."""

    def __init__(self, tokens, length, batch_size, steps, seed):
        super().__init__()
        self.tokens = tokens
        self.length = length
        self.batch_size = batch_size
        self.steps = steps
        self.seed = seed
        self.epoch = 0

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        random = np.random.default_rng((self.seed, self.epoch, step))
        starts = random.integers(len(self.tokens) - self.length, size=self.batch_size)
        return windows(self.tokens, starts, self.length)

    def on_epoch_end(self):
        self.epoch += 1


def ngram_bits(train, held_out, order, vocabulary_size):
    """Bits that models of the orders 0 to `order` need for each character of `held_out`.

    The model of order n counts how often a character follows the n characters
    before it, and mixes these frequencies with the model of order n - 1; that
    one gets more weight the more different characters were seen to follow
    (Witten-Bell smoothing). Below order 0 all characters are equally likely.

    Args:
        train: Array of characters as numbers, to count in.
        held_out: Array of the characters that follow, to predict.
        order: Largest number of characters before the predicted one.
        vocabulary_size: Number of different characters.

    Returns:
        Array of shape `(order + 1, len(held_out))`.
    """
    both = np.concatenate([train[len(train) - order :], held_out])
    probability = 1 / vocabulary_size
    bits = []
    for n in range(order + 1):
        seen, counts = np.unique(_ngrams(train, n, vocabulary_size), return_counts=True)
        contexts, first = np.unique(seen // vocabulary_size, return_index=True)
        totals = np.add.reduceat(counts, first)
        followers = np.diff(np.append(first, len(seen)))

        wanted = _ngrams(both[order - n :], n, vocabulary_size)
        count = _look_up(wanted, seen, counts)
        total = _look_up(wanted // vocabulary_size, contexts, totals)
        follower = _look_up(wanted // vocabulary_size, contexts, followers)
        # A context that never occurred leaves the shorter one's probability.
        mixed = (count + follower * probability) / np.maximum(total + follower, 1)
        probability = np.where(total > 0, mixed, probability)
        bits.append(-np.log2(probability))
    return np.stack(bits)


def _ngrams(tokens, n, base):
    """Each character with the `n` before it, as one number."""
    code = np.zeros(len(tokens) - n, dtype="int64")
    for i in range(n + 1):
        code = code * base + tokens[i : len(tokens) - n + i]
    return code


def _look_up(wanted, keys, values):
    """The value of each wanted key, zero where there is none; `keys` are sorted."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)
