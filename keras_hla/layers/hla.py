"""The layer, which evaluates its cell for all tokens in parallel."""

from typing import Any, Unpack

import keras
from keras import ops

from keras_hla import kernels
from keras_hla.backend.devices import devices_of, reference_to, referred_to
from keras_hla.backend.tensors import is_single_token, where
from keras_hla.checks import check_choice, check_features, check_positive_int
from keras_hla.layers import fused as fused_layers
from keras_hla.layers import token
from keras_hla.layers.arguments import plain, split_arguments
from keras_hla.layers.composite import CompositeLayer
from keras_hla.layers.hla_cell import HLACell
from keras_hla.layers.hla_checks import check_call, check_settings, check_split
from keras_hla.layers.masked_outputs import at_masked, outputs_around
from keras_hla.layers.mixing import is_rematerialized, mix
from keras_hla.layers.options import HLAOptions
from keras_hla.layers.own_parameters import check_own_parameters
from keras_hla.layers.redrawn_dropout import warn_of_redrawn_dropout
from keras_hla.layers.sequence_shard import SequenceShard
from keras_hla.layers.state_scope import current_state_scope
from keras_hla.masking import segment_starts
from keras_hla.types import DType, Implementation, Shape, State, Tensor

# The defaults of what needs an order of the tokens, where there is none.
_WITHOUT_ORDER = {"decay": None, "conv_kernel_size": None}


@keras.saving.register_keras_serializable(package="keras_hla")
class HLA(CompositeLayer):
    """Causal sequence mixing by higher-order linear attention, in linear time.

    The layer takes the place of causal self-attention or of a GRU: each output
    depends on its token and on all tokens before it. `HLA` is to `HLACell` what
    `keras.layers.GRU` is to `keras.layers.GRUCell`. Per head, with `a(j→t)` the
    product of the decays after token `j` up to `t`, the default operator
    `"hla2"` computes

        o_t = Σ_{i≤j≤t} a(i→t) a(j→t) (q_t·k_i) (k_i·q_j) v_j

    in chunks, without a loop over tokens. A long sequence can be read in pieces of
    any length: the state after one piece is the initial state of the next.

    Args:
        num_heads: Number of query heads.
        key_dim: Size of each query and key head.
        value_dim: Size of each value head. `None` means `key_dim`.
        return_sequences: Whether to return the output of every token (the
            default, unlike in `keras.layers.GRU`) or of the last one.
        return_state: Whether to return the last state in addition to the output.
        go_backwards: Whether to read the sequence from its end. The outputs, and
            the mask for later layers, are in reversed order then, as in
            `keras.layers.GRU`.
        stateful: Whether the last state of each batch is the initial state of the
            next one. This needs a fixed batch size. The states are `variables`,
            not `weights`: they are not saved, and not copied by `set_weights`.
        zero_output_for_mask: Whether the output of a masked token is zero. By
            default it is the previous output, as in `keras.layers.GRU`.
        causal: `False` lets every token read the whole sequence, still in linear
            time. There is no decay, convolution or state then: the defaults of
            `decay` and `conv_kernel_size` are `None`.
        chunk_size: Largest number of tokens of a chunk. It affects time and
            memory, not the result. `None` chooses it automatically.
        remat_length: Length from which rematerialization saves memory. A longer
            sequence is computed in parts of at most this length, each of them a
            second time in the backward pass. `None` means no limit. With context
            parallelism, a longer shard is recomputed as a whole. The length must be
            known when the call is traced, and `causal=True`. Beyond this length
            `torch.func` has no gradients, and TensorFlow has neither forward mode
            nor second gradients. Within `torch.compile` the compiler chooses what
            to recompute: see PyTorch's `activation_memory_budget`.
        implementation: `"auto"`, `"portable"` or `"triton"`, as in
            `keras_hla.ops.higher_order_attention`. The kernels take queries, keys
            and values in the compute dtype. `implementation_for(sequences)` returns
            the implementation that runs, and the reason.
        **kwargs: Arguments of `HLACell` (`num_key_value_heads`, `operator`,
            `decay`, `rope_max_wavelength`, `scale`, `feature_map`,
            `conv_kernel_size`, `conv_activation`, `qk_norm`, `masked`,
            `normalize`, `epsilon`, `ridge`, `output_norm`, `output_gate`,
            `dropout`, `output_shape`, `use_bias`, `seed`, and the initializers,
            regularizers and constraints of the projections) and of
            `keras.layers.Layer`.

    Call arguments:
        sequences: Tensor of shape `(batch, length, features)`.
        initial_state: List of states as returned with `return_state=True`, of
            shapes `(batch, *size)` for the entries of `layer.cell.state_size`.
            `None` is the state before the first token.
        mask: Boolean tensor of shape `(batch, length)`, true for unmasked
            tokens. A masked token leaves the state unchanged, whatever it holds.
        segment_ids: Integer tensor of shape `(batch, length)`, for packed
            sequences: a new segment, with a state of zeros, starts where it
            changes. The first segment continues from the initial state.
        training: Whether to apply dropout.

    Returns:
        A tensor of shape `(batch, length, features)`, or with
        `return_sequences=False` the output of the last unmasked token, `(batch,
        features)`, or zeros if there is none. `output_shape`, if set, is the number
        of features. A sequence of length 0 leaves the states unchanged.

        With `return_state=True` a tuple of that tensor and the states, float32
        (float64 under a float64 policy): for `"hla2"` `S`, `(batch, num_heads,
        key_dim, key_dim)` (`num_key_value_heads` of them where all heads decay
        alike); `F`, `(batch, num_heads, key_dim, value_dim)`; then, if there is a
        convolution, the window of the last tokens that it reads, and if there is
        a rotary embedding, the position, `(batch, 2)`: how many blocks of 65,536
        tokens lie before, and how many tokens besides.

    Raises:
        ValueError: if an argument is not among its allowed values.

    Example:

    >>> tokens = keras.Input((None,), dtype="int32")
    >>> x = keras.layers.Embedding(256, 64)(tokens)
    >>> x = x + keras_hla.layers.HLA(num_heads=4, key_dim=16)(x)
    >>> model = keras.Model(tokens, keras.layers.Dense(256)(x))

    Reference:

    - [Higher-order Linear Attention](https://arxiv.org/abs/2510.27258)
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        return_sequences: bool = True,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        zero_output_for_mask: bool = False,
        causal: bool = True,
        chunk_size: int | None = None,
        remat_length: int | None = 8192,
        implementation: Implementation = "auto",
        name: str | None = None,
        trainable: bool = True,
        dtype: DType | None = None,
        **kwargs: Unpack[HLAOptions],
    ) -> None:
        arguments, others = split_arguments(kwargs, HLACell)
        if not causal:
            arguments = _WITHOUT_ORDER | arguments
        super().__init__(name=name, trainable=trainable, dtype=dtype, **others)
        check_positive_int("chunk_size", chunk_size, optional=True)
        check_positive_int("remat_length", remat_length, optional=True)
        check_choice("implementation", implementation, kernels.IMPLEMENTATIONS)
        self.cell = HLACell(
            num_heads,
            key_dim,
            value_dim,
            name="cell",
            trainable=trainable,
            dtype=self.dtype_policy,
            **arguments,
        )
        self.return_sequences = return_sequences
        self.return_state = return_state
        self.go_backwards = go_backwards
        self.stateful = stateful
        self.zero_output_for_mask = zero_output_for_mask
        self.causal = causal
        self.chunk_size = chunk_size
        self.remat_length = remat_length
        self.implementation = implementation
        self._context_parallel = None
        self.__dict__["states"] = []  # the variables of a stateful layer
        self.supports_masking = True
        check_settings(self)

    def build(
        self,
        sequences_shape: Shape,
        initial_state_shape: Shape | None = None,
        segment_ids_shape: Shape | None = None,
    ) -> None:
        check_features("sequences", sequences_shape, "(batch, length, features)")
        batch, features = sequences_shape[0], sequences_shape[-1]
        self.cell.build((batch, features))
        if self.stateful:
            if batch is None:
                raise ValueError(
                    "`stateful=True` needs a fixed batch size, as in `Input(batch_shape=...)`. "
                    f"Received: inputs of shape {tuple(sequences_shape)}"
                )
            # Not as an attribute, which Keras would track as a weight.
            self.__dict__["states"] = [
                keras.Variable(
                    "zeros",
                    name=f"state_{name}",
                    shape=(batch, *size),
                    dtype=self.cell.state_dtype,
                    trainable=False,
                    autocast=False,
                )
                for name, size in zip(self.cell.state_names, self.cell.state_size, strict=True)
            ]

    @property
    def variables(self) -> list[keras.Variable]:
        """The weights, the seeds of the dropout, and the states of a stateful layer."""
        return [*super().variables, *self.states]

    def load_own_variables(self, store: Any) -> None:
        # The layer has no weights but the cell's. Files of former versions hold the states here.
        if self._trainable_variables or self._non_trainable_variables:
            super().load_own_variables(store)

    @property
    def context_parallel(self) -> Any:
        """The devices over which the length is split: see `keras_hla.distribution`.

        Of a `DeviceMesh` it is the process group, which the layer does not keep alive.
        """
        return referred_to(self._context_parallel)

    @context_parallel.setter
    def context_parallel(self, context_parallel: Any) -> None:
        check_split(self, context_parallel)
        self._context_parallel = reference_to(context_parallel)

    def get_initial_state(self, batch_size: int) -> list[Tensor]:
        """Returns the list of states before the first token.

        Args:
            batch_size: Number of rows of the batch.

        Returns:
            The list of states, zeros, as `initial_state` of a call takes them.
        """
        return self.cell.get_initial_state(batch_size)

    def reset_state(self) -> None:
        """Sets the state of a `stateful` layer back to that before the first token."""
        if self.stateful and self.built:
            for state in self.states:
                state.assign(ops.zeros(state.shape, state.dtype))

    def call(
        self,
        sequences: Tensor,
        initial_state: State | None = None,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        training: bool | None = None,
    ) -> Any:
        check_own_parameters(self)
        if mask is None:  # Keras fills it in only where `sequences` is the one tensor.
            mask = getattr(sequences, "_keras_mask", None)
        scope, before = current_state_scope(), None
        if scope is not None:
            initial_state, mask, before = scope.enter(
                self, sequences, initial_state, mask, segment_ids
            )
        mask, segment_ids = check_call(self, sequences, initial_state, mask, segment_ids)
        mask = None if mask is None else ops.cast(mask, "bool")
        if self.go_backwards:
            sequences, mask, segment_ids = (
                x if x is None else ops.flip(x, axis=1) for x in (sequences, mask, segment_ids)
            )
        if mask is not None:
            sequences = where(mask[..., None], sequences, 0)
        starts, shard = self._starts_and_shard(sequences, mask, segment_ids)
        states = self._starting_states(initial_state)
        kept = self.return_state or self.stateful or scope is not None
        output, states = mix(self, states, sequences, mask, starts, kept and self.causal, shard)
        warn_of_redrawn_dropout(self, self.cell, training)
        output, last = self.cell.drop(output, training), None
        filled = mask is not None and not self.zero_output_for_mask
        if shard is not None and (filled or not self.return_sequences):
            before, last = outputs_around(shard, output, mask)
        if mask is not None:
            output, last = at_masked(output, mask, before, last, filled, self.return_sequences)
        if scope is not None:
            scope.leave(states, last)
        elif self.stateful:
            for variable, state in zip(self.states, states, strict=True):
                variable.assign(state)
        if not self.return_sequences:
            # Of one token, or of none.
            output = ops.sum(output[:, -1:], axis=1) if last is None else last
        return (output, *states) if self.return_state else output

    def implementation_for(
        self, sequences: Tensor | None = None, segmented: bool = False
    ) -> kernels.Choice:
        """Returns the implementation of the operator and the reason: see `kernels.choose`.

        For a single token it is that of the whole layer except its projections.

        Args:
            sequences: Tensor like those of a call, for its device and known shape.
            segmented: Whether the call has `segment_ids`.

        Returns:
            A `kernels.Choice`, the pair of `implementation` and `reason`.

        Raises:
            ValueError: if the layer has `implementation="triton"`, and the kernels cannot run.
        """
        cell = self.cell
        if sequences is not None and is_single_token(sequences):
            return token.choose(self, sequences, segmented)
        return kernels.choose(
            cell.operator,
            dtype=self.compute_dtype,
            key_dim=cell.key_dim,
            value_dim=cell.value_dim,
            implementation=self.implementation,
            decays=cell.decay is not None or segmented,
            tensor=sequences,
            causal=self.causal,
            normalize=cell.normalize,
            chunk_size=self.chunk_size,
            context_parallel=self.context_parallel,
        )

    def why_not_fused(
        self,
        sequences: Tensor | None = None,
        initial_state: State | None = None,
        mask: Tensor | None = None,
        segmented: bool = False,
    ) -> str | None:
        """Why the stages of the layer are not one function, in words, or `None` if they are.

        One function has less CPU overhead, under PyTorch on a GPU.

        Args:
            sequences: Tensor like those of a call, for its device and known shape.
            initial_state: As in a call.
            mask: As in a call.
            segmented: Whether the call has `segment_ids`.

        Returns:
            The reason in words, or `None`.
        """
        choice = self.implementation_for(sequences, segmented)
        if choice.implementation != "triton":
            return choice.reason
        if sequences is not None and is_single_token(sequences):
            return "one kernel computes a single token"
        if current_state_scope() is not None:
            return "the model streams"
        states = initial_state is not None or self.return_state or self.stateful
        if (states or mask is not None) and self.context_parallel is not None:
            return "several devices hold a sequence with states or masked tokens"
        long = sequences is not None and is_rematerialized(self, sequences)
        if mask is not None and (states or long):
            return "there are a mask and states, if only between the parts of a long sequence"
        return fused_layers.why_not_fused(self.cell, self.cell.denses())

    def starts_and_shard(self, sequences: Tensor, segment_ids: Tensor) -> Any:
        """Where the segments of a call without a mask start, once that is checked, or `None`;
        and the `SequenceShard` that `sequences` is, or `None`.
        """
        _, segment_ids = check_call(self, sequences, None, None, segment_ids)
        return self._starts_and_shard(sequences, None, segment_ids)

    def _starts_and_shard(self, sequences, mask, segment_ids):
        devices, starts = devices_of(self.context_parallel), None
        if segment_ids is not None:
            starts = segment_starts(ops.convert_to_tensor(segment_ids), mask, devices)
        if devices is None:
            return starts, None
        return starts, SequenceShard(devices, ops.shape(sequences)[1], mask, starts)

    def _starting_states(self, initial_state):
        """The given states; else those of a stateful layer; else `None`, which is zeros."""
        if initial_state is not None:
            return [ops.convert_to_tensor(x, self.cell.state_dtype) for x in initial_state]
        # Copies: the variables are overwritten while torch still needs their values.
        return [ops.copy(state) for state in self.states] or None

    def compute_mask(self, sequences: Tensor, previous_mask: Tensor | None = None) -> Any:
        mask = previous_mask if self.return_sequences else None
        if mask is not None and self.go_backwards:  # in the order of the outputs
            mask = ops.flip(mask, axis=1)
        return [mask] + [None] * len(self.cell.state_size) if self.return_state else mask

    def compute_output_shape(
        self,
        sequences_shape: Shape,
        initial_state_shape: Shape | None = None,
        segment_ids_shape: Shape | None = None,
    ) -> Any:
        batch, length, features = sequences_shape
        (_, features), _ = self.cell.compute_output_shape((batch, features))
        output = (batch, length, features) if self.return_sequences else (batch, features)
        if not self.return_state:
            return output
        return (output, *((batch, *size) for size in self.cell.state_size))

    def compute_output_spec(
        self,
        sequences: Tensor,
        initial_state: State | None = None,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        training: bool | None = None,
    ) -> Any:
        check_call(self, sequences, initial_state, mask, segment_ids)
        shapes = self.compute_output_shape(sequences.shape)
        if not self.return_state:
            return keras.KerasTensor(shapes, self.compute_dtype)
        return keras.KerasTensor(shapes[0], self.compute_dtype), *(
            keras.KerasTensor(shape, self.cell.state_dtype) for shape in shapes[1:]
        )

    def get_config(self) -> dict[str, Any]:
        cell = self.cell.get_config()
        del cell["name"], cell["trainable"], cell["dtype"]
        config = {
            "return_sequences": self.return_sequences,
            "return_state": self.return_state,
            "go_backwards": self.go_backwards,
            "stateful": self.stateful,
            "zero_output_for_mask": self.zero_output_for_mask,
            "causal": self.causal,
            "chunk_size": self.chunk_size,
            "implementation": self.implementation,
            "remat_length": self.remat_length,
        }
        return {**super().get_config(), **cell, **plain(config)}
