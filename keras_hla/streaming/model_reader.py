"""A Keras model as what reads the tokens of a `Scheduler`."""

from collections.abc import Mapping
import functools
import hashlib
import json
from typing import Any

import keras
from keras import ops
import numpy as np

from keras_hla.backend.compiling import compiled, compiled_scan
from keras_hla.backend.tensors import count_up, where
from keras_hla.layers.hla import HLA
from keras_hla.streaming.token_reader import TokenReader
from keras_hla.streaming.writer import writer_of
from keras_hla.types import Tensor

# Arguments of a layer that do not change what its states mean.
_IRRELEVANT = ("name", "trainable", "seed", "implementation", "remat_length")


class ModelReader(TokenReader):
    """Reads tokens with a Keras model, for a `Scheduler`, which makes it by itself.

    Args:
        model: Model that `keras_hla.generate` takes. Once it has changed, make another
            reader, and so new sessions: states belong to the weights.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._writer = writer = writer_of(model)
        states = {name: writer.stream.input[name] for name in writer.stream.state_names}
        super().__init__(writer.vocabulary_size, _specs(states), _specs(writer.constants))
        self._step = compiled_scan(self._trace_step, writer.stream.variables, writer.logits_dtype)
        self._put = compiled(_put, [])
        self._take = compiled(_take, [])

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of the weights, the options of `HLA` layers and the states."""
        layers = [
            {key: x for key, x in layer.get_config().items() if key not in _IRRELEVANT}
            for layer in self._model._flatten_layers()
            if isinstance(layer, HLA)
        ]
        text = json.dumps([sorted(self.states.items()), layers], sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode())
        for variable in self._model.variables:
            x = ops.convert_to_numpy(variable.value)
            digest.update(f"{x.dtype}{x.shape}".encode())
            digest.update(np.ascontiguousarray(x).view("uint8").data if x.size else b"")
        return digest.hexdigest()

    def step(self, tokens: np.ndarray, states: Any) -> tuple[Tensor, Any]:
        entries = (ops.convert_to_tensor(tokens[None]),)
        state = tuple(states[name] for name in self._writer.names)
        logits, state = self._step(state, entries)
        return logits[0], dict(zip(self._writer.names, state, strict=True))

    def _trace_step(self, state, entries):
        names = self._writer.names
        states = dict(zip(names, state, strict=True))
        logits, states = self._writer.trace_piece(entries[0][:, None], None, states)
        return logits, tuple(states[name] for name in names)

    def read(self, tokens: np.ndarray, mask: np.ndarray, states: Any) -> Any:
        piece = map(ops.convert_to_tensor, (tokens, mask))
        return self._writer.read_piece(*piece, states)[1]

    def put(self, batch: Any, row: int, states: Any) -> Any:
        return self._put(batch, ops.convert_to_tensor(row, "int32"), states)

    def take(self, batch: Any, row: int) -> Any:
        return self._take(batch, ops.convert_to_tensor([row], "int32"))

    def to_host(self, states: Any) -> dict[str, np.ndarray]:
        return {
            name: ops.convert_to_numpy(ops.cast(states[name], x.dtype))
            for name, x in self.initial_state(0).items()
        }

    def from_host(self, arrays: Mapping[str, np.ndarray]) -> Any:
        return {
            name: ops.cast(ops.convert_to_tensor(arrays[name]), dtype)
            for name, (_, dtype) in self.states.items()
        }


def _specs(tensors):
    return {
        name: (tuple(x.shape[1:]), keras.backend.standardize_dtype(x.dtype))
        for name, x in tensors.items()
    }


def _put(batch, row, states):
    def place(old, new):
        rows = count_up(ops.shape(old)[0])
        return where(ops.reshape(rows == row, (-1, *[1] * (len(old.shape) - 1))), new, old)

    return {name: place(batch[name], states[name]) for name in batch}


def _take(batch, row):
    return {name: ops.take(x, row, axis=0) for name, x in batch.items()}
