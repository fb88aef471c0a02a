"""Lengths, chunk sizes and decays of the second order, one by one."""

from backends import relative_error, run_with_unknown_length, run_with_xla
from definitions import Reference, serial
from family import FORMS, FORWARD, GRADIENT, attend, attend_with_gradients, draw, like
import numpy as np
import pytest

from keras_hla import ops

every_decay = pytest.mark.parametrize("decay", ["none", "constant", "per_token"])
# Around the chunk sizes, and several chunks, the last one full or not.
SIZES = [(1, 64), (2, 64), (63, 64), (64, 64), (65, 64), (65, 1), (500, 16), (500, 64), (500, 1000)]


@every_decay
@pytest.mark.parametrize(("length", "chunk_size"), SIZES)
def test_chunked(rng, decay, length, chunk_size):
    inputs, log_decay = draw(rng, length, decay)
    state = like(rng, [np.empty((2, 2, 8, 8)), np.empty((2, 2, 8, 5))])
    expected = Reference(serial, "hla2", inputs, log_decay, state)
    output, last = attend(inputs, log_decay, state, return_state=True, chunk_size=chunk_size)
    assert relative_error(output, expected.output) <= FORWARD
    for a, e in zip(last, expected.states, strict=True):
        assert relative_error(a, e) <= FORWARD


@pytest.mark.parametrize("length", [1, 65, 500])
@every_decay
@pytest.mark.parametrize("form", ["recurrent", "matrix"])
def test_recurrent_and_matrix(rng, decay, length, form):
    inputs, log_decay = draw(rng, length, decay)
    expected = Reference(serial, "hla2", inputs, log_decay).output
    assert relative_error(attend(inputs, log_decay, form=form), expected) <= FORWARD


@pytest.mark.parametrize("length", [500])
@every_decay
@pytest.mark.parametrize("form", FORMS)
def test_gradients(rng, decay, length, form):
    inputs, log_decay = draw(rng, length, decay)
    expected = Reference(serial, "hla2", inputs, log_decay)
    (weight,) = like(rng, [expected.output])
    _, found = attend_with_gradients(inputs, log_decay, [weight], form=form)
    for a, e in zip(found, expected.gradients(weight), strict=True):
        assert relative_error(a, e) <= GRADIENT


@pytest.mark.parametrize("operator", ["hla2", "hla2_published"])  # with, without exclusive passes
@pytest.mark.parametrize("length", [5, 3000])
@pytest.mark.parametrize("decay", ["none", "per_token"])
def test_length_unknown_at_trace_time(rng, operator, length, decay):
    inputs, log_decay = draw(rng, length, decay, batch=1)
    expected = Reference(serial, operator, inputs, log_decay).output

    def function(q, k, v, *g):
        return ops.higher_order_attention(
            q, k, v, operator, log_decay=g[0] if g else None, chunk_size=16
        )

    arrays = inputs if log_decay is None else [*inputs, log_decay]
    assert relative_error(run_with_unknown_length(function, *arrays), expected) <= FORWARD


@pytest.mark.parametrize("operator", ["hla2", "ahla", "hla3"])
def test_xla(rng, operator):
    inputs, log_decay = draw(rng, 100, "per_token")
    expected = Reference(serial, operator, inputs, log_decay).output

    def function(q, k, v, g):
        return ops.higher_order_attention(q, k, v, operator, log_decay=g)

    assert relative_error(run_with_xla(function, *inputs, log_decay), expected) <= FORWARD


@pytest.mark.parametrize("operator", ["linear", "hla2"])
def test_step(rng, operator):
    inputs, log_decay = draw(rng, 5, "per_token")
    expected = Reference(serial, operator, inputs, log_decay)
    state = [np.zeros(s.shape, "float32") for s in expected.states]
    for t in range(5):
        output, state = ops.attention_step(
            *(x[:, t] for x in inputs), state, operator, log_decay=log_decay[:, t]
        )
        assert relative_error(output, expected.output[:, t]) <= FORWARD
    for a, e in zip(state, expected.states, strict=True):
        assert relative_error(a, e) <= FORWARD


def test_causal_linear_attention_is_first_order(rng):
    inputs, log_decay = draw(rng, 100, "per_token")
    state = like(rng, [np.empty((2, 2, 8, 5))])
    expected = Reference(serial, "linear", inputs, log_decay, state)
    output, last = ops.causal_linear_attention(
        *inputs, log_decay=log_decay, initial_state=state, return_state=True, chunk_size=16
    )
    assert relative_error(output, expected.output) <= FORWARD
    assert relative_error(last[0], expected.states[0]) <= FORWARD
