"""Weights go from model to model: what is among them, and what files hold of them."""

import json
import zipfile

from backends import relative_error, to_numpy
from family import PLAIN
import keras
import numpy as np
import pytest

from keras_hla import layers

KINDS = {"layer": layers.HLA, "block": layers.HLADecoderBlock}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, batch_size=None, stateful=False):
    """A model of two layers, and a layer of it."""
    inputs = keras.Input(batch_shape=(batch_size, 5, 8))
    options = {"decay": "input", "conv_kernel_size": 3, "stateful": stateful}
    first, second = (KINDS[kind](2, 4, name=name, **options) for name in ("first", "second"))
    return keras.Model(inputs, second(first(inputs)))


def read_on(model, x):
    """The outputs of two pieces, the second of which a stateful model reads after the first."""
    return np.concatenate([model.predict(piece, verbose=0) for piece in np.split(x, 2, axis=1)], 1)


@pytest.fixture
def x(rng):
    return rng.standard_normal((2, 10, 8)).astype("float32")


@every_kind
@pytest.mark.parametrize("way", ["list", "file"])
def test_weights_pass_between_stateless_and_stateful_models(x, kind, way, tmp_path):
    """And between batch sizes; the states stay what they were."""

    def pass_on(source, target):
        if way == "list":
            target.set_weights(source.get_weights())
        else:
            source.save_weights(tmp_path / "model.weights.h5")
            target.load_weights(tmp_path / "model.weights.h5")

    free, two, three = make(kind), make(kind, 2, stateful=True), make(kind, 3, stateful=True)
    assert [w.shape for w in free.weights] == [w.shape for w in two.weights]
    assert free.count_params() == two.count_params()
    three.predict(x[[0, 0, 1], :5], verbose=0)
    pass_on(three, two)
    read_on(two, x)
    states = [to_numpy(state) for layer in two.layers[1:] for state in layer.states]
    assert all(np.any(state != 0) for state in states)
    pass_on(free, two)
    for layer in two.layers[1:]:
        for state in layer.states:
            np.testing.assert_array_equal(to_numpy(state), states.pop(0))
        layer.reset_state()
    whole = keras.Model(free.input, free.output).call(keras.ops.convert_to_tensor(x))
    assert relative_error(read_on(two, x), whole) <= 1e-5
    again = make(kind)
    pass_on(two, again)
    for a, b in zip(again.get_weights(), free.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@every_kind
def test_a_stateful_model_is_loaded_before_its_first_token(x, kind, tmp_path):
    model = make(kind, 2, stateful=True)
    expected = read_on(model, x)
    model.save(tmp_path / "model.keras")
    assert relative_error(read_on(model, x), expected) > 0.01
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert relative_error(read_on(loaded, x), expected) <= 1e-6


@every_kind
def test_files_of_former_versions_hold_states(x, kind, tmp_path, monkeypatch):
    def save_states(layer, store):
        for i, state in enumerate(layer.states):
            store[str(i)] = state

    model = make(kind, 2, stateful=True)
    expected = read_on(model, x)
    with monkeypatch.context() as former:
        former.setattr(layers.HLA, "save_own_variables", save_states)
        model.save(tmp_path / "model.keras")
        model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert relative_error(read_on(loaded, x), expected) <= 1e-6
    stateless = make(kind)
    stateless.load_weights(tmp_path / "model.weights.h5")
    assert relative_error(stateless.predict(x[:, :5], verbose=0), expected[:, :5]) <= 1e-6


# What files of versions hold whose default it was to have neither decay nor convolution.
FORMER = json.loads("""{
    "name": "mixer", "trainable": true,
    "dtype": {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "float32"},
              "registered_name": null},
    "num_heads": 2, "key_dim": 4, "value_dim": 4, "num_key_value_heads": 2, "operator": "hla2",
    "decay": null, "rope_max_wavelength": 10000, "scale": 0.5, "masked": true, "normalize": false,
    "epsilon": 1e-06, "ridge": 0.0, "feature_map": null, "conv_kernel_size": null,
    "conv_activation": "silu", "qk_norm": false, "output_norm": true, "output_gate": null,
    "dropout": 0.0, "output_shape": null, "use_bias": true,
    "kernel_initializer": {"module": "keras.initializers", "class_name": "GlorotUniform",
                           "config": {"seed": null}, "registered_name": null},
    "bias_initializer": {"module": "keras.initializers", "class_name": "Zeros", "config": {},
                         "registered_name": null},
    "kernel_regularizer": null, "bias_regularizer": null, "kernel_constraint": null,
    "bias_constraint": null, "seed": null, "return_sequences": true, "return_state": false,
    "go_backwards": false, "stateful": false, "zero_output_for_mask": false, "causal": true,
    "chunk_size": null, "implementation": "auto", "remat_length": 8192
}""")


@pytest.mark.parametrize("causal", [True, False])
def test_files_of_former_defaults(x, causal, tmp_path):
    """They come back without decay and convolution, which are defaults now."""
    former = keras.Sequential(
        [keras.Input((None, 8)), layers.HLA(2, 4, name="mixer", causal=causal, **PLAIN)]
    )
    former.save(tmp_path / "plain.keras")
    with (
        zipfile.ZipFile(tmp_path / "plain.keras") as plain,
        zipfile.ZipFile(tmp_path / "former.keras", "w") as file,
    ):
        for name in plain.namelist():
            content = plain.read(name)
            if name == "config.json":
                config = json.loads(content)
                config["config"]["layers"][1]["config"] = FORMER | {"causal": causal}
                content = json.dumps(config)
            file.writestr(name, content)
    loaded = keras.saving.load_model(tmp_path / "former.keras")
    cell = loaded.layers[0].cell
    assert cell.decay is cell.conv_kernel_size is None
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), former.predict(x, verbose=0))


@every_kind
def test_a_frozen_layer_is_loaded_frozen(x, kind, tmp_path):
    model = make(kind)
    model.layers[1].trainable = False
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    trainable = [w.path for w in model.trainable_weights]
    assert [w.path for w in loaded.trainable_weights] == trainable
    assert len(trainable) == len(model.weights) / 2
    before = loaded.get_weights()
    loaded.compile("adam", "mse")
    loaded.fit(x[:, :5], x[:, 5:], verbose=0)
    for weight, value in zip(loaded.weights, before, strict=True):
        assert np.any(to_numpy(weight) != value) == (weight.path in trainable), weight.path
    loaded.layers[1].trainable = True
    assert len(loaded.trainable_weights) == len(model.weights)


def test_weights_that_a_subclass_adds_are_loaded(tmp_path):
    class Scaled(layers.HLA):
        def build(self, sequences_shape):
            super().build(sequences_shape)
            self.factor = self.add_weight(shape=(), initializer="ones", name="factor")

        def call(self, sequences):
            return self.factor * super().call(sequences)

    first, second = (
        keras.Sequential([keras.Input((5, 8), batch_size=2), Scaled(2, 4, stateful=True)])
        for _ in range(2)
    )
    first.layers[0].factor.assign(3.0)
    first.save_weights(tmp_path / "model.weights.h5")
    second.load_weights(tmp_path / "model.weights.h5")
    assert to_numpy(second.layers[0].factor) == 3
    assert len(second.layers[0].states) == len(second.layers[0].cell.state_size)
