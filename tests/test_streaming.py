"""Any model of HLA layers streams: pieces with states are the whole."""

from backends import relative_error
import keras
from keras import ops
import numpy as np
import pytest

from keras_hla import layers, streaming_model

BACKEND = keras.config.backend()
EVERY_OPTION = {
    "num_key_value_heads": 2,
    "decay": "input",
    "conv_kernel_size": 4,
    "feature_map": "elu",
    "qk_norm": True,
    "output_gate": "silu",
    "dropout": 0.1,
}


def embed(mask_zero=False):
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    return tokens, keras.layers.Embedding(20, 16, mask_zero=mask_zero)(tokens)


def two_blocks():
    tokens, x = embed()
    x = layers.HLADecoderBlock(4, 8, **EVERY_OPTION)(x)
    x = layers.HLADecoderBlock(4, 8, operator="ahla", **EVERY_OPTION)(x)
    return keras.Model(tokens, keras.layers.Dense(20, name="logits")(x))


def everything_else():
    """Operations, a nested model, a shared layer, normalization, a third-order layer."""
    tokens, x = embed(mask_zero=True)
    shared = layers.HLA(2, 8)
    x = x + shared(keras.layers.LayerNormalization()(x))
    inner = keras.Sequential([keras.layers.Dense(16, "relu"), layers.HLA(2, 4, operator="hla3")])
    inner.build((None, None, 16))
    x = inner(x) * ops.sigmoid(x)
    x = keras.layers.BatchNormalization()(shared(x))
    return keras.Model(tokens, keras.layers.Dense(20, name="logits")(x))


def sequential():
    return keras.Sequential(
        [
            keras.Input((128,), dtype="int32", name="tokens"),  # of fixed length
            keras.layers.Embedding(20, 16),
            layers.HLA(4, 4),
            keras.layers.Dropout(0.5),
            layers.HLA(4, 4, stateful=False),
            keras.layers.Dense(20, name="logits"),
        ]
    )


MODELS = [two_blocks, everything_else, sequential]


def draw(rng, shape):
    return rng.integers(1, 20, shape).astype("int32")


def read(stream, tokens, pieces):
    """The outputs for a sequence in pieces, and the states after it."""
    states, outputs, begin = stream.initial_state(len(tokens)), [], 0
    for length in pieces:
        new = stream.predict_on_batch({"tokens": tokens[:, begin : begin + length], **states})
        states = {name: new[name] for name in stream.state_names}
        outputs.append(new["logits"])
        begin += length
    assert begin == tokens.shape[1]
    return np.concatenate(outputs, axis=1), states


@pytest.mark.parametrize("make", MODELS)
def test_pieces_are_the_whole(make, rng):
    model = make()
    stream = streaming_model(model)
    tokens = draw(rng, (3, 128))
    expected = model.predict_on_batch(tokens)
    for pieces in ([1, 7, 1, 64, 55], [64, 64]):
        assert relative_error(read(stream, tokens, pieces)[0], expected) <= 1e-5
    assert {id(v) for v in model.variables} == {id(v) for v in stream.variables}


def test_names_and_shapes():
    stream = streaming_model(everything_else())
    assert stream.state_names[:3] == ["hla_S", "hla_F", "hla_position"]
    assert stream.state_names[-3:] == ["hla_call_2_S", "hla_call_2_F", "hla_call_2_position"]
    assert any(name.startswith("sequential_hla_1_") for name in stream.state_names)
    assert stream.output["logits"].shape == (None, None, 20)
    assert [tuple(x.shape) for x in stream.initial_state(5).values()][:2] == [(5, 2, 8, 8)] * 2


def test_pieces_of_different_lengths_in_a_batch(rng):
    model = two_blocks()
    stream = streaming_model(model, masked=True)
    tokens = draw(rng, (2, 40))
    expected = model.predict_on_batch(tokens)
    states, read_so_far, outputs = stream.initial_state(2), [0, 0], [[], []]
    for lengths in ((3, 9), (9, 1), (0, 5)):
        piece, mask = np.zeros((2, 9), "int32"), np.zeros((2, 9), bool)
        for row, length in enumerate(lengths):
            begin = read_so_far[row]
            piece[row, :length] = tokens[row, begin : begin + length]
            mask[row, :length] = True
            read_so_far[row] += length
        new = stream.predict_on_batch({"tokens": piece, "mask": mask, **states})
        states = {name: new[name] for name in stream.state_names}
        for row, length in enumerate(lengths):
            outputs[row].append(new["logits"][row, :length])
    for row in range(2):
        got = np.concatenate(outputs[row])
        assert relative_error(got, expected[row, : len(got)]) <= 1e-5


def test_last_outputs_and_constant_inputs(rng):
    sequence, constant = keras.Input((None, 8), name="sequence"), keras.Input((3,), name="constant")
    x = layers.HLA(2, 4, return_sequences=False)(sequence)
    x = keras.layers.Concatenate()([x, constant])
    model = keras.Model({"sequence": sequence, "constant": constant}, keras.layers.Dense(2)(x))
    stream = streaming_model(model)
    inputs = {
        "sequence": rng.normal(size=(2, 30, 8)).astype("float32"),
        "constant": rng.normal(size=(2, 3)).astype("float32"),
    }
    states = stream.initial_state(2)
    for begin, end in ((0, 10), (10, 30)):
        piece = inputs | {"sequence": inputs["sequence"][:, begin:end]}
        outputs = stream.predict_on_batch(piece | states)
        states = {name: outputs[name] for name in stream.state_names}
    assert relative_error(outputs["dense"], model.predict_on_batch(inputs)) <= 1e-5


def test_mixed_precision_keeps_float32_states(rng):
    keras.config.set_dtype_policy("mixed_bfloat16")
    stream = streaming_model(two_blocks())
    _, states = read(stream, draw(rng, (2, 9)), [4, 5])
    assert all(x.dtype == "float32" for x in states.values())


def test_save_and_load(rng, tmp_path):
    stream = streaming_model(two_blocks())
    stream.save(tmp_path / "stream.keras")
    loaded = keras.saving.load_model(tmp_path / "stream.keras")
    tokens = draw(rng, (2, 9))
    assert loaded.state_names == stream.state_names
    expected, _ = read(stream, tokens, [4, 5])
    np.testing.assert_array_equal(read(loaded, tokens, [4, 5])[0], expected)


def test_weights_are_shared(rng):
    model = two_blocks()
    stream, tokens = streaming_model(model), draw(rng, (2, 9))
    before, _ = read(stream, tokens, [9])
    model.set_weights([w + 0.1 for w in model.get_weights()])
    after, _ = read(stream, tokens, [9])
    assert relative_error(after, model.predict_on_batch(tokens)) <= 1e-5
    assert relative_error(before, after) > 1e-2


def test_a_nan_stays_in_its_row(rng):
    stream = streaming_model(two_blocks())
    tokens = draw(rng, (3, 12))
    _, states = read(stream, tokens, [12])
    states = {n: np.array(ops.convert_to_numpy(x)) for n, x in states.items()}
    for x in states.values():
        x[1] = np.nan
    outputs = stream.predict_on_batch({"tokens": tokens, **states})["logits"]
    assert np.isnan(outputs[1]).any()
    assert np.isfinite(outputs[[0, 2]]).all()


@keras.saving.register_keras_serializable(package="test")
class Gated(keras.layers.Layer):
    """Mixes over time, behind a gate that starts closed."""

    def build(self, shape):
        self.gate = self.add_weight(name="gate", shape=(), initializer="zeros")

    def call(self, x):
        return x + self.gate * ops.cumsum(x, axis=1)


MIXERS = {
    "attention": lambda x: keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x),
    "conv": keras.layers.Conv1D(16, 3, padding="causal", name="conv"),
    "pool": keras.layers.GlobalAveragePooling1D(name="pool"),
    "flip": lambda x: ops.flip(x, axis=1),
    "gated": Gated(name="gated"),
    "backward_both": keras.layers.Bidirectional(layers.HLA(2, 4, name="both")),
    "unordered": layers.HLA(2, 4, causal=False, name="unordered"),
}


@pytest.mark.parametrize(("name", "nested"), [*((name, False) for name in MIXERS), ("conv", True)])
def test_refuses_by_name_what_mixes_time(name, nested):
    x = inputs = keras.Input((None, 16))
    x = layers.HLA(2, 8)(x)
    if nested:
        inner = keras.Input((None, 16))
        x = keras.Model(inner, keras.layers.Dense(16)(MIXERS[name](inner)))(x)
    else:
        x = MIXERS[name](x)
    model = keras.Model(inputs, keras.layers.Dense(4)(x))
    with pytest.raises(ValueError, match=f"'{name}"):
        streaming_model(model)


def test_errors(rng):
    with pytest.raises(ValueError, match="must be a functional model"):
        streaming_model(layers.HLA(2, 4))
    with pytest.raises(ValueError, match="must be a functional model"):
        streaming_model(keras.Sequential([layers.HLA(2, 4)]))
    inputs = keras.Input((None, 8))
    with pytest.raises(ValueError, match="must have an `HLA` layer"):
        streaming_model(keras.Model(inputs, keras.layers.Dense(4)(inputs)))
    x, state_s, state_f = inputs, keras.Input((2, 4, 4)), keras.Input((2, 4, 4))
    x = layers.HLA(2, 4, rope_max_wavelength=None)(x, initial_state=[state_s, state_f])
    with pytest.raises(ValueError, match="`initial_state` of layer 'hla_"):
        streaming_model(keras.Model([inputs, state_s, state_f], x))
    stream = streaming_model(two_blocks())
    states, tokens = stream.initial_state(2), draw(rng, (2, 3))
    with pytest.raises(ValueError, match="must be a dictionary of"):
        stream({"tokens": tokens})
    with pytest.raises(ValueError, match="must be a dictionary of"):
        stream(tokens)
    name = stream.state_names[0]
    with pytest.raises(ValueError, match=rf"inputs\['{name}'\]"):
        stream({"tokens": tokens, **states, name: states[name][:, :1]})
    with pytest.raises(ValueError, match="must have shape"):
        stream({"tokens": draw(rng, (3, 3)), **states})
