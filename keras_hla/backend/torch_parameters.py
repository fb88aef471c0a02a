"""Parameters that PyTorch replaces, of which Keras knows nothing."""

import sys

import torch


def are_replaced(layer):
    """Whether others take the place of the parameters that Keras' variables hold.

    `fully_shard` does so, and makes the layer an `FSDPModule`. What `torch.func` puts there is no
    parameter.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # which takes long to import
    if fsdp is not None and isinstance(layer, fsdp.FSDPModule):
        return True
    parameter = next(layer.parameters(), None)
    return parameter is not None and not isinstance(parameter, torch.nn.Parameter)
