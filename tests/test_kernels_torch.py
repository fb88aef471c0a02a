"""The kernels as PyTorch calls them: directly, compiled, and with gradients of gradients."""

from backends import relative_error
from definitions import Reference, serial
from family import FORWARD, GRADIENT, draw, like
import keras
import numpy as np
import pytest
import torch

from keras_hla import kernels, layers, ops
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


@pytest.mark.parametrize("options", [{}, {"ridge": 0.3}, {"ridge": 0.3, "masked": False}])
def test_within_what_torch_compiles(rng, options):
    inputs, _ = draw(rng, 40, "none", dim=16, value_dim=16)

    def function(q, k, v):
        return 2 * ops.higher_order_attention(q, k, v, **options, **KERNELS)

    expected = Reference(serial, "hla2", inputs, None, **options)
    tensors = to_tensors(inputs)
    output = torch.compile(function, backend="aot_eager", fullgraph=True)(*tensors)
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
    assert kernels.choose() == ("portable", "Triton interprets the kernels, which is slow")


def test_a_layer_is_one_function_or_tells_why_not(rng):
    x = keras.ops.convert_to_tensor(rng.standard_normal((1, 20, 8)), "float32")

    def why_not(policy="mixed_bfloat16", mask=None, **options):
        layer = layers.HLA(2, 4, decay="input", dtype=policy, **KERNELS, **options)
        layer.build(x.shape)
        return layer.why_not_fused(x, mask=mask)

    assert why_not() is why_not("float32", conv_kernel_size=3, qk_norm=True) is None
    assert why_not(mask=keras.ops.ones((1, 20), "bool")) is None
    assert why_not(return_state=True) is why_not(remat_length=8) is None
    assert "a mask and states" in why_not(mask=keras.ops.ones((1, 20), "bool"), return_state=True)
    assert "a feature map" in why_not(feature_map="relu")
    assert "not 'silu'" in why_not(output_gate="sigmoid")
    assert "float16" in why_not("mixed_float16")
    of_query = {".*query": keras.DTypePolicy("float32")}
    policy = keras.dtype_policies.DTypePolicyMap("mixed_bfloat16", of_query)
    assert "query" in why_not(policy)


def test_a_layer_that_was_one_function_follows_lora(rng):
    x = keras.ops.convert_to_tensor(rng.standard_normal((1, 20, 8)), "float32")
    layer = layers.HLA(2, 4, **KERNELS)
    before = layer(x)
    layer.cell.query_dense.enable_lora(2)
    layer.cell.query_dense.lora_kernel_b.assign(rng.standard_normal((2, 8)))
    after = layer(x)
    layer.implementation = "portable"
    assert relative_error(after.detach(), layer(x).detach()) <= FORWARD
    assert relative_error(after.detach(), before.detach()) > 0.01


def test_a_convolution_longer_than_a_tile(rng):
    """One function, whose gradient reads as many tokens after a token."""
    x = keras.ops.convert_to_tensor(rng.standard_normal((1, 90, 8)), "float32").requires_grad_()
    layer = layers.HLA(1, 16, conv_kernel_size=40, **KERNELS)
    layer.build(x.shape)
    results = []
    for implementation in ("triton", "portable"):
        layer.implementation = implementation
        weights = [v.value for v in layer.trainable_variables]
        results.append(torch.autograd.grad(layer(x).sin().sum(), [x, *weights]))
    for a, e in zip(*results, strict=True):
        assert relative_error(a, e) <= GRADIENT
