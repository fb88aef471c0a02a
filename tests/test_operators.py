"""Every operator, option and form against the float64 definitions."""

import itertools

from backends import relative_error, run, to_numpy, value_and_gradients
from definitions import Reference, index_sum, serial
from family import (
    FORMS,
    FORWARD,
    GRADIENT,
    PROBLEMS,
    VARIANTS,
    attend,
    attend_with_gradients,
    draw,
    draw_problem,
    draw_to_normalize,
    like,
    split,
)
import keras
import numpy as np
import pytest

from keras_hla import operators, ops

every_variant = pytest.mark.parametrize("variant", VARIANTS)
# The other forms without decay are in test_lengths.py, normalized ones further below.
every_problem = pytest.mark.parametrize(
    ("form", "problem"),
    [*(("chunked", problem) for problem in PROBLEMS), ("recurrent", "decay"), ("matrix", "decay")],
)


@every_variant
@every_problem
def test_forms_equal_the_index_sum(rng, variant, form, problem):
    inputs, log_decay, normalize = draw_problem(rng, 24, variant, problem)
    operator, options = split(variant)
    options["normalize"] = normalize
    expected = Reference(index_sum, operator, inputs, log_decay, **options)
    (weight,) = like(rng, [expected.output])
    if form == "chunked":
        options["chunk_size"] = 7
    (output,), found = attend_with_gradients(
        inputs, log_decay, [weight], operator=operator, form=form, **options
    )
    assert relative_error(output, expected.output) <= FORWARD
    for a, e in zip(found, expected.gradients(weight), strict=True):
        assert relative_error(a, e) <= GRADIENT


@every_variant
@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_states_in_and_out(rng, variant, form):
    inputs, log_decay = draw(rng, 70, "per_token")
    operator, options = split(variant)
    shapes = Reference(serial, operator, inputs, log_decay, **options).states
    state = like(rng, shapes)
    expected = Reference(serial, operator, inputs, log_decay, state, **options)
    weight, *weights = like(rng, [expected.output, *expected.states])
    if form == "chunked":
        options["chunk_size"] = 16
    (output, *last), found = attend_with_gradients(
        inputs, log_decay, [weight, *weights], state, operator=operator, form=form, **options
    )
    assert relative_error(output, expected.output) <= FORWARD
    for a, e in zip(last, expected.states, strict=True):
        assert relative_error(a, e) <= FORWARD
    for a, e in zip(found, expected.gradients(weight, weights), strict=True):
        assert relative_error(a, e) <= GRADIENT


@every_variant
def test_normalized_pieces_and_steps(rng, variant):
    inputs, log_decay = draw_to_normalize(rng, 30, variant)
    operator, options = split(variant)
    options |= {"normalize": True, "epsilon": 0.5}
    expected = Reference(serial, operator, inputs, log_decay, **options)
    options["operator"] = operator
    decays = (None, None) if log_decay is None else (log_decay[:, :29], log_decay[:, 29])
    _, state = attend([x[:, :29] for x in inputs], decays[0], return_state=True, **options)
    token, last = ops.attention_step(
        *(x[:, 29] for x in inputs), state, log_decay=decays[1], **options
    )
    assert relative_error(token, expected.output[:, 29]) <= FORWARD
    for a, e in zip(last, expected.states, strict=True):
        assert relative_error(a, e) <= FORWARD


@pytest.mark.parametrize("variant", ["linear", "hla2", "hla2 ridge", "ahla", "hla3"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("form", ["chunked", "matrix"])
def test_noncausal(rng, variant, normalize, form):
    inputs, _ = draw(rng, 24, "none", positive=normalize)
    operator, options = split(variant)
    options |= {"normalize": normalize, "causal": False}
    expected = Reference(index_sum, operator, inputs, **options)
    (weight,) = like(rng, [expected.output])
    (output,), found = attend_with_gradients(
        inputs, None, [weight], operator=operator, form=form, **options
    )
    assert relative_error(output, expected.output) <= FORWARD
    for a, e in zip(found, expected.gradients(weight), strict=True):
        assert relative_error(a, e) <= GRADIENT


def weigh(query, key, log_decay, **options):
    """`attention_weights` of arrays."""

    def function(query, key, *log_decay):
        return ops.attention_weights(query, key, log_decay=(*log_decay, None)[0], **options)

    return run(function, query, key, *([] if log_decay is None else [log_decay]))


@every_variant
def test_weights(rng, variant):
    inputs, log_decay = draw_to_normalize(rng, 24, variant)
    query, key, value = inputs
    operator, options = split(variant)
    for normalize in (False, True):
        options["normalize"] = normalize
        expected = Reference(index_sum, operator, inputs, log_decay, **options).output

        weights = to_numpy(weigh(query, key, log_decay, operator=operator, **options))
        assert weights.shape == (2, 2, 24, 24)
        output = np.einsum("bhtj,bjhd->bthd", weights, value)
        assert relative_error(output, expected) <= FORWARD


def test_noncausal_weights(rng):
    inputs, _ = draw(rng, 12, "none")
    expected = Reference(index_sum, "ahla", inputs, causal=False).output
    weights = to_numpy(weigh(*inputs[:2], None, operator="ahla", causal=False))
    output = np.einsum("bhtj,bjhd->bthd", weights, inputs[2])
    assert relative_error(output, expected) <= FORWARD


@pytest.mark.parametrize(
    ("variant", "decay"),
    [
        *((name, "per_token") for name in VARIANTS if "ridge" not in name),
        *((name, "none") for name in ("hla2 ridge", "hla3")),
    ],
)
def test_shared_keys_are_held_once(rng, variant, decay):
    """Four query heads, two or one key heads: as if the keys were repeated, but they are not."""
    operator, options = split(variant)
    names = operators.get(operator, **options).state_names
    key_heads = 1 if variant == "ahla" else 2
    inputs, _ = draw(rng, 40, "none", heads=4, key_heads=key_heads)
    log_decay = None if decay == "none" else draw(rng, 40, decay, heads=key_heads)[1]
    group = 4 // key_heads
    query, *shared = inputs
    repeated = [np.repeat(x, group, axis=2) for x in shared]
    decays = None if log_decay is None else np.repeat(log_decay, group, axis=2)
    expected = Reference(serial, operator, [query, *repeated], decays, **options)
    for form in ("chunked", "recurrent"):
        output, state = attend(
            inputs, log_decay, operator=operator, form=form, return_state=True, **options
        )
        assert relative_error(output, expected.output) <= FORWARD
        for name, a, e in zip(names, state, expected.states, strict=True):
            if name in "SPH":  # made of keys and values alone
                assert a.shape[1] == key_heads
            assert relative_error(a, e[:, :: 4 // a.shape[1]]) <= FORWARD
    matrix = attend(inputs, log_decay, operator=operator, form="matrix", **options)
    assert relative_error(matrix, expected.output) <= FORWARD


def test_shared_keys_with_decays_of_their_own(rng):
    """A decay per query head needs a key moment per query head."""
    (query, *shared), _ = draw(rng, 40, "none", heads=4, key_heads=2)
    log_decay = draw(rng, 40, "per_token", heads=4)[1]
    repeated = [np.repeat(x, 2, axis=2) for x in shared]
    expected = Reference(serial, "hla3", [query, *repeated], log_decay)
    for form in ("chunked", "recurrent"):
        output, state = attend(
            [query, *shared], log_decay, operator="hla3", form=form, return_state=True
        )
        assert [s.shape[1] for s in state] == [4, 4, 4]
        assert relative_error(output, expected.output) <= FORWARD
        for a, e in zip(state, expected.states, strict=True):
            assert relative_error(a, e) <= FORWARD


@every_variant
@pytest.mark.parametrize(
    ("form", "decay_heads"), [("chunked", 2), ("chunked", 4), ("recurrent", 2), ("matrix", 4)]
)
def test_gradients_with_shared_keys(rng, variant, form, decay_heads):
    """Of inputs, decays, and states in and out: several chunks, two query heads per key head."""
    inputs, _ = draw(rng, 24, "none", heads=4, key_heads=2, dim=4, value_dim=3)
    _, log_decay = draw(rng, 24, "per_token", heads=decay_heads)
    operator, options = split(variant)
    shapes = operators.get(operator, **options).state_shapes(decay_heads, 4, 4, 3)
    state = [] if form == "matrix" else like(rng, [np.empty((2, *shape)) for shape in shapes])
    expected = Reference(serial, operator, inputs, log_decay, state, **options)
    weight, *weights = like(rng, [expected.output, *expected.states])
    weights = weights if state else []
    if form == "chunked":
        options["chunk_size"] = 7
    (output, *last), found = attend_with_gradients(
        inputs, log_decay, [weight, *weights], state, operator=operator, form=form, **options
    )
    assert relative_error(output, expected.output) <= FORWARD
    for a, e in zip(last, expected.states if state else [], strict=True):
        assert relative_error(a, e) <= FORWARD
    for a, e in zip(found, expected.gradients(weight, weights), strict=True):
        assert relative_error(a, e) <= GRADIENT


@pytest.mark.parametrize("published", ["hla2_published", "hla3_published"])
def test_what_the_paper_prints_at_third_order_and_with_decay_is_another_operator(rng, published):
    operator = published.removesuffix("_published")
    for decay, equal in (("none", operator == "hla2"), ("constant", False)):
        inputs, log_decay = draw(rng, 24, decay)
        printed, causal = (attend(inputs, log_decay, operator=x) for x in (published, operator))
        error = relative_error(printed, causal)
        assert error <= FORWARD if equal else error > 0.01


def test_algorithm_3_keeps_the_terms_whose_maximum_is_reached_twice(rng):
    (q, k, v), _ = draw(rng, 12, "none", batch=1, heads=1)
    A = q[0, :, 0] @ k[0, :, 0].T
    expected = np.zeros((12, 5))
    for t in range(12):
        for i, j, m in np.ndindex(t + 1, t + 1, t + 1):
            if [i, j, m].count(max(i, j, m)) >= 2:
                expected[t] += A[t, i] * A[j, i] * A[j, m] * v[0, m, 0]
    output = ops.higher_order_attention(q, k, v, "hla3_published")
    assert relative_error(output[0, :, 0], expected) <= FORWARD


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "published" not in name])
@pytest.mark.parametrize("form", FORMS)
def test_packed_is_separate(rng, variant, form):
    """Packed sequences, with decay or without, some of their tokens masked."""
    decay = "per_token" if form == "recurrent" else "none"
    inputs, log_decay = draw(rng, 40, decay, dim=4, value_dim=3)
    operator, options = split(variant)
    ends = np.cumsum([0, 7, 1, 20, 12])
    segment_ids = np.repeat([[3, 1, 7, 1], [0, 1, 2, 3]], np.diff(ends), axis=1).astype("int32")
    mask = rng.random((2, 40)) < 0.8
    mask[:, [2, 7, 20, 30]] = True
    segment_ids[1] = np.where(mask[1], segment_ids[1], 9)  # what is masked is in no segment
    weight = rng.standard_normal((2, 40, 2, 3)).astype("float32")
    arrays = inputs if log_decay is None else [*inputs, log_decay]
    expected = np.zeros(weight.shape)
    slopes = [np.zeros(x.shape) for x in arrays]
    for row, (begin, end) in itertools.product(range(2), itertools.pairwise(ends)):
        segment = np.ix_([row], begin + np.flatnonzero(mask[row, begin:end]))
        q, k, v, *g = (x[segment] for x in arrays)
        alone = Reference(serial, operator, (q, k, v), *g, **options)
        expected[segment] = alone.output
        for whole, slope in zip(slopes, alone.gradients(weight[segment]), strict=True):
            whole[segment] = slope

    def function(q, k, v, *g):
        output = ops.higher_order_attention(
            *(q, k, v),
            operator,
            form,
            log_decay=g[0] if g else None,
            mask=keras.ops.convert_to_tensor(mask),
            segment_ids=keras.ops.convert_to_tensor(segment_ids),
            **({"chunk_size": 16} if form == "chunked" else {}),
            **options,
        )
        return keras.ops.sum(keras.ops.multiply(output, weight)), [output]

    (output,), found = value_and_gradients(function, arrays)
    assert relative_error(output, expected) <= FORWARD
    for a, e in zip(found, slopes, strict=True):
        assert relative_error(a, e) <= GRADIENT


@every_variant
def test_padded_is_alone(rng, variant):
    """Padding left, right and inside, with decay, outputs and gradients; NaN in the padding."""
    decay = "constant" if "published" in variant else "per_token"
    inputs, log_decay = draw(rng, 24, decay, dim=4, value_dim=3, batch=3)
    operator, options = split(variant)
    mask = np.ones((3, 24), bool)
    mask[0, :9] = mask[1, 15:] = mask[2, 5:16] = False
    mask[2, 10] = True
    arrays = [*inputs, log_decay]
    weight = np.where(mask[..., None, None], rng.standard_normal((3, 24, 2, 3)), 0)
    expected, slopes = np.zeros(weight.shape), [np.zeros(x.shape) for x in arrays]
    for row in range(3):
        tokens = np.ix_([row], np.flatnonzero(mask[row]))
        q, k, v, g = (x[tokens] for x in arrays)
        alone = Reference(serial, operator, (q, k, v), g, **options)
        expected[tokens] = alone.output
        for whole, slope in zip(slopes, alone.gradients(weight[tokens]), strict=True):
            whole[tokens] = slope
    for x in arrays:
        x[~mask] = np.nan

    def function(q, k, v, g):
        output = ops.higher_order_attention(
            *(q, k, v),
            log_decay=g,
            mask=keras.ops.convert_to_tensor(mask),
            chunk_size=16,
            operator=operator,
            **options,
        )
        return keras.ops.sum(keras.ops.multiply(output, weight.astype("float32"))), [output]

    (output,), found = value_and_gradients(function, arrays)
    assert relative_error(output, expected) <= FORWARD
    for a, e in zip(found, slopes, strict=True):
        assert relative_error(a, e) <= GRADIENT
