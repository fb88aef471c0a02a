"""Functions of tensors that differ between the backends of Keras."""

import keras
from keras import ops

_constants: dict = {}  # of PyTorch, by values, dtype and device
# TensorFlow is slow at many small products on a CPU.
DEFAULT_CHUNK_SIZE = 128 if keras.config.backend() == "tensorflow" else 64


def size_at_run_time(length, largest):
    """The size of pieces, at most `largest`, of a length that is unknown at trace time."""
    if keras.config.backend() == "tensorflow":
        # Or a single token would cost as much as a chunk.
        return ops.clip(length, 1, largest)
    return largest  # JAX cannot divide by a symbolic size.


def is_single_token(x):
    """Whether a tensor `(batch, length, ...)` is known to have a length of one at trace time."""
    return isinstance(x.shape[1], int) and x.shape[1] == 1


def entries_to_loop_over(length):
    """The length, or 1 where that is 0 and `scan_serially` can loop over no empty inputs."""
    if isinstance(length, int):
        return max(length, 1)
    return ops.maximum(length, 1) if keras.config.backend() == "tensorflow" else length


def contiguous(x):
    """A tensor that is about to be read by many products, with its axes in order in memory."""
    # torch would copy it for each of the products; compilers choose by themselves.
    return x.contiguous() if keras.config.backend() == "torch" else x


def constant(values, dtype):
    """The tensor of a tuple of numbers.

    Under PyTorch it is kept, as to copy it to a GPU waits for all that runs there.
    """
    dtype = keras.backend.standardize_dtype(dtype)
    if keras.config.backend() != "torch":
        return ops.convert_to_tensor(values, dtype)
    from keras.src.backend.torch.core import get_device  # which has no public name
    import torch

    if torch.compiler.is_compiling():  # where it is a part of the graph
        return ops.convert_to_tensor(values, dtype)
    key = values, dtype, get_device()
    found = _constants.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = ops.convert_to_tensor(values, dtype)
        if type(found) is torch.Tensor:  # not one that stands for another while it is traced
            _constants[key] = found
    return found


def at_least(x, minimum):
    """`x`, or the number `minimum` where that is larger; NaN stays NaN. In the dtype of `x`."""
    if keras.config.backend() == "torch":  # where `keras.ops.maximum` makes float32 of float64
        return x.clamp(min=minimum)
    return ops.where(x < minimum, minimum, x)


def cumulative_sum(x):
    """The sums along the last axis, in the dtype of `x`."""
    if keras.config.backend() == "torch":  # where `keras.ops.cumsum` makes float32 of float64
        return x.cumsum(-1, dtype=x.dtype)
    if keras.config.backend() == "jax":
        import jax

        # Or XLA sums up constant decays while it compiles, which takes seconds for long sequences.
        x = jax.lax.optimization_barrier(x)
    return ops.cumsum(x, axis=-1)


def cos_and_sin(x):
    """Both in the dtype of `x`."""
    if keras.config.backend() == "jax":  # where those of `keras.ops` make float32 of float64
        import jax.numpy as jnp

        return jnp.cos(x), jnp.sin(x)
    return ops.cos(x), ops.sin(x)


def gradients_are_recorded(x, *constants):
    """Whether PyTorch records gradients of `x`, and none of `constants`, as it computes.

    There a function of `keras_hla.backend.torch_gradients` saves time and memory. What compiles a
    graph finds as much by itself.
    """
    if keras.config.backend() != "torch":
        return False
    import torch

    recorded = torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
    return recorded and not any(y.requires_grad for y in constants)
