"""What a `Scheduler` needs of a model: the interface of those that read tokens."""

import abc
from collections.abc import Mapping
from typing import Any

from keras import ops
import numpy as np

from keras_hla.checks import check_shape
from keras_hla.streaming.drawing import check_input_names
from keras_hla.types import Tensor


class TokenReader(abc.ABC):
    """A language model that reads tokens from given states, for a `Scheduler`.

    It keeps nothing of what it has read. States are dictionaries of tensors, whose
    first axis is the batch. `keras_hla.streaming.ModelReader` reads with a Keras
    model, `keras_hla.export.SavedModelReader` with a SavedModel.

    Args:
        vocabulary_size: Number of tokens that there are.
        states: Dictionary from the name of a state to a pair of its shape, without
            the batch axis, and its dtype. States are zeros before the first token.
        inputs: The same for further inputs, such as a condition, which each session
            gives. They are kept among the states.
    """

    def __init__(
        self,
        vocabulary_size: int,
        states: Mapping[str, tuple[tuple[int, ...], str]],
        inputs: Mapping[str, tuple[tuple[int, ...], str]] | None = None,
    ) -> None:
        self.vocabulary_size = vocabulary_size
        self.inputs = dict(inputs or {})
        self.states = {**states, **self.inputs}

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """What tells this model from another: states of one must not go to the other."""

    @abc.abstractmethod
    def step(self, tokens: np.ndarray, states: Any) -> tuple[Tensor, Any]:
        """Reads one token in each row.

        Args:
            tokens: int32 array of shape `(batch,)`.
            states: The states before the tokens.

        Returns:
            The logits after the tokens, `(batch, vocabulary)`, as a tensor of the
            backend of Keras or an array, and the states after them.
        """

    @abc.abstractmethod
    def read(self, tokens: np.ndarray, mask: np.ndarray, states: Any) -> Any:
        """Reads a piece in each row.

        Args:
            tokens: int32 array of shape `(batch, length)`.
            mask: Boolean array of the same shape, true for unmasked tokens.
            states: The states before the piece.

        Returns:
            The states after it.
        """

    @abc.abstractmethod
    def put(self, batch: Any, row: int, states: Any) -> Any:
        """Replaces the states of one row of a batch.

        Args:
            batch: The states of the batch.
            row: Index of the row.
            states: The new states of the row, as a batch of one.

        Returns:
            The states of the batch with the new ones.
        """

    @abc.abstractmethod
    def take(self, batch: Any, row: int) -> Any:
        """Reads the states of one row off those of a batch.

        Args:
            batch: The states of the batch.
            row: Index of the row.

        Returns:
            The states of the row, as a batch of one.
        """

    @abc.abstractmethod
    def to_host(self, states: Any) -> dict[str, np.ndarray]:
        """Returns states as arrays.

        Args:
            states: Dictionary of tensors.

        Returns:
            Dictionary of arrays, of dtypes that NumPy has.
        """

    @abc.abstractmethod
    def from_host(self, arrays: Mapping[str, np.ndarray]) -> Any:
        """Returns states from arrays.

        Args:
            arrays: Dictionary of arrays, as `to_host` returns it.

        Returns:
            Dictionary of tensors, of the dtypes that the model takes.
        """

    def initial_state(self, batch_size: int) -> dict[str, np.ndarray]:
        """Returns the states before the first token.

        Args:
            batch_size: Number of rows of the batch.

        Returns:
            Dictionary of arrays of zeros.
        """
        return {
            name: np.zeros((batch_size, *shape), "float32" if dtype == "bfloat16" else dtype)
            for name, (shape, dtype) in self.states.items()
        }

    def start(self, inputs: dict[str, Tensor] | None = None) -> dict[str, np.ndarray]:
        """Returns the states of a new session, with its further inputs.

        Args:
            inputs: Dictionary of the further inputs, without the batch axis.

        Returns:
            Dictionary of arrays, for a batch of one.

        Raises:
            ValueError: if inputs are missing, not known, or of another shape.
        """
        states = self.initial_state(1)
        for name, x in check_input_names(inputs, self.inputs).items():
            array = ops.convert_to_numpy(x)
            check_shape(f"inputs['{name}']", array, self.inputs[name][0])
            states[name] = array[None].astype(states[name].dtype)
        return states
