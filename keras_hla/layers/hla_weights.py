"""The arguments and the weights that a cell and its layer share."""

from collections.abc import Sequence
from typing import Any, Unpack

import keras

from keras_hla import operators
from keras_hla.checks import (
    check_features,
    check_head_groups,
    check_number,
    check_positive_int,
)
from keras_hla.layers.arguments import plain, plain_number
from keras_hla.layers.composite import CompositeLayer
from keras_hla.layers.decay import LogDecay, check_decay
from keras_hla.layers.feature_map import get_activation, serialize_activation
from keras_hla.layers.float64 import make_dense
from keras_hla.layers.options import NamedLayerOptions
from keras_hla.layers.quantized import with_default
from keras_hla.layers.rms_normalization import RMSNormalization
from keras_hla.layers.short_convolution import ShortConvolution
from keras_hla.operators import Operator
from keras_hla.precision import state_dtype
from keras_hla.stages.rotary import turns_of
from keras_hla.types import Activation, Constraint, Initializer, Regularizer, Seed


class HLAWeights(CompositeLayer):
    """What an `HLACell` is made of: see its arguments."""

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        num_key_value_heads: int | None = None,
        operator: str | Operator = "hla2",
        decay: float | Sequence[float] | str | None = "input",
        rope_max_wavelength: float | None = 10_000,
        scale: float | None = None,
        feature_map: Activation | None = None,
        conv_kernel_size: int | None = 4,
        conv_activation: Activation | None = "silu",
        qk_norm: bool = False,
        masked: bool = True,
        normalize: bool = False,
        epsilon: float = 1e-6,
        ridge: float = 0.0,
        output_norm: bool = True,
        output_gate: Activation | None = None,
        dropout: float = 0.0,
        output_shape: int | None = None,
        use_bias: bool = True,
        kernel_initializer: Initializer = "glorot_uniform",
        bias_initializer: Initializer = "zeros",
        kernel_regularizer: Regularizer | None = None,
        bias_regularizer: Regularizer | None = None,
        kernel_constraint: Constraint | None = None,
        bias_constraint: Constraint | None = None,
        seed: Seed | None = None,
        **kwargs: Unpack[NamedLayerOptions],
    ) -> None:
        super().__init__(**kwargs)
        check_positive_int("num_heads", num_heads)
        check_positive_int("key_dim", key_dim)
        check_positive_int("value_dim", value_dim, optional=True)
        check_positive_int("num_key_value_heads", num_key_value_heads, optional=True)
        if scale is not None:
            check_number("scale", scale, "None or a number")
        if rope_max_wavelength is not None:
            allowed = "None or a positive number"
            check_number("rope_max_wavelength", rope_max_wavelength, allowed, lambda x: x > 0)
            if key_dim % 2:
                raise ValueError(
                    "Argument `key_dim` must be even for a rotary embedding "
                    f"(`rope_max_wavelength`). Received: key_dim={key_dim}, "
                    f"rope_max_wavelength={rope_max_wavelength}"
                )
            self.turns = turns_of(key_dim, rope_max_wavelength)
        self.num_heads = int(num_heads)  # which may be NumPy's, as all sizes
        self.key_dim = int(key_dim)
        self.value_dim = int(value_dim or key_dim)
        self.num_key_value_heads = int(num_key_value_heads or num_heads)
        check_head_groups(self.num_heads, self.num_key_value_heads)
        check_number("epsilon", epsilon, "a positive number", lambda x: x > 0)
        check_number("dropout", dropout, "a number in [0, 1)", lambda x: 0 <= x < 1)
        check_positive_int("output_shape", output_shape, optional=True)
        check_positive_int("conv_kernel_size", conv_kernel_size, optional=True)
        if conv_kernel_size == 1:
            raise ValueError(
                "Argument `conv_kernel_size` must be None or an integer of 2 or more. "
                "Received: conv_kernel_size=1"
            )
        self.operator = operators.get(operator, masked, ridge)
        self._operator_name = operators.name_of(operators.get(operator))
        self.masked = masked
        self.normalize = normalize
        self.epsilon = epsilon
        self.ridge = ridge
        self.decay = check_decay(decay, num_heads)
        self.rope_max_wavelength = rope_max_wavelength
        self.scale = key_dim**-0.5 if scale is None else scale
        self.feature_map = get_activation("feature_map", feature_map)
        self.conv_kernel_size = conv_kernel_size
        self.conv_activation = get_activation("conv_activation", conv_activation)
        self.qk_norm = qk_norm
        self.output_norm = output_norm
        self.output_gate = get_activation("output_gate", output_gate)
        self.dropout = dropout
        self._dropout_mask = None
        self.seed = plain_number(seed)  # Keras takes no other
        self._output_shape = output_shape
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)

    def build(self, input_shape: Any) -> None:
        check_features("inputs", input_shape, "(batch, features)")
        self.query_dense = self.make_dense(self.num_heads * self.key_dim, "query")
        self.key_dense = self.make_dense(self.num_key_value_heads * self.key_dim, "key")
        self.value_dense = self.make_dense(self.num_key_value_heads * self.value_dim, "value")
        self.output_size = self._output_shape or input_shape[-1]
        self.output_dense = self.make_dense(self.output_size, "output")
        inner = [self.query_dense, self.key_dense, self.value_dense]
        if self.output_gate is not None:
            self.gate_dense = self.make_dense(self.num_heads * self.value_dim, "gate")
            inner.append(self.gate_dense)
        for dense in inner:
            dense.build(input_shape)
        self.output_dense.build((*input_shape[:-1], self.num_heads * self.value_dim))
        if self.conv_kernel_size is not None:
            self.conv = ShortConvolution(
                self.conv_kernel_size,
                self.conv_activation,
                trainable=self.trainable,
                dtype=self.state_dtype,
                name="conv",
            )
            self.conv.build((*input_shape[:-1], sum(self.projected_sizes)))
        if self.decay is not None:
            policy = with_default(self.dtype_policy, self.state_dtype)
            self.log_decay = LogDecay(
                self.decay, self.num_heads, trainable=self.trainable, dtype=policy, name="decay"
            )
            self.log_decay.build(input_shape)
        if self.qk_norm:
            self.query_norm = self._norm("query_norm", self.key_dim)
            self.key_norm = self._norm("key_norm", self.key_dim)
        if self.output_norm:
            self.norm = self._norm("norm", self.value_dim)
        if self.dropout:
            self.dropout_layer = keras.layers.Dropout(
                self.dropout, seed=self.seed, dtype=self.dtype_policy, name="dropout"
            )

    @property
    def state_dtype(self) -> Any:
        """The dtype of the states."""
        return state_dtype(self.compute_dtype)

    @property
    def state_names(self) -> tuple[str, ...]:
        """The names of the states, in order: the operator's, `"window"`, and `"position"`."""
        conv = () if self.conv_kernel_size is None else ("window",)
        rope = () if self.rope_max_wavelength is None else ("position",)
        return self.operator.state_names + conv + rope

    @property
    def state_size(self) -> Any:
        """The shapes of the states, in order, without the batch axis."""
        own_decays = self.decay is not None and not isinstance(self.decay, float)
        moments = self.num_heads if own_decays else self.num_key_value_heads
        value_dim = self.value_dim + self.normalize  # with a column for the denominator
        sizes: list[tuple[int, ...]] = [
            *self.operator.state_shapes(moments, self.num_heads, self.key_dim, value_dim)
        ]
        if self.conv_kernel_size is not None:
            sizes.append((self.conv_kernel_size - 1, sum(self.projected_sizes)))
        if self.rope_max_wavelength is not None:
            sizes.append((2,))
        return sizes

    def denses(self) -> list[Any]:
        """Returns the list of all projections."""
        # No property: Keras would save its list instead of the attributes.
        denses = [self.query_dense, self.key_dense, self.value_dense, self.output_dense]
        if self.output_gate is not None:
            denses.append(self.gate_dense)
        if self.decay == "input":
            denses.append(self.log_decay.logit_dense)
        return denses

    @property
    def projected_sizes(self) -> Any:
        """The sizes of all heads' queries, keys and values."""
        key_value_heads = self.num_key_value_heads
        return (
            self.num_heads * self.key_dim,
            key_value_heads * self.key_dim,
            key_value_heads * self.value_dim,
        )

    def _norm(self, name, dim):
        norm = RMSNormalization(dtype=self.state_dtype, trainable=self.trainable, name=name)
        norm.build((None, dim))
        return norm

    def make_dense(self, units: int, name: str, owner: Any = None) -> Any:
        """A `Dense` layer with the bias, initializers, regularizers and constraints of this one.

        Args:
            units: Number of features.
            name: Name of the layer.
            owner: The `CompositeLayer` that it is in, if not the cell.
        """
        # Every projection needs a separate initializer, or all would start with equal weights.
        return make_dense(
            int(units),
            use_bias=self.use_bias,
            kernel_initializer=_copy(self.kernel_initializer),
            bias_initializer=_copy(self.bias_initializer),
            kernel_regularizer=self.kernel_regularizer,
            bias_regularizer=self.bias_regularizer,
            kernel_constraint=self.kernel_constraint,
            bias_constraint=self.bias_constraint,
            **(owner or self).options_of(name),
        )

    def get_config(self) -> dict[str, Any]:
        config = {
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "num_key_value_heads": self.num_key_value_heads,
            "operator": self._operator_name,
            "decay": self.decay,
            "rope_max_wavelength": self.rope_max_wavelength,
            "scale": self.scale,
            "masked": self.masked,
            "normalize": self.normalize,
            "epsilon": self.epsilon,
            "ridge": self.ridge,
            "feature_map": serialize_activation(self.feature_map),
            "conv_kernel_size": self.conv_kernel_size,
            "conv_activation": serialize_activation(self.conv_activation),
            "qk_norm": self.qk_norm,
            "output_norm": self.output_norm,
            "output_gate": serialize_activation(self.output_gate),
            "dropout": self.dropout,
            "output_shape": self._output_shape,
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
            "seed": self.seed,
        }
        return {**super().get_config(), **plain(config)}


def _copy(initializer):
    return initializer.__class__.from_config(initializer.get_config())
