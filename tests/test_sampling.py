"""Tokens are drawn with the probabilities of a definition in NumPy's float64, at its edges too."""

import keras
import numpy as np
import pytest

from keras_hla import generate, layers
from keras_hla.backend.compiling import compiled
from keras_hla.streaming.sampling import inverse, sample

INF = np.inf
LOGITS = {
    "usual": [0.1, 1.5, -1.0, 0.7, 0.0, -2.0],
    "forbidden": [-INF, 0.5, -INF, 1.0, -INF, -INF],
    "one infinite": [0.0, 1.0, INF, -INF, 5.0, 3e38],
    "two infinite": [INF, 1.0, 3e38, -INF, 5.0, INF],
    "equal": [2.5] * 6,
    "infinite": [INF] * 6,
    "large": [3e38, -3e38, 2.9e38, -INF, 0.0, 3e38],
    "large and negative": [-3e38, -3.1e38, -INF, -3e38, -3.2e38, -3.3e38],
    "close": [1.0, np.nextafter(np.float32(1), 2, dtype="float32"), 0.99, 0.0, -1.0, 0.5],
    "small": [1e-30, 3e-30, 0.0, -1e-30, 2e-30, -INF],
}
TEMPERATURES = (5e-324, 1e-45, 1e-40, 1e-38, 1e-30, 1e-10, 0.5, 1.0, 30.0, 1e38, 1e300)
DRAWS = 4096


def probabilities(logits, temperature, top_p=1.0, top_k=None):
    """By definition; the likeliest tokens are the first of those that are equal."""
    logits = np.asarray(logits, "float32").astype("float64")
    if np.max(logits) == INF:
        logits = np.where(logits == INF, 0.0, -INF)
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp((logits - np.max(logits)) / temperature)
    order = np.argsort(-logits, kind="stable")[:top_k]
    shares = weights[order] / np.sum(weights[order])
    before = np.cumsum(shares) - shares
    allowed = order[(before < top_p) | (np.arange(len(order)) == 0)]
    weights = np.where(np.isin(np.arange(len(logits)), allowed), weights, 0)
    return weights / np.sum(weights)


def sum_up(probabilities, logits):
    """The probabilities of the values of the logits."""
    values, place = np.unique(logits, return_inverse=True)
    return np.bincount(place, probabilities, len(values))


@pytest.fixture(scope="module")
def draw():
    """A function that counts the tokens drawn with evenly spaced numbers."""
    functions = {}

    def frequencies(logits, temperature, top_p=1.0, top_k=None):
        if top_k not in functions:
            functions[top_k] = compiled(lambda *inputs: sample(*inputs, top_k), [])
        uniform = (np.arange(DRAWS) + 0.5) / DRAWS
        batch = np.tile(np.asarray(logits, "float32"), (DRAWS, 1))
        arrays = (batch, uniform, inverse(temperature), top_p)
        tensors = (keras.ops.convert_to_tensor(np.asarray(x, "float32")) for x in arrays)
        tokens = keras.ops.convert_to_numpy(functions[top_k](*tensors))
        return np.bincount(tokens, minlength=len(logits)) / DRAWS

    return frequencies


@pytest.mark.parametrize("name", LOGITS)
def test_frequencies_are_the_probabilities(name, draw):
    for temperature in TEMPERATURES:
        for options in ({}, {"top_k": 2}, {"top_k": 6, "top_p": 0.85}):
            expected = probabilities(LOGITS[name], temperature, **options)
            actual = draw(LOGITS[name], temperature, **options)
            if "top_k" in options:  # Which of two equal ones comes first, nobody says.
                expected, actual = (sum_up(x, LOGITS[name]) for x in (expected, actual))
            np.testing.assert_allclose(actual, expected, atol=2 / DRAWS, err_msg=str(temperature))


@pytest.mark.parametrize("top_p", [1e-46, 1e-45, 1e-38, 1e-10, 0.3])
def test_a_small_top_p_takes_the_likeliest(draw, top_p):
    assert draw(LOGITS["usual"], 1.0, top_p, 6)[1] == 1


def test_greedy_takes_the_largest(draw):
    for name, logits in LOGITS.items():
        (token,) = np.flatnonzero(draw(logits, 1.0, top_k=1))
        assert logits[token] == max(logits), name


@pytest.mark.parametrize("top_k", [None, 1000, 1])
def test_rows_without_a_token(top_k):
    logits = np.random.default_rng(0).standard_normal((4, 1000)).astype("float32")
    logits[1] = -INF
    logits[2, 700] = np.nan
    tensors = (keras.ops.convert_to_tensor(x) for x in (logits, np.full(4, 0.5, "float32")))
    tokens = keras.ops.convert_to_numpy(sample(*tensors, inverse(1.0), 1.0, top_k))
    np.testing.assert_array_equal(tokens < 0, [False, True, True, False])


@pytest.mark.parametrize("top_k", [None, 1000])
def test_the_largest_number_draws_what_has_a_probability(top_k):
    logits = np.zeros((1, 1000), "float32")
    logits[:, 500:] = -INF
    uniform = np.nextafter(np.float32([1]), np.float32(0))
    tensors = (keras.ops.convert_to_tensor(x) for x in (logits, uniform))
    assert 0 <= int(sample(*tensors, inverse(1.0), 1.0, top_k)[0]) < 500


@pytest.fixture(scope="module")
def constant():
    """A model that gives the same logits whatever it has read."""
    tokens = keras.Input((None,), dtype="int32")
    x = layers.HLA(1, 4)(keras.layers.Embedding(6, 4)(tokens))
    return keras.Model(tokens, keras.layers.Dense(6, kernel_initializer="zeros", name="logits")(x))


def test_generated_tokens_at_the_edges(constant):
    def draw(name, **options):
        constant.get_layer("logits").bias.assign(np.array(LOGITS[name], "float32"))
        return set(generate(constant, [1], 32, seed=0, **options).tolist())

    for temperature in (5e-324, 1e-45, 1e-39, 1e-10):
        assert draw("usual", temperature=temperature) == {1}
        assert draw("equal", temperature=temperature) == set(range(6))
    for top_p in (5e-324, 1e-46, 1e-39):
        assert draw("usual", top_p=top_p) == {1}
    assert draw("one infinite") == draw("one infinite", top_k=3) == {2}
    assert draw("two infinite") == draw("two infinite", top_p=0.9) == {0, 5}
    assert draw("large", temperature=1e36) == {0, 5}


def test_no_token_to_draw_is_an_error(constant):
    for logits in ([-INF] * 6, [0, 1, 2, np.nan, 4, 5]):
        constant.get_layer("logits").bias.assign(np.array(logits, "float32"))
        for options in ({"temperature": 0}, {"top_k": 3}, {}):
            with pytest.raises(ValueError, match="NaN, or are all minus infinity"):
                generate(constant, [1], 4, **options)


@pytest.mark.parametrize("top_k", [None, 3])
def test_logits_of_float64(top_k):
    uniform, logits = np.linspace(0, 0.99, 20), np.tile(LOGITS["usual"], (20, 1))
    tokens = [
        sample(
            keras.ops.convert_to_tensor(logits, dtype),
            *(keras.ops.convert_to_tensor(x, "float32") for x in (uniform, inverse(0.7), 0.9)),
            top_k,
        )
        for dtype in ("float32", "float64")
    ]
    np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, tokens))
