"""The reference of the benchmarks, compared with the definitions of the tests."""

from definitions import index_sum
import numpy as np
import pytest
import torch

from benchmarks import reference
from benchmarks.cases import Case
from benchmarks.chains import CHAINS


def heads_first(x):
    return np.moveaxis(x, 2, 1).astype("float64")


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("operator", [*CHAINS, "softmax"])
def test_reference(operator, decay):
    case = Case.parse("2x3x150x4x5", decay=decay)
    inputs, cotangent, log_decay = case.arrays()
    tensors = [torch.from_numpy(x).double().requires_grad_() for x in inputs]
    g = torch.zeros(2, 150, 3) if log_decay is None else torch.from_numpy(log_decay)
    if operator == "softmax":
        output = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in tensors), is_causal=True
        ).transpose(1, 2)
    else:
        output = index_sum(operator, *tensors, g.double())
    gradients = torch.autograd.grad(output, tensors, torch.from_numpy(cotangent).double())

    q, k, v, do = map(heads_first, (*inputs, cotangent))
    g = None if log_decay is None else heads_first(log_decay)
    found, found_gradients = reference.by_matrices(operator, q, k, v, g, do)
    for x, y in zip([found, *found_gradients], [output, *gradients], strict=True):
        assert reference.relative_error(x, heads_first(y.detach().numpy())) < 1e-12

    g = None if g is None else g[1, 2]
    last = reference.on_long_sequence(operator, q[1, 2], k[1, 2], v[1, 2], g)
    assert len(last) == (reference.ROWS if operator == "softmax" else 150)
    assert reference.relative_error(last, found[1, 2][-len(last) :]) < 1e-12


def test_an_error_that_is_no_number_is_infinite():
    assert reference.relative_error(np.array([np.nan]), np.ones(1)) == np.inf


@pytest.mark.parametrize("text", ["1x2x3", "1x2x3x4x5x6", "0x1x1x1"])
def test_shapes(text):
    with pytest.raises(ValueError, match="heads x length"):
        Case.parse(text)
    assert Case.parse("1x2x3x4").value_dim == 4
    assert Case.parse("1x2x3x4x5").shape == "1x2x3x4x5"
