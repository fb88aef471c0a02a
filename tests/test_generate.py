"""Generation draws what the model, run anew on all that was written, would give."""

import keras
import numpy as np
import pytest

from keras_hla import generate, generate_stream, layers, streaming_model
from keras_hla.streaming.sampling import sample

VOCABULARY = 30


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    start = keras.initializers.RandomNormal(stddev=1.0)
    x = keras.layers.Embedding(VOCABULARY, 32, embeddings_initializer=start)(tokens)
    for _ in range(2):
        # Large weights, so that what is drawn depends on all that was before.
        large = keras.initializers.RandomNormal(stddev=0.3)
        x = layers.HLADecoderBlock(2, 16, kernel_initializer=large)(x)
    return keras.Model(tokens, keras.layers.Dense(VOCABULARY, name="logits")(x))


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, n) for n in (1, 5, 40)]


def test_greedy_is_the_naive_forward(model, prompts):
    written = generate(model, prompts, 20, temperature=0, tokens_per_call=8)
    assert len({*np.concatenate(written)}) > 4  # not one token for ever
    for prompt, new in zip(prompts, written, strict=True):
        assert new.shape == (20,)
        row = np.concatenate([prompt, new])[None].astype("int32")
        likeliest = np.argmax(model.predict_on_batch(row)[0], axis=-1)
        np.testing.assert_array_equal(new, likeliest[len(prompt) - 1 : -1])


def test_long_prompts_are_read_in_pieces(model):
    prompt = np.random.default_rng(1).integers(0, VOCABULARY, 1500)
    new = generate(model, prompt, 3, temperature=0, tokens_per_call=8)
    row = np.concatenate([prompt, new])[None].astype("int32")
    likeliest = np.argmax(model.predict_on_batch(row)[0, -4:-1], axis=-1)
    np.testing.assert_array_equal(new, likeliest)


def test_a_seed_draws_the_same_whatever_is_in_the_batch(model, prompts):
    options = {"max_new_tokens": 16, "temperature": 0.9, "top_k": 10, "top_p": 0.9}
    first = generate(model, prompts, seed=3, tokens_per_call=8, **options)
    again = generate(model, prompts, seed=3, tokens_per_call=8, **options)
    np.testing.assert_array_equal(first, again)
    alone = generate(model, prompts[0], seed=3, tokens_per_call=8, **options)
    np.testing.assert_array_equal(first[0], alone)
    others = generate(model, prompts, seed=4, tokens_per_call=8, **options)
    assert not np.array_equal(first, others)


def test_stop_tokens(model, prompts):
    free = generate(model, prompts, 20, temperature=0, tokens_per_call=8)
    stop = int(free[0][4])
    for new, whole in zip(
        generate(model, prompts, 20, temperature=0, stop_tokens=[stop], tokens_per_call=8),
        free,
        strict=True,
    ):
        ends = np.flatnonzero(whole == stop)
        expected = whole[: ends[0] + 1] if ends.size else whole
        np.testing.assert_array_equal(new, expected)


def test_stream_yields_text_as_it_comes(model, prompts):
    whole = generate(model, prompts[1], 20, temperature=0, tokens_per_call=8)

    def decode(tokens):
        return "".join(chr(65 + token) for token in tokens)

    stream = generate_stream(model, prompts[1], 20, temperature=0, tokens_per_call=8, decode=decode)
    pieces = [next(stream), *stream]
    assert [len(x) for x in pieces] == [8, 8, 4]
    assert "".join(pieces) == decode(whole)


def test_weights_may_change(model, prompts):
    before = generate(model, prompts[1], 8, temperature=0, tokens_per_call=8)
    weights = model.get_weights()
    model.set_weights([w[::-1] if w.ndim == 2 else w for w in weights])
    changed = generate(model, prompts[1], 8, temperature=0, tokens_per_call=8)
    model.set_weights(weights)
    assert not np.array_equal(before, changed)
    after = generate(model, prompts[1], 8, temperature=0, tokens_per_call=8)
    np.testing.assert_array_equal(before, after)


def test_batch_size_may_change(model, prompts):
    alone = [generate(model, x, 10, temperature=0, tokens_per_call=8) for x in prompts]
    for rows in ([0, 1], [2, 0, 1], [1, 2]):
        batch = [prompts[row] for row in rows]
        written = generate(model, batch, 10, temperature=0, tokens_per_call=8)
        np.testing.assert_array_equal(written, [alone[row] for row in rows])


class Counted(keras.layers.Layer):
    """Counts the calls in Python."""

    calls = 0

    def call(self, x):
        self.calls += 1
        return x


def small_model(layer):
    tokens = keras.Input((None,), dtype="int32")
    x = layer(keras.layers.Embedding(VOCABULARY, 8)(tokens))
    x = layers.HLA(2, 4, decay="input")(x)
    return keras.Model(tokens, keras.layers.Dense(VOCABULARY)(x))


def test_no_layer_is_called_for_each_token():
    layer = Counted()
    model = small_model(layer)

    def count(tokens, **options):
        before = layer.calls
        generate(model, [1, 2], tokens, top_k=5, tokens_per_call=8, **options)
        return layer.calls - before

    assert count(8, temperature=0.9, top_p=0.9) > 0
    # On what is compiled only for the prompt, if at all; whatever the numbers.
    assert count(80, temperature=0.8, top_p=0.8) == count(8, temperature=0.7, top_p=0.7) < 8


class Choosing(keras.layers.Layer):
    """Does in Python what depends on what the tensor holds."""

    def call(self, x):
        return 2 * x if float(keras.ops.stop_gradient(keras.ops.max(x))) > 0 else -x


@pytest.mark.skipif(keras.config.backend() != "torch", reason="TensorFlow and JAX refuse it")
def test_what_torch_cannot_trace_runs_as_it_is():
    model = small_model(Choosing())
    with pytest.warns(UserWarning, match="cannot trace a step of the model"):
        new = generate(model, [1, 2, 3], 8, temperature=0)
    # A token at a time, since the layer looks at all it is given.
    stream = streaming_model(model)
    states = stream.initial_state(1)
    row = [np.array([[1, 2, 3]], "int32"), *new[:, None, None].astype("int32")]
    for token, following in zip(row, new, strict=False):
        outputs = stream({"inputs": token, **states})
        states = {name: outputs[name] for name in stream.state_names}
        logits = outputs[next(name for name in outputs if name not in states)]
        assert np.argmax(keras.ops.convert_to_numpy(logits)[0, -1]) == following


@pytest.mark.parametrize(
    ("options", "allowed"),
    [({}, 6), ({"top_k": 2}, 2), ({"top_p": 0.9, "top_k": 6}, 4), ({"temperature": 0.5}, 6)],
)
def test_frequencies_are_the_probabilities(options, allowed):
    """Against probabilities of NumPy, with as many numbers as tell them apart."""
    logits = np.array([0.1, 1.5, -1.0, 0.7, 0.0, -2.0])
    n = 20_000
    uniform = (np.arange(n) + 0.5) / n
    temperature = options.get("temperature", 1.0)
    tokens = sample(
        keras.ops.convert_to_tensor(np.tile(logits, (n, 1)), "float32"),
        keras.ops.convert_to_tensor(uniform, "float32"),
        temperature,
        options.get("top_p", 1.0),
        options.get("top_k"),
    )
    expected = np.exp(logits / temperature)
    expected[np.argsort(-logits)[allowed:]] = 0
    expected /= expected.sum()
    counts = np.bincount(keras.ops.convert_to_numpy(tokens), minlength=6)
    np.testing.assert_allclose(counts / n, expected, atol=1e-3)


def test_the_largest_number_draws_what_has_a_probability():
    logits = np.zeros((1, 1000), "float32")
    logits[:, 500:] = -np.inf
    for top_k in (None, 1000):
        token = sample(
            keras.ops.convert_to_tensor(logits),
            keras.ops.convert_to_tensor([np.nextafter(np.float32(1), np.float32(0))]),
            1.0,
            1.0,
            top_k,
        )
        assert int(token[0]) < 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "`prompt`"),
        ({"prompt": [[]]}, "`prompt`"),
        ({"prompt": [0.5]}, "`prompt`"),
        ({"prompt": [VOCABULARY]}, "`prompt`"),
        ({"prompt": [[1], [-1]]}, "`prompt`"),
        ({"max_new_tokens": 0}, "`max_new_tokens`"),
        ({"temperature": -1}, "`temperature`"),
        ({"top_k": 0}, "`top_k`"),
        ({"top_p": 0.0}, "`top_p`"),
        ({"tokens_per_call": 0}, "`tokens_per_call`"),
    ],
)
def test_errors(model, arguments, message):
    arguments = {"prompt": [1, 2], "max_new_tokens": 3} | arguments
    with pytest.raises(ValueError, match=message):
        generate(model, **arguments)


def test_model_errors():
    inputs = keras.Input((None, 8))
    with pytest.raises(ValueError, match="must have one input"):
        generate(keras.Model(inputs, layers.HLA(2, 4)(inputs)), [1], 3)


def test_nan_is_an_error(model, prompts):
    weights = model.get_weights()
    model.set_weights([w * np.nan for w in weights])
    with pytest.raises(ValueError, match="NaN"):
        generate(model, prompts[1], 8, temperature=0, tokens_per_call=8)
    model.set_weights(weights)
