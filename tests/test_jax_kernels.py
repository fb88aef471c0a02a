"""The kernels under JAX, as far as they go without a GPU."""

import importlib.util

import pytest
from scripts import run_python

KERNELS = {
    *("forward_kernel", "backward_kernel", "span_kernel", "decay_kernel", "decay_gradient_kernel"),
    *("convolution_kernel", "convolution_gradient_kernel", "norm_kernel", "norm_gradient_kernel"),
    *("gate_kernel", "gate_gradient_kernel", "rotary_kernel", "token_kernel"),
}


@pytest.mark.skipif(
    importlib.util.find_spec("jax_triton") is None, reason="jax-triton is not installed"
)
def test_gradients_lower_for_cuda():
    printed = run_python("tests/lower_for_cuda.py", backend="jax")
    assert set(printed.split()) == KERNELS


# Rows of batch and of heads on each of four devices, and their collectives: sums of gradients,
# where rows that are on several devices share decays or keys.
ON_OWN_ROWS = {
    "batch: 1 x 3",
    "batch and heads: 2 x 2",
    "heads: 4 x 1",
    "shared keys: 2 x 2 all-reduce",
    "one key: 2 x 2 all-reduce",
    "heads that do not divide: 2 x 3",
    "ridge: 2 x 2",
    "unmasked: 2 x 2",
    "model: 1 x 2 all-reduce",
}


def test_devices_launch_kernels_on_their_own_rows():
    printed = run_python("tests/kernels_over_devices.py", backend="jax")
    assert set(printed.splitlines()) == ON_OWN_ROWS
