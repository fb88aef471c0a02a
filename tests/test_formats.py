"""ONNX and LiteRT files give what the Keras model gives, whole and in pieces."""

from backends import relative_error
from family import PLAIN
import keras
from keras.quantizers import Int4QuantizationConfig, Int8QuantizationConfig
import numpy as np
import pytest

import keras_hla

EVERY_OPTION = {
    "num_key_value_heads": 1,
    "decay": "input",
    "conv_kernel_size": 4,
    "qk_norm": True,
    "output_gate": "silu",
}
# The operator, its options, the length that the file is for, and those of the pieces.
ONNX_STEPS = [
    ("hla3", EVERY_OPTION, None, (1, 7, 64, 1)),
    ("ahla", EVERY_OPTION, 7, (7, 7)),
    ("hla2", PLAIN, None, (1, 7, 64)),  # nothing is between the projections and the heads
]
LITERT_STEPS = [("hla2", 7), ("ahla", 1), ("hla3", 64)]
WHOLE = [("out.onnx", None, (1, 7, 65, 300)), ("out.tflite", 64, (64,))]


def make(operator, options=EVERY_OPTION):
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    h = keras.layers.Embedding(20, 16)(tokens)
    h = h + keras_hla.layers.HLA(2, 8, operator=operator, **options)(h)
    return keras.Model(tokens, keras.layers.Dense(20, name="logits")(h))


def export(model, path, step=False, length=None):
    write = keras_hla.export_onnx if path.suffix == ".onnx" else keras_hla.export_litert
    write(model, path, step=step, length=length)


def load(path):
    """The file as a function of named arrays, returning named arrays."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        names = [x.name for x in session.get_outputs()]
        return lambda **inputs: dict(zip(names, session.run(None, inputs), strict=True))
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(str(path)).get_signature_runner("serving_default")


def check_pieces(model, path, lengths, new):
    """Reads a sequence in pieces, handing on the states, whose names after a piece `new` gives."""
    served, stream = load(path), keras_hla.streaming_model(model)
    states = {n: keras.ops.convert_to_numpy(x) for n, x in stream.initial_state(3).items()}
    tokens = np.random.default_rng(0).integers(0, 20, (3, sum(lengths)), "int32")
    pieces = []
    for piece in np.split(tokens, np.cumsum(lengths)[:-1], axis=1):
        outputs = served(tokens=piece, **states)
        assert set(outputs) == {"logits", *map(new, states)}
        pieces.append(outputs["logits"])
        states = {name: outputs[new(name)] for name in states}
    assert relative_error(np.concatenate(pieces, axis=1), model(tokens)) <= 1e-5


@pytest.mark.parametrize(("operator", "options", "length", "pieces"), ONNX_STEPS)
def test_onnx_in_pieces(tmp_path, operator, options, length, pieces):
    model = make(operator, options)
    export(model, tmp_path / "out.onnx", step=True, length=length)
    check_pieces(model, tmp_path / "out.onnx", pieces, new="next_{}".format)


@pytest.mark.parametrize(("operator", "length"), LITERT_STEPS)
def test_litert_in_pieces(tmp_path, operator, length):
    model = make(operator)
    export(model, tmp_path / "out.tflite", step=True, length=length)
    check_pieces(model, tmp_path / "out.tflite", [length] * 3, new=str)


@pytest.mark.parametrize(("file", "length", "lengths"), WHOLE)
def test_whole_sequences(tmp_path, rng, file, length, lengths):
    model = make("hla2")
    export(model, tmp_path / file, length=length)
    served = load(tmp_path / file)
    for n in lengths:
        for batch in (1, 3):
            tokens = rng.integers(0, 20, (batch, n), "int32")
            outputs = served(tokens=tokens)
            assert set(outputs) == {"logits"}
            assert relative_error(outputs["logits"], model(tokens)) <= 1e-5


@pytest.mark.parametrize(
    ("file", "config"),
    [
        ("step.onnx", Int8QuantizationConfig()),
        ("step.tflite", Int8QuantizationConfig(activation_quantizer=None)),
        ("step.tflite", Int4QuantizationConfig()),
    ],
)
def test_quantized_models(tmp_path, file, config):
    model = make("hla2", {"decay": "input"})
    model.quantize(config=config)
    export(model, tmp_path / file, step=True, length=7)
    new = "next_{}".format if file == "step.onnx" else str
    check_pieces(model, tmp_path / file, [7] * 3, new=new)


def test_quantized_activations_are_refused_in_litert(tmp_path):
    model = make("hla2", {})
    model.quantize("int8")
    with pytest.raises(ValueError, match=r"`model` must multiply in float32.*products of int8"):
        keras_hla.export_litert(model, tmp_path / "out.tflite", length=7)
    assert not list(tmp_path.iterdir())


def test_what_is_not_exact_is_refused(tmp_path):
    model = make("hla2")
    for length in (None, 129):
        with pytest.raises(ValueError, match="from 1 to 128"):
            keras_hla.export_litert(model, tmp_path / "out.tflite", length=length)
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = make("hla2")
    for write in (keras_hla.export_onnx, keras_hla.export_litert):
        with pytest.raises(ValueError, match=r"float32.*Received: .*bfloat16"):
            write(model, tmp_path / "out", length=1)
    assert not list(tmp_path.iterdir())
