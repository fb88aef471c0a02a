"""The block that language models stack."""

import functools
from typing import Any, Unpack

import keras
from keras import ops

from keras_hla import stages
from keras_hla.backend.tensors import is_single_token, where
from keras_hla.checks import (
    as_tensor,
    check_features,
    check_mask,
    check_number,
    check_positive_int,
    check_rank,
)
from keras_hla.layers import fused as fused_layers
from keras_hla.layers.arguments import plain, split_arguments
from keras_hla.layers.composite import CompositeLayer
from keras_hla.layers.feature_map import get_activation, serialize_activation
from keras_hla.layers.hla import HLA
from keras_hla.layers.hla_cell import HLACell
from keras_hla.layers.mixing import is_rematerialized
from keras_hla.layers.options import BlockOptions
from keras_hla.layers.own_parameters import check_own_parameters
from keras_hla.layers.redrawn_dropout import warn_of_redrawn_dropout
from keras_hla.layers.rms_normalization import RMSNormalization
from keras_hla.types import Activation, DType, Shape, State, Tensor

# Arguments of the mixer that a residual leaves no choice of.
_FIXED = ("return_sequences", "go_backwards", "output_shape")
# The size of an MLP is a multiple of this.
_MLP_MULTIPLE = 16


@keras.saving.register_keras_serializable(package="keras_hla")
class HLADecoderBlock(CompositeLayer):
    """Pre-norm decoder block: `HLA` and a gated MLP, with dropout and residuals.

        y = x + dropout(HLA(norm(x)))
        z = y + dropout((activation(norm(y) W_gate) ⊙ norm(y) W_up) W_down)

    A language model is a stack of these blocks. They stream as the layer does.

    Args:
        num_heads: Number of query heads.
        key_dim: Size of each query and key head.
        intermediate_dim: Hidden size of the MLP. `None` means 8/3 of the features
            of the input, rounded up to a multiple of 16: as many weights as an MLP
            without a gate has at four times the features.
        activation: Activation of the MLP's gate.
        dropout: Fraction in [0, 1) of the outputs of the mixer and of the MLP that
            training drops.
        norm_epsilon: Positive number, added to the mean squares of the norms.
        use_bias: Whether the projections, including those of the MLP, have a bias.
        **kwargs: Arguments of `HLA`, except `return_sequences`, `go_backwards` and
            `output_shape`, and of `keras.layers.Layer`. Initializers, regularizers
            and constraints apply to the MLP, too.

    Call arguments:
        sequences: Tensor of shape `(batch, length, features)`.
        initial_state: List of states as returned with `return_state=True`, or
            `None`, as in `HLA`.
        mask: Boolean tensor of shape `(batch, length)`, true for unmasked
            tokens. A masked token affects no other token.
        segment_ids: Integer tensor of shape `(batch, length)`, as in `HLA`.
        training: Whether to apply dropout.

    Returns:
        A tensor of the shape of `sequences`. With `return_state=True` a tuple of
        this tensor and the states of the mixer.

    Raises:
        ValueError: if an argument is not among its allowed values.

    Example:

    >>> tokens = keras.Input((None,), dtype="int32")
    >>> x = keras.layers.Embedding(256, 64)(tokens)
    >>> for _ in range(2):
    ...     x = keras_hla.layers.HLADecoderBlock(num_heads=4, key_dim=16)(x)
    >>> x = keras.layers.RMSNormalization()(x)
    >>> model = keras.Model(tokens, keras.layers.Dense(256)(x))
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        intermediate_dim: int | None = None,
        activation: Activation = "silu",
        dropout: float = 0.0,
        norm_epsilon: float = 1e-6,
        use_bias: bool = False,
        name: str | None = None,
        trainable: bool = True,
        dtype: DType | None = None,
        **kwargs: Unpack[BlockOptions],
    ) -> None:
        arguments, others = split_arguments(kwargs, HLA, HLACell)
        super().__init__(name=name, trainable=trainable, dtype=dtype, **others)
        for argument in _FIXED:
            if argument in arguments:
                raise ValueError(
                    f"A block takes no argument `{argument}`: its outputs are those of all tokens, "
                    "in order, with the features of the input. "
                    f"Received: {argument}={arguments[argument]!r}"
                )
        check_positive_int("intermediate_dim", intermediate_dim, optional=True)
        check_number("norm_epsilon", norm_epsilon, "a positive number", lambda x: x > 0)
        self.mixer = HLA(
            num_heads,
            key_dim,
            use_bias=use_bias,
            dropout=dropout,
            trainable=trainable,
            dtype=self.dtype_policy,
            name="mixer",
            **arguments,
        )
        self.intermediate_dim = intermediate_dim
        self.activation = get_activation("activation", activation)
        self.norm_epsilon = norm_epsilon
        self.supports_masking = True

    def build(
        self,
        sequences_shape: Shape,
        initial_state_shape: Shape | None = None,
        segment_ids_shape: Shape | None = None,
    ) -> None:
        check_features("sequences", sequences_shape, "(batch, length, features)")
        features: Any = sequences_shape[-1]
        size = self.mlp_size(features)
        cell = self.mixer.cell
        self.mixer_norm = self._norm("mixer_norm")
        self.mlp_norm = self._norm("mlp_norm")
        self.gate_dense = cell.make_dense(size, "gate", owner=self)
        self.up_dense = cell.make_dense(size, "up", owner=self)
        self.down_dense = cell.make_dense(features, "down", owner=self)
        for norm in (self.mixer_norm, self.mlp_norm):
            norm.build(sequences_shape)
        self.mixer.build(sequences_shape)
        self.gate_dense.build(sequences_shape)
        self.up_dense.build(sequences_shape)
        self.down_dense.build((*sequences_shape[:-1], size))

    def mlp_size(self, features: int) -> int:
        """The number of features between the projections of the MLP."""
        return self.intermediate_dim or -(-8 * features // (3 * _MLP_MULTIPLE)) * _MLP_MULTIPLE

    @property
    def cell(self) -> HLACell:
        """The cell of the mixer, which names the states and knows their sizes."""
        return self.mixer.cell

    @property
    def states(self) -> list[keras.Variable]:
        """The variables of a stateful block."""
        return self.mixer.states

    def get_initial_state(self, batch_size: int) -> list[Tensor]:
        """Returns the list of states before the first token.

        Args:
            batch_size: Number of rows of the batch.

        Returns:
            The list of states of the mixer, zeros.
        """
        return self.mixer.get_initial_state(batch_size)

    def reset_state(self) -> None:
        """Sets the state of a `stateful` block back to that before the first token."""
        self.mixer.reset_state()

    def call(
        self,
        sequences: Tensor,
        initial_state: State | None = None,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        training: bool | None = None,
    ) -> Any:
        check_own_parameters(self)
        check_rank(3, "(batch, length, features)", sequences=sequences)
        if mask is None:  # Keras fills it in only where `sequences` is the one tensor.
            mask = getattr(sequences, "_keras_mask", None)
        mask = as_tensor("mask", mask, optional=True)
        if mask is not None:
            check_mask(mask, *sequences.shape[:2])
            sequences = where(ops.cast(mask, "bool")[..., None], sequences, 0)
        sequences = ops.cast(sequences, self.compute_dtype)
        segmented = segment_ids is not None
        fused = stages.are_fused(self.mixer.implementation_for(sequences, segmented)[0])
        if fused and not self._why_not_fused(sequences, initial_state, mask, segmented):
            starts, shard = self.mixer.starts_and_shard(sequences, segment_ids)
            drop = None
            if self.cell.dropout and training:
                warn_of_redrawn_dropout(self, self.cell, training)
                drop = functools.partial(self.cell.drop, training=training)
            return fused_layers.transform(self, sequences, starts, shard, drop)
        mixed = self.mixer(
            self.mixer_norm.normalize(sequences, fused),
            initial_state=initial_state,
            mask=mask,
            segment_ids=segment_ids,
            training=training,
        )
        mixed, *states = mixed if self.mixer.return_state else (mixed,)
        output = sequences + mixed
        warn_of_redrawn_dropout(self, self.cell, training)
        output = output + self.cell.drop(self._transform_mlp(output, fused), training)
        return (output, *states) if states else output

    def _transform_mlp(self, x, fused):
        """What the MLP adds to `x`, before dropout."""
        if fused and not is_single_token(x) and not self._why_mlp_not_fused():
            return fused_layers.transform_mlp(self, x)
        hidden = self.mlp_norm.normalize(x, fused)
        gates = self.gate_dense(hidden)
        hidden = stages.gate(self.up_dense(hidden), gates, self.activation, fused)
        return self.down_dense(hidden)

    def _why_not_fused(self, sequences, initial_state, mask, segmented):
        """As `HLA.why_not_fused`, of the whole block."""
        mixer = self.mixer
        if mask is not None:
            return "there is a mask"
        if initial_state is not None or mixer.return_state or mixer.stateful:
            return "there are states before or after the sequence"
        if is_rematerialized(mixer, sequences):
            return "the sequence is longer than `remat_length`"
        if mixer.context_parallel is not None and sequences.shape[1] == 0:
            return "the shard has no tokens"
        reason = mixer.why_not_fused(sequences, initial_state, mask, segmented)
        return reason or self._why_mlp_not_fused()

    def _why_mlp_not_fused(self):
        if self.activation is not keras.activations.silu:
            return "`activation` is not 'silu'"
        denses = self.gate_dense, self.up_dense, self.down_dense
        return fused_layers.why_not_fused(self.cell, denses)

    def compute_mask(self, sequences: Tensor, previous_mask: Tensor | None = None) -> Any:
        return self.mixer.compute_mask(sequences, previous_mask)

    def compute_output_shape(
        self,
        sequences_shape: Shape,
        initial_state_shape: Shape | None = None,
        segment_ids_shape: Shape | None = None,
    ) -> Any:
        return self.mixer.compute_output_shape(sequences_shape)

    def compute_output_spec(
        self,
        sequences: Tensor,
        initial_state: State | None = None,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        training: bool | None = None,
    ) -> Any:
        return self.mixer.compute_output_spec(sequences, initial_state, mask, segment_ids)

    def _norm(self, name):
        return RMSNormalization(
            epsilon=self.norm_epsilon,
            trainable=self.trainable,
            dtype=self.dtype_policy,
            name=name,
        )

    def get_config(self) -> dict[str, Any]:
        mixer = self.mixer.get_config()
        for argument in _FIXED:
            del mixer[argument]
        config = {
            "intermediate_dim": self.intermediate_dim,
            "activation": serialize_activation(self.activation),
            "norm_epsilon": self.norm_epsilon,
        }
        return {**mixer, **super().get_config(), **plain(config)}
