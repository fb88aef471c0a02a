"""Programs recorded as CUDA graphs, each of which is launched by one call.

A graph reads and writes at the addresses at which it was recorded. So a recording keeps its
inputs, into which each call copies; weights are read where they are; and results are copied out
of buffers that all recordings of a stream share.
"""

import weakref

import torch

from keras_hla.backend import cuda_graphs
from keras_hla.backend.graph_pool import can_capture, pool_of
from keras_hla.kernels.launching.torch_launcher import as_kernels_take_it, refuse_second_gradients

# Consecutive calls of one shape, the last of which is recorded: changing shapes are not.
_CALLS = 3
# Sequences with more elements take longer on the GPU than the CPU overhead.
_LARGEST = 1 << 25


class Recordings:
    """The recordings of one program: the latest with gradients, and the latest without."""

    def __init__(self):
        self._recordings = {}
        self._last = {}  # the key of the last call without a recording, and how many it had
        self._fits = True

    def find(self, program, tensors, wanted):
        """The recording of a program for these tensors, or `None` if none can be used.

        Args:
            program: the `Program`.
            tensors: dictionary of the tensors that it reads, by number.
            wanted: tuple of the numbers of the tensors that need gradients.
        """
        if not cuda_graphs.is_cuda_graphs_enabled():
            self._recordings.clear()
            self._last.clear()
            return None
        if not (self._fits and _can_be_recorded(tensors[program.sequences])):
            return None
        key, kind = _key_of(program, tensors, wanted), bool(wanted)
        recording = self._recordings.get(kind)
        if recording is not None and recording.key == key:
            self._last.pop(kind, None)
            return None if recording.is_in_use() else recording
        last, count = self._last.get(kind, (None, 0))
        self._last[kind] = key, count + 1 if last == key else 1
        if self._last[kind][1] < _CALLS or not _can_be_read(program, tensors):
            return None
        self._recordings.pop(kind, None)  # before there is another, for its memory
        try:
            with torch.inference_mode(False):  # in which buffers could not be written to later
                self._recordings[kind] = Recording(program, tensors, wanted, key)
        except torch.OutOfMemoryError:
            self._fits = False
        return self._recordings.get(kind)


class Recording:
    """A program for tensors of one kind as a CUDA graph, and its gradients as a second graph.

    What gradients need stays in the graphs. So from a call until its gradients are computed, or
    its output is freed, the recording is in use.
    """

    def __init__(self, program, tensors, wanted, key):
        self.key = key
        self._numbers = tuple(tensors)
        self._call = None  # a weak reference to the last one that may have gradients
        self._pool = pool_of(tensors[program.sequences].device)
        changing = program.changing_inputs
        self._inputs = {n: tensors[n].detach().clone() for n in changing}
        tensors = {n: x.detach() for n, x in tensors.items()} | self._inputs

        # Once without a graph, which compiles the kernels.
        (output,), kept, saved = program.evaluate(tensors, bool(wanted))
        # Holds the output, later its gradient: each is read before the other is written.
        self._result = self._pool.buffer(output.shape, output.dtype).zero_()
        if wanted:
            found = program.gradients({**tensors, **kept}, saved, (self._result,), wanted)
            self._found = _Gradients(self._pool, found, changing)
        del output, kept, saved

        def evaluate():
            (output,), *rest = program.evaluate(tensors, bool(wanted))
            self._result.copy_(output)
            return rest

        def find_gradients():
            kept, saved = self._kept
            values = {**tensors, **kept}
            self._found.store(program.gradients(values, saved, (self._result,), wanted))

        # What gradients read is held, so that no graph has it overwritten by another's values.
        self._forward, self._kept = self._pool.record(evaluate)
        if wanted:
            self._backward, _ = self._pool.record(find_gradients)

    def is_in_use(self):
        """Whether the gradients of the last call may still be computed."""
        call = self._call and self._call()
        return bool(call and not call.is_over)

    def __call__(self, tensors):
        """The output for the tensors in order."""
        with self._pool.lock:
            for number, x in zip(self._numbers, tensors, strict=True):
                if number in self._inputs:
                    self._inputs[number].copy_(x)
            self._forward.replay()
            output = self._result.clone()
        return output

    def begin(self, tensors):
        """Returns a record of a call with these tensors, whose gradients may be computed later."""
        read = zip(self._numbers, tensors, strict=True)
        call = _Call([x for number, x in read if number not in self._inputs])
        self._call = weakref.ref(call)
        return call

    def gradients(self, call, gradient):
        """The gradients of the tensors in order, from that of the output of a call."""
        if not self._call or self._call() is not call:
            raise RuntimeError(
                "The gradients of a layer were computed a second time after the layer had other "
                "outputs, which overwrote what the gradients need. Call "
                "`keras_hla.kernels.disable_cuda_graphs()` before the layer is called."
            )
        call.end()
        with self._pool.lock:
            self._result.copy_(gradient)
            self._backward.replay()
            found = self._found.copies()
        return [found.get(number) for number in self._numbers]


class _Call:
    """One call, from its output to its gradients, and the weights that it reads."""

    def __init__(self, weights):
        self._weights = weights
        self._versions = [x._version for x in weights]
        self._places = [x.data_ptr() for x in weights]
        self.is_over = False

    def end(self):
        if any(x.data_ptr() != n for x, n in zip(self._weights, self._places, strict=True)):
            raise RuntimeError(
                "Weights of a layer were moved between its call and the computation of its "
                "gradients, as `fully_shard` does. Call "
                "`keras_hla.kernels.disable_cuda_graphs()` before the layer is called."
            )
        if any(x._version != n for x, n in zip(self._weights, self._versions, strict=True)):
            raise RuntimeError(
                "Weights of a layer were changed in place between its call and the computation of "
                "its gradients, which need them as they were."
            )
        self.is_over = True


class _Gradients:
    """The gradients that a graph computes, in buffers that all graphs share."""

    def __init__(self, pool, found, inputs):
        self._inputs = {n: pool.buffer(x.shape, x.dtype) for n, x in found.items() if n in inputs}
        # Gradients of weights are many and small: concatenated in a buffer for each dtype.
        self._weights = {}
        for dtype in {x.dtype for n, x in found.items() if n not in inputs}:
            shapes = {n: x.shape for n, x in found.items() if n not in inputs and x.dtype == dtype}
            size = sum(shape.numel() for shape in shapes.values())
            self._weights[dtype] = shapes, pool.buffer((size,), dtype)

    def store(self, found):
        for number, buffer in self._inputs.items():
            buffer.copy_(found[number])
        for shapes, buffer in self._weights.values():
            torch.cat([found[number].reshape(-1) for number in shapes], out=buffer)

    def copies(self):
        found = {number: buffer.clone() for number, buffer in self._inputs.items()}
        for shapes, buffer in self._weights.values():
            parts = buffer.clone().split([shape.numel() for shape in shapes.values()])
            parts = zip(shapes.items(), parts, strict=True)
            found |= {number: part.view(shape) for (number, shape), part in parts}
        return found


class Replayed(torch.autograd.Function):
    """A call of a recording, with gradients."""

    @staticmethod
    def forward(ctx, recording, *tensors):
        ctx.recording, ctx.call = recording, recording.begin(tensors)
        return recording(tensors)

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():  # with `create_graph=True`
            refuse_second_gradients()
        found = ctx.recording.gradients(ctx.call, gradient)
        return None, *(
            x if n else None for x, n in zip(found, ctx.needs_input_grad[1:], strict=True)
        )


def _can_be_recorded(x):
    """Whether the size, device and stream of a call allow to record or replay it."""
    return (
        x.numel() <= _LARGEST
        and can_capture(x.device)
        and not torch.is_autocast_enabled(x.device.type)
        # Such as the hooks of `torch.utils.checkpoint`, which would find no saved tensors.
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    )


def _can_be_read(program, tensors):
    """Whether kernels can read the weights without a copy."""
    changing = program.changing_inputs
    return all(as_kernels_take_it(x) is x for n, x in tensors.items() if n not in changing)


def _key_of(program, tensors, wanted):
    """Everything that must be equal for a recording to be replayed."""
    changing = program.changing_inputs
    return (
        wanted,
        pool_of(tensors[program.sequences].device),  # one for each stream
        torch.get_float32_matmul_precision(),
        [(x.shape, x.dtype) if n in changing else x.data_ptr() for n, x in tensors.items()],
    )
