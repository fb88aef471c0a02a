"""Decays that forget all before a token, or nearly all, among mild ones."""

from backends import gradients, relative_error, run, to_numpy
from definitions import Reference, serial
from family import FORMS, FORWARD, GRADIENT, VARIANTS, attend, draw, like, split
import keras
import numpy as np
import pytest

from keras_hla import layers, ops

every_variant = pytest.mark.parametrize("variant", VARIANTS)
FORGET = 4  # the token whose decay is strong


def draw_decayed(rng, strong, length=12, heads=2):
    inputs, _ = draw(rng, length, "none", heads=heads)
    log_decay = np.full((2, length, heads), -0.37, "float32")
    log_decay[0, FORGET] = strong
    return inputs, log_decay


@every_variant
@pytest.mark.parametrize("strong", [-20.0, -120.0, -1e5, -1e9, -np.inf])
def test_outputs_and_states(rng, variant, strong):
    inputs, log_decay = draw_decayed(rng, strong)
    operator, options = split(variant)
    expected = Reference(serial, operator, inputs, log_decay, **options)
    for form in FORMS:
        sizes = (None, 3) if form == "chunked" else (None,)
        for size in sizes:
            returns = {} if form == "matrix" else {"return_state": True}
            result = attend(
                inputs, log_decay, form=form, chunk_size=size, **returns, **VARIANTS[variant]
            )
            output, states = result if returns else (result, expected.states)
            assert relative_error(output, expected.output) <= FORWARD
            after = np.s_[0, FORGET:]
            assert relative_error(to_numpy(output)[after], expected.output[after]) <= FORWARD
            for a, e in zip(states, expected.states, strict=True):
                assert relative_error(a, e) <= FORWARD


@every_variant
@pytest.mark.parametrize("strong", [-20.0, -1e9])
def test_gradients(rng, variant, strong):
    inputs, log_decay = draw_decayed(rng, strong)
    operator, options = split(variant)
    expected = Reference(serial, operator, inputs, log_decay, **options)
    weight = keras.ops.convert_to_tensor(like(rng, inputs)[2])

    def loss(q, k, v, g):
        output = ops.higher_order_attention(q, k, v, log_decay=g, chunk_size=5, **VARIANTS[variant])
        return keras.ops.sum(output * weight)

    found = gradients(loss, [*inputs, log_decay])
    for a, e in zip(found, expected.gradients(to_numpy(weight)), strict=True):
        assert relative_error(a, e) <= GRADIENT


def test_forgetting_needs_no_gradient_of_its_own(rng):
    inputs, log_decay = draw_decayed(rng, -np.inf)
    weight = keras.ops.convert_to_tensor(like(rng, inputs)[2])
    expected = Reference(serial, "hla2", inputs, log_decay).gradients(to_numpy(weight))

    def loss(q, k, v, g):
        return keras.ops.sum(ops.higher_order_attention(q, k, v, log_decay=g) * weight)

    for a, e in zip(gradients(loss, [*inputs, log_decay]), expected, strict=True):
        assert relative_error(a, e) <= GRADIENT


@pytest.mark.parametrize("operator", ["linear", "hla2", "ahla", "hla3"])
@pytest.mark.parametrize("strong", [-1e9, -np.inf])
def test_segments(rng, operator, strong):
    """Also where the strong decay is that of the first token of the right segment."""
    (q, k, v), log_decay = draw_decayed(rng, strong)
    expected = Reference(serial, operator, (q, k, v), log_decay).states

    def summarize(q, k, v, g):
        cuts = slice(FORGET), slice(FORGET, None)
        whole = ops.summarize(q, k, v, operator, g)
        sides = [
            ops.summarize(*(x[:, cut] for x in (q, k, v)), operator, g[:, cut]) for cut in cuts
        ]
        return [whole, ops.combine(*sides, operator)]

    for segment in run(summarize, q, k, v, log_decay):
        for a, e in zip(segment[: len(expected)], expected, strict=True):
            assert relative_error(a, e) <= FORWARD
        assert np.all(to_numpy(keras.ops.exp(segment[-1]))[0] == 0)


@pytest.mark.parametrize("form", FORMS)
def test_a_number_that_forgets_all_leaves_each_token_alone(rng, form):
    (q, k, v), _ = draw(rng, 20, "none")
    output = run(lambda *x: ops.higher_order_attention(*x, form=form, log_decay=-np.inf), q, k, v)
    q, k, v = (x.astype("float64") for x in (q, k, v))
    alone = np.sum(q * k, axis=-1, keepdims=True) ** 2 * v
    assert relative_error(output, alone) <= FORWARD


def test_a_log_decay_that_is_nan_does_not_go_unnoticed(rng):
    inputs, log_decay = draw_decayed(rng, np.nan)
    for form in FORMS:
        assert np.isnan(to_numpy(attend(inputs, log_decay, form=form))[0, FORGET]).all()


@pytest.mark.parametrize("strong", [-40.0, -1e4])
@pytest.mark.parametrize("form", ["chunked", "matrix"])
def test_sums_over_many_strong_decays_stay_exact(rng, form, strong):
    """Many tokens that forget, and after them a few that remember."""
    length, mild = 1100, 40
    inputs, _ = draw(rng, length, "none", heads=1)
    log_decay = np.full((2, length, 1), strong, "float32")
    log_decay[:, -mild:] = -0.01
    expected = Reference(serial, "hla2", inputs, log_decay).output
    size = {"chunk_size": length} if form == "chunked" else {}
    output = to_numpy(attend(inputs, log_decay, form=form, **size))
    assert relative_error(output, expected) <= FORWARD
    assert relative_error(output[:, -mild:], expected[:, -mild:]) <= FORWARD


@pytest.mark.parametrize("form", FORMS)
def test_many_packed_sequences(rng, form):
    """Three tokens each, in one row: each is as it would be alone."""
    count, each = 750, 3
    inputs, log_decay = draw(rng, each, "per_token", heads=1, batch=count)
    expected = Reference(serial, "hla2", inputs, log_decay).output
    packed = [x.reshape(1, count * each, *x.shape[2:]) for x in (*inputs, log_decay)]
    ids = np.repeat(np.arange(count), each)[None]
    output = run(
        lambda q, k, v, g: ops.higher_order_attention(
            q, k, v, form=form, log_decay=g, segment_ids=ids
        ),
        *packed,
    )
    assert relative_error(output, expected.reshape(output.shape)) <= FORWARD


def test_weights_of_strong_decays(rng):
    (q, k, _), log_decay = draw_decayed(rng, -1e9)
    values = np.broadcast_to(np.eye(12)[None, :, None], (2, 12, 2, 12))
    expected = Reference(serial, "hla2", (q, k, values), log_decay).output
    weights = run(lambda q, k, g: ops.attention_weights(q, k, log_decay=g), q, k, log_decay)
    assert relative_error(np.swapaxes(to_numpy(weights), 1, 2), expected) <= FORWARD


def test_decays_computed_from_large_inputs(rng):
    """The layer is its cell, token by token, where a token forgets all before it."""
    layer = layers.HLA(num_heads=2, key_dim=4, decay="input", conv_kernel_size=None)
    x = rng.standard_normal((2, 20, 6)).astype("float32")
    layer.build(x.shape)
    dense = layer.cell.log_decay.logit_dense
    dense.kernel.assign(np.full(dense.kernel.shape, 1.0))
    x[:, 7] -= 1e6
    cell = keras.layers.RNN(layer.cell, return_sequences=True, unroll=True)
    assert relative_error(run(layer, x), run(cell, x)) <= FORWARD
