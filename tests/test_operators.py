"""Every operator in every form against its float64 definition."""

from backends import (
    gradients,
    relative_error,
    run,
    run_with_unknown_length,
    run_with_xla,
    to_numpy,
)
from definitions import Definition, index_sum
import keras
import numpy as np
import pytest

from keras_hla import ops

OPERATORS = ("hla2", "linear")
LENGTHS = (1, 2, 63, 64, 65, 500)
CHUNK_SIZES = (1, 16, 64, 1000)
# The first order is a link of every chain: a few lengths of its own are enough.
CASES = [("hla2", n) for n in LENGTHS] + [("linear", n) for n in (1, 65, 500)]
DECAYS = ("none", "constant", "per_token")
FORMS = ("chunked", "recurrent", "matrix")
FORWARD, GRADIENT = 1e-5, 1e-4  # largest relative RMS errors in float32


def draw(rng, length, decay, heads=2, key_heads=2, dim=8, value_dim=5, batch=2):
    q = rng.standard_normal((batch, length, heads, dim))
    k = rng.standard_normal((batch, length, key_heads, dim))
    v = rng.standard_normal((batch, length, key_heads, value_dim))
    log_decay = {
        "none": None,
        "constant": np.full((batch, length, heads), np.log(0.9)),
        "per_token": np.log(rng.uniform(0.5, 1.0, (batch, length, heads))),
    }[decay]
    inputs = [x.astype("float32") for x in (q, k, v)]
    return inputs, None if log_decay is None else log_decay.astype("float32")


def draw_state(rng, operator, heads=2, dim=8, value_dim=5, batch=2):
    columns = {"hla2": (dim, value_dim), "linear": (value_dim,)}[operator]
    shapes = [(batch, heads, dim, n) for n in columns]
    return [rng.standard_normal(shape).astype("float32") for shape in shapes]


def attend(inputs, log_decay, state=(), **options):
    """`higher_order_attention` on arrays."""

    def function(q, k, v, *rest):
        g, *rest = rest if log_decay is not None else (None, *rest)
        return ops.higher_order_attention(
            q, k, v, log_decay=g, initial_state=rest or None, **options
        )

    return run(function, *inputs, *([] if log_decay is None else [log_decay]), *state)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [1, 2, 17])
def test_matrix_definition_is_the_index_sum(rng, operator, decay, length):
    inputs, log_decay = draw(rng, length, decay)
    g = np.zeros(inputs[0].shape[:3]) if log_decay is None else log_decay.astype("float64")
    expected = index_sum(operator, *(x.astype("float64") for x in inputs), g)
    actual = Definition(operator, *inputs, log_decay).output
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", DECAYS)
def test_forms_equal_the_index_sum(rng, operator, form, decay):
    inputs, log_decay = draw(rng, 30, decay)
    g = np.zeros(inputs[0].shape[:3]) if log_decay is None else log_decay.astype("float64")
    expected = index_sum(operator, *(x.astype("float64") for x in inputs), g)
    size = {"chunk_size": 7} if form == "chunked" else {}
    actual = attend(inputs, log_decay, operator=operator, form=form, **size)
    assert relative_error(actual, expected) <= FORWARD


@pytest.mark.parametrize(("operator", "length"), CASES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_chunked(rng, operator, decay, length, chunk_size):
    inputs, log_decay = draw(rng, length, decay)
    state = draw_state(rng, operator)
    definition = Definition(operator, *inputs, log_decay, state)
    output, last = attend(
        inputs, log_decay, state, operator=operator, return_state=True, chunk_size=chunk_size
    )
    assert relative_error(output, definition.output) <= FORWARD
    for actual, expected in zip(last, definition.states, strict=True):
        assert relative_error(actual, expected) <= FORWARD


@pytest.mark.parametrize(("operator", "length"), CASES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("form", ["recurrent", "matrix"])
def test_recurrent_and_matrix(rng, operator, decay, length, form):
    inputs, log_decay = draw(rng, length, decay)
    expected = Definition(operator, *inputs, log_decay).output
    actual = attend(inputs, log_decay, operator=operator, form=form)
    assert relative_error(actual, expected) <= FORWARD


@pytest.mark.parametrize(("operator", "length"), CASES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("form", FORMS)
def test_gradients(rng, operator, decay, length, form):
    inputs, log_decay = draw(rng, length, decay)
    state = [] if form == "matrix" else draw_state(rng, operator)
    definition = Definition(operator, *inputs, log_decay, state)
    output_weight = rng.standard_normal(definition.output.shape)
    state_weights = [len(state) and rng.standard_normal(s.shape) for s in definition.states]
    expected = definition.gradients(output_weight, state_weights)
    decays = [] if log_decay is None else [log_decay]

    def loss(q, k, v, *rest):
        g, state = (rest[0], rest[1:]) if decays else (None, rest)
        result = ops.higher_order_attention(
            q,
            k,
            v,
            operator,
            form,
            log_decay=g,
            initial_state=list(state) or None,
            return_state=form != "matrix",
        )
        output, last = (result, []) if form == "matrix" else result
        total = keras.ops.sum(keras.ops.multiply(output, output_weight.astype("float32")))
        for s, w in zip(last, state_weights, strict=False):
            total = total + keras.ops.sum(keras.ops.multiply(s, w.astype("float32")))
        return total

    actual = gradients(loss, [*inputs, *decays, *state])
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) <= GRADIENT


def test_gradient_of_the_definition_against_finite_differences(rng):
    inputs, log_decay = draw(rng, 6, "per_token", batch=1)
    state = draw_state(rng, "hla2", batch=1)
    arrays = [x.astype("float64") for x in (*inputs, log_decay, *state)]
    weight = rng.standard_normal((1, 6, 2, 5))

    def loss(arrays):
        return np.sum(Definition("hla2", *arrays[:4], arrays[4:]).output * weight)

    found = Definition("hla2", *arrays[:4], arrays[4:]).gradients(weight, [0, 0])
    step = 1e-6
    for n, gradient in enumerate(found):
        direction = rng.standard_normal(arrays[n].shape)
        ahead, behind = list(arrays), list(arrays)
        ahead[n], behind[n] = arrays[n] + step * direction, arrays[n] - step * direction
        slope = (loss(ahead) - loss(behind)) / (2 * step)
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", ["none", "number", "per_key_head", "per_head"])
@pytest.mark.parametrize("key_heads", [1, 2])
def test_shared_key_heads(rng, form, decay, key_heads):
    inputs, _ = draw(rng, 70, "none", heads=4, key_heads=key_heads)
    log_decay = {
        "none": None,
        "number": np.float32(-0.1),
        "per_key_head": -rng.uniform(0, 0.5, (2, 70, key_heads)),
        "per_head": -rng.uniform(0, 0.5, 4),
    }[decay]
    query, *rest = inputs
    group = 4 // key_heads
    g = np.repeat(log_decay, group, axis=2) if decay == "per_key_head" else log_decay
    g = None if g is None else np.broadcast_to(g, (2, 70, 4))
    definition = Definition("hla2", query, *(np.repeat(x, group, axis=2) for x in rest), g)
    if form == "matrix":
        output = attend(inputs, log_decay, form=form)
    else:
        output, (S, F) = attend(inputs, log_decay, form=form, return_state=True)
        own_moments = decay == "per_head"
        assert tuple(S.shape) == (2, 4 if own_moments else key_heads, 8, 8)
        every = 1 if own_moments else group
        assert relative_error(S, definition.states[0][:, ::every]) <= FORWARD
        assert relative_error(F, definition.states[1]) <= FORWARD
    assert relative_error(output, definition.output) <= FORWARD


def test_causal_linear_attention_is_first_order(rng):
    inputs, log_decay = draw(rng, 100, "per_token")
    state = draw_state(rng, "linear")
    definition = Definition("linear", *inputs, log_decay, state)
    output, last = ops.causal_linear_attention(
        *inputs, log_decay=log_decay, initial_state=state, return_state=True, chunk_size=16
    )
    assert relative_error(output, definition.output) <= FORWARD
    assert relative_error(last[0], definition.states[0]) <= FORWARD


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("decay", DECAYS)
def test_step(rng, operator, decay):
    inputs, log_decay = draw(rng, 5, decay)
    state = draw_state(rng, operator)
    definition = Definition(operator, *inputs, log_decay, state)
    for t in range(5):
        g = None if log_decay is None else log_decay[:, t]
        token = [x[:, t] for x in inputs]
        output, state = ops.attention_step(*token, state, operator, log_decay=g)
        assert relative_error(output, definition.output[:, t]) <= FORWARD
    for actual, expected in zip(state, definition.states, strict=True):
        assert relative_error(actual, expected) <= FORWARD


@pytest.mark.parametrize("length", [5, 64, 3000])
@pytest.mark.parametrize("decay", ["none", "per_token"])
def test_length_unknown_at_trace_time(rng, length, decay):
    inputs, log_decay = draw(rng, length, decay, batch=1)
    expected = Definition("hla2", *inputs, log_decay).output

    def function(q, k, v, *g):
        return ops.higher_order_attention(q, k, v, log_decay=g[0] if g else None, chunk_size=16)

    arrays = inputs if log_decay is None else [*inputs, log_decay]
    actual = run_with_unknown_length(function, *arrays)
    assert relative_error(actual, expected) <= FORWARD


def test_xla(rng):
    inputs, log_decay = draw(rng, 100, "per_token")
    expected = Definition("hla2", *inputs, log_decay).output

    def function(q, k, v, g):
        return ops.higher_order_attention(q, k, v, log_decay=g)

    actual = run_with_xla(function, *inputs, log_decay)
    assert relative_error(actual, expected) <= FORWARD


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_low_precision_inputs_accumulate_in_float32(rng, dtype, form):
    inputs, log_decay = draw(rng, 200, "per_token")
    rounded = [keras.ops.cast(x, dtype) for x in inputs]
    exact = Definition("hla2", *map(to_numpy, rounded), log_decay).output
    output = ops.higher_order_attention(*rounded, form=form, log_decay=log_decay)
    best = keras.ops.cast(
        keras.ops.convert_to_tensor(exact.astype("float32")), dtype
    )  # rounded once, at the end
    assert output.dtype == rounded[0].dtype
    assert relative_error(output, exact) <= 1.01 * relative_error(best, exact)
