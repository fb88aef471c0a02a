"""One step of the layer, and what the layer does before and after its operator."""

from typing import Any

import keras
from keras import ops

# Not public, but cells of this class alone may draw random numbers before the loop of an RNN.
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

from keras_hla import stages
from keras_hla.backend.tensors import count_up, is_single_token, split_features
from keras_hla.evaluate import evaluate
from keras_hla.inputs import arrange, prepare_state
from keras_hla.layers.hla_weights import HLAWeights
from keras_hla.layers.redrawn_dropout import warn_of_redrawn_dropout
from keras_hla.masking import count_tokens
from keras_hla.precision import exchanged_dtype
from keras_hla.stages.rotary import join_position, rotation, split_position
from keras_hla.types import Shape, State, Tensor


@keras.saving.register_keras_serializable(package="keras_hla")
class HLACell(HLAWeights, DropoutRNNCell):
    """Cell of the `HLA` layer: one step of one token, at a constant cost.

    Projections of the input give `q_t, k_t, v_t` per head, and the decay `a_t`.
    The default operator `"hla2"` computes

        S_t = a_t S_{t-1} + k_t k_tᵀ
        F_t = a_t² F_{t-1} + (S_t q_t) v_tᵀ
        o_t = q_tᵀ F_t

    and the cell returns the output projection of the normalized `o_t` of all heads.

    `keras.layers.RNN(cell)` runs it over a sequence, token by token; `HLA` gives
    the same outputs in parallel.

    Args:
        num_heads: Number of query heads.
        key_dim: Size of each query and key head.
        value_dim: Size of each value head. `None` means `key_dim`.
        num_key_value_heads: Number of key and value heads, a divisor of
            `num_heads`: consecutive query heads share one. `None` means `num_heads`.
        operator: Name of an operator, or an operator that has a name; see
            `keras_hla.operators.get`.
        decay: Factor by which the state decays at each token: `"input"`, the
            default, computes it per head and token from the inputs; `"learned"`
            trains one per head; `"multiscale"` fixes one per head, with time scales
            from 32 to 512 tokens; a sequence of `num_heads` numbers in (0, 1] gives
            one per head, and a number gives one for all heads; `None` means no
            decay.
        rope_max_wavelength: Longest period of the rotary position embedding of
            queries and keys, in tokens divided by `2 π`; `None` means no embedding. It
            needs an even `key_dim`, and adds the position to the state.
        scale: Factor of the queries. `None` means `key_dim ** -0.5`.
        feature_map: Applied to queries and keys, before the scale and the rotary
            embedding: the name of a Keras activation (`"relu"`, `"softplus"`,
            ...), `"elu_plus_one"`, or a callable of tensors `(..., key_dim)` that
            keeps their shape. `None` means no feature map, as in the paper.
        conv_kernel_size: Kernel size, 2 or more, of a causal depthwise convolution
            of the projected queries, keys and values; 4 by default. It adds the
            last `conv_kernel_size - 1` tokens to the state. `None` means no
            convolution.
        conv_activation: Activation after the convolution, or `None`.
        qk_norm: Whether to divide the queries and keys of each head by their root
            mean square, with a trained scale per feature, before the feature map.
        masked: As in `keras_hla.ops.higher_order_attention`.
        normalize: Whether to divide outputs by the operator's denominator, as in
            `keras_hla.ops.higher_order_attention`.
        epsilon: Positive number, added to the denominator.
        ridge: As in `keras_hla.ops.higher_order_attention`.
        output_norm: Whether to divide the output of each head by its root mean
            square. Without it outputs grow with the length.
        output_gate: Activation of a gate, computed from the inputs, that multiplies
            the normalized outputs of the heads: `"silu"`, or another name or
            callable. `None` means no gate.
        dropout: Fraction in [0, 1) of the outputs that training drops. In
            `keras.layers.RNN` the same features are dropped at all tokens of a
            sequence, as with `keras.layers.GRUCell`; `HLA` draws for each token.
        output_shape: Number of features of the output. `None` means that of the
            input.
        use_bias: Whether the projections have a bias.
        kernel_initializer: Initializer of the projections' kernels.
        bias_initializer: Initializer of the projections' biases.
        kernel_regularizer: Regularizer of the projections' kernels.
        bias_regularizer: Regularizer of the projections' biases.
        kernel_constraint: Constraint of the projections' kernels.
        bias_constraint: Constraint of the projections' biases.
        seed: Integer, the seed of the dropout.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, features)`.
        states: List of the states before the token, of shapes
            `(batch, *size)` for the entries of `state_size`.
        training: Whether to drop outputs.

    Returns:
        The tuple `(output, states)`: a tensor of shape `(batch, features)`, and
        the list of new states. States are float32, also under a
        lower-precision policy (float64 under a float64 policy).

    Raises:
        ValueError: if an argument is not among its allowed values.

    Example:

    >>> cell = keras_hla.layers.HLACell(num_heads=4, key_dim=16)
    >>> token = keras.random.normal((2, 64))
    >>> output, states = cell(token, cell.get_initial_state(batch_size=2))
    >>> tuple(output.shape)
    (2, 64)

    Reference:

    - [Higher-order Linear Attention](https://arxiv.org/abs/2510.27258)
    """

    def get_initial_state(self, batch_size: int) -> list[Tensor]:
        """Returns the list of states before the first token.

        Args:
            batch_size: Number of rows of the batch.

        Returns:
            The list of states, zeros, in the order of `state_names`.
        """
        return [ops.zeros((batch_size, *size), self.state_dtype) for size in self.state_size]

    def call(self, inputs: Tensor, states: State, training: bool | None = None) -> Any:
        self._check_dtypes(states)
        memory, context = self.split_states(states)
        operands, context = self.project(inputs[:, None], context)
        operands = arrange(*operands)
        sizes = operands.state_shapes(self.operator, self.normalize)
        memory = prepare_state("states", memory, self.operator, sizes, operands)
        epsilon = self.epsilon if self.normalize else None
        output, memory = evaluate(self.operator, operands, memory, form="step", epsilon=epsilon)
        output = output[:, 0]
        output = self.finish(output, inputs)
        warn_of_redrawn_dropout(self, self, training)
        if training and self._dropout_mask is not None:
            output = output * self._dropout_mask
        else:
            output = self.drop(output, training)
        return output, [*memory, *context.values()]

    def _check_dtypes(self, states):
        """Refuses what `keras.layers.RNN` makes of states under a policy of low precision."""
        for name, state in zip(self.state_names, states, strict=True):
            dtype = keras.backend.standardize_dtype(state.dtype)
            if dtype != self.state_dtype:
                raise ValueError(
                    f"Argument `states` must hold tensors of dtype {self.state_dtype} under every "
                    "policy of low precision, but `keras.layers.RNN` casts them. Use "
                    f"`keras_hla.layers.HLA`, or a policy of {self.state_dtype}. "
                    f"Received: state {name} of dtype {dtype}, policy {self.dtype_policy.name}"
                )

    def split_states(self, states: State) -> Any:
        """The list of the operator's states, and a dictionary of the others."""
        memory = len(self.operator.state_names)
        context = zip(self.state_names[memory:], states[memory:], strict=True)
        return list(states[:memory]), dict(context)

    def project(
        self,
        sequences: Tensor,
        context: Any,
        mask: Tensor | None = None,
        starts: Tensor | None = None,
        return_context: bool = True,
        fused: bool = False,
        shard: Any = None,
    ) -> Any:
        """What the operator takes.

        Args:
            sequences: Tensor of shape `(batch, length, features)`.
            context: Dictionary of the states before them, without the operator's. What is left
                out is zero.
            mask: Boolean tensor of shape `(batch, length)`.
            starts: Boolean tensor of shape `(batch, length)`, true where a segment
                starts that forgets all before it.
            return_context: Whether the new context is wanted; without it is empty.
            fused: Whether kernels compute the stages.
            shard: The `SequenceShard` that `sequences` is, or `None` where it is the whole.

        Returns:
            Query, key and value, `(batch, length, heads, dim)`, and the log-decay or `None`;
            and the new context.
        """
        dtype = exchanged_dtype(self.compute_dtype)
        denses = (self.query_dense, self.key_dense, self.value_dense)
        projected = [ops.cast(dense(sequences), dtype) for dense in denses]
        after = {}
        if self.conv_kernel_size is not None:
            projected, after["window"] = self._convolve(
                projected, context.get("window"), mask, starts, return_context, fused, shard
            )
        query, key, value = projected
        query = _split_heads(query, self.num_heads, self.key_dim)
        key = _split_heads(key, self.num_key_value_heads, self.key_dim)
        value = _split_heads(value, self.num_key_value_heads, self.value_dim)
        if self.qk_norm:
            query = self.query_norm.normalize(query, fused)
            key = self.key_norm.normalize(key, fused)
        if self.feature_map is not None:
            query, key = (
                ops.cast(self.feature_map(ops.cast(x, self.state_dtype)), dtype)
                for x in (query, key)
            )
        if self.rope_max_wavelength is None:
            query = query * self.scale
        else:
            (cos, sin), after["position"] = self.angles(
                sequences, context.get("position"), mask, return_context, shard
            )
            query = stages.rotate(query, cos, sin, self.scale, fused)
            key = stages.rotate(key, cos, sin, fused=fused)
        log_decay = None if self.decay is None else self.log_decay(sequences)
        return (query, key, value, log_decay), after if return_context else {}

    def _convolve(self, projected, window, mask, starts, return_window, fused, shard):
        """The convolution of the projected queries, keys and values, and the window after it."""
        if shard is not None:
            own = self._window_after(projected, (None,) * 3, mask, starts)
            window, last = shard.last_tokens(own, window, starts is not None, return_window)
        sizes = self.projected_sizes
        # Together where there is more to each call than to its products.
        joint = mask is not None or is_single_token(projected[0])
        kernels, windows = [ops.convert_to_tensor(self.conv.kernel)], [window]
        if joint:
            projected = [ops.concatenate(projected, axis=-1)]
        else:
            kernels = split_features(kernels[0], sizes)
            windows = [None] * 3 if window is None else split_features(window, sizes)
        parts = list(zip(projected, kernels, windows, strict=True))
        projected = [
            stages.convolve(x, kernel, self.conv_activation, before, mask, starts, fused)
            for x, kernel, before in parts
        ]
        after = None
        if return_window:
            tokens, _, before = zip(*parts, strict=True)
            after = self._window_after(tokens, before, mask, starts) if shard is None else last
            after = ops.cast(after, self.state_dtype)
        return (split_features(projected[0], sizes) if joint else projected), after

    def _window_after(self, projected, windows, mask, starts):
        size = self.conv_kernel_size
        after = [
            stages.last_window(x, size, before, mask, starts)
            for x, before in zip(projected, windows, strict=True)
        ]
        return ops.concatenate(after, axis=-1)

    def angles(
        self, sequences: Tensor, position: Any, mask: Any, return_position: bool, shard: Any
    ) -> Any:
        """The cosines and sines of the tokens' positions, and the position after them."""
        if shard is not None:
            if position is None:  # the same in all rows, unless there is a mask
                rows = ops.shape(sequences)[0] if return_position else 1
                position = ops.zeros((rows, 2), self.state_dtype)
            position, last = shard.positions(position)
        before, total = _count(sequences, mask, self.state_dtype)
        block, rest = (None, 0.0) if position is None else split_position(position)
        angles = rotation(block, rest + before, self.turns)
        if not return_position:
            return angles, None
        if shard is not None:
            return angles, last
        if position is None:
            block = rest = ops.zeros((ops.shape(sequences)[0], 1), self.state_dtype)
        return angles, join_position(block, rest + total)

    def finish(self, output: Tensor, inputs: Tensor, fused: bool = False) -> Any:
        """From the operator's outputs `(..., heads, dim)` to the layer's, `(..., features)`."""
        if self.output_norm:
            output = self.norm.normalize(output, fused)
        *lead, heads, dim = ops.shape(output)
        output = ops.cast(ops.reshape(output, (*lead, heads * dim)), self.compute_dtype)
        if self.output_gate is not None:
            output = stages.gate(output, self.gate_dense(inputs), self.output_gate, fused)
        return self.output_dense(output)

    def get_dropout_mask(self, step_input: Tensor) -> Any:
        """Draws the factors of a sequence's outputs, for all steps; `RNN` calls it before them."""
        if self.dropout:
            ones = ops.ones((ops.shape(step_input)[0], self.output_size), self.compute_dtype)
            self._dropout_mask = self.dropout_layer(ones, training=True)
        return self._dropout_mask

    def get_recurrent_dropout_mask(self, step_input: Tensor) -> Any:
        """Returns `None`: states are not dropped."""
        return None

    def drop(self, output: Tensor, training: bool | None) -> Any:
        """Dropout, in training. It is apart because no part of a loop may draw random numbers."""
        return self.dropout_layer(output, training=training) if self.dropout else output

    def compute_output_shape(self, input_shape: Shape, states_shape: Shape | None = None) -> Any:
        states = [(input_shape[0], *size) for size in self.state_size]
        return (*input_shape[:-1], self._output_shape or input_shape[-1]), states

    def compute_output_spec(
        self, inputs: Tensor, states: State | None = None, training: bool | None = None
    ) -> Any:
        output, states = self.compute_output_shape(inputs.shape)
        return keras.KerasTensor(output, self.compute_dtype), [
            keras.KerasTensor(shape, self.state_dtype) for shape in states
        ]


def _split_heads(x, heads, dim):
    return ops.reshape(x, (*ops.shape(x)[:-1], heads, dim))


def _count(sequences, mask, dtype):
    """The number of unmasked tokens before each, `(batch or 1, length)`, and of all."""
    if mask is None:
        counts = ops.cast(count_up(ops.shape(sequences)[1] + 1)[None], dtype)
        return counts[:, :-1], counts[:, -1:]
    mask = ops.cast(mask, "int32")
    total = ops.sum(mask, axis=1, keepdims=True)
    return ops.cast(count_tokens(mask) - mask, dtype), ops.cast(total, dtype)
