"""One step of the layer, and the weights that both share."""

import keras
from keras import ops

# Not public, but cells of this class alone may draw random numbers before the loop of an RNN.
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell
import numpy as np

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
from keras_hla.layers.float64 import make_dense, make_rms_norm
from keras_hla.layers.quantized import with_default
from keras_hla.layers.redrawn_dropout import warn_of_redrawn_dropout
from keras_hla.layers.rotary import join_position, rotate, rotation, split_position
from keras_hla.layers.short_convolution import ShortConvolution
from keras_hla.layout import count_tokens
from keras_hla.ops import attention_step
from keras_hla.ops.inputs import forget_at, state_dtype


@keras.saving.register_keras_serializable(package="keras_hla")
class HLACell(CompositeLayer, DropoutRNNCell):
    """Cell of the `HLA` layer: takes in one token at a constant cost.

    With the rows of the projections as `q_t, k_t, v_t` per head, rotated by the
    position, and the decay `a_t`, the default operator `"hla2"` computes

        S_t = a_t S_{t-1} + k_t k_tᵀ
        F_t = a_t² F_{t-1} + (S_t q_t) v_tᵀ
        o_t = q_tᵀ F_t

    and the cell returns the output projection of all heads' normalized `o_t`.

    `keras.layers.RNN(cell)` runs it over a sequence, token by token; `HLA` gives
    the same outputs in parallel.

    Args:
        num_heads: Number of query heads.
        key_dim: Size of each query and key head.
        value_dim: Size of each value head. `None` is `key_dim`.
        num_key_value_heads: Number of key and value heads, a divisor of
            `num_heads`: query heads in a row share one. `None` is `num_heads`.
        operator: Name of an operator, or an operator that has a name; see
            `keras_hla.operators.get`.
        decay: How fast the past is forgotten: `None`, not at all; a number in
            (0, 1], the factor per token; a sequence of `num_heads` numbers, one
            per head; `"multiscale"`, fixed factors with time scales from 32 to
            512 tokens over the heads; `"learned"`, one trained factor per head;
            or `"input"`, a factor per head and token computed from the inputs.
        rope_max_wavelength: Longest period of the rotary position embedding of
            queries and keys, in tokens times `2 π`; `None` is no embedding. It
            needs an even `key_dim`, and adds the position to the state.
        scale: Factor on the queries. `None` is `key_dim ** -0.5`.
        feature_map: Applied to queries and keys, before the scale and the rotary
            embedding: the name of a Keras activation (`"relu"`, `"softplus"`,
            ...), `"elu_plus_one"`, or a callable of tensors `(..., key_dim)` that
            keeps their shape. `None` is none, as in the paper.
        conv_kernel_size: Number of tokens, 2 or more, over which a causal
            convolution mixes each feature of the projected queries, keys and
            values alone, before all else. It adds the last `conv_kernel_size - 1`
            tokens to the state. `None` is no convolution.
        conv_activation: Activation after the convolution, or `None`.
        qk_norm: Whether each head's queries and keys are divided by their root
            mean square, with a trained scale per feature, before the feature map.
        masked: As in `keras_hla.ops.higher_order_attention`.
        normalize: Whether outputs are divided by the operator's denominator, as
            in `keras_hla.ops.higher_order_attention`.
        epsilon: Positive number, added to the denominator.
        ridge: As in `keras_hla.ops.higher_order_attention`.
        output_norm: Whether each head's output is divided by its root mean
            square. Without it outputs grow with the length.
        output_gate: Activation of a gate that is computed from the inputs and
            multiplies the heads' outputs, after their norm: `"silu"`, or another
            name or callable. `None` is no gate.
        dropout: Share in [0, 1) of the outputs that are dropped in training. In
            `keras.layers.RNN` they are the same features at all tokens of a
            sequence, as with `keras.layers.GRUCell`; `HLA` draws for each token.
        output_shape: Number of features of the output. `None` is that of the input.
        use_bias: Whether the projections have a bias.
        kernel_initializer: Initializer of the projections' kernels.
        bias_initializer: Initializer of the projections' biases.
        kernel_regularizer: Regularizer of the projections' kernels.
        bias_regularizer: Regularizer of the projections' biases.
        kernel_constraint: Constraint of the projections' kernels.
        bias_constraint: Constraint of the projections' biases.
        seed: Integer, seed of the dropout.
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
        ValueError: if an argument is outside of what it may be.

    Example:

    >>> cell = keras_hla.layers.HLACell(num_heads=4, key_dim=16)
    >>> token = keras.random.normal((2, 64))
    >>> output, states = cell(token, cell.get_initial_state(batch_size=2))
    >>> tuple(output.shape)
    (2, 64)

    Reference:

    - [Higher-order Linear Attention](https://arxiv.org/abs/2510.27258)
    """

    def __init__(
        self,
        num_heads,
        key_dim,
        value_dim=None,
        num_key_value_heads=None,
        operator="hla2",
        decay=None,
        rope_max_wavelength=10_000,
        scale=None,
        feature_map=None,
        conv_kernel_size=None,
        conv_activation="silu",
        qk_norm=False,
        masked=True,
        normalize=False,
        epsilon=1e-6,
        ridge=0.0,
        output_norm=True,
        output_gate=None,
        dropout=0.0,
        output_shape=None,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        seed=None,
        **kwargs,
    ):
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

    def build(self, input_shape):
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
            self.conv.build((*input_shape[:-1], sum(self._projected_sizes)))
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
    def state_dtype(self):
        """The dtype of the states."""
        return state_dtype(self.compute_dtype)

    @property
    def state_names(self):
        """The names of the states, in order: the operator's, `"window"`, and `"position"`."""
        conv = () if self.conv_kernel_size is None else ("window",)
        rope = () if self.rope_max_wavelength is None else ("position",)
        return self.operator.state_names + conv + rope

    @property
    def state_size(self):
        """The shapes of the states, in order, without the batch axis."""
        own_decays = self.decay is not None and not isinstance(self.decay, float)
        moments = self.num_heads if own_decays else self.num_key_value_heads
        value_dim = self.value_dim + self.normalize  # with a column for the denominator
        sizes = [*self.operator.state_shapes(moments, self.num_heads, self.key_dim, value_dim)]
        if self.conv_kernel_size is not None:
            sizes.append((self.conv_kernel_size - 1, sum(self._projected_sizes)))
        if self.rope_max_wavelength is not None:
            sizes.append((2,))
        return sizes

    @property
    def _projected_sizes(self):
        """The sizes of all heads' queries, keys and values."""
        key_value_heads = self.num_key_value_heads
        return (
            self.num_heads * self.key_dim,
            key_value_heads * self.key_dim,
            key_value_heads * self.value_dim,
        )

    def get_initial_state(self, batch_size):
        """Returns the list of states before the first token: zeros."""
        return [ops.zeros((batch_size, *size), self.state_dtype) for size in self.state_size]

    def call(self, inputs, states, training=None):
        self._check_dtypes(states)
        memory, context = self.split_states(states)
        (query, key, value, log_decay), context = self.project(inputs[:, None], context)
        if log_decay is not None and len(log_decay.shape) == 3:
            log_decay = log_decay[:, 0]
        output, memory = attention_step(
            query[:, 0],
            key[:, 0],
            value[:, 0],
            memory,
            self.operator,
            log_decay,
            normalize=self.normalize,
            epsilon=self.epsilon,
        )
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

    def split_states(self, states):
        """The list of the operator's states, and a dictionary of the others."""
        memory = len(self.operator.state_names)
        context = zip(self.state_names[memory:], states[memory:], strict=True)
        return list(states[:memory]), dict(context)

    def project(self, sequences, context, mask=None, starts=None):
        """The operator's inputs.

        Args:
            sequences: Tensor of shape `(batch, length, features)`.
            context: Dictionary of the states before them, without the operator's.
            mask: Boolean tensor of shape `(batch, length)`.
            starts: Boolean tensor of shape `(batch, length)`, true where a segment
                starts that forgets all before it.

        Returns:
            Query, key and value, `(batch, length, heads, dim)`, and the
            log-decay, all in the dtype of the states; and the new context.
        """
        projected = [
            ops.cast(dense(sequences), self.state_dtype)
            for dense in (self.query_dense, self.key_dense, self.value_dense)
        ]
        if self.conv_kernel_size is not None:
            joint = ops.concatenate(projected, axis=-1)
            joint, window = self.conv(joint, context["window"], mask=mask, starts=starts)
            projected = ops.split(joint, np.cumsum(self._projected_sizes)[:-1].tolist(), axis=-1)
            context = context | {"window": window}
        query, key, value = projected
        query = _split_heads(query, self.num_heads, self.key_dim)
        key = _split_heads(key, self.num_key_value_heads, self.key_dim)
        value = _split_heads(value, self.num_key_value_heads, self.value_dim)
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.feature_map is not None:
            query, key = self.feature_map(query), self.feature_map(key)
        query = query * self.scale
        if self.rope_max_wavelength is not None:
            block, rest = split_position(context["position"])
            before, total = _count(sequences, mask, rest.dtype)
            angles = rotation(block, rest + before, self.key_dim, self.rope_max_wavelength)
            query, key = (rotate(x, *angles) for x in (query, key))
            context = context | {"position": join_position(block, rest + total)}
        log_decay = None if self.decay is None else self.log_decay(sequences)
        if starts is not None:
            log_decay = forget_at(starts[..., None], log_decay, self.state_dtype)
        return (query, key, value, log_decay), context

    def finish(self, output, inputs):
        """From the operator's outputs `(..., heads, dim)` to the layer's, `(..., features)`."""
        if self.output_norm:
            output = self.norm(output)
        *lead, heads, dim = ops.shape(output)
        output = ops.cast(ops.reshape(output, (*lead, heads * dim)), self.compute_dtype)
        if self.output_gate is not None:
            output = output * self.output_gate(self.gate_dense(inputs))
        return self.output_dense(output)

    def get_dropout_mask(self, step_input):
        """Draws the factors of a sequence's outputs, for all steps; `RNN` calls it before them."""
        if self.dropout:
            ones = ops.ones((ops.shape(step_input)[0], self.output_size), self.compute_dtype)
            self._dropout_mask = self.dropout_layer(ones, training=True)
        return self._dropout_mask

    def get_recurrent_dropout_mask(self, step_input):
        """Returns `None`: states are not dropped."""
        return None

    def drop(self, output, training):
        """Dropout, in training. It is apart because no part of a loop may draw random numbers."""
        return self.dropout_layer(output, training=training) if self.dropout else output

    def _norm(self, name, dim):
        norm = make_rms_norm(self.state_dtype, trainable=self.trainable, name=name)
        norm.build((None, dim))
        return norm

    def make_dense(self, units, name, owner=None):
        """A `Dense` layer with the bias, initializers, regularizers and constraints of this one.

        Args:
            units: Number of features.
            name: Name of the layer.
            owner: The `CompositeLayer` that it is in, if not the cell.
        """
        # Every projection needs an initializer of its own, or all would start with equal weights.
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

    def compute_output_shape(self, input_shape, states_shape=None):
        states = [(input_shape[0], *size) for size in self.state_size]
        return (*input_shape[:-1], self._output_shape or input_shape[-1]), states

    def compute_output_spec(self, inputs, states=None, training=None):
        output, states = self.compute_output_shape(inputs.shape)
        return keras.KerasTensor(output, self.compute_dtype), [
            keras.KerasTensor(shape, self.state_dtype) for shape in states
        ]

    def get_config(self):
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


def _split_heads(x, heads, dim):
    return ops.reshape(x, (*ops.shape(x)[:-1], heads, dim))


def _count(sequences, mask, dtype):
    """The number of unmasked tokens before each, `(batch or 1, length)`, and of all."""
    if mask is None:
        before = ops.arange(ops.shape(sequences)[1])[None]
        total = ops.shape(sequences)[1]
    else:
        mask = ops.cast(mask, "int32")
        before = count_tokens(mask) - mask
        total = ops.sum(mask, axis=1, keepdims=True)
    return ops.cast(before, dtype), ops.cast(total, dtype)


def _copy(initializer):
    return initializer.__class__.from_config(initializer.get_config())
