"""Functions of tensors that differ between the backends of Keras."""

import itertools

import keras
from keras import ops

from keras_hla.backend.compiling import is_torch_compiling

_kept: dict = {}  # of PyTorch, by what they depend on
_MOST_KEPT = 16
# TensorFlow is slow at many small products on a CPU.
DEFAULT_CHUNK_SIZE = 128 if keras.config.backend() == "tensorflow" else 64


def is_known(size):
    """Whether a size is a number at trace time."""
    if keras.config.backend() == "torch" and isinstance(size, int):
        import torch

        if torch.compiler.is_compiling():  # where symbols pass for integers
            from torch.fx.experimental.symbolic_shapes import has_static_value

            return has_static_value(size)
    return isinstance(size, int)


def size_at_run_time(length, largest):
    """The size of chunks, at most `largest`, of a length that is unknown at trace time."""
    if keras.config.backend() == "tensorflow":
        # Or a single token would cost as much as a chunk.
        return ops.clip(length, 1, largest)
    return largest  # JAX cannot divide by a symbolic size.


def filled_up(length, size):
    """The least multiple of `size` that is no less than the length, which may be unknown."""
    if keras.config.backend() == "torch":  # which can tell how many pieces this is
        return (length + size - 1) // size * size
    return length + (size - length % size) % size  # of which JAX can tell that it is no less


def is_single_token(x):
    """Whether a tensor `(batch, length, ...)` is known to have a length of one at trace time."""
    return is_known(x.shape[1]) and x.shape[1] == 1


def entries_to_loop_over(length):
    """The length, or 1 where that is 0 and `scan_serially` can loop over no empty inputs."""
    if is_known(length):
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
    return kept((values, dtype), lambda: ops.convert_to_tensor(values, dtype))


def kept(key, make):
    """What `make()` returns, tensors that depend on `key` alone, kept under PyTorch."""
    if keras.config.backend() != "torch":
        return make()
    from keras.src.backend.torch.core import get_device  # which has no public name
    import torch

    if torch.compiler.is_compiling():  # where it is a part of the graph
        return make()
    key = *key, get_device()
    if key not in _kept:
        with torch.inference_mode(False), torch.no_grad():
            found = make()
        if not all(type(x) is torch.Tensor for x in keras.tree.flatten(found)):
            return found  # what stands for tensors while they are traced
        while len(_kept) >= _MOST_KEPT:
            _kept.pop(next(iter(_kept)), None)
        _kept[key] = found
    return _kept[key]


def first_entries(x, n, axis):
    """The first `n` entries of a (negative) axis, a number that may be unknown at trace time."""
    part = x[(..., slice(n), *[slice(None)] * (-1 - axis))]
    if keras.config.backend() == "torch" and not is_known(n):
        import torch

        # Or what follows is compiled once for a part and once more for the whole.
        return part.clone(memory_format=torch.contiguous_format)
    return part


def activate(activation, x):
    """What an activation makes of `x`."""
    if activation is keras.activations.silu and keras.config.backend() == "tensorflow":
        # Its own keeps what was traced with it, weights included, for as long as the process lives.
        return x * ops.sigmoid(x)
    return activation(x)


def count_up(size):
    """The integers from 0 to `size - 1`, which may be unknown at trace time."""
    if keras.config.backend() == "torch":  # where `keras.ops.arange` takes no symbol
        from keras.src.backend.torch.core import get_device  # which has no public name
        import torch

        return torch.arange(size, dtype=torch.int32, device=get_device())
    return ops.arange(size, dtype="int32")


def pad_axis(x, before, after, axis):
    """Adds zeros along one axis."""
    if is_known(after) and before == after == 0:
        return x
    axis = axis % len(x.shape)
    if keras.config.backend() == "torch":  # where `keras.ops.pad` is slow, and breaks a graph
        import torch

        of_later_axes = [0, 0] * (len(x.shape) - 1 - axis)
        return torch.nn.functional.pad(x, [*of_later_axes, before, after])
    widths = [(0, 0)] * len(x.shape)
    widths[axis] = (before, after)
    return ops.pad(x, widths)


def where(condition, x, y):
    """`keras.ops.where`, also for numbers.

    Under PyTorch `keras.ops` copies numbers to the device: the CPU waits until a GPU has done all
    that it was given.
    """
    if keras.config.backend() == "torch":
        import torch

        return torch.where(condition, x, y)
    return ops.where(condition, x, y)


def split_features(x, sizes):
    """The parts of the last axis, of these sizes; without a copy to the device, as `where`."""
    ends = list(itertools.accumulate(sizes))
    return [x[..., end - size : end] for size, end in zip(sizes, ends, strict=True)]


def at_least(x, minimum):
    """`x`, or the number `minimum` where that is larger; NaN stays NaN. In the dtype of `x`."""
    if keras.config.backend() == "torch":  # where `keras.ops.maximum` makes float32 of float64
        return x.clamp(min=minimum)
    return ops.where(x < minimum, minimum, x)


def cumulative_sum(x):
    """The sums along the last axis, in the dtype of `x`."""
    if keras.config.backend() == "torch":  # where `keras.ops.cumsum` makes float32 of float64
        import torch

        if torch.compiler.is_compiling():  # for Inductor, which can forget the argument `dtype`
            return x.cumsum(-1).to(x.dtype)
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
    graph finds as much by itself, and what traces one is to see the operations.
    """
    if keras.config.backend() != "torch":
        return False
    import torch

    recorded = torch.is_grad_enabled() and x.requires_grad and not is_torch_compiling()
    return recorded and not any(y.requires_grad for y in constants)


def may_have_gradients(streams):
    """Whether there may be gradients of a call: JAX does not tell, where it is of no stream."""
    if keras.config.backend() != "torch":
        return not streams
    import torch

    return torch.is_grad_enabled()
