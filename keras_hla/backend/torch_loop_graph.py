"""A traced loop under PyTorch recorded as a CUDA graph: one launch for all entries.

The CPU overhead of a small step exceeds its time on the GPU by far.
"""

import warnings

import torch

from keras_hla.backend import cuda_graphs
from keras_hla.backend.graph_pool import can_capture, pool_of


class LoopRecordings:
    """Calls a loop, and records it in its second consecutive call with tensors of one kind.

    Args:
        prepare: function of the values, which gives what does not change from entry to entry.
        run: `run(prepared, state, inputs)` returns the outputs and the last states.
    """

    def __init__(self, prepare, run):
        self._prepare = prepare
        self._run = run
        self._recording = None
        self._last = None  # the key of the last call
        self._can_be_recorded = True

    def __call__(self, values, state, inputs):
        recording = self._find(values, state, inputs)
        if recording is None:
            return self._run(self._prepare(*values), state, inputs)
        return recording(values, state, inputs)

    def _find(self, values, state, inputs):
        if not (self._can_be_recorded and cuda_graphs.is_cuda_graphs_enabled()):
            self._recording = None
            return None
        device = state[0].device
        if not can_capture(device) or torch.is_autocast_enabled(device.type):
            return None
        if any(x.is_inference() for x in values):  # of which none knows whether they change
            return None
        # A graph reads at the addresses at which it was recorded: weights are not copied.
        key = (
            pool_of(device),  # one for each stream
            torch.get_float32_matmul_precision(),
            [x.data_ptr() for x in values],
            [(x.shape, x.dtype) for x in (*state, *inputs)],
        )
        if self._recording is not None and self._recording.key == key:
            return self._recording
        last, self._last = self._last, key
        if last != key:
            return None
        self._recording = None  # before there is another, for its memory
        try:
            self._recording = LoopRecording(self._prepare, self._run, values, state, inputs, key)
        except RuntimeError as error:
            self._can_be_recorded = False
            warnings.warn(
                "PyTorch cannot record the steps of the model as a CUDA graph, and they take "
                f"several times as long. {type(error).__name__}: {error}",
                stacklevel=5,
            )
        return self._recording


class LoopRecording:
    """A loop for tensors of one kind as a CUDA graph."""

    def __init__(self, prepare, run, values, state, inputs, key):
        self.key = key
        self._prepare = prepare
        self._pool = pool_of(state[0].device)
        self._inputs = [x.clone() for x in (*state, *inputs)]
        self._prepared = prepare(*values)
        self._versions = _versions(values)
        self._storages = [x.untyped_storage() for x in values]  # or others may take their addresses
        state, inputs = self._inputs[: len(state)], self._inputs[len(state) :]
        self._graph, self._result = self._pool.record(lambda: run(self._prepared, state, inputs))

    def __call__(self, values, state, inputs):
        with self._pool.lock:
            if _versions(values) != self._versions:
                self._prepare_again(values)
            for own, x in zip(self._inputs, (*state, *inputs), strict=True):
                own.copy_(x)
            self._graph.replay()
            output, state = self._result
            return output.clone(), tuple(x.clone() for x in state)

    def _prepare_again(self, values):
        for own, x in zip(self._prepared, self._prepare(*values), strict=True):
            if own.data_ptr() != x.data_ptr():  # which is no weight, nor a part of one
                own.copy_(x)
        self._versions = _versions(values)


def _versions(values):
    """Numbers that change where a weight does."""
    return [x._version for x in values]
