"""Short causal convolution of queries, keys and values."""

import keras

from keras_hla import stages


class ShortConvolution(keras.layers.Layer):
    """Mixes each feature alone over the last tokens: see `keras_hla.stages.convolve`.

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
            name="kernel",
            shape=(self.kernel_size, input_shape[-1]),
            initializer=start,
            autocast=False,
        )

    def call(self, inputs, window=None, mask=None, starts=None):
        """Returns the outputs, of the shape of `inputs`, and the window after them."""
        output = stages.convolve(inputs, self.kernel, self.activation, window, mask, starts)
        return output, stages.last_window(inputs, self.kernel_size, window, mask, starts)
