"""Inputs and states have the same names in a new model, a loaded one, and an exported one."""

import zipfile

from backends import relative_error
import h5py
import keras
import numpy as np
import pytest
from scripts import run_python

from keras_hla import layers, streaming_model

INPUTS = {
    "one": ["inputs"],
    "sequential": ["inputs"],
    "sequential inside": ["inputs"],
    "several": ["inputs_1", "tokens", "inputs_3"],
    "looks unnamed": ["inputs"],
}


def make(kind):
    if kind.startswith("sequential"):
        model = keras.Sequential([keras.Input((None, 4)), layers.HLA(2, 4), layers.HLA(2, 4)])
        if kind == "sequential":
            return model
        model = keras.Sequential([model, layers.HLA(2, 4)])
        sequences = keras.Input((None, 4))
        return keras.Model(sequences, model(sequences))
    names = {"several": (None, "tokens", None), "looks unnamed": ("input_layer",)}
    inputs = [keras.Input((None, 4), name=name) for name in names.get(kind, (None,))]
    return keras.Model(inputs, layers.HLADecoderBlock(2, 4)(sum(inputs)))


@pytest.mark.parametrize("kind", INPUTS)
def test_a_loaded_model_has_the_names_of_the_new_one(kind, tmp_path):
    model = make(kind)
    model.save(tmp_path / "model.keras")
    stream = streaming_model(model)
    assert [name for name in stream.input if name not in stream.state_names] == INPUTS[kind]
    for other in (
        keras.saving.load_model(tmp_path / "model.keras"),
        keras.models.clone_model(model),
    ):
        again = streaming_model(other)
        assert list(again.input) == list(stream.input)
        assert list(again.output) == list(stream.output)


def test_a_streaming_model_of_unnamed_inputs_is_loaded(rng, tmp_path):
    stream = streaming_model(make("several"))
    stream.save(tmp_path / "stream.keras")
    with zipfile.ZipFile(tmp_path / "stream.keras") as file:  # as in files of former versions
        assert b'"keras_hla>StreamedModel"' in file.read("config.json")
        with h5py.File(file.open("model.weights.h5")) as weights:
            assert "streamed_model" in weights["layers"]
    loaded = keras.saving.load_model(tmp_path / "stream.keras")
    inputs = {name: rng.standard_normal((2, 5, 4)).astype("float32") for name in INPUTS["several"]}
    inputs |= stream.initial_state(2)
    for a, b in zip(loaded(inputs).values(), stream(inputs).values(), strict=True):
        assert relative_error(a, b) <= 1e-6


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_files_hold_weights_where_former_versions_do(dtype, tmp_path):
    sequences = keras.Input((None, 4), dtype=dtype)
    options = {"qk_norm": True, "output_gate": "silu", "dtype": dtype}
    model = keras.Model(sequences, layers.HLADecoderBlock(2, 4, **options)(sequences))
    model.save_weights(tmp_path / "model.weights.h5")
    paths = []
    with h5py.File(tmp_path / "model.weights.h5") as file:
        file.visititems(lambda name, x: paths.append(name) if hasattr(x, "dtype") else None)
    names = ["cell/conv/vars/0", "cell/log_decay/logit_dense/vars/0"]
    names += ["cell/log_decay/logit_dense/vars/1"]
    names += [f"cell/{name}_dense/vars/0" for name in ("query", "key", "value", "output", "gate")]
    names += [f"cell/{name}/vars/0" for name in ("query_norm", "key_norm", "norm")]
    names += [f"{name}/vars/0" for name in ("gate_dense", "up_dense", "down_dense")]
    names += [f"{name}/vars/0" for name in ("mixer_norm", "mlp_norm")]
    assert sorted(paths) == sorted(f"layers/hla_decoder_block/{name}" for name in names)


def test_inputs_called_like_unnamed_ones_are_refused():
    inputs = [keras.Input((None, 4)), keras.Input((None, 4), name="inputs_1")]
    with pytest.raises(ValueError, match=r"must not have these names.*inputs_1"):
        streaming_model(keras.Model(inputs, layers.HLA(2, 4)(sum(inputs))))


@pytest.mark.skipif(
    keras.config.backend() != "torch",
    reason="the command is the same, and test_interchange.py loads files of each backend",
)
def test_the_export_of_the_readme(tmp_path):
    tokens = keras.Input((None,), dtype="int32")
    x = layers.HLA(num_heads=2, key_dim=4)(keras.layers.Embedding(9, 8)(tokens))
    model = keras.Model(tokens, keras.layers.Dense(9)(x))
    model.save(tmp_path / "model.keras")
    run_python("-m", "keras_hla.export", tmp_path / "model.keras", tmp_path / "saved_model")
    import tensorflow as tf

    served = tf.saved_model.load(tmp_path / "saved_model").signatures
    states = served["initial_state"](batch_size=tf.constant(1))
    text = np.arange(7, dtype="int32")[None] % 9
    (whole,) = served["serving_default"](inputs=tf.constant(text)).values()
    assert relative_error(whole, model(text)) <= 1e-5
    outputs = served["step"](inputs=tf.constant(text), **states)
    assert relative_error(outputs[model.output_names[0]], whole) <= 1e-5
