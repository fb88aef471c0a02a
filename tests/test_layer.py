"""The layer and its cell: streaming, state, masks, dtypes, configs and training."""

import fractions

from backends import call, compiled, gradients, relative_error, run, to_numpy
from definitions import Reference, serial
from family import PLAIN
import keras
import numpy as np
import pytest

from keras_hla import layers
from keras_hla.stages.rotary import rotation, split_position, turns_of

CONFIGURATIONS = {
    "plain": PLAIN,
    "default": {},
    "per_head": {
        **PLAIN,
        "decay": [0.9, 0.95, 0.99, 1.0],
        "value_dim": 6,
        "rope_max_wavelength": None,
    },
    "multiscale": {**PLAIN, "decay": "multiscale", "num_key_value_heads": 1, "scale": 0.5},
    "learned": {**PLAIN, "decay": "learned", "num_key_value_heads": 2, "use_bias": False},
    "input": {**PLAIN, "decay": "input", "output_norm": False, "key_dim": 4},
    "every option": {
        "operator": "hla3",
        "decay": "input",
        "num_key_value_heads": 2,
        "qk_norm": True,
        "feature_map": "elu_plus_one",
        "output_gate": "silu",
        "conv_kernel_size": 4,
        "dropout": 0.1,
        "kernel_regularizer": "l2",
        "bias_constraint": "max_norm",
    },
}
# Under torch XLA would be torch.compile, which needs a C++ compiler on the machine; JAX always
# compiles, because training goes op by op without.
BACKEND = keras.config.backend()
TRAININGS = [(name, BACKEND == "jax") for name in ("plain", "input")]
if BACKEND == "tensorflow":
    TRAININGS.append(("input", True))
every_configuration = pytest.mark.parametrize("name", CONFIGURATIONS)
some_configurations = pytest.mark.parametrize(
    "name", ["plain", "default", "learned", "every option"]
)


def make(name="input", **options):
    layer = layers.HLA(**{"num_heads": 4, "key_dim": 8, **CONFIGURATIONS[name], **options})
    layer.build((2, None, 16))
    return layer


@pytest.fixture
def x(rng):
    return rng.standard_normal((2, 70, 16)).astype("float32")


@every_configuration
def test_is_its_cell_in_an_rnn(x, name):
    x = x[:, :24]
    layer = make(name, return_state=True)
    output, *states = call(layer, x)
    rnn = keras.layers.RNN(layer.cell, return_sequences=True)
    rnn.build(x.shape)
    assert relative_error(run(rnn, x), output) <= 1e-5
    step, state = compiled(layer.cell), layer.get_initial_state(2)
    for t in range(x.shape[1]):
        token, state = step(keras.ops.convert_to_tensor(x[:, t]), state)
    assert relative_error(token, output[:, -1]) <= 1e-5
    for a, b in zip(state, states, strict=True):
        assert relative_error(a, b) <= 1e-5


@every_configuration
def test_pieces_are_the_whole(x, name):
    layer = make(name, return_state=True)
    whole, *last = call(layer, x)
    states, outputs = (), []
    for piece in np.split(x, (1, 2, 64), axis=1):
        output, *states = call(layer, piece, states)
        outputs.append(to_numpy(output))
    assert relative_error(np.concatenate(outputs, axis=1), whole) <= 1e-5
    for a, b in zip(states, last, strict=True):
        assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize("more", [False, True])
def test_computes_what_the_paper_defines(x, more):
    """The layer rebuilt in NumPy and torch float64 from its weights."""
    options = {"qk_norm": True, "feature_map": "softplus", "output_gate": "silu"} if more else {}
    layer = make("learned", num_key_value_heads=4, scale=0.25, **options)
    for name in ("query_norm", "key_norm", "norm"):  # so that their scales matter
        if hasattr(layer.cell, name):
            scale = getattr(layer.cell, name).scale
            scale.assign(keras.random.uniform(scale.shape, 0.5, 1.5, seed=3))
    output = call(layer, x)
    weights = {w.path.split("/", 2)[-1]: to_numpy(w) for w in layer.weights}
    exact = x.astype("float64")
    q, k, v = (
        (exact @ weights[f"{n}/kernel"]).reshape(2, 70, 4, 8) for n in ("query", "key", "value")
    )

    def norm(x, name):
        rms = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        return x / rms * weights[f"{name}/scale"]

    if more:
        q, k = (np.log1p(np.exp(norm(x, f"{n}_norm"))) for x, n in ((q, "query"), (k, "key")))
    angle = np.arange(70)[:, None, None] * 10_000.0 ** (-np.arange(4) / 4)

    def rotate(x):
        first, second = x[..., :4], x[..., 4:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    log_decay = -np.log1p(np.exp(-weights["decay/logit"]))
    log_decay = np.broadcast_to(log_decay, (2, 70, 4))
    o = Reference(serial, "hla2", (0.25 * rotate(q), rotate(k), v), log_decay).output
    o = norm(o, "norm").reshape(2, 70, 32)
    if more:
        gate = exact @ weights["gate/kernel"]
        o = o * gate / (1 + np.exp(-gate))
    expected = o @ weights["output/kernel"]
    assert relative_error(output, expected) <= 1e-5


@pytest.mark.parametrize("piece", [1, 7])
def test_stateful(x, piece):
    x = x[:, :21]
    inputs = keras.Input(batch_shape=(2, piece, 16))
    layer = make(stateful=True)
    model = keras.Model(inputs, layer(inputs))
    twin = make()
    twin.cell.set_weights(layer.cell.get_weights())
    expected = call(twin, x)
    assert {v.path for v in layer.states} <= {v.path for v in model.non_trainable_variables}
    for _ in range(2):
        outputs = [model.predict(p, verbose=0) for p in np.split(x, 21 // piece, axis=1)]
        assert relative_error(np.concatenate(outputs, axis=1), expected) <= 1e-5
        assert to_numpy(layer.states[-1]).tolist() == [[0, 21], [0, 21]]
        layer.reset_state()
        assert all(np.all(to_numpy(state) == 0) for state in layer.states)


def test_stateful_training_goes_on_from_the_last_batch(x):
    inputs = keras.Input(batch_shape=(2, 35, 16))
    layer = make(stateful=True)
    model = keras.Model(inputs, layer(inputs))
    model.compile("adam", "mse")
    batches = np.concatenate(np.split(x, 2, axis=1))
    model.fit(batches, batches, batch_size=2, epochs=2, shuffle=False, verbose=0)
    assert to_numpy(layer.states[-1]).tolist() == [[0, 140], [0, 140]]


def test_return_sequences(x, rng):
    whole = make()
    last = make(return_sequences=False)
    last.set_weights(whole.get_weights())
    np.testing.assert_array_equal(to_numpy(call(last, x)), to_numpy(call(whole, x))[:, -1])
    mask = rng.random((2, 70)) < 0.5
    mask[1, 40:] = False
    output = to_numpy(call(whole, x, mask=mask))
    ends = [np.flatnonzero(row)[-1] for row in mask]
    np.testing.assert_array_equal(to_numpy(call(last, x, mask=mask)), output[[0, 1], ends])


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("go_backwards", [False, True])
def test_masks_and_directions_are_those_of_an_rnn(x, rng, zero, go_backwards):
    """Padding left, right and inside; the whole output and the last one."""
    x = x[:, :10]
    mask = rng.random((2, 10)) < 0.6
    mask[0, [0, -1]] = mask[1, [3, 4]] = False
    options = {"go_backwards": go_backwards, "zero_output_for_mask": zero}
    layer = make(return_state=True, **options)
    # Not unrolled, RNN goes wrong with such states under JAX; backwards with masks, under torch.
    rnn = keras.layers.RNN(layer.cell, return_sequences=True, unroll=True)
    order = np.arange(10)[:: -1 if go_backwards else 1]

    def function(x):
        return rnn(x, mask=keras.ops.convert_to_tensor(mask[:, order]))

    output, *_ = call(layer, x, mask=mask)
    expected = to_numpy(run(function, x[:, order]))
    if zero:
        expected = np.where(mask[:, order, None], expected, 0)
    assert relative_error(output, expected) <= 1e-5
    last = make(return_sequences=False, **options)
    last.set_weights(layer.get_weights())
    mask[1] = False  # which leaves nothing to be read
    ends = to_numpy(call(last, x, mask=mask))
    assert np.all(ends[1] == 0)
    layer.zero_output_for_mask = False
    whole, *_ = call(layer, x, mask=mask)
    np.testing.assert_array_equal(to_numpy(call(last, x, mask=mask)), to_numpy(whole)[:, -1])


def test_bidirectional(x, rng):
    forward = make("every option", return_state=True)
    both = keras.layers.Bidirectional(forward, merge_mode=None)
    assert both.backward_layer.go_backwards
    mask = rng.random((2, 70)) < 0.7
    outputs = run(lambda x: both(x, mask=keras.ops.convert_to_tensor(mask)), x)
    assert len(outputs) == 2 + 2 * len(forward.cell.state_size)
    for layer, output, flip in (
        (both.forward_layer, outputs[0], 1),
        (both.backward_layer, outputs[1], -1),
    ):
        alone = make("every option")
        alone.set_weights(layer.get_weights())
        expected = to_numpy(call(alone, x[:, ::flip].copy(), mask=mask[:, ::flip].copy()))
        expected = np.where(mask[:, ::flip, None], expected, 0)[:, ::flip]
        assert relative_error(output, expected) <= 1e-5
    inputs = keras.Input((None, 16))
    model = keras.Model(inputs, keras.layers.Bidirectional(make(return_sequences=False))(inputs))
    assert model.output_shape == (None, 32)
    twin = keras.Model.from_config(model.get_config())
    twin.set_weights(model.get_weights())
    assert relative_error(twin.predict(x, verbose=0), model.predict(x, verbose=0)) <= 1e-6


def test_masked_tokens_do_not_exist(x, rng):
    layer = make(return_state=True, zero_output_for_mask=True)
    keep = rng.random(70) < 0.6
    alone, *expected = call(layer, x[:, keep])
    padded = np.where(keep[:, None], x, np.nan).astype("float32")
    output, *states = call(layer, padded, mask=np.broadcast_to(keep, (2, 70)))
    assert relative_error(to_numpy(output)[:, keep], alone) <= 1e-5
    assert np.all(to_numpy(output)[:, ~keep] == 0)
    for a, b in zip(states, expected, strict=True):
        assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize("name", ["plain", "every option"])
def test_packed_sequences_are_separate(x, name):
    layer = make(name, return_state=True)
    segment_ids = np.repeat([[1, 2, 1]] * 2, [20, 1, 49], axis=1)
    output, *states = call(layer, x, segment_ids=keras.ops.convert_to_tensor(segment_ids))
    pieces = [call(layer, piece) for piece in np.split(x, [20, 21], axis=1)]
    alone = np.concatenate([to_numpy(piece[0]) for piece in pieces], axis=1)
    # Positions go on: only their differences matter to outputs, but the states are turned.
    assert relative_error(output, alone) <= 1e-5
    assert to_numpy(states[-1]).tolist() == [[0, 70], [0, 70]]
    sequences, ids = keras.Input((70, 16)), keras.Input((70,), dtype="int32")
    model = keras.Model([sequences, ids], layer(sequences, segment_ids=ids)[0])
    assert relative_error(model.predict([x, segment_ids], verbose=0), output) <= 1e-5


def test_implicit_mask(rng):
    tokens = rng.integers(1, 20, (2, 30))
    tokens[0, 20:] = 0
    embedding = keras.layers.Embedding(20, 16, mask_zero=True)
    layer = make(return_state=True, zero_output_for_mask=True)
    embedded = embedding(tokens)
    output, *states = layer(embedded)
    assert np.all(to_numpy(output)[0, 20:] == 0)
    assert to_numpy(states[-1]).tolist() == [[0, 20], [0, 30]]
    np.testing.assert_array_equal(to_numpy(output._keras_mask), tokens != 0)
    zeros = layer.get_initial_state(2)
    again, *_ = layer(embedding(tokens), initial_state=zeros)  # two tensors: Keras passes no mask
    np.testing.assert_array_equal(to_numpy(again), to_numpy(output))


def test_functional_model_with_states(x):
    sequences = keras.Input((None, 16))
    layer = make(return_state=True)
    sizes = layer.cell.state_size
    states = [keras.Input(size) for size in sizes]
    output, *last = layer(sequences, initial_state=states)
    assert output.shape == (None, None, 16)
    assert [s.shape for s in last] == [(None, *size) for size in sizes]
    model = keras.Model([sequences, *states], [output, *last])
    expected = call(layer, x)
    state = [to_numpy(s).astype("float32") for s in layer.get_initial_state(2)]
    first, *state = model.predict([x[:, :33], *state], verbose=0)
    second, *state = model.predict([x[:, 33:], *state], verbose=0)
    assert relative_error(np.concatenate([first, second], axis=1), expected[0]) <= 1e-5


@pytest.mark.parametrize(("name", "jit_compile"), TRAININGS)
def test_trains_in_a_functional_model(name, jit_compile):
    tokens = keras.Input((None,), dtype="int32")
    h = keras.layers.Embedding(7, 16)(tokens)
    h = h + make(name)(keras.layers.RMSNormalization()(h))
    model = keras.Model(tokens, keras.layers.Dense(7)(h))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss, jit_compile=jit_compile)
    text = np.arange(41) % 7
    batch = np.stack([text] * 4)
    before = model.evaluate(batch[:, :-1], batch[:, 1:], verbose=0)
    model.fit(batch[:, :-1], batch[:, 1:], epochs=25, verbose=0)
    assert model.evaluate(batch[:, :-1], batch[:, 1:], verbose=0) < 0.5 * before
    assert model.predict(batch[:1, :5], verbose=0).shape == (1, 5, 7)


@some_configurations
def test_every_weight_gets_a_gradient(x, name):
    layer = make(name)
    weights = layer.trainable_weights
    start = [keras.ops.copy(w.value) for w in weights]
    direction = [keras.random.normal(w.shape, seed=n) for n, w in enumerate(weights)]
    target = keras.random.normal(x.shape, seed=99)

    def loss(*steps):
        moved = [w + s * d for w, s, d in zip(start, steps, direction, strict=True)]
        with keras.StatelessScope(state_mapping=zip(weights, moved, strict=True)):
            return keras.ops.mean(layer(keras.ops.convert_to_tensor(x)) * target)

    found = gradients(loss, [np.float32(0)] * len(weights))
    for weight, gradient in zip(weights, found, strict=True):
        assert np.isfinite(gradient), weight.path
        assert gradient != 0, weight.path


@every_configuration
def test_config_round_trip(x, name):
    layer = make(name, chunk_size=32, return_state=True, dtype="mixed_bfloat16")
    config = layer.get_config()
    twin = layers.HLA.from_config(config)
    assert twin.get_config() == config
    assert {"name", "trainable", "dtype", *CONFIGURATIONS[name]} <= set(config)
    cell = layers.HLACell.from_config(layer.cell.get_config())
    assert cell.get_config() == layer.cell.get_config()
    twin.build((2, None, 16))
    assert [w.shape for w in layer.weights] == [w.shape for w in twin.weights]


@some_configurations
def test_save_and_load(x, name, tmp_path):
    inputs = keras.Input((None, 16))
    model = keras.Model(inputs, make(name)(inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_low_precision_policies_keep_float32_states(x, policy):
    layer = make(return_state=True, dtype=policy)
    reference = make(return_state=True)
    layer.set_weights(reference.get_weights())
    compute = policy.removeprefix("mixed_")
    spec, *state_specs = layer(keras.Input((None, 16)))
    expected, *_ = call(reference, x)
    output, *states = layer(x, initial_state=layer.get_initial_state(2))
    assert keras.backend.standardize_dtype(output.dtype) == spec.dtype == compute
    for state, state_spec in zip(states, state_specs, strict=True):
        assert keras.backend.standardize_dtype(state.dtype) == state_spec.dtype == "float32"
    tolerance = {"float16": 1e-2, "bfloat16": 8e-2}[compute]
    assert relative_error(output, expected) <= tolerance
    assert to_numpy(states[-1]).tolist() == [[0, 70], [0, 70]]


@pytest.mark.parametrize("kind", [layers.HLA, layers.HLADecoderBlock])
def test_mixed_precision_within_a_model_and_without(x, kind):
    """Keras casts variables of a layer that is called by itself, and not within a model."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    layer = kind(4, 8, qk_norm=True)
    layer.build(x.shape)
    layer.set_weights(
        [0.9 + 0.1 * np.random.default_rng(3).random(w.shape) for w in layer.get_weights()]
    )
    inputs = keras.Input((None, 16))
    model = keras.Model(inputs, layer(inputs))
    assert np.array_equal(to_numpy(layer(x)), to_numpy(model(x)))


def test_stateful_keeps_float32_state_under_mixed_precision(x):
    layer = make(stateful=True, dtype="mixed_bfloat16")
    layer(x)
    layer(x)
    assert {v.dtype for v in layer.states} == {"float32"}
    # 140 is no bfloat16 number plus one, and the moments would lose their small parts.
    assert to_numpy(layer.states[-1]).tolist() == [[0, 140], [0, 140]]
    S = to_numpy(layer.states[0])
    assert not np.array_equal(S, to_numpy(keras.ops.cast(layer.states[0], "bfloat16")))


def test_changing_a_token_leaves_earlier_outputs_bitwise_equal(x):
    layer = make()
    before = to_numpy(call(layer, x))
    changed = x.copy()
    changed[:, 40] += 1
    after = to_numpy(call(layer, changed))
    np.testing.assert_array_equal(before[:, :40], after[:, :40])
    assert not np.any(before[:, 40] == after[:, 40])


@pytest.mark.parametrize("options", [{}, {"key_dim": 64, "rope_max_wavelength": 1e6}])
def test_positions_count_from_the_state(x, options):
    """A rotary embedding sees only distances, also billions of tokens from the start."""
    layer = make("plain", return_state=True, **options)
    output, *_ = call(layer, x)
    for start in (5, 1023, 2**16 - 30, 10**6 + 3, 10**7, 2**24 - 30, 2**24 + 1, 10**9, 10**12):
        *memory, _ = layer.get_initial_state(2)
        moved, *states = call(layer, x, [*memory, np.array([divmod(start, 2**16)] * 2)])
        assert relative_error(moved, output) <= 1e-6
        assert to_numpy(states[-1]).tolist() == [list(divmod(start + 70, 2**16))] * 2
        # A start that is not split in two numbers, as far as one can hold it.
        moved, *_ = call(layer, x, [*memory, np.array([[0, start]] * 2)])
        assert relative_error(moved, output) <= 1e-6


def test_pieces_are_the_whole_at_any_position(x):
    layer = make("every option", return_state=True)
    for start in (0, 2**24 - 40, 10**9):
        *memory, _ = layer.get_initial_state(2)
        position = np.array([divmod(start, 2**16)] * 2)
        whole, *_ = call(layer, x, [*memory, position])
        states, outputs = [*memory, position], []
        for piece in (x[:, :39], x[:, 39:40], x[:, 40:]):
            output, *states = call(layer, piece, states)
            outputs.append(to_numpy(output))
        assert relative_error(np.concatenate(outputs, axis=1), whole) <= 1e-5


@pytest.mark.parametrize("wavelength", [0.3, 100.0, 1e4, 1e9])
def test_angles(wavelength):
    """Against exact arithmetic, far out and around the ends of blocks."""
    start = np.array([0, 2**16 - 3, 2**24 - 3, 10**9], dtype=object)
    counts = np.arange(6)
    position = np.array([divmod(n, 2**16) for n in start], "float32")

    def function(position, counts):
        block, rest = split_position(position)
        return rotation(block, rest + counts, turns_of(8, wavelength))

    angles = run(function, position, counts[None])
    turns = [fractions.Fraction(w) for w in wavelength ** (-np.arange(4) / 4) / (2 * np.pi)]
    for row, column in np.ndindex(4, 6):
        parts = [float((start[row] + int(counts[column])) * t % 1) for t in turns]
        expected = np.cos(np.multiply(parts, 2 * np.pi)), np.sin(np.multiply(parts, 2 * np.pi))
        for a, e in zip(angles, expected, strict=True):
            np.testing.assert_allclose(to_numpy(a)[row, column], e, atol=2e-6)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_an_rnn_of_low_precision_is_refused(x, policy):
    """As Keras casts the states: a position of bfloat16 counts to 256."""
    cell = make("plain", dtype=policy).cell
    with pytest.raises(ValueError, match=r"`states` must hold tensors of dtype float32.*state S"):
        keras.layers.RNN(cell, dtype=policy)(x)


def twice(x):
    return 2 * x


def test_custom_feature_map(x, tmp_path):
    keras.saving.register_keras_serializable(package="test")(twice)
    inputs = keras.Input((None, 16))
    layer = make("plain", feature_map=twice, scale=0.5, output_norm=False)
    model = keras.Model(inputs, layer(inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[1].cell.feature_map is twice
    twin = make("plain", scale=0.5, output_norm=False)
    twin.set_weights(layer.get_weights())
    # Twice the queries, twice the keys, each of which comes twice.
    twin.cell.output_dense.kernel.assign(16 * layer.cell.output_dense.kernel)
    assert relative_error(loaded.predict(x, verbose=0), call(twin, x)) <= 1e-5


def test_regularizers_and_constraints(x):
    layer = make("plain", kernel_regularizer="l1", bias_regularizer="l2", output_gate="silu")
    for weight in layer.trainable_weights:
        weight.assign(keras.ops.ones(weight.shape))
    layer(x)
    kernels = [w for w in layer.weights if w.name == "kernel"]
    biases = [w for w in layer.weights if w.name == "bias"]
    expected = sum(0.01 * np.prod(w.shape) for w in (*kernels, *biases))
    assert len(kernels) == len(biases) == len(layer.losses) / 2 == 5
    assert relative_error(sum(layer.losses), np.float64(expected)) <= 1e-5
    layer = make("plain", kernel_constraint="non_neg", bias_constraint="max_norm")
    constraints = {(w.name, type(w.constraint).__name__) for w in layer.cell.output_dense.weights}
    assert constraints == {("kernel", "NonNeg"), ("bias", "MaxNorm")}


def test_weight_names():
    layer = layers.HLA(4, 8, decay="learned", conv_kernel_size=None, name="mixer")
    layer.build((None, None, 16))
    assert [w.path for w in layer.weights] == [
        "mixer/cell/query/kernel",
        "mixer/cell/query/bias",
        "mixer/cell/key/kernel",
        "mixer/cell/key/bias",
        "mixer/cell/value/kernel",
        "mixer/cell/value/bias",
        "mixer/cell/output/kernel",
        "mixer/cell/output/bias",
        "mixer/cell/decay/logit",
        "mixer/cell/norm/scale",
    ]
