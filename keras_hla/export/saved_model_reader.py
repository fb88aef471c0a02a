"""A SavedModel as what reads the tokens of a `Scheduler`."""

from collections.abc import Mapping
import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from keras_hla.streaming.token_reader import TokenReader
from keras_hla.types import StrPath, Tensor


class SavedModelReader(TokenReader):
    """Reads tokens with a SavedModel, for a `keras_hla.streaming.Scheduler`.

    TensorFlow runs the model, without Keras, whatever the backend of Keras is.

    Args:
        path: Folder that `keras_hla.export_saved_model` wrote, of a language model: it
            has one input that is a sequence, integer tokens, and one output, logits.

    Raises:
        ValueError: if it is of another model, or keeps its states itself.
    """

    def __init__(self, path: StrPath) -> None:
        import tensorflow as tf

        self._path = Path(path)
        self._loaded = tf.saved_model.load(str(path))  # the signatures do not keep it alive
        signatures = self._loaded.signatures
        if not {"initial_state", "step", "step_masked"} <= set(signatures):
            raise ValueError(
                "Argument `path` must be a SavedModel that takes and returns states, as "
                f"`export_saved_model` writes it. Received: {path} with the signatures "
                f"{sorted(signatures)}"
            )
        # XLA makes a step several times as fast. It compiles each once, for their sizes are fixed.
        self._step, self._read = (
            tf.function(functools.partial(signatures[name]), jit_compile=True, autograph=False)
            for name in ("step", "step_masked")
        )
        states = set(signatures["initial_state"].structured_outputs)
        outputs = dict(signatures["step"].structured_outputs)
        inputs = dict(signatures["step"].structured_input_signature[1])
        further = {name: x for name, x in inputs.items() if name not in states}
        sequences = [name for name, x in further.items() if x.shape[1:].as_list() == [None]]
        logits = [name for name in outputs if name not in states]
        if len(sequences) != 1 or len(logits) != 1 or outputs[logits[0]].shape.rank != 3:
            raise ValueError(
                "Argument `path` must be a SavedModel with one input that is a sequence of tokens "
                "and one output (batch, length, vocabulary). Received: inputs "
                f"{sorted(further)}, outputs {logits}"
            )
        (self._tokens,), (self._logits,) = sequences, logits
        self._dtype = further.pop(self._tokens).dtype
        super().__init__(
            outputs[self._logits].shape[-1],
            _specs({name: inputs[name] for name in sorted(states)}),
            _specs(further),
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of the files."""
        files = [self._path / "saved_model.pb", *sorted(self._path.glob("variables/*"))]
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.read_bytes())
        return digest.hexdigest()

    def step(self, tokens: np.ndarray, states: Any) -> tuple[Tensor, Any]:
        outputs = self._call(self._step, tokens[:, None], states)
        return outputs[self._logits][:, -1].numpy(), self._states_of(states | outputs)

    def read(self, tokens: np.ndarray, mask: np.ndarray, states: Any) -> Any:
        import tensorflow as tf

        outputs = self._call(self._read, tokens, states | {"mask": tf.constant(mask)})
        return self._states_of(states | outputs)

    def _call(self, function, tokens, inputs):
        import tensorflow as tf

        return function(**{self._tokens: tf.cast(tokens, self._dtype)}, **inputs)

    def _states_of(self, tensors):
        return {name: tensors[name] for name in self.states}

    def put(self, batch: Any, row: int, states: Any) -> Any:
        import tensorflow as tf

        return {
            name: tf.tensor_scatter_nd_update(x, [[row]], states[name]) for name, x in batch.items()
        }

    def take(self, batch: Any, row: int) -> Any:
        return {name: x[row : row + 1] for name, x in batch.items()}

    def to_host(self, states: Any) -> dict[str, np.ndarray]:
        expected = self.initial_state(0)
        return {name: x.numpy().astype(expected[name].dtype) for name, x in states.items()}

    def from_host(self, arrays: Mapping[str, np.ndarray]) -> Any:
        import tensorflow as tf

        return {name: tf.cast(arrays[name], dtype) for name, (_, dtype) in self.states.items()}


def _specs(tensors):
    return {name: (tuple(x.shape[1:]), x.dtype.name) for name, x in tensors.items()}
