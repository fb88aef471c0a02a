"""The arguments of a layer: those that it hands on, and those that go into its config."""

import inspect

import numpy as np


def split_arguments(arguments, *classes):
    """Arguments that the classes name, which are handed on to them, and the others.

    The others are those of `keras.layers.Layer`, which refuses what it does not know.
    """
    names = {name for cls in classes for name in inspect.signature(cls).parameters}
    named = {name: x for name, x in arguments.items() if name in names}
    return named, {name: x for name, x in arguments.items() if name not in names}


def plain(config):
    """A config with Python's numbers in the place of NumPy's, which JSON does not know."""
    return {name: plain_number(x) for name, x in config.items()}


def plain_number(x):
    """Python's number in the place of NumPy's; and what is none as it is."""
    return x.item() if isinstance(x, np.generic) else x
