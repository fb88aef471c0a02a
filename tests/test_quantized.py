"""Quantized models come back from their files as they were; policies that layers refuse."""

import gc
import weakref

from backends import relative_error
import keras
from keras.quantizers import AbsMaxQuantizer, Int4QuantizationConfig, Int8QuantizationConfig
import numpy as np
import pytest

from keras_hla import layers
from keras_hla.hub import HLABackbone, HLACausalLM
from keras_hla.layers.quantized import QuantizedDTypePolicyMap

MODES = {
    "int8": {"mode": "int8"},
    "int4": {"mode": "int4"},
    "float8": {"mode": "float8"},
    "int8 weights": {"config": Int8QuantizationConfig(activation_quantizer=None)},
    "int4 all": {
        "config": Int4QuantizationConfig(block_size=-1, activation_quantizer=AbsMaxQuantizer())
    },
    "only some": {"mode": "int8", "filters": "query|logit|up"},
}
LAYERS = {
    "layer": lambda: layers.HLA(2, 8, decay="input", output_gate="silu"),
    "block": lambda: layers.HLADecoderBlock(2, 8, dtype="mixed_bfloat16"),
    "both directions": lambda: keras.layers.Bidirectional(layers.HLA(2, 8, decay="input")),
    "cell": lambda: keras.layers.RNN(layers.HLACell(2, 8, decay="input"), return_sequences=True),
}


@pytest.fixture(scope="module", autouse=True)
def _little_garbage():
    """Keras collects garbage for each weight that it quantizes: long where much is alive."""
    gc.freeze()
    yield
    gc.unfreeze()


def check(model, inputs, mode, path):
    """Quantizes a model, and holds what is loaded, and loaded again, to it."""

    def answer(model):
        return keras.ops.cast(model(inputs), "float32")

    exact = answer(model)
    model.quantize(**MODES[mode])
    expected = answer(model)
    assert 1e-4 <= relative_error(expected, exact) < 1
    for _ in range(2):
        model.save(path)
        model = keras.saving.load_model(path)
        assert relative_error(answer(model), expected) <= 1e-6
    if mode.startswith("int"):
        kernels = [w for w in model.weights if w.name == "kernel" and "/conv/" not in w.path]
        assert {w.dtype for w in kernels} == {"int8"}
    return model


@pytest.mark.parametrize(
    ("kind", "mode"), [*((kind, "int8") for kind in LAYERS), *(("block", mode) for mode in MODES)]
)
def test_models_of_layers(rng, kind, mode, tmp_path):
    sequences = keras.Input((None, 16))
    outputs = keras.layers.Dense(5)(LAYERS[kind]()(sequences))
    x = rng.standard_normal((2, 9, 16)).astype("float32")
    check(keras.Model(sequences, outputs), x, mode, tmp_path / "model.keras")


@pytest.mark.parametrize(
    ("mode", "dtype", "tied"),
    [
        ("int8", "float32", True),
        ("int4", "float32", False),
        ("int8 weights", "mixed_bfloat16", True),
    ],
)
def test_language_models(rng, mode, dtype, tied, tmp_path):
    """Under the dtype that they were made with, whatever that of the session is."""
    backbone = HLABackbone(40, 2, 2, 16, tie_word_embeddings=tied, dtype=dtype)
    token_ids = rng.integers(0, 40, (2, 9)).astype("int32")
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    loaded = check(HLACausalLM(backbone), inputs, mode, tmp_path / "model.keras")
    assert loaded.backbone.compute_dtype == backbone.compute_dtype
    assert loaded.backbone.decoder_blocks[0].compute_dtype == backbone.compute_dtype
    loaded.save_to_preset(str(tmp_path / "preset"))
    preset = HLACausalLM.from_preset(str(tmp_path / "preset"))
    outputs = [keras.ops.cast(model(inputs), "float32") for model in (preset, loaded)]
    assert relative_error(*outputs) <= 1e-6


def test_more_is_quantized_after_loading(rng, tmp_path):
    x = rng.standard_normal((2, 9, 16)).astype("float32")
    sequences = keras.Input((None, 16))
    model = keras.Model(sequences, layers.HLADecoderBlock(2, 8)(sequences))
    model.quantize("int8", filters="gate")
    model.save(tmp_path / "model.keras")
    check(keras.saving.load_model(tmp_path / "model.keras"), x, "only some", tmp_path / "2.keras")


def test_decays_stay_exact_but_for_their_weights():
    """The projection of decays computes in the dtype of the states, also when it is quantized."""
    layer = layers.HLA(2, 8, decay="input", dtype="mixed_bfloat16")
    model = keras.Sequential([keras.Input((None, 16)), layer])
    model.quantize("int8")
    twin = layers.HLA.from_config(layer.get_config())
    twin.build((None, None, 16))
    for some in (layer, twin):
        assert some.cell.log_decay.logit_dense.compute_dtype == "float32"
        assert some.cell.log_decay.logit_dense.quantization_mode == "int8"
        assert some.cell.query_dense.compute_dtype == "bfloat16"


def test_adapters_are_merged_on_saving(rng, tmp_path):
    x = rng.standard_normal((2, 9, 16)).astype("float32")
    sequences = keras.Input((None, 16))
    layer = layers.HLA(2, 8)
    model = keras.Model(sequences, layer(sequences))
    layer.cell.query_dense.enable_lora(2)
    for adapter in layer.trainable_weights:
        adapter.assign(keras.random.normal(adapter.shape, seed=1))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert relative_error(loaded(x), model(x)) <= 1e-5
    assert not any("lora" in w.name for w in loaded.weights)
    assert all(w.trainable for w in loaded.weights)


@pytest.mark.parametrize("kind", [layers.HLA, layers.HLACell, layers.HLADecoderBlock])
def test_policies_are_set_before_building(kind):
    layer = kind(2, 4)
    layer.dtype_policy = "mixed_bfloat16"
    expected = kind(2, 4, dtype="mixed_bfloat16", name=layer.name)
    assert layer.get_config() == expected.get_config()
    for some in (layer, expected):
        some.build((2, 16) if kind is layers.HLACell else (2, 5, 16))
    for a, b in zip(layer._flatten_layers(), expected._flatten_layers(), strict=True):
        assert a.dtype_policy == b.dtype_policy
    with pytest.raises(ValueError, match=r"is fixed once.*Received: dtype_policy=.*float64"):
        layer.dtype_policy = "float64"
    for a, b in zip(layer._flatten_layers(), expected._flatten_layers(), strict=True):
        assert a.dtype_policy == b.dtype_policy


@pytest.mark.parametrize("kind", [layers.HLA, layers.HLACell, layers.HLADecoderBlock])
def test_quantized_policies_are_refused(kind):
    with pytest.raises(ValueError, match=r"Argument `dtype` must be.*quantize`.*int8_from"):
        kind(2, 4, dtype="int8_from_float32")
    with pytest.raises(ValueError, match=r"Argument `dtype_policy` must be.*quantize`.*int8_from"):
        kind(2, 4).dtype_policy = "int8_from_float32"


def test_what_is_saved_is_not_freed(monkeypatch):
    """Keras takes an object at the address of another that it has saved for the same object."""
    layer, saved = layers.HLA(2, 8), []
    layer.build((None, None, 16))
    layer.cell.query_dense.quantize("int8")
    serialize = keras.dtype_policies.serialize
    monkeypatch.setattr(
        keras.dtype_policies, "serialize", lambda x: saved.append(weakref.ref(x)) or serialize(x)
    )
    first, second = layer.get_config(), layer.get_config()
    assert first == second
    policies = [x() for x in saved if isinstance(x(), QuantizedDTypePolicyMap)]
    assert len(policies) == 2 * 2  # of the cell, too
    assert len({id(x) for x in policies}) == 2
