"""Options of the layer: convolution, dropout, sizes, full attention, long sequences in parts."""

import os

from backends import call, relative_error, run, to_numpy, value_and_gradients
from definitions import Reference, index_sum
import keras
import numpy as np
import pytest
from scripts import run_python

from keras_hla import layers, stages
from keras_hla.layers.short_convolution import ShortConvolution

BACKEND = keras.config.backend()


def make(**options):
    layer = layers.HLA(**{"num_heads": 2, "key_dim": 4, **options})
    layer.build((2, None, 8))
    return layer


@pytest.fixture
def x(rng):
    return rng.standard_normal((2, 40, 8)).astype("float32")


def convolve(x, kernel, window):
    """The convolution of one segment `(length, features)`, token by token in float64."""
    row = np.concatenate([window, x]).astype("float64")
    size = len(kernel)
    sums = [np.sum(kernel * row[t : t + size], axis=0) for t in range(len(x))]
    return np.array(sums).reshape(x.shape), row[len(x) :]


@pytest.mark.parametrize("size", [2, 4])
def test_short_convolution(x, rng, size):
    """Each segment of each row by itself, without its masked tokens."""
    layer = ShortConvolution(size, None)
    layer.build((2, None, 8))
    kernel = to_numpy(layer.kernel)
    assert np.abs(kernel).max() <= size**-0.5
    window = rng.standard_normal((2, size - 1, 8)).astype("float32")
    mask = rng.random((2, 40)) < 0.6
    mask[0, -3:] = mask[1, :2] = False
    mask[1, 3:] = mask[1, 3:] & (rng.random(37) < 0.5)
    starts = np.zeros((2, 40), bool)
    starts[0, np.flatnonzero(mask[0])[[3, 4, 12]]] = True
    starts[1, np.flatnonzero(mask[1])[-1]] = True
    for counts, begin in ((None, None), (mask, None), (None, starts), (mask, starts)):
        options = {
            name: keras.ops.convert_to_tensor(array)
            for name, array in (("mask", counts), ("starts", begin))
            if array is not None
        }

        def both(x, window, options=options):
            output = stages.convolve(x, layer.kernel, window=window, **options)
            return output, stages.last_window(x, size, window, **options)

        output, end = run(both, x, window)
        for row in range(2):
            keep = np.arange(40) if counts is None else np.flatnonzero(counts[row])
            first = [] if begin is None else np.flatnonzero(begin[row][keep])
            before, expected = window[row], []
            for n, segment in enumerate(np.split(x[row][keep], first)):
                before = before if n == 0 else np.zeros_like(before)
                sums, before = convolve(segment, kernel, before)
                expected.append(sums)
            assert relative_error(to_numpy(output)[row][keep], np.concatenate(expected)) <= 1e-6
            assert relative_error(end[row], before) <= 1e-6


def test_convolution_comes_before_the_heads(x):
    """The layer's outputs are those of its projections, convolved and activated."""
    layer = make(decay=None, conv_kernel_size=3, conv_activation="tanh", rope_max_wavelength=None)
    weights = {w.path.split("/", 2)[-1]: to_numpy(w) for w in layer.weights}
    output = call(layer, x)
    exact = x.astype("float64")
    joint = np.concatenate([exact @ weights[f"{n}/kernel"] for n in ("query", "key", "value")], -1)
    joint = [np.tanh(convolve(row, weights["conv/kernel"], np.zeros((2, 24)))[0]) for row in joint]
    q, k, v = np.split(np.array(joint).reshape(2, 40, 6, 4), 3, axis=2)
    o = Reference(index_sum, "hla2", (q * 0.5, k, v)).output
    o = o / np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + 1e-6)
    assert relative_error(output, o.reshape(2, 40, 8) @ weights["output/kernel"]) <= 1e-5


def test_dropout(x):
    layer = make(dropout=0.5, seed=3)
    plain = make()
    plain.set_weights(layer.get_weights())
    expected = to_numpy(call(plain, x))
    np.testing.assert_array_equal(to_numpy(call(layer, x)), expected)
    output = to_numpy(layer(x, training=True))
    dropped = output == 0
    assert 0.4 < dropped.mean() < 0.6
    assert relative_error(output[~dropped], 2 * expected[~dropped]) <= 1e-5
    assert np.any(dropped != (to_numpy(layer(x, training=True)) == 0))
    twin = layers.HLA.from_config(layer.get_config())
    twin.build((2, None, 8))
    twin.set_weights(plain.get_weights())
    np.testing.assert_array_equal(to_numpy(twin(x, training=True)) == 0, dropped)
    cell_output, _ = layer.cell(x[:, 0], layer.get_initial_state(2), training=True)
    assert np.any(to_numpy(cell_output) == 0)


def test_output_shape(x):
    layer = make(output_shape=5, return_state=True)
    output, *_ = layer(keras.Input((None, 8)))
    assert output.shape == (None, None, 5)
    output, *_ = call(layer, x)
    assert output.shape == (2, 40, 5)
    token, _ = layer.cell(x[:, 0], layer.get_initial_state(2))
    assert relative_error(token, to_numpy(output)[:, 0]) <= 1e-5
    spec, _ = layer.cell(keras.Input((8,)), [keras.Input(s) for s in layer.cell.state_size])
    assert spec.shape == (None, 5)


@pytest.mark.parametrize("operator", ["linear", "hla2", "ahla", "hla3"])
def test_without_causality_each_token_reads_all(x, rng, operator):
    layer = make(causal=False, operator=operator, output_norm=False, rope_max_wavelength=None)
    weights = {w.path.split("/", 2)[-1]: to_numpy(w) for w in layer.weights}
    keep = rng.random(40) < 0.7
    padded = np.where(keep[:, None], x, np.nan).astype("float32")
    output = to_numpy(call(layer, padded, mask=np.broadcast_to(keep, (2, 40))))[:, keep]
    q, k, v = (
        (x[:, keep] @ weights[f"{n}/kernel"]).reshape(2, -1, 2, 4).swapaxes(1, 2)
        for n in ("query", "key", "value")
    )
    A = 0.5 * q @ k.swapaxes(-1, -2)
    W = {"linear": A, "hla2": A @ A.swapaxes(-1, -2), "ahla": A @ A}
    W["hla3"] = W["hla2"] @ A
    expected = (W[operator] @ v).swapaxes(1, 2).reshape(2, -1, 8) @ weights["output/kernel"]
    assert relative_error(output, expected) <= 1e-5
    twin = layers.HLA.from_config(layer.get_config())
    assert twin.causal is False


REMATERIALIZED = {
    "decay": "input",
    "conv_kernel_size": 3,
    "output_gate": "silu",
    "return_state": True,
}


def test_rematerialization_of_long_sequences(x, rng):
    """Outputs, states and the gradients of every weight and of the inputs, masked and packed."""
    mask = rng.random((2, 40)) < 0.8
    mask[:, [13, 14]] = [[True, True], [False, True]]
    # A segment starts with the second part: they are of 14, 14 and 12 tokens.
    segment_ids = np.repeat([[1, 2, 1, 3]] * 2, [10, 4, 21, 5], axis=1)
    whole, parts = make(**REMATERIALIZED), make(**REMATERIALIZED, remat_length=15)
    # Others than those of the layers, which nothing may read.
    values = [to_numpy(v) + 0.1 * rng.standard_normal(v.shape) for v in whole.trainable_weights]
    weight = rng.standard_normal((2, 40, 8)).astype("float32")
    starting = [rng.standard_normal((2, *s)).astype("float32") for s in whole.cell.state_size]
    starting[-1] = np.array([[0, 5], [1, 65_530]], "float32")  # positions
    results = []
    for layer in (whole, parts):
        variables = layer.trainable_weights

        def function(x, *arrays, layer=layer, variables=variables):
            values, states = arrays[: len(variables)], list(arrays[len(variables) :])
            with keras.StatelessScope(state_mapping=zip(variables, values, strict=True)):
                output, *states = layer(
                    x,
                    initial_state=states,
                    mask=keras.ops.convert_to_tensor(mask),
                    segment_ids=keras.ops.convert_to_tensor(segment_ids),
                )
            return keras.ops.sum(keras.ops.multiply(output, weight)), [output, *states]

        arrays = [x, *values, *starting]
        results.append(value_and_gradients(function, arrays))
    for some in (0, 1):
        for a, e in zip(results[1][some], results[0][some], strict=True):
            assert relative_error(a, e) <= 1e-5


@pytest.mark.parametrize("jit_compile", [False, True] if BACKEND == "tensorflow" else ["auto"])
def test_training_with_rematerialization_is_training(x, jit_compile):
    histories = []
    for longest in (None, 20):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((None, 8))
        layer = layers.HLA(2, 4, decay="input", remat_length=longest)
        model = keras.Model(inputs, layer(inputs))
        model.compile(keras.optimizers.SGD(0.5), "mse", jit_compile=jit_compile)
        histories.append(model.fit(x, x, epochs=3, verbose=0).history["loss"])
    assert histories[0][-1] < 0.9 * histories[0][0]
    np.testing.assert_allclose(histories[1], histories[0], rtol=1e-5)


ONE_TOKEN = """
import os, torch, keras
from keras_hla.layers.decay import LogDecay
torch.set_num_threads(4)
for decay in ("learned", "input"):
    layer = LogDecay(decay, 4)
    layer.build((None, 8))
    with torch.no_grad():
        before = os.listdir("/proc/self/task")
        layer(torch.ones(1, 1, 8))
        assert os.listdir("/proc/self/task") == before, decay
"""


@pytest.mark.skipif(
    BACKEND != "torch" or not os.path.exists("/proc/self/task"),
    reason="PyTorch's threads, counted as Linux lists them",
)
def test_the_decay_of_one_token_starts_no_threads():
    """Threads that wait for each other take milliseconds on a busy machine."""
    run_python("-c", ONE_TOKEN, backend="torch")


FOLLOWERS = {
    "GRU": lambda: keras.layers.GRU(3, seed=1),
    "HLA": lambda: layers.HLA(2, 4, return_sequences=False, decay="learned"),
    "pooling": keras.layers.GlobalAveragePooling1D,
}


@pytest.mark.parametrize("follower", FOLLOWERS)
@pytest.mark.parametrize("return_state", [False, True])
def test_the_mask_after_a_layer_that_goes_backwards(rng, follower, return_state):
    """What follows reads what it reads where the tokens themselves are in that order."""
    tokens = rng.integers(1, 9, (3, 7))
    tokens[0, 4:], tokens[1, :3] = 0, 0  # masked, at the end and at the beginning
    embed, follow = keras.layers.Embedding(9, 8, mask_zero=True), FOLLOWERS[follower]()
    backwards, forwards = (
        layers.HLA(2, 4, decay="input", go_backwards=reverse, return_state=return_state)
        for reverse in (True, False)
    )

    def evaluate(layer, tokens):
        output = layer(embed(tokens))
        return follow(output[0] if return_state else output)

    inputs = keras.Input((7,), dtype="int32")
    model, reference = (
        keras.Model(inputs, evaluate(layer, inputs)) for layer in (backwards, forwards)
    )
    forwards.set_weights(backwards.get_weights())
    expected = reference.predict(tokens[:, ::-1].copy(), verbose=0)
    assert relative_error(model.predict(tokens, verbose=0), expected) <= 1e-5
    assert (
        relative_error(evaluate(backwards, keras.ops.convert_to_tensor(tokens)), expected) <= 1e-5
    )


def test_masks_of_both_directions(rng):
    """Keras puts the outputs of the backward layer in order; and so must their mask be."""
    tokens = rng.integers(1, 9, (3, 7))
    tokens[0, 4:], tokens[1, :3] = 0, 0
    embed = keras.layers.Embedding(9, 8, mask_zero=True)
    both = keras.layers.Bidirectional(layers.HLA(2, 4, decay=0.9), merge_mode=None)
    outputs = both(embed(keras.ops.convert_to_tensor(tokens)))
    for output in outputs:
        mask = keras.src.backend.get_keras_mask(output)
        np.testing.assert_array_equal(to_numpy(mask), tokens != 0)
    pooled = keras.layers.GlobalAveragePooling1D()(outputs[1])
    mask = (tokens != 0)[..., None]
    expected = (to_numpy(outputs[1]) * mask).sum(1) / mask.sum(1)
    assert relative_error(pooled, expected) <= 1e-5


def test_no_mask_and_no_direction(rng):
    x = keras.ops.convert_to_tensor(rng.standard_normal((2, 5, 8)), "float32")
    mask = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], bool)
    layer = layers.HLA(2, 4, go_backwards=True)
    assert layer.compute_mask(x, None) is None
    assert keras.src.backend.get_keras_mask(layer(x)) is None
    np.testing.assert_array_equal(to_numpy(layer.compute_mask(x, mask)), mask[:, ::-1])
    assert layers.HLA(2, 4, go_backwards=True, return_sequences=False).compute_mask(x, mask) is None


@pytest.fixture
def long_and_whole(x):
    """A layer that rematerializes the parts of a sequence, and its twin that does not."""
    layer, twin = make(remat_length=15, decay="input"), make(remat_length=None, decay="input")
    twin.set_weights(layer.get_weights())
    return layer, twin


@pytest.mark.skipif(BACKEND != "torch", reason="These are transforms of PyTorch.")
def test_transforms_of_torch_above_remat_length(x, long_and_whole):
    import torch

    x = torch.as_tensor(x)
    batches = torch.stack([x, 2 * x])

    def directional(layer):
        return torch.func.jvp(layer, (x,), (2 * x,))[1]

    def second_order(layer):
        given = x.clone().requires_grad_()
        (first,) = torch.autograd.grad((layer(given) ** 2).sum(), given, create_graph=True)
        return torch.autograd.grad((first**2).sum(), given)[0]

    for transform in (directional, second_order, lambda f: torch.func.vmap(f)(batches)):
        found, expected = map(transform, long_and_whole)
        assert relative_error(found.detach(), expected.detach()) <= 1e-4
    with pytest.raises(ValueError, match=r"longer than `remat_length`.*`torch.func`"):
        torch.func.grad(lambda x: long_and_whole[0](x).sum())(x)


@pytest.mark.skipif(BACKEND != "jax", reason="These are transforms of JAX.")
def test_transforms_of_jax_above_remat_length(x, long_and_whole):
    import jax

    def directional(layer):
        return jax.jvp(layer, (x,), (2 * x,))[1]

    def second_order(layer):
        first = jax.grad(lambda x: (layer(x) ** 2).sum())
        return jax.jvp(first, (x,), (x,))[1]

    def over_batches(layer):
        return jax.vmap(layer)(np.stack([x, 2 * x]))

    for transform in (directional, second_order, over_batches):
        found, expected = map(transform, map(jax.jit, long_and_whole))
        assert relative_error(found, expected) <= 1e-4


@pytest.mark.skipif(BACKEND != "tensorflow", reason="These are transforms of TensorFlow.")
def test_transforms_of_tensorflow_above_remat_length(x, long_and_whole):
    import tensorflow as tf

    x = tf.constant(x)

    def jacobian(layer):
        with tf.GradientTape() as tape:
            tape.watch(x)
            sums = tf.reduce_sum(layer(x), axis=(1, 2))
        return tape.jacobian(sums, x)

    for transform in (jacobian, lambda f: tf.vectorized_map(f, tf.stack([x, 2 * x]))):
        found, expected = map(transform, long_and_whole)
        assert relative_error(found, expected) <= 1e-4
    forward = tf.autodiff.ForwardAccumulator(x, x)
    with pytest.raises(ValueError, match="longer than `remat_length`"), forward:
        long_and_whole[0](x)
