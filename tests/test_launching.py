"""Launches of kernels under PyTorch."""

import torch

from keras_hla.kernels.launching import Launch, torch_launcher


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
