"""Types of arguments and results, for annotations."""

from collections.abc import Callable, Sequence
import os
from typing import Any, Literal, TypeAlias

import keras

#: A tensor of the backend, a NumPy array, or where it says so a `keras.KerasTensor`. Keras has no
#: type for it.
Tensor: TypeAlias = Any
#: The states of an operator or a layer, in order.
State: TypeAlias = Sequence[Tensor]
#: A shape, with `None` for what is not known.
Shape: TypeAlias = tuple[int | None, ...]
#: The shapes `(heads, rows, columns)` of the states of an operator, in order.
StateShapes: TypeAlias = tuple[tuple[int, int, int], ...]
#: The shapes of what a segment holds besides its states.
SegmentShapes: TypeAlias = tuple[Shape, ...]
#: An activation, by name or as a function.
Activation: TypeAlias = str | Callable[[Tensor], Tensor]
#: An initializer, by name, as an object, or as its config.
Initializer: TypeAlias = str | keras.initializers.Initializer | dict[str, Any]
#: A regularizer, by name, as an object, or as its config.
Regularizer: TypeAlias = str | keras.regularizers.Regularizer | dict[str, Any]
#: A constraint, by name, as an object, or as its config.
Constraint: TypeAlias = str | keras.constraints.Constraint | dict[str, Any]
#: The dtype or dtype policy of a layer.
DType: TypeAlias = str | keras.DTypePolicy | dict[str, Any]
#: A seed, or Keras' generator of seeds.
Seed: TypeAlias = int | keras.random.SeedGenerator
#: What `implementation` may be.
Implementation: TypeAlias = Literal["auto", "portable", "triton"]
#: What `form` may be.
Form: TypeAlias = Literal["chunked", "recurrent", "matrix"]
#: A file or a folder.
StrPath: TypeAlias = str | os.PathLike[str]
