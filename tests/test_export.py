"""SavedModels answer and stream in processes that know nothing of Keras."""

from backends import relative_error
import keras
import numpy as np
import pytest
from scripts import run_python

from keras_hla import export_saved_model, layers

BACKEND = keras.config.backend()
SHAPES = [(1, 1), (5, 1), (1, 63), (5, 64), (1, 65), (5, 65), (1, 1000)]
PIECES = [1, 7, 64, 1, 27]

SERVE = """
import sys
for name in ("keras", "tf_keras", "keras_hla"):
    sys.modules[name] = None  # importing them fails from here on
import numpy as np, tensorflow as tf
folder = sys.argv[1]
arrays = np.load(f"{folder}/arrays.npz")
answers = {}
signatures = tf.saved_model.load(f"{folder}/saved_model").signatures
for name in arrays:
    if name.startswith("whole"):
        answers[name] = signatures["serving_default"](tokens=arrays[name])["logits"]
tokens, mask = arrays["tokens"], arrays["mask"]
answers["serving_masked"] = signatures["serving_masked"](tokens=tokens, mask=mask)["logits"]


def read(step, pieces, states):
    logits, begin = [], 0
    for length in pieces:
        outputs = step(begin, begin + length, states)
        logits.append(outputs["logits"])
        states = {name: outputs[name] for name in states}
        assert all(x.dtype == tf.float32 for x in states.values())
        begin += length
    return np.concatenate(logits, axis=1)


answers["step"] = read(
    lambda i, j, states: signatures["step"](tokens=tokens[:, i:j], **states),
    arrays["pieces"],
    signatures["initial_state"](batch_size=tf.constant(len(tokens))),
)
answers["step_masked"] = read(
    lambda i, j, states: signatures["step_masked"](
        tokens=tokens[:, i:j], mask=mask[:, i:j], **states
    ),
    arrays["pieces"],
    signatures["initial_state"](batch_size=tf.constant(len(tokens))),
)
session = tf.saved_model.load(f"{folder}/session").signatures
for n in range(2):
    answers[f"session_{n}"] = read(
        lambda i, j, states: session["step"](tokens=tokens[:1, i:j]), arrays["pieces"], {}
    )
    session["reset"]()
np.savez(f"{folder}/answers.npz", **answers)
"""


@pytest.fixture(scope="module")
def model():
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    x = keras.layers.Embedding(20, 16)(tokens)
    x = layers.HLADecoderBlock(
        4,
        8,
        num_key_value_heads=2,
        operator="hla3",
        feature_map="elu",
        qk_norm=True,
        output_gate="silu",
    )(x)
    return keras.Model(tokens, keras.layers.Dense(20, name="logits")(x))


def export(model, folder):
    """Both forms of the SavedModel, from torch by way of the command line."""
    if BACKEND != "torch":
        export_saved_model(model, folder / "saved_model")
        export_saved_model(model, folder / "session", stateful=True)
        return
    model.save(folder / "model.keras")
    for name, options in (("saved_model", []), ("session", ["--stateful"])):
        run_python("-m", "keras_hla.export", folder / "model.keras", folder / name, *options)


def test_a_saved_model_is_the_model(model, rng, tmp_path):
    export(model, tmp_path)
    draws = {f"whole_{b}_{n}": rng.integers(0, 20, (b, n)).astype("int32") for b, n in SHAPES}
    tokens = rng.integers(0, 20, (3, sum(PIECES))).astype("int32")
    mask = np.ones(tokens.shape, bool)
    mask[1, 60:] = False
    np.savez(tmp_path / "arrays.npz", tokens=tokens, mask=mask, pieces=PIECES, **draws)
    run_python("-c", SERVE, tmp_path)
    answers = np.load(tmp_path / "answers.npz")
    for name, x in draws.items():
        assert relative_error(answers[name], model.predict_on_batch(x)) <= 1e-5
    expected = model.predict_on_batch(tokens)
    assert relative_error(answers["step"], expected) <= 1e-5
    for name in ("serving_masked", "step_masked"):
        assert relative_error(answers[name][mask], expected[mask]) <= 1e-5
    for n in range(2):  # anew after `reset`
        assert relative_error(answers[f"session_{n}"], expected[:1]) <= 1e-5
    if BACKEND != "torch":  # where TensorFlow has written the file
        check_command_line(model, tokens, tmp_path)


def check_command_line(model, tokens, folder):
    """`saved_model_cli`, which comes with TensorFlow, runs the same file."""
    np.save(folder / "tokens.npy", tokens)
    run_python(
        *("-m", "tensorflow.python.tools.saved_model_cli", "run", "--dir", folder / "saved_model"),
        *("--tag_set", "serve", "--signature_def", "serving_default"),
        *("--inputs", f"tokens={folder}/tokens.npy", "--outdir", folder),
    )
    assert relative_error(np.load(folder / "logits.npy"), model.predict_on_batch(tokens)) <= 1e-5


@pytest.mark.skipif(BACKEND == "torch", reason="TensorFlow writes the file, and has this test")
def test_low_precision_models_answer_in_float32(tmp_path):
    import tensorflow as tf

    keras.config.set_dtype_policy("mixed_bfloat16")
    inputs = keras.Input((None, 8), name="sequence")
    export_saved_model(keras.Model(inputs, layers.HLA(2, 4)(inputs)), tmp_path / "saved_model")
    signatures = tf.saved_model.load(tmp_path / "saved_model").signatures
    for name in ("serving_default", "step"):
        outputs = signatures[name].structured_outputs
        assert {x.dtype.name for x in outputs.values()} == {"float32"}


@pytest.mark.skipif(BACKEND == "torch", reason="TensorFlow writes the file there")
def test_quantized_models(rng, tmp_path):
    import tensorflow as tf

    sequences = keras.Input((None, 8))
    model = keras.Model(sequences, layers.HLA(2, 4, decay="input", name="hla")(sequences))
    model.quantize("int8")
    export_saved_model(model, tmp_path / "saved_model")
    loaded = tf.saved_model.load(tmp_path / "saved_model")
    signatures = loaded.signatures
    x = rng.standard_normal((2, 70, 8)).astype("float32")
    answer = signatures["serving_default"](inputs=tf.constant(x))["hla"]
    assert relative_error(answer, model.predict_on_batch(x)) <= 1e-5
    if BACKEND == "jax":  # from which the backward passes would double the file
        given = tf.Variable(x)
        with (
            tf.GradientTape(),
            pytest.raises(LookupError, match="does not support gradients"),
        ):
            signatures["serving_default"](inputs=given)


def test_errors(model, tmp_path):
    if BACKEND == "torch":
        with pytest.raises(RuntimeError, match=r"python -m keras_hla.export model.keras"):
            export_saved_model(model, tmp_path)
    inputs = keras.Input((None, 8))
    with pytest.raises(RuntimeError if BACKEND == "torch" else ValueError):
        export_saved_model(keras.Model(inputs, keras.layers.Dense(4)(inputs)), tmp_path)
    with pytest.raises(AssertionError, match="there is no file"):
        run_python("-m", "keras_hla.export", tmp_path / "nothing.keras", tmp_path / "out")
