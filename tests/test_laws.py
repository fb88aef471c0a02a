"""Laws that hold for every operator, on random shapes, splits and decays."""

import functools

from backends import compiled, relative_error, run, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st
import keras
import numpy as np
import pytest

from keras_hla import ops

OPERATORS = ("hla2", "linear")
few = settings(max_examples=6, deadline=None, derandomize=True)


@st.composite
def problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    length = draw(st.integers(2, 90))
    key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    dim, value_dim = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    shape = (draw(st.integers(1, 2)), length)
    q = rng.standard_normal((*shape, key_heads * group, dim))
    k = rng.standard_normal((*shape, key_heads, dim))
    v = rng.standard_normal((*shape, key_heads, value_dim))
    heads = draw(st.sampled_from([key_heads, key_heads * group]))
    log_decay = -rng.uniform(0, draw(st.sampled_from([0.01, 1.0])), (*shape, heads))
    arrays = [x.astype("float32") for x in (q, k, v, log_decay)]
    cut = draw(st.integers(1, length - 1))
    return arrays, cut, draw(st.integers(1, 40))


@functools.cache
def attention(operator, **options):
    def function(q, k, v, log_decay, *state):
        return ops.higher_order_attention(
            q, k, v, operator, log_decay=log_decay, initial_state=list(state) or None, **options
        )

    return compiled(function)


def attend(arrays, operator, state=(), **options):
    tensors = map(keras.ops.convert_to_tensor, [*arrays, *state])
    return attention(operator, **options)(*tensors)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_any_split_is_the_whole(operator, form):
    @few
    @given(problems())
    def law(problem):
        arrays, cut, chunk_size = problem
        options = {"form": form, "return_state": True}
        if form == "chunked":
            options["chunk_size"] = chunk_size
        whole, last = attend(arrays, operator, **options)
        first, state = attend([x[:, :cut] for x in arrays], operator, **options)
        second, state = attend([x[:, cut:] for x in arrays], operator, state, **options)
        pieces = np.concatenate([to_numpy(first), to_numpy(second)], axis=1)
        assert relative_error(pieces, whole) <= 1e-5
        for a, b in zip(state, last, strict=True):
            assert relative_error(a, b) <= 1e-5

    law()


@pytest.mark.parametrize("operator", OPERATORS)
def test_step_by_step_is_the_whole(operator):
    @few
    @given(problems())
    def law(problem):
        arrays, _, chunk_size = problem
        whole = attend(arrays, operator, chunk_size=chunk_size)
        serial = attend(arrays, operator, form="recurrent")
        matrix = attend(arrays, operator, form="matrix")
        assert relative_error(whole, serial) <= 1e-5
        assert relative_error(matrix, serial) <= 1e-5

    law()


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("form", ["chunked", "recurrent", "matrix"])
def test_a_token_leaves_earlier_outputs_bitwise_equal(operator, form):
    @few
    @given(problems())
    def law(problem):
        arrays, cut, chunk_size = problem
        options = {"form": form}
        if form == "chunked":
            options["chunk_size"] = chunk_size
        before = to_numpy(attend(arrays, operator, **options))
        changed = [x.copy() for x in arrays]
        for x in changed[:3]:
            x[:, cut] = -3 * x[:, cut] + 1
        changed[3][:, cut] = -0.7
        after = to_numpy(attend(changed, operator, **options))
        np.testing.assert_array_equal(before[:, :cut], after[:, :cut])
        assert not np.array_equal(before[:, cut], after[:, cut])

    law()


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("form", ["chunked", "recurrent", "matrix"])
def test_masked_tokens_do_not_exist(operator, form):
    @few
    @given(problems(), st.integers(0, 2**32 - 1))
    def law(problem, seed):
        arrays, _, _ = problem
        batch, length = arrays[0].shape[:2]
        keep = np.random.default_rng(seed).random(length) < 0.6
        keep[0] = True
        padded = [x.copy() for x in arrays]
        for x in padded[:3]:
            x[:, ~keep] = np.nan
        alone = attend([x[:, keep] for x in arrays], operator, form=form)

        def masked(*tensors):
            *inputs, log_decay = tensors
            mask = np.broadcast_to(keep, (batch, length))
            return ops.higher_order_attention(
                *inputs, operator, form, log_decay=log_decay, mask=mask
            )

        output = to_numpy(run(masked, *padded))
        assert relative_error(output[:, keep], alone) <= 1e-5
        assert np.all(output[:, ~keep] == 0)

    law()
