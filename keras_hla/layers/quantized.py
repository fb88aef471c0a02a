"""Dtype policies that tell how the layers inside of a layer are quantized."""

import re

import keras
from keras.dtype_policies import DTypePolicyMap


@keras.saving.register_keras_serializable(package="keras_hla")
class QuantizedDTypePolicyMap(DTypePolicyMap):
    """A `DTypePolicyMap` that knows the quantization configs as well.

    Args:
        default_policy: As in `keras.dtype_policies.DTypePolicyMap`.
        policy_map: As there.
        configs: Dictionary of `keras.quantizers.QuantizationConfig`s, with keys of
            `policy_map`.
    """

    def __init__(self, default_policy=None, policy_map=None, configs=None):
        super().__init__(default_policy, policy_map)
        self.configs = configs or {}

    def is_like(self, other):
        """Whether another policy, or `None`, is equal."""
        if not isinstance(other, QuantizedDTypePolicyMap):
            return False
        policies = (self.default_policy, {**self}), (other.default_policy, {**other})
        return policies[0] == policies[1] and self.configs == other.configs

    def get_config(self):
        configs = keras.saving.serialize_keras_object(self.configs)
        return {**super().get_config(), "configs": configs}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        configs = keras.saving.deserialize_keras_object(config["configs"], custom_objects)
        others = {key: value for key, value in config.items() if key != "configs"}
        policy = DTypePolicyMap.from_config(others, custom_objects)
        return cls(policy.default_policy, {**policy}, configs)


def layer_options(policy, path):
    """The arguments by which a layer follows the dtype policy of the layer that it is in.

    Args:
        policy: the dtype policy, which may be a map.
        path: path of the layer.
    """
    if not isinstance(policy, DTypePolicyMap):
        return {"dtype": policy}
    configs = _configs(policy)
    keys = (key for key in configs if key == path or re.fullmatch(key, path))
    return {"dtype": policy[path], "quantization_config": configs.get(next(keys, None))}


def policy_with_quantized(layer):
    """The dtype policy of a layer, with those of the layers inside that have been quantized."""
    policy = layer.dtype_policy
    inside = layer._flatten_layers(include_self=False)
    quantized = {x.path: x for x in inside if x.quantization_mode is not None}
    if isinstance(policy, DTypePolicyMap):
        known, default = {**policy}, policy.default_policy
        changed = {path: x for path, x in quantized.items() if policy[path] != x.dtype_policy}
    else:
        known, default = {}, policy
        # The same for any name of the layer, and for the second that `Bidirectional` makes.
        changed = {path.replace(f"{layer.path}/", ".*/", 1): x for path, x in quantized.items()}
    if not changed:
        return policy
    policies = {key: x.dtype_policy for key, x in changed.items()}
    configs = {key: x.quantization_config for key, x in changed.items()}
    return QuantizedDTypePolicyMap(default, {**known, **policies}, {**_configs(policy), **configs})


def with_default(policy, dtype):
    """The policy of what is quantized, and `dtype` for all else."""
    if not isinstance(policy, DTypePolicyMap):
        return dtype
    quantized = {key: own for key, own in policy.items() if own.quantization_mode is not None}
    return QuantizedDTypePolicyMap(dtype, quantized, _configs(policy))


def _configs(policy):
    return policy.configs if isinstance(policy, QuantizedDTypePolicyMap) else {}
