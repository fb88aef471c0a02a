"""Whether the kernels run on the backend and the device at hand."""

import importlib.util
import os

import keras

# Where the kernels were measured.
_MEASURED = "9.0"
_FEWEST_TOKENS = 16_384
# Not asked for at each call, as a search takes long.
_INSTALLED = {x: importlib.util.find_spec(x) is not None for x in ("triton", "jax_triton")}


def why_not(tensor):
    """Why the kernels cannot run on the device of `tensor`, or `None` if they can."""
    backend = keras.config.backend()
    needed = {"torch": ("triton",), "jax": ("triton", "jax_triton")}.get(backend)
    if needed is None:
        return f"they are for PyTorch and JAX, not {backend}"
    if tensor is not None:
        if not all(isinstance(n, int) for n in tensor.shape):
            return "they need a known batch size and length"
        if 0 in tensor.shape:
            return "there is nothing to compute"
    for name in needed:
        if not _INSTALLED[name]:
            return f"the package {name} is not installed"
    if backend == "torch" and interpreted():
        return None
    return None if _capability(tensor) else "there is no CUDA GPU"


def why_not_faster(tensor):
    """Why the portable path is chosen where the kernels can run, or `None`."""
    if interpreted():
        return "the interpreter of the kernels is slow"
    if _capability(tensor) != _MEASURED:
        return f"the kernels were measured on GPUs of compute capability {_MEASURED} alone"
    if tensor is not None and tensor.shape[0] * tensor.shape[1] < _FEWEST_TOKENS:
        return f"the kernels were measured from {_FEWEST_TOKENS} tokens of a batch on"
    return None


def interpreted():
    """Whether Triton interprets kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _capability(tensor):
    """The compute capability of the CUDA GPU on which a tensor is, as in "9.0", or `None`."""
    if keras.config.backend() == "jax":
        device = _jax_device(tensor)
        cuda = "nvidia" in device.device_kind.lower() and device.platform in ("gpu", "cuda")
        return device.compute_capability if cuda else None
    import torch

    if torch.version.hip or not torch.cuda.is_available():
        return None
    device = None if tensor is None else tensor.device
    if device is not None and device.type != "cuda":
        return None
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def _jax_device(tensor):
    import jax

    if tensor is not None and not isinstance(tensor, jax.core.Tracer):
        return next(iter(tensor.devices()))
    default = getattr(jax.config, "jax_default_device", None)  # or its platform, or None
    return default if hasattr(default, "platform") else jax.devices(default)[0]
