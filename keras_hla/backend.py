"""What differs between the backends of Keras."""

import keras
from keras import ops

# TensorFlow is slow at many small products on a CPU.
DEFAULT_CHUNK_SIZE = 128 if keras.config.backend() == "tensorflow" else 64


def cumulative_sum(x):
    """The sums along the last axis, in the dtype of `x`."""
    if keras.config.backend() == "torch":  # where `keras.ops.cumsum` makes float32 of float64
        return x.cumsum(-1)
    if keras.config.backend() == "jax":
        import jax

        # Or XLA sums up constant decays while it compiles, which takes seconds for long sequences.
        x = jax.lax.optimization_barrier(x)
    return ops.cumsum(x, axis=-1)


def scan_tokens(step, state, inputs):
    """Calls `output, state = step(state, token)` for one token after the other, differentiably.

    Args:
        step: takes the tuple of states and the tuple of one token's inputs.
        state: tuple of tensors, whose shapes and dtypes `step` keeps.
        inputs: tuple of tensors whose first axis is the length.

    Returns:
        The outputs, stacked along the first axis, and the last states.
    """
    if keras.config.backend() == "tensorflow":
        # `keras.ops.scan` wants outputs shaped like states there, and has no gradient under XLA.
        return _scan_tensorflow(step, state, inputs)

    def body(state, token):
        output, state = step(state, token)
        return state, output

    state, outputs = ops.scan(body, state, inputs)
    return outputs, state


def _scan_tensorflow(step, state, inputs):
    import tensorflow as tf

    length = inputs[0].shape[0]
    bound = tf.shape(inputs[0])[0] if length is None else length
    outputs = tf.TensorArray(inputs[0].dtype, size=bound, element_shape=None)

    def body(t, state, outputs):
        output, state = step(state, tuple(x[t] for x in inputs))
        return t + 1, state, outputs.write(t, output)

    _, state, outputs = tf.while_loop(
        lambda t, *_: t < bound, body, (0, tuple(state), outputs), maximum_iterations=bound
    )
    return outputs.stack(), state
