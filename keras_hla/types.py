"""Types of arguments and results, for annotations."""

from collections.abc import Callable, Sequence
import os
from typing import Any, Literal, TypeAlias

import keras

__all__ = [
    "Activation",
    "Constraint",
    "DType",
    "Form",
    "Implementation",
    "Initializer",
    "Regularizer",
    "Seed",
    "SegmentShapes",
    "Shape",
    "State",
    "StateShapes",
    "StrPath",
    "Tensor",
]

Tensor: TypeAlias = Any
"""A tensor of the backend, a NumPy array, or where it says so a `keras.KerasTensor`. Keras has
no type for it."""
State: TypeAlias = Sequence[Tensor]
"""The states of an operator or a layer, in order."""
Shape: TypeAlias = tuple[int | None, ...]
"""A shape, with `None` for what is not known."""
StateShapes: TypeAlias = tuple[tuple[int, int, int], ...]
"""The shapes `(heads, rows, columns)` of the states of an operator, in order."""
SegmentShapes: TypeAlias = tuple[Shape, ...]
"""The shapes of what a segment holds besides its states."""
Activation: TypeAlias = str | Callable[[Tensor], Tensor]
"""An activation, by name or as a function."""
Initializer: TypeAlias = str | keras.initializers.Initializer | dict[str, Any]
"""An initializer, by name, as an object, or as its config."""
Regularizer: TypeAlias = str | keras.regularizers.Regularizer | dict[str, Any]
"""A regularizer, by name, as an object, or as its config."""
Constraint: TypeAlias = str | keras.constraints.Constraint | dict[str, Any]
"""A constraint, by name, as an object, or as its config."""
DType: TypeAlias = str | keras.DTypePolicy | dict[str, Any]
"""The dtype or dtype policy of a layer."""
Seed: TypeAlias = int | keras.random.SeedGenerator
"""A seed, or Keras' generator of seeds."""
Implementation: TypeAlias = Literal["auto", "portable", "triton"]
"""What `implementation` may be."""
Form: TypeAlias = Literal["chunked", "recurrent", "matrix"]
"""What `form` may be."""
StrPath: TypeAlias = str | os.PathLike[str]
"""A file or a folder."""
