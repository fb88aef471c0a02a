"""The decoder block: what it computes, streaming, masks, packing, configs and errors."""

from backends import call, relative_error, run, to_numpy
import keras
import numpy as np
import pytest

from keras_hla import layers

EVERY_OPTION = {
    "value_dim": 6,
    "num_key_value_heads": 2,
    "operator": "hla3",
    "qk_norm": True,
    "feature_map": "elu_plus_one",
    "output_gate": "silu",
    "dropout": 0.1,
}


def make(**options):
    block = layers.HLADecoderBlock(**{"num_heads": 4, "key_dim": 4, **options})
    block.build((None, None, 12))
    return block


@pytest.fixture
def x(rng):
    return rng.standard_normal((2, 40, 12)).astype("float32")


def test_computes_what_it_says(x):
    block = make(intermediate_dim=20, norm_epsilon=1e-3)
    for norm in (block.mixer_norm, block.mlp_norm):  # so that their scales matter
        norm.scale.assign(keras.random.uniform((12,), 0.5, 1.5, seed=3))
    mixer = layers.HLA(4, 4, use_bias=False)
    mixer.build((None, None, 12))
    mixer.set_weights(block.mixer.get_weights())

    def norm(x, layer):
        rms = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-3)
        return x / rms * to_numpy(layer.scale)

    exact = x.astype("float64")
    y = exact + to_numpy(call(mixer, norm(exact, block.mixer_norm)))
    gate, up, down = (
        to_numpy(d.kernel) for d in (block.gate_dense, block.up_dense, block.down_dense)
    )
    assert gate.shape == up.shape == down.T.shape == (12, 20)
    hidden = norm(y, block.mlp_norm)
    opening = hidden @ gate
    expected = y + (opening / (1 + np.exp(-opening)) * (hidden @ up)) @ down
    assert relative_error(call(block, x), expected) <= 1e-5


def test_intermediate_dim():
    assert make().gate_dense.kernel.shape == (12, 32)  # 8/3 of 12, and a multiple of 16
    block = layers.HLADecoderBlock(4, 4)
    block.build((None, None, 96))
    assert block.gate_dense.kernel.shape == (96, 256)


@pytest.mark.parametrize("options", [{}, EVERY_OPTION])
def test_a_model_of_two_blocks_streams(x, options):
    """In pieces of 1, 7 and 32 tokens, each with the states after the one before."""
    blocks = [make(return_state=True, **options) for _ in range(2)]
    tokens = keras.Input((None, 12))
    states = [[keras.Input(size) for size in block.cell.state_size] for block in blocks]
    h, last = tokens, []
    for block, state in zip(blocks, states, strict=True):
        h, *new = block(h, initial_state=state)
        last.append(new)
    model = keras.Model([tokens, *states], [h, *last])

    def step(x, *s):
        half = len(s) // 2
        return model([x, list(s[:half]), list(s[half:])])

    def advance(x, states):
        output, *states = run(step, x, *(s for state in states for s in state))
        return to_numpy(output), states

    zeros = [[to_numpy(s) for s in block.get_initial_state(2)] for block in blocks]
    whole, end = advance(x, zeros)
    assert relative_error(whole, call(blocks[1], to_numpy(call(blocks[0], x)[0]))[0]) <= 1e-5
    state, outputs = zeros, []
    for piece in np.split(x, [1, 8], axis=1):
        output, state = advance(piece, state)
        outputs.append(output)
    assert relative_error(np.concatenate(outputs, axis=1), whole) <= 1e-5
    state, outputs = zeros, []
    for t in range(12):
        output, state = advance(x[:, t : t + 1], state)
        outputs.append(output)
    assert relative_error(np.concatenate(outputs, axis=1), whole[:, :12]) <= 1e-5
    assert [len(s) for s in end] == [len(block.cell.state_size) for block in blocks]


def test_masked_tokens_do_not_exist(x, rng):
    block = make(return_state=True)
    keep = rng.random(40) < 0.6
    padded = np.where(keep[:, None], x, np.nan).astype("float32")
    alone, *expected = call(block, x[:, keep])
    output, *states = call(block, padded, mask=np.broadcast_to(keep, (2, 40)))
    assert np.all(np.isfinite(to_numpy(output)))
    assert relative_error(to_numpy(output)[:, keep], alone) <= 1e-5
    for a, b in zip(states, expected, strict=True):
        assert relative_error(a, b) <= 1e-5


def test_masks_pass_through_a_stack(rng):
    """Right padding, from the embedding to the last block."""
    tokens = rng.integers(1, 20, (2, 30))
    tokens[0, 20:] = 0
    inputs = keras.Input((None,), dtype="int32")
    h = keras.layers.Embedding(20, 12, mask_zero=True)(inputs)
    for _ in range(2):
        h = layers.HLADecoderBlock(4, 4)(h)
    model = keras.Model(inputs, h)
    padded = model.predict(tokens, verbose=0)
    alone = model.predict(tokens[:1, :20], verbose=0)
    assert relative_error(padded[:1, :20], alone) <= 1e-5


def test_packed_sequences_are_separate(x):
    block = make()
    segment_ids = np.repeat([[1, 2, 1]] * 2, [20, 1, 19], axis=1)
    output = call(block, x, segment_ids=keras.ops.convert_to_tensor(segment_ids))
    alone = [to_numpy(call(block, piece)) for piece in np.split(x, [20, 21], axis=1)]
    assert relative_error(output, np.concatenate(alone, axis=1)) <= 1e-5


def test_stateful(x):
    inputs = keras.Input(batch_shape=(2, 10, 12))
    block = layers.HLADecoderBlock(4, 4, stateful=True)
    model = keras.Model(inputs, block(inputs))
    twin = make()
    for a, b in zip(twin.trainable_weights, block.trainable_weights, strict=True):
        a.assign(b)
    expected = call(twin, x)
    outputs = [model.predict(piece, verbose=0) for piece in np.split(x, 4, axis=1)]
    assert relative_error(np.concatenate(outputs, axis=1), expected) <= 1e-5
    block.reset_state()
    assert all(np.all(to_numpy(state) == 0) for state in block.states)


def test_config_and_file(x, tmp_path):
    inputs = keras.Input((None, 12))
    block = make(**EVERY_OPTION, intermediate_dim=20, norm_epsilon=1e-4, activation="gelu")
    config = block.get_config()
    assert {"norm_epsilon", "intermediate_dim", "activation", *EVERY_OPTION} <= set(config)
    assert layers.HLADecoderBlock.from_config(config).get_config() == config
    model = keras.Model(inputs, block(inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 0}, "`num_heads` must be a positive integer. Received: num_heads=0"),
        ({"intermediate_dim": 0}, "`intermediate_dim` must be .*Received: intermediate_dim=0"),
        ({"activation": "gelu2"}, "`activation` must be.*Received: activation='gelu2'"),
        ({"norm_epsilon": 0}, "`norm_epsilon` must be a positive.*norm_epsilon=0"),
        ({"dropout": 1.0}, r"`dropout` must be a number in \[0, 1\).*dropout=1.0"),
        ({"return_sequences": False}, "no argument `return_sequences`.*return_sequences=False"),
        ({"go_backwards": True}, "no argument `go_backwards`.*Received: go_backwards=True"),
        ({"output_shape": 7}, "no argument `output_shape`.*Received: output_shape=7"),
        ({"causal": False, "decay": 0.9}, "`causal=False`.*`decay` must be None.*decay=0.9"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        layers.HLADecoderBlock(**{"num_heads": 4, "key_dim": 8, **arguments})


def test_errors_of_calls(x):
    block = make()
    with pytest.raises(ValueError, match=r"`sequences` must have shape .*Received.*\(2, 12\)"):
        block(x[:, 0])
    with pytest.raises(ValueError, match="`mask` must have shape"):
        block(x, mask=np.ones((2, 5), bool))
    with pytest.raises(ValueError, match=r"`initial_state` must be a list.*'window', 'position'"):
        block(x, initial_state=[x])
