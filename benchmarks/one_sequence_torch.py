"""Context parallelism under PyTorch: see `one_sequence.py`."""

import torch
from torch import distributed

from benchmarks import collectives, processes
from benchmarks.one_sequence import attend, median_time, relative


def run(arguments):
    """Yields the rows of `one_sequence.report`."""
    for count in arguments.devices:
        yield processes.spawn(_measure, count, max(arguments.devices), count, arguments)


def _measure(rank, device, count, arguments):
    tensors = draw(arguments, device)
    whole = [] if rank else step(arguments, tensors, None)
    tensors = [x.chunk(count, dim=1)[rank].clone() for x in tensors]
    group = distributed.group.WORLD if count > 1 else None
    differences = []
    for i, own in enumerate(step(arguments, tensors, group)):
        parts = [torch.empty_like(own) for _ in range(count)]
        distributed.all_gather(parts, own.contiguous())
        if rank == 0:
            difference = relative(torch.cat(parts, dim=1).float(), whole[i].float())
            differences.append(difference.item())
    del whole, parts
    memory, on_gpus = None, device.type == "cuda"
    if on_gpus:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with collectives.counted() as exchanged:
        step(arguments, tensors, group)
    seconds = median_time(
        lambda: step(arguments, tensors, group), lambda result: processes.wait(device)
    )
    if on_gpus:
        memory = torch.cuda.max_memory_allocated() - before
    return count, processes.name_of(device), seconds, memory, differences, exchanged.total


def draw(arguments, device):
    """Query, key, value, log-decay, and the weights of the output in the loss.

    They are the same in all processes.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = 1, arguments.length, arguments.heads, arguments.dim
    dtype, scale = getattr(torch, arguments.dtype), arguments.dim**-0.5
    query, key, value, weights = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4)
    )
    decay = torch.rand(shape[:3], generator=generator, device=device)
    return query * scale, key * scale, value, torch.log(0.99 + 0.01 * decay), weights


def step(arguments, tensors, group):
    """The output, and the gradients of the inputs."""
    *inputs, weights = tensors
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = attend(arguments, inputs, group)
    return output.detach(), *torch.autograd.grad(output, inputs, weights)
