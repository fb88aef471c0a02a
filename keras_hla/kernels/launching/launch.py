"""One launch of a kernel, as far as it is known before its inputs."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class Launch:
    """A kernel and its arguments besides its inputs.

    The arguments of the kernel are the inputs, `numbers`, what is allocated for `outputs`, and
    `constants`. For an input or output that is `None` the kernel gets an address, which it neither
    reads nor writes.
    """

    kernel: Any
    grid: tuple
    numbers: tuple
    outputs: tuple  # of pairs `(shape, dtype)`, or `None` for what the kernel does not store
    constants: dict
    options: dict = dataclasses.field(default_factory=dict)
    in_place: dict = dataclasses.field(default_factory=dict)  # outputs: the inputs they overwrite
    compiled: dict = dataclasses.field(
        default_factory=dict
    )  # for the backend, by device and dtypes


def block_of(size):
    """The least power of two that holds `size` features and that the tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())
