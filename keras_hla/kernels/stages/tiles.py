"""What the kernels of stages share, in Triton: tiles of tokens and features, and activations."""

from keras import ops
import triton
import triton.language as tl

# Elements that a program holds of each of its tensors, in float32: what fits the registers.
_ELEMENTS = 4096


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def silu_gradient(x):
    s = tl.sigmoid(x)
    return s + x * s * (1.0 - s)


def rows_of(block):
    """The number of rows of `block` features that a program reads."""
    return max(1, _ELEMENTS // block)


def like(x, other):
    """A tensor in the dtype of another one."""
    return x if x.dtype == other.dtype else ops.cast(x, other.dtype)


def dtype_of(x):
    return str(x.dtype).removeprefix("torch.")


def shapes_of_x(options, tensors, save):
    """The `shapes` of a `KernelFunction` whose result is like `x`, and that saves nothing."""
    return ((tensors["x"].shape, dtype_of(tensors["x"])),), ()
