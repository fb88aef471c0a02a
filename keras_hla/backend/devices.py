"""The devices of context parallelism, each with a contiguous shard, and their collectives.

All devices take part in each collective, forward and backward, in the same order. Gradients are
those of the sum of the losses of all devices.
"""

import weakref

import keras
from keras import ops

_ALLOWED = {
    "jax": "the name of an axis of the mesh of the `jax.shard_map` that it is called in",
    "torch": "a `torch.distributed.ProcessGroup` of which this process is a member, or a "
    "one-dimensional `DeviceMesh`",
}


def devices_of(context_parallel):
    """The devices that the argument `context_parallel` means, or `None` for `None`."""
    if context_parallel is None:
        return None
    backend = keras.config.backend()
    if backend not in _ALLOWED:
        raise ValueError(
            "Argument `context_parallel` needs the JAX or the PyTorch backend: no other supports "
            "it. "
            f"Received: context_parallel={context_parallel!r}, backend {backend!r}"
        )
    devices = (JaxDevices if backend == "jax" else TorchDevices).of(context_parallel)
    if devices is None:
        raise ValueError(
            f"Argument `context_parallel` must be {_ALLOWED[backend]}. "
            f"Received: context_parallel={context_parallel!r}"
        )
    return devices


def check_context_parallel(context_parallel):
    """Checks `context_parallel`, as far as that is possible outside of a call."""
    if keras.config.backend() != "jax" or not isinstance(context_parallel, str):
        devices_of(context_parallel)


def reference_to(context_parallel):
    """A reference to `context_parallel` for a layer to keep, without keeping a process group alive.

    The threads of a group that lives until the interpreter exits may abort the process.
    """
    if context_parallel is None or isinstance(context_parallel, str):
        return context_parallel
    return weakref.ref(devices_of(context_parallel).group)


def referred_to(reference):
    """The name or the process group of which a layer has the reference."""
    if not isinstance(reference, weakref.ref):
        return reference
    group = reference()
    if group is None:
        raise ValueError(
            "The process group over which this model is split has been destroyed. Call "
            "`keras_hla.distribution.split_sequence` with another one, or with None."
        )
    return group


def restored(kept):
    """The devices of which something was `kept`."""
    return JaxDevices.of(kept) if isinstance(kept, str) else kept


class JaxDevices:
    """Those along an axis of the mesh of a `jax.shard_map`."""

    are_shards_equal = True  # in length

    def __init__(self, axis, index, size):
        self._axis = axis
        self.kept = axis  # what a trace may keep of them
        self.index = index  # of this device, in the order of the parts
        self.size = size

    @classmethod
    def of(cls, axis):
        import jax

        if not isinstance(axis, str):
            return None
        try:
            return cls(axis, jax.lax.axis_index(axis), jax.lax.psum(1, axis))
        except NameError:  # no such axis
            return None

    def gather(self, x, axis):
        """What all devices hold, in order along a new axis."""
        import jax

        return jax.lax.all_gather(x, self._axis, axis=axis % (len(x.shape) + 1))

    def total(self, x):
        """The sum of what devices hold of a gradient of what is `shared`."""
        return x  # as JAX has summed it up

    def own(self, x, axis):
        """The entry of this device along an axis of all devices."""
        import jax

        return jax.lax.dynamic_index_in_dim(x, self.index, axis, keepdims=False)

    def shared(self, x):
        """A tensor that is the same on all devices, in a way that the engine knows, too."""
        import jax

        # JAX knows it of sums alone. The compiler leaves it out where nobody reads it.
        return jax.lax.psum(self.of_first(x), self._axis)

    def of_first(self, x):
        """`x` on the first device, and zeros on the others."""
        return ops.where(self.index == 0, x, 0)


class TorchDevices:
    """Those of a group of processes."""

    are_shards_equal = False

    def __init__(self, group, index):
        self.group = group
        self.index = index
        self._gathered: list | None = None  # by a function that is recomputed
        self._to_read: list = []  # of what it gathered in its first call

    @classmethod
    def of(cls, group):
        import torch

        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return None
        if isinstance(group, torch.distributed.DeviceMesh) and group.ndim == 1:
            group = group.get_group()
        if not isinstance(group, torch.distributed.ProcessGroup):
            return None
        index = torch.distributed.get_rank(group)
        return None if index < 0 else cls(group, index)

    @property
    def kept(self):  # no attribute: a cycle would keep the group until garbage is collected
        return self

    def gather(self, x, axis):
        from keras_hla.backend.torch_collectives import GatheredBefore, all_gather

        if self._to_read:
            known = self._to_read.pop(0)
            return GatheredBefore.apply(x, self.group, known).movedim(0, axis)
        gathered = all_gather(x, self.group)
        if self._gathered is not None:
            self._gathered.append(gathered.detach())
        return gathered.movedim(0, axis)

    def exchanging_once(self, function):
        """The function, whose first call gathers; later calls read what it has gathered."""
        gathered: list = []

        def call(*arguments, **options):
            self._gathered, self._to_read = gathered, list(gathered)
            try:
                return function(*arguments, **options)
            finally:
                self._gathered, self._to_read = None, []

        return call

    def total(self, x):
        return self.gather(x, axis=0).sum(0)

    def own(self, x, axis):
        return x.select(axis, self.index)

    def shared(self, x):
        return x

    def of_first(self, x):
        return x if self.index == 0 else x.new_zeros(x.shape)
