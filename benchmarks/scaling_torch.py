"""Training on a mesh of devices under PyTorch: see `scaling.py`."""

from pathlib import Path
import tempfile
import time

import numpy as np
import torch
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh

from benchmarks import collectives
from benchmarks.scaling import RATE, STEPS, draw, make_model

WARMUP = 4  # steps, until graphs are recorded


def train(arguments, rows, shards):
    """The device, seconds of a step, bytes in memory and exchanged, and how the loss differs."""
    with tempfile.TemporaryDirectory() as folder:
        count = rows * shards
        torch.multiprocessing.spawn(_process, ((rows, shards), folder, arguments), count)
        return torch.load(Path(folder) / "row")


def _process(rank, mesh, folder, arguments):
    count = mesh[0] * mesh[1]
    on_gpus = torch.cuda.device_count() >= max(arguments.devices)
    if on_gpus:
        torch.cuda.set_device(rank)
    engine = "nccl" if on_gpus else "gloo"
    distributed.init_process_group(engine, f"file://{folder}/all", rank=rank, world_size=count)
    # In a function of its own, so that modules are freed before their process group is destroyed.
    found = _measure(rank, mesh, arguments, torch.device("cuda", rank) if on_gpus else "cpu")
    if rank == 0:
        torch.save(found, Path(folder) / "row")
    distributed.destroy_process_group()


def _measure(rank, mesh, arguments, device):
    import keras

    from keras_hla.distribution import split_sequence

    rows, shards = mesh
    with keras.device(str(device)):
        model, loss_of = make_model(arguments)
        batch = draw(arguments, rows, shards)
        expected = _loss_on_one_device(arguments, model, loss_of, batch, device) if rank == 0 else 1
        module = torch.nn.parallel.DistributedDataParallel(model)
        gradients = collectives.Count()
        module.register_comm_hook(gradients, _counting_hook)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        if shards > 1:
            devices = init_device_mesh(torch.device(device).type, mesh, mesh_dim_names=("r", "s"))
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
        memory = torch.cuda.max_memory_allocated() if device != "cpu" else None
    name = torch.cuda.get_device_name() if device != "cpu" else "cpu"
    difference = abs(first.item() / (rows * shards) - expected) / expected
    return name, seconds, memory, gradients.total / (STEPS + 1) + others.total, difference


def _counting_hook(count, bucket):
    count.total += bucket.buffer().nbytes
    return allreduce_hook(distributed.group.WORLD, bucket)  # type: ignore[arg-type]


def _time(step, device):
    """Mean seconds of a step, from idle devices until the steps are complete."""

    def wait():
        distributed.barrier()
        if device != "cpu":
            torch.cuda.synchronize()

    wait()
    begin = time.perf_counter()
    for _ in range(STEPS):
        step()
    wait()
    return (time.perf_counter() - begin) / STEPS


@torch.no_grad()
def _loss_on_one_device(arguments, model, loss_of, batch, device):
    """The mean over the rows, as many at a time as one device has in the mesh."""
    few = max(1, arguments.rows * arguments.length // batch[0].shape[1])
    parts = []
    for i in range(0, len(batch[0]), few):
        tokens, targets = (torch.tensor(x[i : i + few], device=device) for x in batch)
        parts.append(loss_of(targets, model(tokens)).item())
    return float(np.mean(parts))
