"""The decays of a layer: how fast each head forgets."""

import numbers

import keras
from keras import ops
import numpy as np

from keras_hla.backend.tensors import constant
from keras_hla.layers.composite import CompositeLayer
from keras_hla.layers.float64 import make_dense

_NAMES = ("multiscale", "learned", "input")
# Logits of trained decays start here, spread over the heads: decays from 0.88 to 0.998.
_FIRST_LOGIT, _LAST_LOGIT = 2.0, 6.0
# The time scales, in tokens, over which `"multiscale"` is spread in equal ratios.
_SHORTEST, _LONGEST = 32, 512


class LogDecay(CompositeLayer):
    """Computes `log a_t` per head from the layer's inputs `(..., features)`.

    Args:
        decay: a decay that `check_decay` accepts, not `None`.
        num_heads: number of heads.
    """

    def __init__(self, decay, num_heads, **kwargs):
        super().__init__(**kwargs)
        self.decay = decay
        self.num_heads = num_heads
        self._fixed = _fixed_logs(decay, num_heads)

    def build(self, input_shape):
        logits = np.linspace(_FIRST_LOGIT, _LAST_LOGIT, self.num_heads)
        start = keras.initializers.Constant(logits)
        if self.decay == "learned":
            self.logit = self.add_weight(
                name="logit", shape=(self.num_heads,), initializer=start, autocast=False
            )
        elif self.decay == "input":
            self.logit_dense = make_dense(
                self.num_heads,
                kernel_initializer="zeros",
                bias_initializer=start,
                **self.options_of("logit"),
            )
            self.logit_dense.build(input_shape)

    def call(self, inputs):
        """Returns `log a_t`, broadcastable to `(..., num_heads)`."""
        if self.decay == "learned":
            return _log_sigmoid(self.logit)
        if self.decay == "input":
            return _log_sigmoid(self.logit_dense(inputs))
        return constant(self._fixed, self.compute_dtype)


def _fixed_logs(decay, num_heads):
    """The logarithms of decays that are not trained, as a number or one for each head."""
    if decay in ("learned", "input"):
        return None
    if decay == "multiscale":
        decay = 1 - 1 / np.geomspace(_SHORTEST, _LONGEST, num_heads)
    return tuple(np.log(np.atleast_1d(decay)).tolist())


def _log_sigmoid(x):
    # Not that of `keras.ops`, which takes milliseconds for one token under torch.
    return -ops.softplus(-x)


def check_decay(decay, num_heads):
    """Returns `decay` as it goes into a config; raises `ValueError` if it is not a decay."""
    if decay is None or (isinstance(decay, str) and decay in _NAMES):
        return decay
    if isinstance(decay, list | tuple | np.ndarray):
        decay = [float(value) for value in decay]
        valid = len(decay) == num_heads and all(0 < value <= 1 for value in decay)
    elif isinstance(decay, numbers.Real) and not isinstance(decay, bool):
        decay = float(decay)
        valid = 0 < decay <= 1
    else:
        valid = False
    if not valid:
        raise ValueError(
            f"Argument `decay` must be None, a number in (0, 1], {num_heads} such numbers (one "
            f"per head), or one of {list(_NAMES)}. Received: decay={decay!r}"
        )
    return decay
