"""A function of tensors that kernel launches compute, and its gradients."""

from collections.abc import Callable
import dataclasses

import keras


@dataclasses.dataclass(frozen=True, eq=False)
class KernelFunction:
    """What all backends need to know of a function that kernels compute.

    Its tensors come as a dictionary by name, which holds only the tensors that are given. Its
    options are a tuple of names, numbers, booleans, `None` and such tuples, so that a compiler may
    keep them.

    `run(launch, inputs)` launches a `Launch` and returns the tuple of its outputs.

    Args:
        name: Name of the function.
        evaluate: `evaluate(run, options, tensors, save)` returns the tuple of the results, and
            if `save` the tuple of what else `gradients` reads. No element is one of `tensors`.
        gradients: `gradients(run, options, tensors, saved, results, wanted)` returns the
            dictionary of the gradients of the tensors named in `wanted`, from the gradients of
            the results, of which some, not all, may be `None`.
        shapes: `shapes(options, tensors, save)` returns two tuples of pairs `(shape, dtype)`:
            for the two tuples that `evaluate` returns.
        reads: The names of the tensors that `gradients` reads; `None` is all.
        count: `count(options)` returns the number of results.
        rows: `rows(shape)` returns the indices of the axes of batch and heads in the shape of a
            tensor, result, gradient or saved tensor. Devices may then compute rows of batch and
            heads independently. `None` if they may not.
    """

    name: str
    evaluate: Callable
    gradients: Callable
    shapes: Callable
    reads: tuple | None = None
    count: Callable = lambda options: 1
    rows: Callable | None = None

    def __post_init__(self):
        _launcher().register(self)

    def __call__(self, options, **tensors):
        """Returns the tuple of the results; tensors that are `None` are left out."""
        tensors = {name: x for name, x in tensors.items() if x is not None}
        return _launcher().call(self, options, tensors)


def _launcher():
    """The module that launches kernels under the backend in use."""
    if keras.config.backend() == "jax":
        from keras_hla.kernels.launching import jax_launcher

        return jax_launcher
    from keras_hla.kernels.launching import torch_launcher

    return torch_launcher
