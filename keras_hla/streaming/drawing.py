"""How tokens are drawn: the arguments that `generate` and sessions share, checked."""

from collections.abc import Sequence
import dataclasses
import functools

import numpy as np

from keras_hla.checks import check_number, check_positive_int
from keras_hla.streaming.sampling import inverse


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How many tokens are drawn, from which probabilities, and where that ends.

    Args:
        vocabulary_size: number of tokens that there are.
        max_new_tokens: as in `generate`, as are the others.
    """

    vocabulary_size: int
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    stop_tokens: int | Sequence[int] = ()
    seed: int | None = None

    def __post_init__(self):
        check_positive_int("max_new_tokens", self.max_new_tokens)
        check_number("temperature", self.temperature, "a number >= 0", lambda x: x >= 0)
        check_positive_int("top_k", self.top_k, optional=True)
        if self.top_p is not None:
            check_number("top_p", self.top_p, "None or a number in (0, 1]", lambda x: 0 < x <= 1)
        if self.seed is not None:
            check_number("seed", self.seed, "None or an integer >= 0", _is_natural)
        _check_stop_tokens(self.stop_tokens, self.vocabulary_size)

    @functools.cached_property
    def candidates(self):
        """The `top_k` of `sample`."""
        if self.temperature == 0:
            return 1
        if self.top_k is None:
            return None if self.top_p is None else self.vocabulary_size
        return min(self.top_k, self.vocabulary_size)

    @functools.cached_property
    def inverse(self):
        """The `inverse` of `sample`."""
        return inverse(self.temperature or 1)

    @functools.cached_property
    def stops(self):
        """The stop tokens as a tuple."""
        return _check_stop_tokens(self.stop_tokens, self.vocabulary_size)

    @property
    def share(self):
        """The `top_p` of `sample`."""
        return float(self.top_p or 1)

    def generators(self, count):
        """For each of `count` sequences what draws its random numbers, from the seed."""
        return np.random.default_rng(self.seed).spawn(count)


def check_prompt(prompt, vocabulary_size):
    """The prompt as an array."""
    x = np.asarray(prompt)
    if not (x.ndim == 1 and x.size and _are_tokens(x, vocabulary_size)):
        raise ValueError(
            "Argument `prompt` must be a sequence of integers from 0 to "
            f"{vocabulary_size - 1}, not empty, or a list of such. Received: {x}"
        )
    return x


def check_input_names(inputs, names):
    """The further inputs of a model, a dictionary with these names; `None` is an empty one."""
    inputs = {} if inputs is None else inputs
    if not isinstance(inputs, dict) or set(inputs) != set(names):
        received = sorted(inputs) if isinstance(inputs, dict) else inputs
        raise ValueError(
            "Argument `inputs` must be a dictionary of the inputs of the model that are not "
            f"sequences, {sorted(names)}. Received: {received}"
        )
    return inputs


def _check_stop_tokens(stop_tokens, vocabulary_size):
    """The stop tokens as a tuple."""
    unordered = isinstance(stop_tokens, set | frozenset)
    tokens = np.asarray(list(stop_tokens) if unordered else stop_tokens)
    if tokens.ndim > 1 or not (tokens.size == 0 or _are_tokens(tokens, vocabulary_size)):
        raise ValueError(
            f"Argument `stop_tokens` must be integers from 0 to {vocabulary_size - 1}, or one. "
            f"Received: stop_tokens={stop_tokens!r}"
        )
    return tuple(np.ravel(tokens).tolist())


def _are_tokens(x, vocabulary_size):
    return np.issubdtype(x.dtype, np.integer) and x.min() >= 0 and x.max() < vocabulary_size


def _is_natural(x):
    return isinstance(x, int | np.integer) and x >= 0
