"""Context parallelism under PyTorch: see `one_sequence.py`."""

import numpy as np
import torch
from torch import distributed

from benchmarks import collectives, processes
from benchmarks.one_sequence import attend, median_time, relative


def run(arguments):
    """Yields the rows of `one_sequence.report`."""
    for count in arguments.devices:
        yield processes.spawn(_measure, count, max(arguments.devices), count, arguments)


def _measure(rank, device, count, arguments):
    tensors = [x.to(device) for x in draw(arguments)]
    whole = [] if rank else [x.float() for x in step(arguments, tensors, None)]
    tensors = [x.chunk(count, dim=1)[rank].clone() for x in tensors]
    group = distributed.group.WORLD if count > 1 else None
    differences = []
    for i, own in enumerate(step(arguments, tensors, group)):
        parts = [torch.empty_like(own) for _ in range(count)]
        distributed.all_gather(parts, own.contiguous())
        if rank == 0:
            differences.append(relative(torch.cat(parts, dim=1).float(), whole[i]))
    whole.clear()
    memory, on_gpus = None, device.type == "cuda"
    if on_gpus:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with collectives.counted() as exchanged:
        step(arguments, tensors, group)
    seconds = median_time(lambda: step(arguments, tensors, group), lambda: processes.wait(device))
    if on_gpus:
        memory = torch.cuda.max_memory_allocated() - before
    return count, processes.name_of(device), seconds, memory, differences, exchanged.total


def draw(arguments):
    """Query, key, value, log-decay, and the weights of the output in the loss."""
    rng = np.random.default_rng(0)
    shape = 1, arguments.length, arguments.heads, arguments.dim
    dtype, scale = getattr(torch, arguments.dtype), arguments.dim**-0.5
    query, key, value, weights = (
        torch.from_numpy(rng.standard_normal(shape, dtype="float32")).to(dtype) for _ in range(4)
    )
    log_decay = torch.from_numpy(np.log(rng.uniform(0.99, 1, shape[:3])).astype("float32"))
    return query * scale, key * scale, value, log_decay, weights


def step(arguments, tensors, group):
    """The output, and the gradients of the inputs."""
    *inputs, weights = tensors
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = attend(arguments, inputs, group)
    return output.detach(), *torch.autograd.grad(output, inputs, weights)
