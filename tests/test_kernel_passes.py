"""The passes that are found in the chain of an operator, and which chains are more than passes."""

import dataclasses

from keras import ops
import numpy as np
import pytest

from keras_hla import operators
from keras_hla.kernels.passes import Pass, passes_of


def test_a_ridge_is_a_third_pass():
    """It is a multiple of the pass, and adds the output of the second."""
    for ridge in (0.5, np.float32(0.5)):
        *_, second, third = passes_of(operators.HLA2(ridge))
        assert second == Pass(1, "query", "pass 0", "value", 2, "pass 1")
        assert third == Pass(2, "query", "query", "value", 1, "sum at pass 2", 0.5, "pass 1", 1.0)


def test_a_ridge_without_the_mask_adds_queries():
    first, second = passes_of(operators.HLA2Unmasked(0.5))
    assert first == Pass(0, "query", "key", "key", 1, "sum at pass 0", 1.0, "query", 0.5)
    assert second == Pass(1, "sum at pass 0", "query", "value", 1, "pass 1")
    assert all(x.added is None for x in passes_of(operators.HLA2Unmasked()))


def read_sum_and_part(scan, P, E, query, key, value):
    first, P = scan(query, key, value, P)
    second, E = scan(query, key, first + value, E)
    return first + second, (P, E)


def add_two_inputs(scan, P, E, query, key, value):
    first, P = scan(query, key, value, P)
    second, E = scan(query, key, first + query + key, E)
    return second, (P, E)


def add_no_pass(scan, P, E, query, key, value):
    first, P = scan(query + key, key, value, P)
    second, E = scan(query, key, first, E)
    return second, (P, E)


def multiply_tensors(scan, P, E, query, key, value):
    first, P = scan(query, key, value, P)
    second, E = scan(query, key, first, E)
    return second * value, (P, E)


def add_a_number(scan, P, E, query, key, value):
    first, P = scan(query, key, value, P)
    second, E = scan(query, key, first, E)
    return second + 1, (P, E)


def call_a_function(scan, P, E, query, key, value):
    first, P = scan(query, key, ops.exp(value), P)
    second, E = scan(query, key, first, E)
    return second, (P, E)


def read_elements(scan, P, E, query, key, value):
    first, P = scan(query, key, value[..., :1], P)
    second, E = scan(query, key, first, E)
    return second, (P, E)


def exchange_states(scan, P, E, query, key, value):
    first, P = scan(query, key, value, P)
    second, E = scan(query, key, first, E)
    return second, (E, P)


def change_a_state(scan, P, E, query, key, value):
    first, P = scan(query, key, value, P)
    second, E = scan(query, key, first, E)
    return second, (P, 2 * E)


def use_a_state_twice(scan, P, E, query, key, value):
    first, P = scan(query, key, value, P)
    second, P = scan(query, key, first, P)
    return second, (P, E)


def never_read_the_keys(scan, P, E, query, key, value):
    first, P = scan(query, query, value, P)
    second, E = scan(query, query, first, E)
    return second, (P, E)


def drop_an_output(scan, P, E, query, key, value):
    first, P = scan(query, key, value, P)
    _, E = scan(query, key, first, E)
    return first, (P, E)


@pytest.mark.parametrize(
    "chain",
    [
        read_sum_and_part,
        add_two_inputs,
        add_no_pass,
        multiply_tensors,
        add_a_number,
        call_a_function,
        read_elements,
        exchange_states,
        change_a_state,
        use_a_state_twice,
        never_read_the_keys,
        drop_an_output,
    ],
)
def test_more_than_passes(chain):
    @dataclasses.dataclass(frozen=True)
    class Custom(operators.AHLA):
        def chain(self, scan, state, query, key, value):
            return chain(scan, *state, query, key, value)

    assert passes_of(Custom()) is None
