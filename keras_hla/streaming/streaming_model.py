"""Streaming models, which take a piece of a sequence and the states before it."""

import re
from typing import Any

import keras
from keras import ops

from keras_hla.checks import check_shape
from keras_hla.streaming.check import check_streams
from keras_hla.streaming.model_as_layer import StreamedModel
from keras_hla.streaming.model_call import ModelCall
from keras_hla.streaming.snapshot import Snapshot
from keras_hla.types import Tensor


@keras.saving.register_keras_serializable(package="keras_hla")
class StreamingModel(keras.Model):
    """A functional model with states among its inputs and outputs: see `streaming_model`."""

    _snapshot = None  # of what `predict` has compiled

    def __call__(self, inputs, *args, **kwargs):
        return super().__call__(self._checked(inputs), *args, **kwargs)

    def _checked(self, inputs):
        """The inputs as tensors: some may be arrays, and others states as they were returned."""
        expected = self.input
        if not isinstance(inputs, dict) or set(inputs) != set(expected):
            received = sorted(inputs) if isinstance(inputs, dict) else type(inputs)
            raise ValueError(
                f"Argument `inputs` must be a dictionary of {sorted(expected)}. "
                f"Received: {received}"
            )
        inputs = {
            name: x if isinstance(x, keras.KerasTensor) else ops.convert_to_tensor(x)
            for name, x in inputs.items()
        }
        for name, x in inputs.items():
            check_shape(f"inputs['{name}']", x, expected[name].shape)
        return inputs

    def make_predict_function(self, force: bool = False) -> Any:
        """As Keras' own, but anew where layers have other variables, as after `enable_lora`."""
        changed = self._snapshot is None or not self._snapshot.matches(self)
        if changed:
            self._snapshot = Snapshot(self, self._forget)
        return super().make_predict_function(force=force or changed)

    def _forget(self):
        self.predict_function = None

    def _track_variables(self):
        """Keeps no list under PyTorch, or weights that the model replaces would stay in memory."""

    def step(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Calls without checks, for what is traced: pieces of any length, with `"mask"` or without.

        Args:
            inputs: dictionary of tensors, as in a call.

        Returns:
            The dictionary of outputs and states after the piece.
        """
        return self.get_layer("stream").call(inputs)

    @property
    def state_names(self) -> list[str]:
        """The names of the states, which are keys of the inputs and of the outputs."""
        return [name for name in self.output if name in self.input]

    def initial_state(self, batch_size: int) -> dict[str, Tensor]:
        """Returns the states before the first token.

        Args:
            batch_size: Number of rows of the batch.

        Returns:
            Dictionary from the names of the states to tensors of zeros.
        """
        states = {name: self.input[name] for name in self.state_names}
        return {name: ops.zeros((batch_size, *x.shape[1:]), x.dtype) for name, x in states.items()}


def streaming_model(model: keras.Model, masked: bool = False) -> StreamingModel:
    """Returns a model that reads sequences piece by piece.

    The pieces of a sequence may have any length from one token on. The outputs are
    those that `model` gives for the same tokens in the whole sequence.

    Args:
        model: Functional or Sequential model. Each of its layers, also in nested
            models, must be an `HLA` layer or block, or act on each time step
            independently. The weights are shared, not copied. Inputs of unknown
            length, as in `keras.Input((None,))`, are sequences; if there are none,
            inputs of integers and inputs of three or more axes are.
        masked: Whether the model has one more input, `"mask"`: a boolean tensor of
            shape `(batch, length)`, true for unmasked tokens. With it the pieces
            of a batch can have different lengths. The outputs of tokens that it
            masks are undefined. Tokens that the model itself masks, as with
            `Embedding(mask_zero=True)`, have the same outputs as in the whole
            sequence.

    Returns:
        A `keras.Model` from a dictionary of inputs and states to a dictionary of
        outputs and states. An input has the name of its `keras.Input`; inputs
        without a name are called `"inputs"`, or `"inputs_1"`, `"inputs_2"`, ... by
        position if there are several. An output has the name of its layer, or of
        its key if `model` returns a dictionary. A state has the name of its layer
        and its own, as in `"hla_S"`: in the inputs it is the state before the
        piece, in the outputs the state after it. Where a mask reaches a layer, its
        last output, `"hla_output"`, is a state.

        `state_names` lists the states, and `initial_state(batch_size)` returns
        the states before the first token. A layer with `return_sequences=False`
        returns the last output of the piece. Dropout is off.

    Raises:
        ValueError: if a layer mixes time steps in another way (attention, pooling,
            a convolution over time, absolute positions) or reads from the end. The
            error names the layer.

    Example:

    >>> tokens = keras.Input((None,), dtype="int32", name="tokens")
    >>> x = keras.layers.Embedding(256, 64)(tokens)
    >>> x = keras_hla.layers.HLADecoderBlock(num_heads=4, key_dim=16)(x)
    >>> model = keras.Model(tokens, keras.layers.Dense(256, name="logits")(x))
    >>> stream = keras_hla.streaming_model(model)
    >>> states = stream.initial_state(batch_size=2)
    >>> outputs = stream({"tokens": keras.ops.zeros((2, 7), "int32"), **states})
    >>> tuple(outputs["logits"].shape)
    (2, 7, 256)
    >>> states = {name: outputs[name] for name in stream.state_names}  # for the next piece
    """
    call = ModelCall(model)
    scope = check_streams(model)
    if not scope.layers:
        raise ValueError(
            f"Argument `model` must have an `HLA` layer, or a block of it. Received: {model}"
        )
    inputs = {}
    for name, x in call.inputs.items():
        shape = (None, *x.shape[2:]) if name in call.sequences else x.shape[1:]
        inputs[name] = keras.Input(shape, dtype=x.dtype, name=name)
    if masked:
        inputs["mask"] = keras.Input((None,), dtype="bool", name="mask")
    names, states = _state_inputs(scope, model)
    for name in call.output_names:
        if name in inputs or name in states:
            raise ValueError(f"An output must not have the name of an input or a state: '{name}'")
    inputs |= states
    outputs = StreamedModel(call.model, names, name="stream")(inputs)
    return StreamingModel(inputs, outputs, name=f"{model.name}_stream")


def _path(layer, model):
    """The path of a layer, as it is in a new model: loaded ones lack their Sequential models."""
    path = layer.path.split("/")
    for inside in reversed(list(model._flatten_layers())):
        lacks = isinstance(inside, keras.Sequential) and inside.name not in path
        if lacks and layer in inside._flatten_layers():
            path.insert(0, inside.name)
    return "_".join(path)


def _state_inputs(scope, model):
    """For each call of a layer the names of its states; and an input for each state."""
    names: list[list[str]] = []
    inputs: dict[str, keras.KerasTensor] = {}
    for layer, carries_output in zip(scope.layers, scope.carries, strict=True):
        cell = layer.cell
        prefix = _unique(re.sub(r"\W", "_", _path(layer, model)), inputs, cell.state_names[0])
        states = dict(zip(cell.state_names, cell.state_size, strict=True))
        if carries_output:
            states["output"] = (cell.output_size,)
        names.append([f"{prefix}_{state}" for state in states])
        for name, size in zip(names[-1], states.values(), strict=True):
            inputs[name] = keras.Input(size, dtype=cell.state_dtype, name=name)
    return names, inputs


def _unique(prefix, inputs, state):
    """The prefix, with a number if a layer is called again."""
    unique, count = prefix, 1
    while f"{unique}_{state}" in inputs:
        count += 1
        unique = f"{prefix}_call_{count}"
    return unique
