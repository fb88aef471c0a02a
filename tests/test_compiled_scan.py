"""A compiled loop gives what its step gives, called for entry after entry."""

import keras
from keras import ops
import numpy as np
import pytest

from keras_hla.backend.compiling import compiled_scan

only_torch = pytest.mark.skipif(keras.config.backend() != "torch", reason="is about torch alone")


def tensors(*arrays):
    return tuple(ops.convert_to_tensor(x, "float32") for x in arrays)


def test_values_of_variables_may_change(rng):
    matrix = keras.Variable(rng.standard_normal((3, 3)), dtype="float32")

    def step(state, entries):
        (x,) = state
        (y,) = entries
        x = ops.tanh(x @ ops.transpose(matrix) + y)
        return ops.sum(x, axis=-1), (x,)

    scan = compiled_scan(step, [matrix])
    for batch in (2, 5, 2):
        x, inputs = rng.standard_normal((batch, 3)), rng.standard_normal((4, batch, 3))
        outputs, (last,) = scan(tensors(x), tensors(inputs))
        expected = []
        for y in inputs:
            x = np.tanh(x @ ops.convert_to_numpy(matrix).T + y)
            expected.append(x.sum(-1))
        np.testing.assert_allclose(ops.convert_to_numpy(last), x, atol=1e-5)
        np.testing.assert_allclose(ops.convert_to_numpy(outputs), expected, atol=1e-5)
        matrix.assign(rng.standard_normal((3, 3)))


def test_one_tensor_may_be_given_twice():
    def step(state, entries):
        x, y = state
        return 10 * x + y, (x + entries[0], y + entries[1])

    (zero, inputs) = tensors([0], [[1], [2], [3]])
    for state in ((zero, zero), tensors([0], [0])):
        outputs, (x, y) = compiled_scan(step, [])(state, (inputs, inputs**2))
        np.testing.assert_array_equal(ops.convert_to_numpy(outputs)[:, 0], [0, 11, 35])
        assert (float(x[0]), float(y[0])) == (6, 14)


def shapes(x):
    """Changes of shape in a row, of which some keep the order of the elements and some do not."""
    x = ops.swapaxes(ops.reshape(x, (2, 1, 3)), 0, 1)  # (1, 2, 3)
    x = ops.swapaxes(x, 1, 2)[0]  # (3, 2)
    x = ops.reshape(x[None, :, :, None], (2, 1, 3))[:, 0]
    x = ops.broadcast_to(x, (2, 3))[:, None]
    return ops.reshape(ops.flip(ops.transpose(x, (2, 1, 0))[:, 0], axis=1), (6,))


def test_changes_of_shape_are_as_they_are(rng):
    scan = compiled_scan(lambda state, entries: (shapes(state[0] + entries[0]), state), [])
    x, inputs = rng.standard_normal(6), rng.standard_normal((3, 6))
    outputs, _ = scan(tensors(x), tensors(inputs))
    expected = [ops.convert_to_numpy(shapes(*tensors(x + y))) for y in inputs]
    np.testing.assert_allclose(ops.convert_to_numpy(outputs), expected, atol=1e-6)


@only_torch
def test_what_is_written_in_place():
    """Of a state, of what does not depend on the entry, and of a part of another tensor."""

    def step(state, entries):
        total, count = state
        (x,) = entries
        ones = ops.ones((2,)).add_(1)  # not once for all entries
        part = ops.zeros((2, 2))
        part[0].add_(x)
        return part[0] + ones, (total.add_(x), count + ones)

    for used in (2, 1):  # With the last state alone, nothing is written to that is read again.
        scan = compiled_scan(step if used == 2 else lambda s, e: (e[0], step(s, e)[1]), [])
        outputs, (total, count) = scan(tensors([0, 0], [0, 0]), tensors([[1, 2], [3, 4]]))
        expected = [[3, 4], [5, 6]] if used == 2 else [[1, 2], [3, 4]]
        np.testing.assert_array_equal(ops.convert_to_numpy(outputs), expected)
        np.testing.assert_array_equal(ops.convert_to_numpy(total), [4, 6])
        np.testing.assert_array_equal(ops.convert_to_numpy(count), [4, 4])


@only_torch
def test_random_numbers_are_drawn_for_each_entry():
    import torch

    def step(state, entries):
        return torch.rand(3) + entries[0], state

    outputs, _ = compiled_scan(step, [])(tensors([0]), tensors([[0], [0]]))
    assert not np.array_equal(*ops.convert_to_numpy(outputs))


@only_torch
def test_a_step_that_fails_says_why():
    def step(state, entries):
        raise ValueError("of the step")

    with (
        pytest.warns(UserWarning, match="of the step"),
        pytest.raises(ValueError, match="of the step"),
    ):
        compiled_scan(step, [])(tensors([0]), tensors([[0]]))
