"""The norm, as a layer."""

import keras
from keras import ops

from keras_hla import stages


@keras.saving.register_keras_serializable(package="keras_hla")
class RMSNormalization(keras.layers.RMSNormalization):
    """`keras.layers.RMSNormalization` of the last axis, computed by `keras_hla.stages.rms_norm`.

    Keras' own computes in float32 under a policy of float64. It has the same name, as paths of
    weights in files hold that.
    """

    def call(self, x):
        return self.normalize(x)

    def normalize(self, x, fused=False):
        """Returns the norm of `x` in its dtype, without the time that a call of a layer takes."""
        return stages.rms_norm(x, ops.convert_to_tensor(self.scale), self.epsilon, fused)
