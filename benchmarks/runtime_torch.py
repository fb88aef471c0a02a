"""See `benchmarks.runtime`."""

import gc
import itertools

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import timing
from keras_hla.kernels import disable_cuda_graphs, enable_cuda_graphs

_CALLS_UNTIL_RECORDED = 4


def on_gpu():
    from keras.src.backend.torch.core import get_device  # what Keras puts its tensors on

    return get_device().startswith("cuda")


def device_name():
    return torch.cuda.get_device_name() if on_gpu() else "cpu"


def tensor(array, dtype):
    return torch.from_numpy(array).to("cuda" if on_gpu() else "cpu", getattr(torch, dtype))


def to_numpy(x):
    return x.detach().double().cpu().numpy()


def forward(function, jit):
    function = _compiled(function, jit)

    def call(inputs, constants):
        with torch.no_grad():
            return function(*inputs, *constants)

    return call


def training(function, jit):
    function = _compiled(function, jit)

    def call(inputs, constants, cotangent):
        # Parameters are the layer's own, which has the function.
        inputs = [x if x.requires_grad else x.detach().requires_grad_() for x in inputs]
        output = function(*inputs, *constants)
        return output, torch.autograd.grad(output, inputs, cotangent)

    return call


def _compiled(function, jit):
    if jit != "on":
        return function
    # Contenders and cases share the code of a function here, and each is a graph of its own.
    torch._dynamo.config.recompile_limit = 1000
    return torch.compile(function, dynamic=False)


def time_calls(call, argument_sets):
    if not on_gpu():
        return timing.on_cpu(call, argument_sets[0])
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(argument_sets) + 1)]
    call(*argument_sets[-1])  # so that the queue is not empty when the first event is recorded
    events[0].record()
    for arguments, event in zip(argument_sets, events[1:], strict=True):
        call(*arguments)
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def added_memory(call, arguments):
    if not on_gpu():
        return None
    # Memory that CUDA graphs keep between steps is included. A call without graphs frees it.
    disable_cuda_graphs()
    call(*arguments)  # may try several kernels, which takes memory
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    enable_cuda_graphs()
    for _ in range(_CALLS_UNTIL_RECORDED):
        call(*arguments)
    gc.collect()  # as some layers leave reference cycles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call(*arguments)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def kernels(call, arguments):
    if not on_gpu():
        return None
    call(*arguments)  # which may compile kernels, or try several
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call(*arguments)
        torch.cuda.synchronize()
    return {e.name for e in profiler.events() if e.device_type == DeviceType.CUDA}


def train_on_batch(model, x, y):
    return lambda: model.train_on_batch(x, y)
