"""Generation draws what the model, run anew on all that was written, would give."""

import functools
import gc
import threading
import weakref

from backends import compiled, to_numpy
from family import PLAIN
import keras
import numpy as np
import pytest

from keras_hla import generate, generate_stream, layers, streaming_model

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


def check_greedy(new, model, prompt, **inputs):
    """Holds new tokens to the model, called on all that was written."""
    row = keras.ops.convert_to_tensor(np.concatenate([prompt, new])[None].astype("int32"))
    call = model.call if isinstance(model, keras.Sequential) else model  # of any length
    # By a new one, or JAX would take what it has compiled for former variables.
    logits = to_numpy(
        compiled(functools.partial(call))({"tokens": row} | inputs if inputs else row)
    )
    np.testing.assert_array_equal(new, np.argmax(logits[0, len(prompt) - 1 : -1], axis=-1))


def test_greedy_is_the_naive_forward(model, prompts):
    written = generate(model, prompts, 20, temperature=0, tokens_per_call=8)
    assert len({*np.concatenate(written)}) > 4  # not one token for ever
    for prompt, new in zip(prompts, written, strict=True):
        assert new.shape == (20,)
        check_greedy(new, model, prompt)


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


def stack(mask_zero=False):
    """Layers of a language model that writes more than one token for ever."""
    start = keras.initializers.RandomNormal(stddev=1.0)
    return [
        keras.layers.Embedding(VOCABULARY, 16, start, mask_zero=mask_zero),
        layers.HLA(2, 8, name="hla", kernel_initializer=start, **PLAIN),
        keras.layers.Dense(VOCABULARY, name="logits", kernel_initializer=start),
    ]


def functional(mask_zero=False, residual=False):
    tokens = keras.Input((None,), dtype="int32")
    embedding, hla, dense = stack(mask_zero)
    x = embedding(tokens)
    x = x + hla(x) if residual else hla(x)
    return keras.Model(tokens, dense(layers.HLA(2, 8, name="second", **PLAIN)(x)))


def enable_lora(model):
    for layer in (model.get_layer("logits"), model.get_layer("hla").cell.query_dense):
        layer.enable_lora(4)
        b = layer.lora_kernel_b
        b.assign(np.random.default_rng(0).standard_normal(b.shape).astype("float32"))


def change_the_dtype(model):
    model.get_layer("logits").dtype_policy = keras.DTypePolicy("mixed_float16")


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize(
    "change",
    [
        enable_lora,
        lambda model: model.quantize("int8"),
        lambda model: model.quantize("int4"),
        lambda model: model.set_weights([-w for w in model.get_weights()]),
        change_the_dtype,
        lambda model: setattr(model.get_layer("hla"), "trainable", False),
    ],
)
def test_the_model_is_written_with_as_it_is_now(change):
    model, prompt = functional(), [1, 2, 3]
    generate(model, prompt, 8, temperature=0)
    change(model)
    check_greedy(generate(model, prompt, 8, temperature=0), model, prompt)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_the_model_may_change_while_it_writes():
    model, prompt = functional(), [1, 2, 3]
    stream = generate_stream(model, prompt, 9, temperature=0, tokens_per_call=3)
    first = next(stream)
    enable_lora(model)
    second = next(stream)
    model.quantize("int8")
    third = next(stream)
    again = generate_stream(model, [*prompt, *first, *second], 3, temperature=0, tokens_per_call=3)
    assert len(third) == len(next(again)) == 3


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_replaced_weights_leave_the_memory():
    tokens = keras.Input((None,), dtype="int32")
    embedding, _, dense = stack()
    model = keras.Model(tokens, dense(layers.HLADecoderBlock(2, 8)(embedding(tokens))))
    generate(model, [1, 2, 3], 8)
    kernel = weakref.ref(model.get_layer("logits").kernel)
    kept = [kernel, weakref.ref(kernel().value)]
    if keras.config.backend() == "tensorflow":  # what a compiled function holds of a variable
        kept.append(weakref.ref(kernel().value.handle))
    model.quantize("int8")
    gc.collect()
    assert [reference() for reference in kept] == [None] * len(kept)


def test_streams_are_of_the_model_as_it_is_now():
    model, tokens = functional(), np.array([[1, 2, 3]], "int32")
    stream = streaming_model(model)
    inputs = {"inputs": tokens} | stream.initial_state(1)
    before = stream.predict_on_batch(inputs)["logits"]
    enable_lora(model)
    after = stream.predict_on_batch(inputs)["logits"]
    np.testing.assert_allclose(after, keras.ops.convert_to_numpy(model(tokens)), atol=1e-4)
    np.testing.assert_allclose(after, stream.predict(inputs, verbose=0)["logits"], atol=1e-4)
    assert np.abs(after - before).max() > 0.1


def test_sequential_models():
    given = keras.Sequential([keras.Input((None,), dtype="int32"), *stack()])
    built, called, fixed = keras.Sequential(stack()), keras.Sequential(stack()), stack()
    built.build((None, None))
    called(np.ones((2, 5), "int32"))
    fixed = keras.Sequential([keras.Input((7,), dtype="int32", batch_size=3), *stack()])
    for model in (given, built, called, fixed):
        new = generate(model, [1, 2, 3], 12, temperature=0)
        check_greedy(new, model, [1, 2, 3])
    given.pop()
    given.add(keras.layers.Dense(10))
    assert generate(given, [1, 2, 3], 50).max() < 10
    with pytest.raises(ValueError, match="Sequential one that is built"):
        generate(keras.Sequential(stack()), [1], 3)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.embedding, self.hla, self.dense = stack()

    def call(self, tokens):
        x = self.embedding(tokens)
        return self.dense(x + self.hla(x))


def test_subclassed_models():
    model = Subclassed()
    with pytest.raises(ValueError, match=r"`keras.Model\(inputs, model\(inputs\)\)`"):
        generate(model, [1, 2, 3], 12)
    tokens = keras.Input((None,), dtype="int32")
    new = generate(keras.Model(tokens, model(tokens)), [1, 2, 3], 12, temperature=0)
    check_greedy(new, model, [1, 2, 3])


def test_further_inputs(rng):
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    condition = keras.Input((16,), name="condition")
    embedding, hla, dense = stack()
    x = embedding(tokens) + condition[:, None]
    inputs = {"tokens": tokens, "condition": condition}
    model = keras.Model(inputs, dense(hla(x)))
    conditions = 3 * rng.standard_normal((2, 16)).astype("float32")
    prompts = [[1, 2, 3], [1, 2]]
    written = generate(model, prompts, 8, temperature=0, inputs={"condition": conditions})
    for prompt, x, new in zip(prompts, conditions, written, strict=True):
        check_greedy(new, model, prompt, condition=keras.ops.convert_to_tensor(x[None]))
        alone = generate(model, prompt, 8, temperature=0, inputs={"condition": x})
        np.testing.assert_array_equal(new, alone)
    assert not np.array_equal(*written)
    for wrong in (None, {}, conditions, {"condition": conditions, "other": 1}):
        with pytest.raises(ValueError, match="Argument `inputs` must be a dictionary"):
            generate(model, prompts, 3, inputs=wrong)
    for wrong in (conditions[0], conditions[:1], conditions[:, :8]):
        with pytest.raises(ValueError, match=r"`inputs\['condition'\]`"):
            generate(model, prompts, 3, inputs={"condition": wrong})


@pytest.mark.parametrize("residual", [False, True])
def test_masked_tokens(residual):
    """They are in the prompt, and are written; an addition ends the mask, so that they count."""
    model = functional(mask_zero=True, residual=residual)
    row = np.random.default_rng(0).integers(0, VOCABULARY, (1, 64))
    logits = to_numpy(compiled(model)(keras.ops.convert_to_tensor(row, "int32")))
    gap, written = logits.max(axis=-1) - logits[..., 0], []
    for share in (0.0, 0.5, 0.9):  # of the tokens that are masked then
        bias = np.quantile(gap, share) * np.eye(VOCABULARY)[0]
        model.get_layer("logits").bias.assign(bias.astype("float32"))
        new = generate(model, [3, 0, 0, 2, 0], 24, temperature=0)
        check_greedy(new, model, [3, 0, 0, 2, 0])
        written.extend(new)
    assert 0 in written
    assert len({*written}) > 2


def test_stop_tokens_may_be_of_any_kind(model, prompts):
    free = generate(model, prompts[0], 20, temperature=0)
    stop = int(free[4])
    expected = free[: np.flatnonzero(free == stop)[0] + 1]
    for given in (stop, np.int64(stop), [stop], (stop,), {stop}, np.array([stop])):
        new = generate(model, prompts[0], 20, temperature=0, stop_tokens=given)
        np.testing.assert_array_equal(new, expected)


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


@pytest.mark.skipif(keras.config.backend() != "jax", reason="others compile in a call")
def test_jax_compiles_the_loop_once_while_it_compiles_the_prompt():
    from jax import monitoring

    threads = []  # in which each of the programs of the model is compiled

    def listen(event, _, fun_name=None, **__):
        if event.endswith("backend_compile_duration") and fun_name == "jit(with_values)":
            threads.append(threading.current_thread())

    monitoring.register_event_duration_secs_listener(listen)
    try:
        model = small_model(keras.layers.Dense(8))
        for seed in range(2):
            generate(model, [[1, 2, 3], [4]], 20, top_k=2, tokens_per_call=8, seed=seed)
    finally:
        monitoring.unregister_event_duration_listener(listen)
    assert threads.count(threading.main_thread()) == 1
    assert len(threads) == 2


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
        ({"seed": 0.5}, "`seed`"),
        ({"seed": -1}, "`seed`"),
        ({"stop_tokens": 0.5}, "`stop_tokens`"),
        ({"stop_tokens": [1.0]}, "`stop_tokens`"),
        ({"stop_tokens": [-1]}, "`stop_tokens`"),
        ({"stop_tokens": VOCABULARY}, "`stop_tokens`"),
        ({"stop_tokens": "1"}, "`stop_tokens`"),
        ({"stop_tokens": ["1"]}, "`stop_tokens`"),
        ({"stop_tokens": True}, "`stop_tokens`"),
        ({"stop_tokens": None}, "`stop_tokens`"),
        ({"stop_tokens": [[1]]}, "`stop_tokens`"),
        ({"inputs": {"other": 1}}, "`inputs`"),
    ],
)
def test_errors(model, arguments, message):
    arguments = {"prompt": [1, 2], "max_new_tokens": 3} | arguments
    with pytest.raises(ValueError, match=message):
        generate(model, **arguments)


def test_model_errors():
    tokens, ids = (keras.Input((None,), dtype="int32", name=name) for name in ("tokens", "ids"))
    x = layers.HLA(2, 4)(keras.layers.Embedding(5, 8)(tokens), segment_ids=ids)
    segmented = keras.Model([tokens, ids], keras.layers.Dense(5)(x))
    with pytest.raises(ValueError, match="must have one input that is a sequence"):
        generate(segmented, [1], 3)
    with pytest.raises(ValueError, match="make the model without `segment_ids` of layer 'hla"):
        streaming_model(segmented)
    inputs = keras.Input((None, 8))
    with pytest.raises(ValueError, match="must have one input"):
        generate(keras.Model(inputs, layers.HLA(2, 4)(inputs)), [1], 3)


def test_nan_is_an_error(model, prompts):
    weights = model.get_weights()
    model.set_weights([w * np.nan for w in weights])
    with pytest.raises(ValueError, match="NaN"):
        generate(model, prompts[1], 8, temperature=0, tokens_per_call=8)
    model.set_weights(weights)
