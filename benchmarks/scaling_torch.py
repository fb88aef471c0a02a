"""Training on a mesh of devices under PyTorch: see `scaling.py`."""

import time

import numpy as np
import torch
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh

from benchmarks import collectives, processes
from benchmarks.scaling import RATE, STEPS, draw, make_model, mean_loss

WARMUP = 4  # steps, until graphs are recorded


def train(arguments, rows, shards):
    """The device, seconds of a step, bytes in memory and exchanged, and how the loss differs."""
    most = max(arguments.devices)
    return processes.spawn(_measure, rows * shards, most, (rows, shards), arguments)


def _measure(rank, device, mesh, arguments):
    import keras

    from keras_hla.distribution import split_sequence

    rows, shards = mesh
    with keras.device(str(device)):
        model, loss_of = make_model(arguments)
        batch = draw(arguments, rows, shards)

        @torch.no_grad()
        def loss_alone(*batch):
            tokens, targets = (torch.tensor(x, device=device) for x in batch)
            return loss_of(targets, model(tokens)).item()

        expected = mean_loss(arguments, batch, loss_alone) if rank == 0 else 1
        module = torch.nn.parallel.DistributedDataParallel(model)
        gradients = collectives.Count()
        module.register_comm_hook(gradients, _counting_hook)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        if shards > 1:
            devices = init_device_mesh(device.type, mesh, mesh_dim_names=("r", "s"))
            split_sequence(model, devices.get_group("s"))
        own = [np.split(np.split(x, rows)[rank // shards], shards, 1)[rank % shards] for x in batch]
        tokens, targets = (torch.tensor(x, device=device) for x in own)

        def step():
            loss = loss_of(targets, module(tokens))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        first = step().clone()
        distributed.all_reduce(first)
        for _ in range(WARMUP):
            step()
        gradients.total = 0
        with collectives.counted() as others:
            step()
        seconds = _time(step, device)
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    difference = abs(first.item() / (rows * shards) - expected) / expected
    exchanged = gradients.total / (STEPS + 1) + others.total
    return processes.name_of(device), seconds, memory, exchanged, difference


def _counting_hook(count, bucket):
    count.total += bucket.buffer().nbytes
    # The type allows for a time before there is a group.
    return allreduce_hook(distributed.group.WORLD, bucket)  # type: ignore[arg-type]


def _time(step, device):
    """Mean seconds of a step, from idle devices until the steps are complete."""
    processes.wait(device)
    if device.type == "cuda":  # without what one device computed for the comparison
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    for _ in range(STEPS):
        step()
    processes.wait(device)
    return (time.perf_counter() - begin) / STEPS
