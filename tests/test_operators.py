"""Every operator, option and form against the float64 definitions."""

from backends import relative_error, run, to_numpy
from definitions import Reference, index_sum, serial
from family import (
    FORMS,
    FORWARD,
    GRADIENT,
    VARIANTS,
    attend,
    attend_with_gradients,
    draw,
    draw_to_normalize,
    like,
    split,
)
import numpy as np
import pytest

from keras_hla import operators, ops

PROBLEMS = ("none", "decay", "normalized")
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_problem = pytest.mark.parametrize("problem", PROBLEMS)


def draw_problem(rng, length, variant, problem):
    """The inputs, the log-decay, and whether outputs are normalized."""
    if problem == "normalized":
        return *draw_to_normalize(rng, length, variant), True
    if problem == "decay":  # the paper's is constant
        problem = "constant" if "published" in variant else "per_token"
    return *draw(rng, length, problem), False


@every_variant
@every_problem
def test_definitions_agree(rng, variant, problem):
    inputs, log_decay, normalize = draw_problem(rng, 17, variant, problem)
    operator, options = split(variant)
    sums, steps = (
        Reference(definition, operator, inputs, log_decay, normalize=normalize, **options)
        for definition in (index_sum, serial)
    )
    weight = rng.standard_normal(sums.output.shape)
    assert relative_error(steps.output, sums.output) <= 1e-11
    for a, b in zip(steps.gradients(weight), sums.gradients(weight), strict=True):
        assert relative_error(a, b) <= 1e-10


def test_gradients_of_the_definition_against_finite_differences(rng):
    inputs, log_decay = draw(rng, 6, "per_token", batch=1)
    arrays = [x.astype("float64") for x in (*inputs, log_decay)]
    weight = rng.standard_normal((1, 6, 2, 5))

    def loss(arrays):
        return np.sum(Reference(index_sum, "hla3", arrays[:3], arrays[3]).output * weight)

    found = Reference(index_sum, "hla3", inputs, log_decay).gradients(weight)
    step = 1e-6
    for n, gradient in enumerate(found):
        direction = rng.standard_normal(arrays[n].shape)
        ahead, behind = list(arrays), list(arrays)
        ahead[n], behind[n] = arrays[n] + step * direction, arrays[n] - step * direction
        slope = (loss(ahead) - loss(behind)) / (2 * step)
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-6)


@every_variant
@every_problem
@pytest.mark.parametrize("form", FORMS)
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


@every_variant
@pytest.mark.parametrize("decay", ["none", "per_token"])
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
