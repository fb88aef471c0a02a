"""Mixers to compare with: softmax attention, a GRU and a gated delta rule, as Keras layers for JAX.

Each is called with `(batch, length, features)` and a mask or `None`, keeps that shape, has about as
many weights as `keras_hla.layers.HLA` of the same heads, and has `state_size(length)`: the number
of elements that it keeps after so many tokens.
"""

import jax
import jax.numpy as jnp
import keras
from keras import layers, ops

from benchmarks.learning.delta_rule import gated_delta_rule
from keras_hla import stages
from keras_hla.layers.rms_normalization import RMSNormalization
from keras_hla.layers.short_convolution import ShortConvolution
from keras_hla.stages.rotary import rotation, rotation_from_start, turns_of

KERNEL_SIZE = 4
QUERIES_AT_ONCE = 512


class Projected(layers.Layer):
    """Projections to queries, keys and values and back, with a short convolution between."""

    def __init__(self, heads, dim, conv, **kwargs):
        super().__init__(**kwargs)
        self.heads, self.dim, self.conv = heads, dim, conv
        self.supports_masking = True

    def build(self, shape):
        width = self.heads * self.dim
        self.input_denses = [layers.Dense(width, use_bias=False) for _ in range(3)]
        for dense in self.input_denses:
            dense.build(shape)
        self.output_dense = layers.Dense(shape[-1], use_bias=False)
        self.output_dense.build((*shape[:-1], width))
        self.kernels = ShortConvolution(KERNEL_SIZE, None)
        if self.conv:
            self.kernels.build((*shape[:-1], 3 * width))

    def project(self, x, mask):
        """Queries, keys and values, `(batch, length, heads, dim)`."""
        projected = ops.concatenate([dense(x) for dense in self.input_denses], axis=-1)
        if self.conv:
            kernel = ops.convert_to_tensor(self.kernels.kernel)
            projected = stages.convolve(projected, kernel, keras.activations.silu, mask=mask)
        shape = (*ops.shape(x)[:2], 3, self.heads, self.dim)
        return ops.unstack(ops.reshape(projected, shape), axis=2)

    def finish(self, output):
        return self.output_dense(ops.reshape(output, (*ops.shape(output)[:2], -1)))

    def window_size(self):
        return self.conv * (KERNEL_SIZE - 1) * 3 * self.heads * self.dim


class Attention(Projected):
    """Causal softmax attention with a rotary embedding."""

    def call(self, x, mask=None):
        query, key, value = self.project(x, mask)
        turns = turns_of(self.dim, 10_000)
        if mask is None:
            cos, sin = rotation_from_start(x.shape[1], turns, "float32")
        else:  # positions among the unmasked tokens
            cos, sin = rotation(None, jnp.cumsum(mask, axis=1) - 1.0, turns)
        query = stages.rotate(query, cos, sin, self.dim**-0.5)
        key = stages.rotate(key, cos, sin)
        return self.finish(_attend(query, key, value, mask))

    def state_size(self, length):
        return 2 * self.heads * self.dim * length + self.window_size()


def _attend(query, key, value, mask):
    """Attention by parts of the queries where there are many, with rematerialization."""
    length = query.shape[1]
    order = jnp.arange(length)
    unmasked = jnp.ones((1, length), bool) if mask is None else mask

    @jax.checkpoint
    def attend(part):
        queries, places = part
        scores = jnp.einsum("bqhd,bkhd->bhqk", queries, key, preferred_element_type="float32")
        allowed = (places[:, None] >= order) & unmasked[:, None, None]
        weights = jax.nn.softmax(jnp.where(allowed, scores, -1e30))
        return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)

    if length <= QUERIES_AT_ONCE or length % QUERIES_AT_ONCE:
        return attend((query, order))
    batch, _, heads, dim = query.shape
    parts = query.reshape(batch, -1, QUERIES_AT_ONCE, heads, dim).swapaxes(0, 1)
    output = jax.lax.map(attend, (parts, order.reshape(-1, QUERIES_AT_ONCE)))
    return output.swapaxes(0, 1).reshape(query.shape)


class GatedDelta(Projected):
    """Gated DeltaNet (Yang et al., arXiv:2412.06464).

    Queries and keys of length one after a short convolution with SiLU, a decay and a rate of
    writing per head and token, and the norm of each head's output times a gate.
    """

    def __init__(self, heads, dim, gate=True, **kwargs):
        super().__init__(heads, dim, conv=True, **kwargs)
        self.gate = gate

    def build(self, shape):
        super().build(shape)
        self.rate_dense = layers.Dense(self.heads)
        spread = jnp.linspace(7.0, 3.0, self.heads)  # decays from 0.999 to 0.95
        self.decay_dense = layers.Dense(
            self.heads,
            kernel_initializer="zeros",
            bias_initializer=keras.initializers.Constant(spread),
        )
        denses = [self.rate_dense, self.decay_dense]
        if self.gate:
            self.gate_dense = layers.Dense(self.heads * self.dim, use_bias=False)
            denses.append(self.gate_dense)
        for dense in denses:
            dense.build(shape)
        self.norm = RMSNormalization()
        self.norm.build((*shape[:-1], self.heads, self.dim))

    def call(self, x, mask=None):
        query, key, value = (ops.cast(y, "float32") for y in self.project(x, mask))
        query, key = (ops.normalize(y, axis=-1) for y in (query, key))
        rate = ops.cast(ops.sigmoid(self.rate_dense(x)), "float32")
        log_decay = -ops.softplus(-ops.cast(self.decay_dense(x), "float32"))
        if mask is not None:
            rate, log_decay = (ops.where(mask[..., None], y, 0.0) for y in (rate, log_decay))
        output = gated_delta_rule(query * self.dim**-0.5, key, value, log_decay, rate)
        output = ops.cast(self.norm(output), self.compute_dtype)
        if self.gate:
            gates = ops.reshape(self.gate_dense(x), ops.shape(output))
            output = stages.gate(output, gates, keras.activations.silu)
        return self.finish(output)

    def state_size(self, length):
        return self.heads * self.dim**2 + self.window_size()


class GRU(layers.Layer):
    """`keras.layers.GRU` of two thirds of the width, and a projection back: 4 width² weights."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def build(self, shape):
        width = shape[-1]
        self.gru = layers.GRU(2 * width // 3, return_sequences=True)
        self.gru.build(shape)
        self.output_dense = layers.Dense(width, use_bias=False)
        self.output_dense.build((*shape[:-1], self.gru.units))

    def call(self, x, mask=None):
        return self.output_dense(self.gru(x, mask=mask))

    def state_size(self, length):
        return self.gru.units
