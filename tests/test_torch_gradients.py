"""Gradients that are written by hand under PyTorch, checked against differences in float64."""

import keras
import numpy as np
import pytest

from keras_hla import layers, stages
from keras_hla.backend.tensors import gradients_are_recorded
from tests.backends import relative_error

if keras.config.backend() != "torch":
    pytest.skip("These functions are of PyTorch.", allow_module_level=True)

import torch

EPSILON = 1e-3


def rotate(x, cos, sin):
    return stages.rotate(x, cos, sin, scale=0.5)


def norm(x, scale):
    return stages.rms_norm(x, scale, EPSILON)


def rotate_numpy(x, cos, sin):
    pairs = np.split(x, 2, axis=-1)
    turned = (pairs[0] + 1j * pairs[1]) * (cos + 1j * sin)[:, :, None]
    return 0.5 * np.concatenate([turned.real, turned.imag], axis=-1)


def norm_numpy(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPSILON) * scale


def tensors(rng, dtype, *shapes):
    return [torch.tensor(rng.standard_normal(shape), dtype=dtype) for shape in shapes]


CASES = {
    "RotationBackward": (rotate, rotate_numpy, [(2, 3, 2, 4), (1, 3, 2), (1, 3, 2)]),
    "RootMeanSquareNormBackward": (norm, norm_numpy, [(2, 3, 2, 4), (4,)]),
}
cases = pytest.mark.parametrize("name", CASES)


@cases
def test_gradients_of_first_and_second_order_and_forward_mode(name, rng):
    function, _, shapes = CASES[name]
    x, *rest = tensors(rng, torch.float64, *shapes)
    trained = name.startswith("Root")
    arguments = [x.requires_grad_(), *(y.requires_grad_(trained) for y in rest)]
    assert torch.autograd.gradcheck(
        function,
        arguments,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert torch.autograd.gradgradcheck(
        function, arguments, check_fwd_over_rev=True, check_batched_grad=True
    )


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_when_they_are_taken(name, dtype, rng):
    function, definition, shapes = CASES[name]
    x, *rest = tensors(rng, dtype, *shapes)
    portable = function(x, *rest)
    assert portable.grad_fn is None
    output = function(x.requires_grad_(), *rest)
    assert type(output.grad_fn).__name__ == name
    expected = definition(*(y.detach().double().numpy() for y in (x, *rest)))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for found in (portable, output.detach()):
        assert relative_error(found, expected) <= tolerance
    with torch.no_grad():
        assert function(x, *rest).grad_fn is None


def test_angles_have_their_gradients(rng):
    arguments = [
        y.requires_grad_() for y in tensors(rng, torch.float64, *CASES["RotationBackward"][2])
    ]
    assert not gradients_are_recorded(*arguments)
    assert torch.autograd.gradcheck(rotate, arguments)


@cases
def test_batches_of_gradients(name, rng):
    function, _, shapes = CASES[name]
    x, *rest = tensors(rng, torch.float64, *shapes)
    batch = torch.stack([x, 2 * x, x - 1])
    gradient = torch.func.grad(lambda x: (function(x, *rest) ** 3).sum())
    expected = torch.stack([gradient(x) for x in batch])
    assert relative_error(torch.func.vmap(gradient)(batch), expected) <= 1e-12


def test_a_layer_takes_them(rng):
    """Its gradients are those in float64, where it stands alone in the graph of all operations."""
    x = torch.tensor(rng.standard_normal((2, 70, 8)), requires_grad=True)
    layer = layers.HLA(2, 4, dtype="float64")
    assert torch.autograd.gradcheck(lambda x: layer(x)[:, -3:], [x], fast_mode=True)
    names, nodes = set(), [layer(x).grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    assert names >= {*CASES}
