"""Calls under PyTorch neither copy numbers to the device nor read any: for both the CPU waits.

On a GPU it waits until all kernels that were launched are complete, and then launches too late.
"""

import keras
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from keras_hla import layers

OPTIONS = {"qk_norm": True, "output_gate": "silu", "decay": "input", "conv_kernel_size": 4}
LAYERS = {
    "block by kernels": (layers.HLADecoderBlock, {"implementation": "triton"}),
    "layer by kernels": (layers.HLA, {"implementation": "triton", **OPTIONS}),
    "states by kernels": (layers.HLA, {"implementation": "triton", "return_state": True}),
    "parts by kernels": (layers.HLA, {"implementation": "triton", "remat_length": 20}),
    "layer": (layers.HLA, {"implementation": "portable", **OPTIONS}),
    "ridge": (layers.HLA, {"ridge": 0.1, "feature_map": "softplus", "decay": "learned"}),
    "normalize": (layers.HLA, {"operator": "hla3", "normalize": True, "feature_map": "elu"}),
    "states": (layers.HLA, {"return_state": True, **OPTIONS}),
    "last output": (layers.HLA, {"return_sequences": False, **OPTIONS}),
    "rematerialization": (layers.HLA, {"remat_length": 20, **OPTIONS}),
    "dropout": (layers.HLADecoderBlock, {"dropout": 0.1}),
}


class Copies(TorchDispatchMode):
    """Records what makes a tensor of a number, or a number of a tensor."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.overloadpacket.__name__ in ("lift_fresh", "_local_scalar_dense", "nonzero"):
            self.found.append(function)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("given", ["nothing", "mask", "both"])
@pytest.mark.parametrize("name", LAYERS)
def test_no_number_is_copied(name, given):
    make, options = LAYERS[name]
    layer = make(2, 8, **options)
    layer.build((None, None, 16))
    x = torch.randn(2, 40, 16, requires_grad=True)
    arguments = {}
    if given in ("mask", "both"):
        arguments["mask"] = torch.rand(2, 40) < 0.7
    if given == "both":
        arguments["segment_ids"] = torch.arange(40).repeat(2, 1) // 15

    def step():
        found = layer(x, training=True, **arguments)
        output = found[0] if isinstance(found, tuple) else found
        torch.autograd.grad(output.sum(), [x, *(w.value for w in layer.trainable_weights)])

    step()  # which may make constants to keep
    with Copies() as copies:
        step()
    assert not copies.found


def test_it_would_be_seen():
    with Copies() as copies:
        keras.ops.maximum(torch.ones(2), 0)
        torch.ones(1).item()
    assert len(copies.found) == 2
