"""A stream that keeps its states."""

import keras
from keras import ops


class Session(keras.layers.Layer):
    """A streaming model for one session, whose states are variables.

    Args:
        stream: model that `keras_hla.streaming_model` made.
    """

    def __init__(self, stream):
        super().__init__()
        self.stream = stream
        self.states = {
            name: self.add_weight(
                name=name,
                shape=(1, *stream.input[name].shape[1:]),
                dtype=stream.input[name].dtype,
                initializer="zeros",
                trainable=False,
            )
            for name in stream.state_names
        }
        self.built = True

    def step(self, inputs):
        """The outputs for a piece. The states move on."""
        states = {name: ops.convert_to_tensor(v) for name, v in self.states.items()}
        outputs = self.stream(inputs | states)
        for name, variable in self.states.items():
            variable.assign(outputs.pop(name))
        return outputs

    def reset(self):
        """Goes back to before the first token."""
        for variable in self.states.values():
            variable.assign(ops.zeros(variable.shape, variable.dtype))
        return {}
