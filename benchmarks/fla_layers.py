"""Layers of flash-linear-attention, with the number and the size of heads of the HLA layers."""

from functools import partial

import torch

from benchmarks.peers_torch import fla_missing
from benchmarks.trainees import Announced, Step, Trainee, width


def layers(case, which):
    del case, which
    reason = fla_missing("fla.layers")
    return [
        Trainee(f"fla {name}", partial(_build, name), unavailable=reason, peer=peer)
        for name, peer in (("GatedLinearAttention", "fla_gla"), ("GatedDeltaNet", "fla_deltanet"))
    ]


def blocks(case, which):
    del case, which
    return []


models = blocks


def _build(name, case):
    """Float32 weights, and products in the dtype of the case."""
    import fla.layers

    sizes = {"hidden_size": width(case), "num_heads": case.heads, "expand_v": 1.0}
    sizes |= {"expand_k": 1.0} if name == "GatedLinearAttention" else {"head_dim": case.dim}
    layer = getattr(fla.layers, name)(**sizes).to("cuda")
    dtype = getattr(torch, case.dtype)

    def function(x, *weights):
        del weights  # they are the layer's own
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            return layer(x)[0]

    return Step(function, list(layer.parameters()), Announced("its Triton kernels", "*chunk"))
