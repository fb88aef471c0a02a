"""Any model of HLA layers streams: pieces with states are the whole."""

from backends import relative_error
from family import PLAIN
import keras
from keras import ops
import numpy as np
import pytest

from keras_hla import layers, streaming_model
from keras_hla.streaming import check
from keras_hla.streaming.signal import ROWS, Signal

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
    for pieces in ([1, 7, 1, 56, 7, 56], [56, 56, 7, 7, 1, 1]):
        assert relative_error(read(stream, tokens, pieces)[0], expected) <= 1e-5
    assert {id(v) for v in model.variables} == {id(v) for v in stream.variables}


def test_names_and_shapes():
    stream = streaming_model(everything_else())
    names = ("S", "F", "window", "position")
    assert stream.state_names[:4] == [f"hla_{name}" for name in names]
    assert stream.state_names[-4:] == [f"hla_call_2_{name}" for name in names]
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


def masked_blocks(**options):
    """The mask of the embedding reaches all blocks."""
    tokens, x = embed(mask_zero=True)
    for operator in ("hla2", "ahla"):
        x = layers.HLADecoderBlock(4, 8, operator=operator, **EVERY_OPTION, **options)(x)
    return keras.Model(tokens, keras.layers.Dense(20, name="logits")(x))


def masked_last():
    tokens, x = embed(mask_zero=True)
    x = layers.HLA(2, 8, return_sequences=False, zero_output_for_mask=True)(x)
    return keras.Model(tokens, keras.layers.Dense(20, name="logits")(x))


def masked_zeros():
    return masked_blocks(zero_output_for_mask=True)


@pytest.mark.parametrize("make", [masked_blocks, masked_zeros, masked_last, everything_else])
def test_masked_tokens_are_those_of_the_whole(make, rng):
    """Also where a piece begins with them, or holds no other; what is downstream may read them."""
    model = make()
    stream = streaming_model(model)
    tokens = draw(rng, (3, 24)) * (rng.random((3, 24)) < 0.6)
    tokens[0, :4] = tokens[1, 9:15] = tokens[2, 10:] = 0
    tokens = tokens.astype("int32")
    for pieces in ([1] * 24, [10, 4, 10], [4, 10, 10]):
        states, begin = stream.initial_state(3), 0
        for length in pieces:
            end = begin + length
            inputs = {"tokens": tokens[:, begin:end]}
            outputs = stream.predict_on_batch(inputs | states)
            # Of one length, for which the model is compiled once: masked tokens change nothing.
            expected = model.predict_on_batch(tokens * (np.arange(24) < end))
            if make is not masked_last:
                expected = expected[:, begin:end]
            np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-4, atol=1e-5)
            states, begin = {name: outputs[name] for name in stream.state_names}, end
    carried = [name for name in stream.state_names if name.endswith("_output")]
    assert len(carried) == {masked_zeros: 0, masked_blocks: 2}.get(make, 1)


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
    _, states = read(stream, draw(rng, (2, 8)), [4, 4])
    assert all(x.dtype == "float32" for x in states.values())


def test_save_and_load(rng, tmp_path):
    stream = streaming_model(two_blocks())
    stream.save(tmp_path / "stream.keras")
    loaded = keras.saving.load_model(tmp_path / "stream.keras")
    tokens = draw(rng, (2, 8))
    assert loaded.state_names == stream.state_names
    expected, _ = read(stream, tokens, [4, 4])
    np.testing.assert_array_equal(read(loaded, tokens, [4, 4])[0], expected)


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


class Positions(keras.layers.Layer):
    """Adds what depends on the position in the piece, or on its length."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        length = ops.shape(x)[1]
        return x + 0.1 * self.function(ops.arange(length, dtype="float32"), length)[:, None]


def on_vocabulary(function, value):
    """What a function makes of half of the features; the others are a constant."""
    return lambda x: ops.where(ops.arange(16) < 8, function(x), value)


def after_a_mask(layer, value):
    """A layer, then another that forbids half of the vocabulary."""
    return lambda x: keras.layers.Lambda(on_vocabulary(lambda z: z, value))(layer(x))


def dilated(rate, name="conv"):
    return keras.layers.Conv1D(16, 2, dilation_rate=rate, padding="causal", name=name)


MIXERS = {
    "attention": lambda x: keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x),
    "conv": keras.layers.Conv1D(16, 3, padding="causal", name="conv"),
    "conv_dilated": dilated(8, "conv_dilated"),
    "conv_far": dilated(700, "conv_far"),
    "conv_hidden": after_a_mask(dilated(8, "conv_hidden"), -1e9),
    "conv_infinite": after_a_mask(dilated(8, "conv_infinite"), -np.inf),
    "conv_in_a_block": keras.Sequential([dilated(9, "conv_in_a_block"), keras.layers.ReLU()]),
    "depthwise": keras.layers.DepthwiseConv1D(2, padding="same", name="depthwise"),
    "pool": keras.layers.GlobalAveragePooling1D(name="pool"),
    "pool_max": keras.layers.MaxPooling1D(2, strides=1, padding="same", name="pool_max"),
    "gru": keras.layers.GRU(16, return_sequences=True, name="gru"),
    "both": keras.layers.Bidirectional(keras.layers.GRU(8, return_sequences=True), name="both"),
    "norm": keras.layers.UnitNormalization(axis=1, name="norm"),
    "group_norm": keras.layers.GroupNormalization(2, name="group_norm"),
    "softmax": keras.layers.Softmax(axis=1, name="softmax"),
    "dense_softmax": keras.layers.Dense(
        16, activation=lambda z: ops.softmax(z, axis=1), name="dense_softmax"
    ),
    "pad": keras.layers.ZeroPadding1D(1, name="pad"),
    "crop": keras.layers.Cropping1D(1, name="crop"),
    "positions": Positions(lambda t, _: ops.sin(t), name="positions"),
    "positions_even": Positions(lambda t, _: t % 2, name="positions_even"),
    "positions_start": Positions(lambda t, _: ops.cast(t == 0, "float32"), name="positions_start"),
    "positions_length": Positions(
        lambda t, n: 0 * t + 1 / ops.cast(n, "float32"), name="positions_length"
    ),
    "lambda_sum": keras.layers.Lambda(
        on_vocabulary(lambda z: ops.cumsum(z, axis=1), -1e9), name="lambda_sum"
    ),
    "lambda_last": keras.layers.Lambda(lambda z: z + z[:, -1:], name="lambda_last"),
    "lambda_shift": keras.layers.Lambda(lambda z: ops.roll(z, 300, axis=1), name="lambda_shift"),
    "get_item": lambda x: x[:, :1],
    "lambda_before": keras.layers.Lambda(lambda z: z[:, -2], name="lambda_before"),
    "lambda_stride": keras.layers.Lambda(lambda z: z[:, ::2], name="lambda_stride"),
    "add": lambda x: keras.layers.Add(name="add")([x, x[:, -1:]]),
    "flip": lambda x: ops.flip(x, axis=1),
    "mean": lambda x: ops.mean(x, axis=1),
    "cumsum": lambda x: ops.cumsum(x, axis=1),
    "matmul": lambda x: ops.matmul(ops.matmul(x, ops.transpose(x, (0, 2, 1))), x),
    "gated": Gated(name="gated"),
    "gated_frozen": Gated(name="gated_frozen", trainable=False),
    "backward_both": keras.layers.Bidirectional(layers.HLA(2, 4, name="both")),
    "unordered": layers.HLA(2, 4, causal=False, name="unordered"),
    "feature_map": layers.HLA(
        2, 4, feature_map=lambda z: ops.softmax(z, axis=1), name="feature_map"
    ),
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


PER_STEP = {
    "vocabulary": lambda: keras.layers.Lambda(on_vocabulary(lambda z: z, -1e9)),
    "infinite": lambda: keras.layers.Lambda(on_vocabulary(lambda z: z, -np.inf)),
    "nan": lambda: keras.layers.Lambda(ops.log),
    "conv": lambda: keras.layers.Conv1D(16, 1),
    "norm": keras.layers.LayerNormalization,
    "batch_norm": keras.layers.BatchNormalization,
    "softmax": keras.layers.Softmax,
    "relu": lambda: keras.layers.Dense(16, "relu"),
    "noise": lambda: keras.layers.GaussianNoise(1.0),
    "heads": lambda: keras.layers.EinsumDense("abc,cde->abde", output_shape=(None, 4, 4)),
    "permuted": lambda: lambda x: ops.transpose(2 * ops.transpose(x, (0, 2, 1)), (0, 2, 1)),
    "split": lambda: lambda x: keras.layers.Reshape((-1, 16))(keras.layers.Reshape((-1, 8))(x)),
    "last": lambda: lambda x: x[:, -1],
    "image": lambda: lambda x: keras.layers.Conv2D(4, (1, 3))(x[..., None]),
}


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("name", PER_STEP)
def test_takes_what_acts_on_each_step_alone(name, dtype, rng):
    keras.config.set_dtype_policy(dtype)
    inputs = keras.Input((None, 16), name="inputs")
    x = PER_STEP[name]()(layers.HLA(2, 8)(inputs))
    stream = streaming_model(keras.Model({"inputs": inputs}, {"outputs": x}))
    outputs = stream({"inputs": draw(rng, (1, 3, 16)) / 20} | stream.initial_state(1))
    assert tuple(outputs["outputs"].shape[1:]) == (
        x.shape[1:] if name == "last" else (3, *x.shape[2:])
    )


def test_errors(rng):
    with pytest.raises(ValueError, match="must be a functional model"):
        streaming_model(layers.HLA(2, 4))
    with pytest.raises(ValueError, match="must be a functional model"):
        streaming_model(keras.Sequential([layers.HLA(2, 4)]))
    inputs = keras.Input((None, 8))
    with pytest.raises(ValueError, match="must have an `HLA` layer"):
        streaming_model(keras.Model(inputs, keras.layers.Dense(4)(inputs)))
    x, state_s, state_f = inputs, keras.Input((2, 4, 4)), keras.Input((2, 4, 4))
    x = layers.HLA(2, 4, rope_max_wavelength=None, **PLAIN)(x, initial_state=[state_s, state_f])
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


def known_layers():
    """Layers whose outputs a streaming model knows, with the signals that they take."""
    sequence, tokens = Signal((ROWS, 1, 16), "float32", 1), Signal((ROWS, 1), "int32", 1)
    options = {"feature_map": "elu_plus_one", "output_gate": "silu"}
    yield layers.HLADecoderBlock(2, 4, **options), sequence
    yield layers.HLA(2, 4, return_sequences=False, return_state=True), sequence
    yield keras.layers.Dense(3, activation="softmax"), sequence
    yield keras.layers.Dense(3), Signal((ROWS, 16), "float32", of_last_step=True)
    yield keras.layers.Dense(3), Signal((ROWS, 16), "float32")
    yield keras.layers.Dense(3), Signal((ROWS, 1, 4, 16), "float32", 1, 2)
    yield keras.layers.Embedding(8, 4), tokens
    yield keras.layers.Dropout(0.5), sequence


@pytest.mark.parametrize("which", range(8))
def test_what_is_known_is_what_a_trial_shows(which):
    layer, signal = [*known_layers()][which]
    layer.build(signal.shape)
    trial = check._Trial()
    found = trial.visit(layer, signal)
    assert trial._known
    assert found == trial._try(layer, (signal,), {}, [signal])


def test_what_is_tried():
    class Mine(keras.layers.Dense):
        pass

    def activation(x):
        return x

    assert check._is_known(keras.layers.Dense(3, activation="silu"))
    for layer in (
        Mine(3),
        keras.layers.Dense(3, activation=activation),
        keras.layers.Dense(3, activation=keras.layers.Softmax(axis=1)),
        keras.layers.Dense(3, activation=keras.ops.flip),
        layers.HLA(2, 4, conv_activation=activation),
        layers.HLADecoderBlock(2, 4, activation=activation),
        keras.layers.LayerNormalization(),
    ):
        assert not check._is_known(layer)
