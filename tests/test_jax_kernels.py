"""The kernels under JAX, as far as they go without a GPU."""

import importlib.util

import pytest
from scripts import run_python

KERNELS = {
    *("forward_kernel", "backward_kernel", "span_kernel", "decay_kernel", "decay_gradient_kernel"),
    *("convolution_kernel", "convolution_gradient_kernel", "norm_kernel", "norm_gradient_kernel"),
    *("gate_kernel", "gate_gradient_kernel", "rotary_kernel"),
}


@pytest.mark.skipif(
    importlib.util.find_spec("jax_triton") is None, reason="jax-triton is not installed"
)
def test_gradients_lower_for_cuda():
    printed = run_python("tests/lower_for_cuda.py", backend="jax")
    assert set(printed.split()) == KERNELS
