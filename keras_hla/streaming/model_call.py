"""A model as a function of named inputs, named outputs and states."""

import re

import keras
from keras import tree

from keras_hla.layers.state_scope import StateScope

# What Keras calls an input without a name: in a new model, and in one that was loaded.
_UNNAMED = re.compile(r"(keras_tensor|input_layer)(_\d+)?")


class ModelCall:
    """Calls a functional or Sequential model with dictionaries, for inference.

    Args:
        model: the model.
    """

    def __init__(self, model):
        functional = isinstance(model, keras.Model) and getattr(model, "inputs", None)
        if not functional:
            raise ValueError(
                "Argument `model` must be a functional model, or a Sequential one that is built. "
                "Another becomes one by `keras.Model(inputs, model(inputs))`, with such as "
                f'`inputs = keras.Input((None,), dtype="int32")`. Received: {model}'
            )
        sequential = isinstance(model, keras.Sequential)
        if sequential:
            model = keras.Model(model.inputs, model.outputs, name=model.name)
        self.model = model
        self.inputs = _named_inputs(model)
        # A dictionary of outputs brings its names.
        self.output_names = list(
            model.output if isinstance(model.output, dict) else model.output_names
        )
        self.sequences = list(self.inputs) if sequential else _sequences(self.inputs)

    def __call__(self, inputs, states=None, mask=None):
        """Returns the dictionary of outputs, and the scope with the states after them.

        Args:
            inputs: dictionary of tensors; others than those of the model are ignored.
            states: list of the lists of states before the piece, or `None`.
            mask: boolean tensor of shape `(batch, length)`, or `None`.
        """
        with StateScope(states, mask) as scope:
            # Not `__call__`, which holds inputs to the lengths that the model was made with.
            outputs = self.model.call(self.arrange_inputs(inputs), training=False)
        return self.name_outputs(outputs), scope

    def arrange_inputs(self, inputs):
        """What the model takes, from a dictionary."""
        if isinstance(self.model.input, dict):
            return {name: inputs[name] for name in self.inputs}
        return tree.pack_sequence_as(self.model.input, [inputs[name] for name in self.inputs])

    def name_outputs(self, outputs):
        """The dictionary of the outputs of the model."""
        if isinstance(outputs, dict):
            return dict(outputs)
        return dict(zip(self.output_names, tree.flatten(outputs), strict=True))


def _named_inputs(model):
    structure = model.input
    if isinstance(structure, dict):
        return dict(structure)
    inputs = tree.flatten(structure)
    single = len(inputs) == 1
    names = [
        ("inputs" if single else f"inputs_{i}") if _UNNAMED.fullmatch(x.name) else x.name
        for i, x in enumerate(inputs, start=1)
    ]
    if len(set(names)) < len(names):
        raise ValueError(
            "Inputs without a name are called 'inputs_1', 'inputs_2', ... after their places: "
            f"others must not have these names. Received: inputs named {[x.name for x in inputs]}"
        )
    return dict(zip(names, inputs, strict=True))


def _sequences(inputs):
    """The names of the inputs that are sequences."""
    unknown = [name for name, x in inputs.items() if len(x.shape) > 1 and x.shape[1] is None]
    return unknown or [
        name
        for name, x in inputs.items()
        if len(x.shape) > 2 or (len(x.shape) == 2 and "int" in x.dtype)
    ]
