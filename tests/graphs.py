"""What stands for CUDA graphs where there is no GPU."""

import threading

import torch


def replayed_calls(monkeypatch, module, recording):
    """The list of the recordings, of that class of a module, that calls replay."""
    if not torch.cuda.is_available():
        pool = Pool()
        monkeypatch.setattr(module, "pool_of", lambda device: pool)
        monkeypatch.setattr(module, "can_capture", lambda device: True)
    replayed, call = [], recording.__call__

    def replay(self, *arguments):
        replayed.append(self)
        return call(self, *arguments)

    monkeypatch.setattr(recording, "__call__", replay)
    return replayed


class Again:
    """Stands for a CUDA graph: calls a function again, with its results in the same tensors."""

    def __init__(self, function):
        self._function = function
        self.result = function()

    def replay(self):
        for old, new in zip(_tensors(self.result), _tensors(self._function()), strict=True):
            old.copy_(new)


def _tensors(x):
    if isinstance(x, dict):
        x = list(x.values())
    return [x] if torch.is_tensor(x) else [y for z in x or () for y in _tensors(z)]


class Pool:
    """Stands for a `GraphPool`."""

    def __init__(self):
        self.lock = threading.RLock()
        self._buffers = {}

    def buffer(self, shape, dtype):
        key = tuple(shape), dtype
        return self._buffers.setdefault(key, torch.full(shape, torch.nan, dtype=dtype))

    def record(self, function):
        graph = Again(function)
        return graph, graph.result
