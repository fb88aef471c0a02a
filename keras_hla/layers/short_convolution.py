"""The weights of the short convolution of queries, keys and values."""

import keras


class ShortConvolution(keras.layers.Layer):
    """Holds the kernel `(kernel_size, features)` of `keras_hla.stages.convolve`.

    Args:
        kernel_size: Number of tokens that an output reads.
        activation: Activation after the convolution, or `None`.
    """

    def __init__(self, kernel_size, activation, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.kernel_size = kernel_size
        self.activation = activation

    def build(self, input_shape):
        # As torch starts a convolution of one feature: uniform, up to kernel_size ** -0.5.
        start = keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")
        self.kernel = self.add_weight(
            name="kernel",
            shape=(self.kernel_size, input_shape[-1]),
            initializer=start,
            autocast=False,
        )
