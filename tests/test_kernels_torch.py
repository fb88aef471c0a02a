"""The kernels as PyTorch calls them: at once, compiled, with gradients of gradients."""

from backends import relative_error
from definitions import Reference, serial
from family import FORWARD, GRADIENT, draw, like
import keras
import numpy as np
import pytest
import torch

from keras_hla import kernels, ops
from keras_hla.kernels.launching import Launch, torch_launcher

KERNELS = {"implementation": "triton"}


def to_tensors(arrays, dtype="float32"):
    tensors = [keras.ops.convert_to_tensor(x, dtype) for x in arrays]
    return [x.requires_grad_() for x in tensors]


def test_calls_after_the_first(rng):
    """They launch what the first compiled, whatever the addresses of their tensors."""
    for offset in (0, 1, 0):
        inputs, _ = draw(rng, 40, "none", dim=16, value_dim=16)
        expected = Reference(serial, "hla2", inputs, None)
        (weight,) = like(rng, [expected.output])
        flat = to_tensors([np.append(np.zeros(offset), x) for x in (*inputs, weight)])
        *tensors, gradient = (x[offset:].view(weight.shape) for x in flat)
        output = ops.higher_order_attention(*tensors, **KERNELS)
        found = torch.autograd.grad(output, tensors, gradient)
        assert relative_error(output.detach(), expected.output) <= FORWARD
        for a, e in zip(found, expected.gradients(weight), strict=True):
            assert relative_error(a, e) <= GRADIENT


class Kernel:
    """In the place of a kernel, doubles a tensor, and takes note of what it is compiled for."""

    def __init__(self):
        self.compiled_for = []

    def __getitem__(self, grid):
        def launch(x, output):
            self.compiled_for.append(x.dtype)
            return self._compile(x.dtype)[grid](x, output)

        return launch

    def _compile(self, dtype):
        class Compiled:
            def __getitem__(self, grid):
                return self.launch

            def launch(self, x, output):
                assert x.dtype == dtype
                output.copy_(2 * x)
                return self

        return Compiled()


def test_a_launch_is_compiled_for_each_dtype_of_its_inputs():
    kernel = Kernel()
    launch = Launch(kernel, (1,), (), (((3,), "float32"),), {})
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16):
        x = torch.arange(3).to(dtype)
        (output,) = torch_launcher.run(launch, (x,))
        assert output.tolist() == [0, 2, 4]
    assert kernel.compiled_for == [torch.float32, torch.bfloat16]


def test_within_what_torch_compiles(rng):
    inputs, _ = draw(rng, 40, "none", dim=16, value_dim=16)

    def function(q, k, v):
        return 2 * ops.higher_order_attention(q, k, v, **KERNELS)

    expected = Reference(serial, "hla2", inputs, None)
    tensors = to_tensors(inputs)
    output = torch.compile(function, backend="aot_eager")(*tensors)
    found = torch.autograd.grad(output.sum(), tensors)
    assert relative_error(output.detach(), 2 * expected.output) <= FORWARD
    for a, e in zip(found, expected.gradients(np.full(output.shape, 2.0)), strict=True):
        assert relative_error(a, e) <= GRADIENT


def test_second_gradients_are_refused(rng):
    inputs, _ = draw(rng, 20, "none", dim=16, value_dim=16)
    tensors = to_tensors(inputs)
    output = ops.higher_order_attention(*tensors, **KERNELS)
    with pytest.raises(RuntimeError, match="no gradients of gradients"):
        torch.autograd.grad(output.sum(), tensors, create_graph=True)


def test_the_interpreter_is_never_chosen():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")  # where the choice is the kernels, or another reason
    assert kernels.choose() == ("portable", "the interpreter of the kernels is slow")
