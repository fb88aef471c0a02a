"""The layer that is a whole model, with its states as inputs and outputs."""

import keras

from keras_hla.streaming.model_call import ModelCall


@keras.saving.register_keras_serializable(package="keras_hla")
class StreamedModel(keras.layers.Layer):
    """From inputs, mask and states by name to outputs and new states by name.

    Files hold the name of the class, in the config and in the paths of the weights.

    Args:
        model: The model, functional or Sequential.
        state_names: List of the lists of names of the states, one for each call
            of an `HLA` layer in the model, in order.
    """

    def __init__(self, model, state_names, **kwargs):
        # Without autocasting, states stay float32; the layers inside cast for themselves.
        super().__init__(autocast=False, **kwargs)
        self.model = model
        self.state_names = state_names
        self._call = ModelCall(model)
        self.built = True

    def call(self, inputs):
        states = [[inputs[name] for name in names] for names in self.state_names]
        outputs, scope = self._call(inputs, states, inputs.get("mask"))
        for names, new in zip(self.state_names, scope.states, strict=True):
            outputs |= dict(zip(names, new, strict=True))
        return outputs

    def compute_output_spec(self, inputs):
        call = self._call
        outputs = call.name_outputs(call.model.compute_output_spec(call.arrange_inputs(inputs)))
        return outputs | {
            name: keras.KerasTensor(inputs[name].shape, inputs[name].dtype)
            for names in self.state_names
            for name in names
        }

    def get_config(self):
        return {
            **super().get_config(),
            "model": keras.saving.serialize_keras_object(self.model),
            "state_names": self.state_names,
        }

    @classmethod
    def from_config(cls, config):
        model = keras.saving.deserialize_keras_object(config.pop("model"))
        return cls(model, **config)
