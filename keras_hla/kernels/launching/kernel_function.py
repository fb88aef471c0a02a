"""A function of tensors that is made of launches of kernels, and its gradients."""

from collections.abc import Callable
import dataclasses

import keras


@dataclasses.dataclass(frozen=True, eq=False)
class KernelFunction:
    """What all backends need to know of a function that kernels compute.

    Its tensors come as a dictionary by name, with those alone that are given. Its options are a
    tuple of names, numbers, booleans, `None` and such tuples, so that a compiler may keep them.

    `run(launch, inputs)` launches a `Launch` and returns the tuple of its outputs.

    Args:
        name: Name of the function.
        evaluate: `evaluate(run, options, tensors, save)` returns the tuple of the results, and
            the tuple of what `gradients` needs besides, if `save`. None is one of `tensors`.
        gradients: `gradients(run, options, tensors, saved, results, wanted)` returns the
            dictionary of the gradients of the tensors named in `wanted`, from those of the
            results; the gradient of a result may be `None`, of all not.
        shapes: `shapes(options, tensors, save)` returns two tuples of pairs `(shape, dtype)`:
            those of what `evaluate` returns.
        reads: The names of the tensors that `gradients` reads; `None` is all.
        count: `count(options)` returns the number of the results.
        rows: `rows(shape)` returns the places of the axes of batch and heads in the shape of a
            tensor, result, gradient or what is saved, for rows of which any may be computed
            apart, as on several devices. `None` if they may not.
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
