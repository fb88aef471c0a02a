"""`train_on_devices.py` under PyTorch: two processes, each with half of the batch."""

import keras
import numpy as np
import process_groups
import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from train_on_devices import (
    BATCH,
    RATE,
    check_saving,
    check_step,
    data,
    fit,
    loss,
    make,
    one_device,
)

from keras_hla import layers
from keras_hla.torch_module import TorchModule

PROCESSES = 2


def run_torch(folder):
    process_groups.spawn(process, PROCESSES, folder, folder)


def process(rank, folder):
    rows = slice(rank * BATCH // PROCESSES, (rank + 1) * BATCH // PROCESSES)
    for name, train in {
        "DistributedDataParallel": in_a_loop,
        "fully_shard": sharded,
        "sums in fit": in_fit,
    }.items():
        model = make()
        before, expected = one_device(fit if train is in_fit else step)
        train(model, rows)
        if rank == 0:
            check_step(name, before, model, expected)
    check_refused()
    check_fused(rank)
    if rank == 0:
        check_saving(folder, model, [])


def step(module, rows=slice(None)):
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    tokens, targets = (torch.tensor(x[rows]) for x in data())
    loss()(targets, module(tokens)).backward()
    optimizer.step()


def in_a_loop(model, rows):
    step(torch.nn.parallel.DistributedDataParallel(model), rows)


def in_fit(model, rows):
    """Each gradient becomes that of all processes as soon as there is one."""

    def average(parameter):
        distributed.all_reduce(parameter.grad)
        parameter.grad /= PROCESSES

    for variable in model.trainable_variables:
        variable.value.register_post_accumulate_grad_hook(average)
    fit(model, rows)


def sharded(model, rows):
    module = TorchModule(model)
    fully_shard(module, mesh=init_device_mesh("cpu", (PROCESSES,)))
    step(module, rows)
    module.assign_to_layer()


def check_refused():
    """That a block that reads other weights than are trained does not run."""
    model, mesh = make(), init_device_mesh("cpu", (PROCESSES,))
    for layer in model.layers:
        if isinstance(layer, layers.HLADecoderBlock):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(RuntimeError, match="TorchModule"):
        step(model)


def check_fused(rank):
    """That gradients of a block that is one function by kernels are those of all processes."""
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(0)
    block = layers.HLADecoderBlock(1, 4, decay="input", implementation="triton")
    x = np.random.default_rng(0).standard_normal((PROCESSES, 3, 4)).astype("float32")
    block.build(x.shape)
    parameters = [x.value for x in block.trainable_variables]
    expected = torch.autograd.grad(block(torch.tensor(x)).square().mean(), parameters)
    module = torch.nn.parallel.DistributedDataParallel(block)
    module(torch.tensor(x[rank : rank + 1])).square().mean().backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)
    if rank == 0:
        print("fused")
