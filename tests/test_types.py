"""Public functions and classes have annotations. Whether they help users: see `check_types.py`."""

import importlib
import inspect
import pkgutil
import re

import keras
import pytest

import keras_hla
from keras_hla import layers
from keras_hla.layers import options

PUBLIC = re.findall(r"^- `(\w+)`:", keras_hla.__doc__, re.MULTILINE)


def public_callables():
    of_torch = set() if keras.backend.backend() == "torch" else {"torch_module"}
    for module in sorted({*PUBLIC} - of_torch):
        members = importlib.import_module(f"keras_hla.{module}")
        for name in members.__all__:
            member = getattr(members, name)
            if inspect.isfunction(member):
                yield f"{module}.{name}", member
            elif inspect.isclass(member):
                yield from methods(f"{module}.{name}", member)


def methods(path, cls):
    for name, member in vars(cls).items():
        function = getattr(member, "__func__", member)  # of a static or class method
        function = getattr(function, "fget", function)  # of a property
        own = inspect.isfunction(function) and function.__module__.startswith("keras_hla")
        if own and (name == "__init__" or not name.startswith("_")):
            yield f"{path}.{name}", function


@pytest.mark.parametrize(("path", "function"), [*public_callables()])
def test_all_arguments_and_results_are_annotated(path, function):
    signature = inspect.signature(function)
    for name, parameter in signature.parameters.items():
        assert name in ("self", "cls") or parameter.annotation is not parameter.empty, (
            f"{path}({name})"
        )
    assert signature.return_annotation is not signature.empty, path


OF_KERAS = {*options.NamedLayerOptions.__annotations__, "kwargs"}


@pytest.mark.parametrize(
    ("cls", "keywords", "to"),
    [
        (layers.HLA, options.HLAOptions, (layers.HLACell,)),
        (layers.HLADecoderBlock, options.BlockOptions, (layers.HLA, layers.HLACell)),
    ],
)
def test_keywords_that_are_handed_on_are_those_of_the_layers_inside(cls, keywords, to):
    own = set(inspect.signature(cls).parameters)
    inside = {name for layer in to for name in inspect.signature(layer).parameters}
    fixed = {"return_sequences", "return_state", "go_backwards", "output_shape"}
    fixed = fixed if cls is layers.HLADecoderBlock else set()
    assert set(keywords.__annotations__) - OF_KERAS == inside - own - OF_KERAS - fixed


def test_public_modules_are_listed_once():
    """In the docstring of the package; each of them says what is public in it."""
    modules = {x.name for x in pkgutil.iter_modules(keras_hla.__path__)}
    assert {*PUBLIC} <= modules
    for name in {*PUBLIC} - {"torch_module"}:
        assert importlib.import_module(f"keras_hla.{name}").__all__
