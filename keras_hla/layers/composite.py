"""Layers made of layers, to which they pass on their dtype policy."""

import keras

from keras_hla.layers.quantized import layer_options, policy_with_quantized


class CompositeLayer(keras.layers.Layer):
    """A layer whose config tells which of the layers inside have been quantized.

    Those inside are created with `options_of(name)`, so that they come back as they were,
    frozen or not.
    """

    def __init__(self, **kwargs):
        # Without autocasting, states stay float32; the layers inside cast for themselves.
        super().__init__(autocast=False, **kwargs)
        _check_not_quantized("dtype", self.dtype_policy)

    @keras.layers.Layer.dtype_policy.setter
    def dtype_policy(self, policy):
        policy = keras.dtype_policies.get(policy)
        _check_not_quantized("dtype_policy", policy)
        if self.built:
            raise ValueError(
                f"The dtype policy of layer '{self.name}' is fixed once the layer is built, as are "
                "the layers and states that were made with it. Set it before, or as the argument "
                f"`dtype` of a new layer. Received: dtype_policy={policy}"
            )
        keras.layers.Layer.dtype_policy.fset(self, policy)
        for layer in self._flatten_layers(include_self=False, recursive=False):
            layer.dtype_policy = policy

    def options_of(self, name):
        """The arguments that a projection of this name inside gets from this layer."""
        # Keras asks each variable of a model whether it is trainable, not the layer that it is in.
        options = {"name": name, "trainable": self.trainable}
        return options | layer_options(self.dtype_policy, f"{self.path}/{name}")

    def get_config(self):
        policy = policy_with_quantized(self)
        if policy is not self.dtype_policy:
            # Keras saves objects at one address once: until others are saved, it must not be freed.
            kept = self.__dict__.get("_saved_policy")
            policy = self.__dict__["_saved_policy"] = kept if policy.is_like(kept) else policy
        return {**super().get_config(), "dtype": keras.dtype_policies.serialize(policy)}


def _check_not_quantized(name, policy):
    if policy.quantization_mode is not None:
        raise ValueError(
            f"Argument `{name}` must be a policy of floating dtypes: build the model, then call "
            f"`model.quantize`. Received: {name}={policy}"
        )
