"""Loops recorded as CUDA graphs; without a GPU as functions that are called again."""

from graphs import replayed_calls
import keras
from keras import ops
import numpy as np
import pytest
import torch

import keras_hla
from keras_hla.backend import torch_loop_graph
from keras_hla.backend.compiling import compiled_scan


@pytest.fixture
def replayed(monkeypatch):
    """The list of the recordings that calls replay."""
    return replayed_calls(monkeypatch, torch_loop_graph, torch_loop_graph.LoopRecording)


@pytest.fixture
def loop(rng):
    """A loop that reads one weight as it is, and another by what is computed from it."""
    weights = [keras.Variable(rng.standard_normal((3, 3)), dtype="float32") for _ in range(2)]

    def step(state, entries):
        first, second = (ops.convert_to_tensor(w) for w in weights)
        x = ops.tanh(state[0] @ first + entries[0] @ (second * second))
        return ops.sum(x, axis=-1), (x,)

    return weights, compiled_scan(step, weights)


def by_definition(weights, x, entries):
    first, second = (ops.convert_to_numpy(w).astype("float64") for w in weights)
    outputs = []
    for y in entries:
        x = np.tanh(x @ first + y @ (second * second))
        outputs.append(x.sum(-1))
    return np.stack(outputs), x


def check(rng, weights, scan, count=4, batch=2):
    """Calls the loop, and returns its results and what they must be."""
    x, entries = rng.standard_normal((batch, 3)), rng.standard_normal((count, batch, 3))
    outputs, (last,) = scan(
        (ops.convert_to_tensor(x, "float32"),), (ops.convert_to_tensor(entries, "float32"),)
    )
    found, expected = (outputs, last), by_definition(weights, x, entries)
    assert_close(found, expected)
    return found, expected


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(a), b, atol=1e-5)


def test_inputs_and_weights_change_from_call_to_call(rng, replayed, loop):
    weights, scan = loop
    former = []
    for _ in range(5):
        former.append(check(rng, weights, scan))
        for w in weights:
            w.assign(rng.standard_normal((3, 3)))
    assert len(replayed) == 4
    for found, expected in former:  # No result is where a later call writes.
        assert_close(found, expected)


def test_other_shapes_and_weights_in_other_places(rng, replayed, loop):
    weights, scan = loop
    for _ in range(2):
        for count, batch in ((4, 2), (4, 2), (2, 2), (2, 2), (2, 5), (2, 5)):
            check(rng, weights, scan, count, batch)
    assert (len(replayed), len(set(replayed))) == (7, 5)  # The latest of each batch size is kept.
    weights[1].value.data = torch.ones((3, 3))
    for _ in range(3):
        check(rng, weights, scan, 2, 5)
    assert len(replayed) == 9


def test_disabled(rng, replayed, loop):
    keras_hla.kernels.disable_cuda_graphs()
    try:
        for _ in range(3):
            check(rng, *loop)
    finally:
        keras_hla.kernels.enable_cuda_graphs()
    assert not replayed


def test_what_no_graph_can_hold(rng, replayed, loop, monkeypatch):
    def refuse(self, function):
        raise RuntimeError("operation not permitted when stream is capturing")

    pool = torch_loop_graph.pool_of(torch.ones(1).device)
    monkeypatch.setattr(type(pool), "record", refuse)
    check(rng, *loop)
    with pytest.warns(UserWarning, match="not permitted"):
        check(rng, *loop)
    check(rng, *loop)
    assert not replayed


def test_generates_the_same_tokens(replayed):
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(32, 8)(tokens)
    x = keras_hla.layers.HLADecoderBlock(2, 4, rope_max_wavelength=100.0)(x)
    model = keras.Model(tokens, keras.layers.Dense(32)(x))
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    for seed in range(2):
        settings = {"max_new_tokens": 12, "seed": seed, "tokens_per_call": 4}
        found = keras_hla.generate(model, prompts, **settings)
        keras_hla.kernels.disable_cuda_graphs()
        try:
            expected = keras_hla.generate(model, prompts, **settings)
        finally:
            keras_hla.kernels.enable_cuda_graphs()
        np.testing.assert_array_equal(found, expected)
        for w in model.trainable_weights:
            w.assign(w + 0.1)
    assert len(replayed) == 5
