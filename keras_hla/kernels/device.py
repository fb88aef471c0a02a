"""Whether the kernels run on the backend and the device at hand."""

import importlib.util
import os

import keras

# The compute capability of the measured GPUs, and the least one for products of bfloat16.
_MEASURED = "9.0"
_LEAST = 8.0
_FEWEST_TOKENS = 16_384
# Looked up once, as a search takes long.
_INSTALLED = {x: importlib.util.find_spec(x) is not None for x in ("triton", "jax_triton")}


def why_not(tensor):
    """Why the kernels cannot run on the device of `tensor`, or `None` if they can."""
    backend = keras.config.backend()
    needed = {"torch": ("triton",), "jax": ("triton", "jax_triton")}.get(backend)
    if needed is None:
        return f"the kernels are for PyTorch and JAX, not for {backend}"
    if tensor is not None:
        if not all(isinstance(n, int) for n in tensor.shape):
            return "the kernels need a known batch size and length"
        if 0 in (tensor.shape[0], *tensor.shape[2:]):
            return "the tensor has no elements"
    missing = [name for name in needed if not _INSTALLED[name]]
    if missing:
        return f"the package {missing[0]} is not installed"
    if backend == "torch" and interpreted():
        return None
    return _why_not_compiled(_capability(tensor))


def _why_not_compiled(capability):
    if capability is None:
        return "there is no CUDA GPU"
    if float(capability) < _LEAST:
        return (
            f"Triton needs a GPU of compute capability {_LEAST} or higher, which has products of "
            f"bfloat16, not {capability}"
        )
    return None


def why_not_faster(tensor):
    """Why the kernels are slower where they can run, or `None`."""
    if interpreted():
        return "Triton interprets the kernels, which is slow"
    if tensor is not None and tensor.shape[0] * tensor.shape[1] < _FEWEST_TOKENS:
        return f"the kernels are known to be faster only from {_FEWEST_TOKENS} tokens per batch on"
    return None


def is_measured(tensor):
    """Whether the kernels were measured, and checked, on GPUs like that of `tensor`."""
    return _capability(tensor) == _MEASURED


def place_of(tensor):
    """The CUDA GPU of a tensor, in the form that `keras.device` takes."""
    if keras.config.backend() == "jax":
        return _jax_device(tensor)
    import torch

    return f"cuda:{torch.cuda.current_device()}" if tensor is None else str(tensor.device)


def describe(place):
    """The name and the compute capability of a GPU from `place_of`."""
    if keras.config.backend() == "jax":
        name, capability = place.device_kind, place.compute_capability
    else:
        import torch

        name = torch.cuda.get_device_name(place)
        capability = "{}.{}".format(*torch.cuda.get_device_capability(place))
    return f"{name}, compute capability {capability}"


def is_capturing():
    """Whether kernel launches are captured as a CUDA graph instead of run."""
    if keras.config.backend() != "torch":
        return False
    import torch

    return torch.cuda.is_current_stream_capturing()


def interpreted():
    """Whether Triton interprets kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _capability(tensor):
    """The compute capability of the CUDA GPU of a tensor, such as "9.0", or `None`."""
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
        return next(iter(tensor.sharding.addressable_devices))
    default = getattr(jax.config, "jax_default_device", None)  # or its platform, or None
    return default if hasattr(default, "platform") else jax.local_devices(backend=default)[0]
