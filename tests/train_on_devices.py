"""Trains a model on several devices, with each framework's own engine.

One step changes the weights as on one device. Then the model is saved, loaded on one device and on
others, streamed and exported. To be run in a fresh process, as devices are virtual CPUs, and
under PyTorch processes. Prints what was checked.
"""

import contextlib
import os
from pathlib import Path
import tempfile

import keras
import numpy as np

from keras_hla import export_saved_model, layers, streaming_model

BATCH, LENGTH, VOCABULARY = 8, 12, 16
RATE = 0.5


def make():
    """A language model, with everything in float64, so that there is little rounding."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float64")
    embedding = keras.layers.ReversibleEmbedding(VOCABULARY, 16, name="token_embedding")
    tokens = keras.Input((None,), dtype="int32")
    x = layers.HLADecoderBlock(
        4, 4, num_key_value_heads=2, output_gate="silu", name="decoder_block_0"
    )(embedding(tokens))
    model = keras.Model(tokens, embedding(x, reverse=True))
    model.compile(keras.optimizers.SGD(RATE), loss())
    return model


def loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64")


def data():
    """Tokens, and those after them."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, LENGTH + 1))
    return tokens[:, :-1], tokens[:, 1:]


def fit(model, rows=slice(None)):
    """One step, with some rows of the batch."""
    tokens, targets = data()
    model.fit(tokens[rows], targets[rows], batch_size=BATCH, verbose=0)


def weights_of(model):
    return [np.asarray(keras.ops.convert_to_numpy(x)) for x in model.weights]


def check_step(name, before, model, expected):
    """That a step changed the weights of `before` to those that are expected."""
    for x, y, z in zip(weights_of(model), expected, before, strict=True):
        change = np.abs(y - z).max()
        assert change > 1e-6, name
        # Keras computes logits in float32 under PyTorch, whatever it is asked for.
        assert np.abs(x - y).max() < 1e-6 * change, (name, y.shape)
    print(name)


def check_saving(folder, model, engines):
    """That files of a model that several devices hold are those of the model."""
    tokens, _ = data()
    path, weights = folder / "model.keras", weights_of(model)
    model.save(path)
    for engine in (contextlib.nullcontext, *engines):
        with engine():
            again = keras.saving.load_model(path)
            assert all(map(np.array_equal, weights_of(again), weights))
    fit(keras.saving.load_model(path))  # as optimizers are loaded, too
    expected = model.predict(tokens, verbose=0)
    check_streaming(model, tokens, expected)
    print("saved and streamed")


def check_streaming(model, tokens, expected):
    stream = streaming_model(model)
    (name,) = set(stream.input) - set(stream.state_names)
    states, pieces = stream.initial_state(BATCH), []
    for piece in np.split(tokens, 2, axis=1):
        results = stream.predict_on_batch({name: piece, **states})
        states = {x: results.pop(x) for x in stream.state_names}
        pieces += results.values()
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, rtol=0, atol=1e-12)


def check_export(folder, model):
    import tensorflow as tf

    tokens, _ = data()
    export_saved_model(model, folder / "exported")
    exported = tf.saved_model.load(folder / "exported").signatures["serving_default"]
    ((_, spec),) = exported.structured_input_signature[1].items()
    (logits,) = exported(**{spec.name: tf.cast(tokens, spec.dtype)}).values()
    np.testing.assert_allclose(logits, model.predict(tokens, verbose=0), rtol=0, atol=1e-5)
    print("exported")


def run_jax(folder):
    import jax

    from keras_hla.hub import HLABackbone

    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_enable_x64", True)
    distribution = keras.distribution
    devices = distribution.list_devices()
    mesh = distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
    layouts = HLABackbone.get_layout_map(mesh)
    engines = {
        "data parallel": distribution.DataParallel(devices=devices),
        "model parallel": distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch"),
    }
    before, expected = one_device()
    backbone = HLABackbone(VOCABULARY, 1, 4, 16, num_key_value_heads=2, output_gate="silu")
    assert {x.path for x in make().weights} < {x.path for x in backbone.weights}
    for name, engine in engines.items():
        with engine.scope():
            model = make()
            fit(model)
        check_step(name, before, model, expected)
    kernel = next(x for x in model.weights if x.path.endswith("query/kernel"))
    assert kernel.value.sharding.spec == jax.sharding.PartitionSpec("batch", "model")
    check_saving(folder, model, [x.scope for x in engines.values()])


def run_tensorflow(folder):
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    before, expected = one_device()
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = make()
    fit(model)
    check_step("mirrored", before, model, expected)
    check_saving(folder, model, [strategy.scope])
    check_export(folder, model)


def one_device(step=fit):
    """The weights before a step, and after it on one device."""
    model = make()
    before = weights_of(model)
    step(model)
    return before, weights_of(model)


if __name__ == "__main__":
    backend = os.environ["KERAS_BACKEND"]
    with tempfile.TemporaryDirectory() as folder:
        if backend == "torch":
            from train_in_processes import run_torch

            run_torch(Path(folder))
        else:
            {"jax": run_jax, "tensorflow": run_tensorflow}[backend](Path(folder))
