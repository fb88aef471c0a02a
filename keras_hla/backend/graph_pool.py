"""Memory that the CUDA graphs of one stream share."""

import functools
import threading
import weakref

import torch


class GraphPool:
    """Records the graphs of a device that run one after the other on a stream."""

    def __init__(self):
        #: One thread at a time copies in, computes and copies out.
        self.lock = threading.RLock()
        self._handle = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # as none is recorded on the default stream
        self._buffers: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
        # Memory of deleted graphs can be reused only while one graph of the pool exists.
        self._graph, _ = self.record(lambda: torch.zeros(1, device=self._stream.device))

    def buffer(self, shape, dtype):
        """A tensor for values between graphs and callers, read directly after a graph runs."""
        key = tuple(shape), dtype
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = torch.empty(shape, dtype=dtype, device=self._stream.device)
            self._buffers[key] = buffer
        return buffer

    def record(self, function):
        """Returns the graph of what a function launches, and its result."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        torch.cuda.empty_cache()  # as a graph takes none of the memory that is kept for others
        self._stream.wait_stream(stream)
        with torch.cuda.stream(self._stream):
            # Other threads may allocate memory at the same time.
            graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
            try:
                result = function()
            finally:
                graph.capture_end()
        stream.wait_stream(self._stream)
        return graph, result


@functools.lru_cache(maxsize=64)
def _make(device, stream):
    return GraphPool()


def pool_of(device):
    """The pool of the current stream of a device, which must be the current device."""
    return _make(device, torch.cuda.current_stream(device).cuda_stream)


def can_capture(device):
    """Whether the current stream is of that GPU, and is not captured already."""
    return (
        device.type == "cuda"
        and device.index == torch.cuda.current_device()
        and not torch.cuda.is_current_stream_capturing()
    )
