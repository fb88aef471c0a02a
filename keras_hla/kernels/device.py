"""Whether the kernels run on the backend and the device at hand."""

import importlib.util
import os

import keras

# The kernels' sizes suit the memory of these chips.
_CAPABILITY = (9, 0)


def why_not(tensor):
    """Why the kernels cannot run on the device of `tensor`, or `None` if they can."""
    backend = keras.config.backend()
    needed = {"torch": ("triton",), "jax": ("triton", "jax_triton")}.get(backend)
    if needed is None:
        return f"they are for PyTorch and JAX, not {backend}"
    if tensor is not None and not all(isinstance(n, int) for n in tensor.shape):
        return "they need a known batch size and length"
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        return f"the package {missing[0]} is not installed"
    if backend == "torch" and interpreted():
        return None
    return None if _has_gpu(tensor) else "there is no CUDA GPU"


def why_not_faster(tensor):
    """Why the portable path is chosen where the kernels can run, or `None`."""
    if not _has_gpu(tensor):
        return "the interpreter of the kernels is slow"
    if tensor is not None and tensor.shape[1] == 1:
        return "a single token is one step"
    if _capability() != _CAPABILITY:
        return "the kernels were measured on GPUs of compute capability 9.0 alone"
    return None


def interpreted():
    """Whether Triton interprets kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _has_gpu(tensor):
    if keras.config.backend() == "jax":
        import jax

        default = jax.config.jax_default_device  # a device, its platform, or None
        return getattr(default, "platform", default or jax.default_backend()) in ("gpu", "cuda")
    import torch

    if tensor is not None:
        return tensor.device.type == "cuda"
    return torch.cuda.is_available()


def _capability():
    if keras.config.backend() == "jax":
        import jax

        return tuple(int(n) for n in jax.devices("gpu")[0].compute_capability.split("."))
    import torch

    return torch.cuda.get_device_capability()
