"""Functions of tensors that take symbolic ones too, as the operations of Keras do."""

from collections.abc import Callable
import functools
import inspect
from typing import Any, TypeVar, cast

import keras

from keras_hla import operators


class FunctionOperation(keras.Operation):
    """A function as a node of a functional model.

    Args:
        **options: The arguments that hold no symbolic tensor. They are no inputs, so that the
            function may ask for their values.
    """

    def __init__(self, name=None, **options):
        super().__init__(name=name)
        self.options = options

    def call(self, **tensors):
        return self.function(**tensors, **self.options)

    def get_config(self):
        return {**super().get_config(), **self.options}

    @classmethod
    def from_config(cls, config):
        return cls(**{n: keras.saving.deserialize_keras_object(x) for n, x in config.items()})


_Function = TypeVar("_Function", bound=Callable[..., Any])


def functional(function: _Function) -> _Function:
    """Decorates a public function, which then makes a node where a tensor is symbolic.

    The node is saved with a model, by the name of the function.
    """
    name = "".join(word.capitalize() for word in function.__name__.split("_"))
    operation = type(name, (FunctionOperation,), {"function": staticmethod(function)})
    operation = keras.saving.register_keras_serializable("keras_hla")(operation)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def with_symbolic_tensors(*args, **kwargs):
        if not _is_symbolic((args, kwargs)):
            return function(*args, **kwargs)
        arguments = signature.bind(*args, **kwargs).arguments
        if isinstance(arguments.get("operator"), operators.Operator):
            arguments["operator"] = _by_name(arguments["operator"])
        tensors = {name: x for name, x in arguments.items() if _is_symbolic(x)}
        options = {name: x for name, x in arguments.items() if name not in tensors}
        return operation(**options)(**tensors)

    return cast(_Function, with_symbolic_tensors)


def _is_symbolic(x):
    """Whether an argument, or one of a nest of them, is a symbolic tensor."""
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list | tuple):
        return any(map(_is_symbolic, x))
    return isinstance(x, keras.KerasTensor)


def _by_name(operator):
    """The name of an operator, which can be saved, if it has one."""
    try:
        return operators.name_of(operator)
    except ValueError:
        return operator
