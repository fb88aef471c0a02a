"""The arguments that layers take by keyword and hand on, for type checkers."""

from collections.abc import Sequence
from typing import TypedDict

from keras_hla.operators import Operator
from keras_hla.types import (
    Activation,
    Constraint,
    DType,
    Implementation,
    Initializer,
    Regularizer,
    Seed,
)


class LayerOptions(TypedDict, total=False):
    """The arguments of every Keras layer."""

    activity_regularizer: Regularizer | None
    autocast: bool


class NamedLayerOptions(LayerOptions, total=False):
    """The arguments of every Keras layer, with those that other layers name themselves."""

    name: str | None
    trainable: bool
    dtype: DType | None


class MixerOptions(LayerOptions, total=False):
    """The arguments of `HLACell` that `HLA` and `HLADecoderBlock` take by keyword."""

    num_key_value_heads: int | None
    operator: str | Operator
    decay: float | Sequence[float] | str | None
    rope_max_wavelength: float | None
    scale: float | None
    masked: bool
    normalize: bool
    epsilon: float
    ridge: float
    feature_map: Activation | None
    qk_norm: bool
    output_norm: bool
    output_gate: Activation | None
    conv_kernel_size: int | None
    conv_activation: Activation | None
    seed: Seed | None
    kernel_initializer: Initializer
    bias_initializer: Initializer
    kernel_regularizer: Regularizer | None
    bias_regularizer: Regularizer | None
    kernel_constraint: Constraint | None
    bias_constraint: Constraint | None


class HLAOptions(MixerOptions, total=False):
    """The arguments of `HLACell` that `HLA` takes by keyword."""

    dropout: float
    output_shape: int | None
    use_bias: bool


class BlockOptions(MixerOptions, total=False):
    """The arguments of `HLA` that `HLADecoderBlock` takes by keyword."""

    value_dim: int | None
    stateful: bool
    zero_output_for_mask: bool
    causal: bool
    chunk_size: int | None
    remat_length: int | None
    implementation: Implementation
