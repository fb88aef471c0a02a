"""Dropout in layers with rematerialization."""

import contextlib
import warnings

from backends import relative_error, to_numpy, value_and_gradients
import keras
import numpy as np
import pytest

from keras_hla import layers

BACKEND = keras.config.backend()
OPTIONS = {"num_heads": 2, "key_dim": 4, "dropout": 0.5, "name": "mixed"}
NAMED = {"mode": "list_of_layers", "layer_names": ["mixed"]}
RECOMPUTED = [{"mode": "full"}, {"mode": "larger_than", "output_size_threshold": 1}, NAMED]
OTHERS = [
    {"mode": None},
    {"mode": "activations"},
    {"mode": "list_of_layers", "layer_names": ["another"]},
]
MAKE = {
    "HLA": layers.HLA,
    "HLADecoderBlock": layers.HLADecoderBlock,
    "RNN": lambda name, **options: keras.layers.RNN(
        layers.HLACell(**options), return_sequences=True, name=name
    ),
}


@pytest.fixture
def x(rng):
    return rng.standard_normal((2, 12, 8)).astype("float32")


def error_of_gradients(layer, x):
    """That of slopes in some directions, against finite differences with the same dropout."""
    layer.build(x.shape)
    generator = layer.cell.dropout_layer.seed_generator
    start = to_numpy(generator.state)

    def loss(x):
        # A scope keeps the compiler's tracers out of the generator.
        with keras.StatelessScope() if BACKEND == "jax" else contextlib.nullcontext():
            total = keras.ops.sum(keras.ops.square(layer(x, training=True)))
        return total, [total]

    def evaluate(x):
        generator.state.assign(start)
        keras.utils.set_random_seed(0)  # which dropout without a seed uses under PyTorch
        (value,), (gradient,) = value_and_gradients(loss, [x])
        return value, gradient

    directions = np.random.default_rng(1).standard_normal((2, *x.shape)).astype("float32")
    step = 2e-3
    slopes = [
        (evaluate(x + step * direction)[0] - evaluate(x - step * direction)[0]) / (2 * step)
        for direction in directions
    ]
    _, gradient = evaluate(x)
    return relative_error(np.sum(gradient * directions, axis=(1, 2, 3)), slopes)


@pytest.mark.parametrize("length", [None, 5])
@pytest.mark.parametrize("name", ["HLA", "HLADecoderBlock"])
def test_remat_length_keeps_the_dropout(x, name, length):
    layer = MAKE[name](**OPTIONS, remat_length=length, seed=3)
    assert error_of_gradients(layer, x) <= 1e-2


CASES = [(name, scope) for name in ("HLA", "HLADecoderBlock") for scope in OTHERS]
if BACKEND != "jax":  # where Keras raises an error for dropout in what a scope recomputes
    CASES += [("HLA", scope) for scope in RECOMPUTED]
    CASES += [
        ("HLADecoderBlock", RECOMPUTED[0]),
        ("HLADecoderBlock", NAMED),
        ("RNN", RECOMPUTED[0]),
    ]


@pytest.mark.parametrize(("name", "scope"), CASES, ids=str)
@pytest.mark.parametrize("seed", [None, 3])
def test_a_scope_warns_where_its_gradients_are_wrong(x, name, scope, seed):
    with keras.RematScope(**scope):
        layer = MAKE[name](**OPTIONS, seed=seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = error_of_gradients(layer, x)
    warned = any("set `remat_length`" in str(warning.message) for warning in caught)
    assert (error > 0.1) if warned else (error <= 1e-2)
    # PyTorch draws the same dropout again where it has no seed.
    redrawn = BACKEND == "tensorflow" or (BACKEND == "torch" and seed is not None)
    assert warned == (redrawn and scope in RECOMPUTED)


def test_without_dropout_in_use_there_is_no_warning(x):
    with keras.RematScope(mode="full"), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        layers.HLA(**OPTIONS, seed=3)(x)
        layers.HLA(**OPTIONS | {"dropout": 0.0}, seed=3)(x, training=BACKEND != "jax")
