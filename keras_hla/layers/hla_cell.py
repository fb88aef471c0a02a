"""One step of the layer, and the weights that both share."""

import keras
from keras import ops

from keras_hla import operators
from keras_hla.checks import check_head_groups, check_number, check_positive_int
from keras_hla.layers.decay import LogDecay, check_decay
from keras_hla.layers.feature_map import get_activation, serialize_activation
from keras_hla.layers.rotary import rotary_embedding
from keras_hla.ops import attention_step
from keras_hla.ops.inputs import state_dtype


@keras.saving.register_keras_serializable(package="keras_hla")
class HLACell(keras.layers.Layer):
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
        use_bias: Whether the projections have a bias.
        kernel_initializer: Initializer of the projections' kernels.
        bias_initializer: Initializer of the projections' biases.
        kernel_regularizer: Regularizer of the projections' kernels.
        bias_regularizer: Regularizer of the projections' biases.
        kernel_constraint: Constraint of the projections' kernels.
        bias_constraint: Constraint of the projections' biases.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, features)`.
        states: List of the states before the token, of shapes
            `(batch, *size)` for the entries of `state_size`.

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
        qk_norm=False,
        masked=True,
        normalize=False,
        epsilon=1e-6,
        ridge=0.0,
        output_norm=True,
        output_gate=None,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        **kwargs,
    ):
        # Without autocasting, states stay float32; the projections cast for themselves.
        super().__init__(autocast=False, **kwargs)
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
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = value_dim or key_dim
        self.num_key_value_heads = num_key_value_heads or num_heads
        check_head_groups(self.num_heads, self.num_key_value_heads)
        check_number("epsilon", epsilon, "a positive number", lambda x: x > 0)
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
        self.qk_norm = qk_norm
        self.output_norm = output_norm
        self.output_gate = get_activation("output_gate", output_gate)
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)

    def build(self, input_shape):
        self.output_size = input_shape[-1]
        self.query_dense = self._dense(self.num_heads * self.key_dim, "query")
        self.key_dense = self._dense(self.num_key_value_heads * self.key_dim, "key")
        self.value_dense = self._dense(self.num_key_value_heads * self.value_dim, "value")
        self.output_dense = self._dense(self.output_size, "output")
        inner = [self.query_dense, self.key_dense, self.value_dense]
        if self.output_gate is not None:
            self.gate_dense = self._dense(self.num_heads * self.value_dim, "gate")
            inner.append(self.gate_dense)
        for dense in inner:
            dense.build(input_shape)
        self.output_dense.build((*input_shape[:-1], self.num_heads * self.value_dim))
        if self.decay is not None:
            self.log_decay = LogDecay(
                self.decay, self.num_heads, dtype=self.state_dtype, name="decay"
            )
            self.log_decay.build(input_shape)
        if self.qk_norm:
            self.query_norm = self._norm("query_norm", self.key_dim)
            self.key_norm = self._norm("key_norm", self.key_dim)
        if self.output_norm:
            self.norm = self._norm("norm", self.value_dim)

    @property
    def state_dtype(self):
        """The dtype of the states."""
        return state_dtype(self.compute_dtype)

    @property
    def state_names(self):
        """The names of the states, in order: the operator's, and `"position"`."""
        rope = () if self.rope_max_wavelength is None else ("position",)
        return self.operator.state_names + rope

    @property
    def state_size(self):
        """The shapes of the states, in order, without the batch axis."""
        own_decays = self.decay is not None and not isinstance(self.decay, float)
        moments = self.num_heads if own_decays else self.num_key_value_heads
        value_dim = self.value_dim + self.normalize  # with a column for the denominator
        sizes = self.operator.state_shapes(moments, self.num_heads, self.key_dim, value_dim)
        rope = () if self.rope_max_wavelength is None else ((1,),)
        return [*sizes, *rope]

    def get_initial_state(self, batch_size):
        """Returns the list of states before the first token: zeros."""
        return [ops.zeros((batch_size, *size), self.state_dtype) for size in self.state_size]

    def call(self, inputs, states):
        memory, position = self.split_states(states)
        query, key, value, log_decay = self.project(inputs, *(p[:, 0] for p in position))
        output, memory = attention_step(
            query,
            key,
            value,
            memory,
            self.operator,
            log_decay,
            normalize=self.normalize,
            epsilon=self.epsilon,
        )
        return self.finish(output, inputs), [*memory, *(p + 1 for p in position)]

    def split_states(self, states):
        """The operator's states, and a list of the position or of nothing."""
        memory = len(self.operator.state_names)
        return list(states[:memory]), list(states[memory:])

    def project(self, inputs, position=None):
        """The operator's inputs for any number of tokens.

        Args:
            inputs: Tensor of shape `(..., features)`.
            position: Tensor of shape `(...,)`, or `None` without rotary embedding.

        Returns:
            Query, key and value, `(..., heads, dim)`, and the log-decay, all in
            the dtype of the states.
        """
        query, key, value = (
            ops.cast(dense(inputs), self.state_dtype)
            for dense in (self.query_dense, self.key_dense, self.value_dense)
        )
        query = _split_heads(query, self.num_heads, self.key_dim)
        key = _split_heads(key, self.num_key_value_heads, self.key_dim)
        value = _split_heads(value, self.num_key_value_heads, self.value_dim)
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.feature_map is not None:
            query, key = self.feature_map(query), self.feature_map(key)
        query = query * self.scale
        if position is not None:
            query = rotary_embedding(query, position, self.rope_max_wavelength)
            key = rotary_embedding(key, position, self.rope_max_wavelength)
        log_decay = None if self.decay is None else self.log_decay(inputs)
        return query, key, value, log_decay

    def finish(self, output, inputs):
        """From the operator's outputs `(..., heads, dim)` to the layer's, `(..., features)`."""
        if self.output_norm:
            output = self.norm(output)
        *lead, heads, dim = ops.shape(output)
        output = ops.cast(ops.reshape(output, (*lead, heads * dim)), self.compute_dtype)
        if self.output_gate is not None:
            output = output * self.output_gate(self.gate_dense(inputs))
        return self.output_dense(output)

    def _norm(self, name, dim):
        norm = keras.layers.RMSNormalization(dtype=self.state_dtype, name=name)
        norm.build((None, dim))
        return norm

    def _dense(self, units, name):
        # Every projection needs an initializer of its own, or all would start with equal weights.
        return keras.layers.Dense(
            units,
            use_bias=self.use_bias,
            kernel_initializer=_copy(self.kernel_initializer),
            bias_initializer=_copy(self.bias_initializer),
            kernel_regularizer=self.kernel_regularizer,
            bias_regularizer=self.bias_regularizer,
            kernel_constraint=self.kernel_constraint,
            bias_constraint=self.bias_constraint,
            dtype=self.dtype_policy,
            name=name,
        )

    def compute_output_shape(self, input_shape, states_shape=None):
        states = [(input_shape[0], *size) for size in self.state_size]
        return tuple(input_shape), states

    def compute_output_spec(self, inputs, states=None):
        output, states = self.compute_output_shape(inputs.shape)
        return keras.KerasTensor(output, self.compute_dtype), [
            keras.KerasTensor(shape, self.state_dtype) for shape in states
        ]

    def get_config(self):
        return {
            **super().get_config(),
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
            "qk_norm": self.qk_norm,
            "output_norm": self.output_norm,
            "output_gate": serialize_activation(self.output_gate),
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
        }


def _split_heads(x, heads, dim):
    return ops.reshape(x, (*ops.shape(x)[:-1], heads, dim))


def _copy(initializer):
    return initializer.__class__.from_config(initializer.get_config())
