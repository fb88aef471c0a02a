"""Short causal convolution of queries, keys and values."""

import keras
from keras import ops

from keras_hla.layout import compact, count_tokens, last_count, take


class ShortConvolution(keras.layers.Layer):
    """Mixes each feature alone over the last tokens, then applies an activation.

        y_t = activation(Σ_i w_i ⊙ x_{t-n+1+i}),   i = 0 … n-1,   n = kernel_size

    Args:
        kernel_size: Number of tokens that an output reads.
        activation: Function of the sums, or `None`.
    """

    def __init__(self, kernel_size, activation, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.kernel_size = kernel_size
        self.activation = activation
        self.supports_masking = True

    def build(self, input_shape):
        # As torch starts a convolution of one feature: uniform, up to kernel_size ** -0.5.
        start = keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")
        self.kernel = self.add_weight(
            name="kernel", shape=(self.kernel_size, input_shape[-1]), initializer=start
        )

    def call(self, inputs, window, mask=None, starts=None):
        """Takes in any number of tokens.

        Args:
            inputs: Tensor of shape `(batch, length, features)`.
            window: The tokens before them, `(batch, kernel_size - 1, features)`.
            mask: Boolean, `(batch, length)`; tokens where it is false are skipped.
            starts: Boolean, `(batch, length)`, true where a segment starts; no token
                reads another segment.

        Returns:
            A tensor of the shape of `inputs`, and the window after them.
        """
        tokens = inputs if mask is None else compact(inputs, mask)
        row = ops.concatenate([window, tokens], axis=1)
        length = inputs.shape[1]
        if isinstance(length, int) and length == 1 and mask is None and starts is None:
            output = ops.sum(self.kernel * row, axis=1, keepdims=True)
            return self._activated(output), row[:, 1:]
        taps = self._shifted(row)
        window = self._end(row, mask)
        if starts is not None:
            taps, window = self._within_segments(taps, window, mask, starts)
        output = sum(self.kernel[i] * tap for i, tap in enumerate(taps))
        if mask is not None:
            output = take(output, ops.maximum(count_tokens(mask) - 1, 0))
        return self._activated(output), window

    def _activated(self, output):
        return output if self.activation is None else self.activation(output)

    def _within_segments(self, taps, window, mask, starts):
        """Puts zero where the window or a token's taps reach into another segment."""
        segment = count_tokens(starts)
        segment = segment if mask is None else compact(segment, mask)
        # What was there before goes on in the first segment.
        row = ops.pad(segment, [(0, 0), (self.kernel_size - 1, 0)])
        taps = [
            ops.where((tap_segment == segment)[..., None], tap, 0)
            for tap_segment, tap in zip(self._shifted(row), taps, strict=True)
        ]
        end = self._end(row, mask)
        return taps, ops.where((end == end[:, -1:])[..., None], window, 0)

    def _shifted(self, row):
        """What each token reads, the oldest first: `kernel_size` tensors of the length."""
        before = self.kernel_size - 1
        return [row[:, i : i - before or None] for i in range(self.kernel_size)]

    def _end(self, row, mask):
        """The last `kernel_size - 1` entries that count."""
        before = self.kernel_size - 1
        if mask is None:
            return row[:, -before:]
        return take(row, last_count(count_tokens(mask)) + ops.arange(before))
