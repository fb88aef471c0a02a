"""What a layer is tried with: random tensors in the place of those that it meets in a model."""

import dataclasses

import keras
import numpy as np

ROWS = 16  # the batch size


@dataclasses.dataclass(frozen=True)
class Signal:
    """A tensor of a model, as far as it matters to reading in pieces.

    Args:
        shape: shape, in which the axis of time has the size 1.
        dtype: dtype.
        axis: axis of time; `None` if there is none.
        per_step: number of entries for each time step.
        of_last_step: whether it is of a sequence's last step, and so differs from piece to piece.
    """

    shape: tuple
    dtype: str
    axis: int | None = None
    per_step: int = 1
    of_last_step: bool = False

    @property
    def varies(self):
        """Whether it depends on the sequences of the model."""
        return self.axis is not None or self.of_last_step

    @property
    def step_size(self):
        """The number of elements of a row and time step."""
        rest = [n for i, n in enumerate(self.shape) if i not in (0, self.axis)]
        return self.per_step * int(np.prod(rest))

    def draw(self, rng, length):
        """Arrays of float32 for the whole, its first piece of `length` steps, and its last step."""
        if self.axis is None:
            whole = self._random(rng, self.shape)
            return whole, self._random(rng, self.shape) if self.of_last_step else whole, whole
        shape = [*self.shape]
        shape[self.axis] = (length + 1) * self.per_step
        whole = self._random(rng, shape)
        return whole, *np.split(whole, [length * self.per_step], axis=self.axis)

    def _random(self, rng, shape):
        tokens = "float" not in self.dtype or (self.axis is not None and len(shape) == 2)
        values = rng.integers(0, 2, shape) if tokens else rng.standard_normal(shape, "float32")
        return values.astype("float32")


def signal_of_shapes(one, two, varies):
    """The signal of an output of an operation that is known to stream.

    Args:
        one: the output for one step.
        two: the output for two steps.
        varies: whether it depends on a sequence.
    """
    shape, dtype = tuple(one.shape), keras.backend.standardize_dtype(one.dtype)
    axes = [i for i, n in enumerate(two.shape) if n != shape[i]]
    if not axes:
        return Signal(shape, dtype, of_last_step=varies)
    (axis,) = axes
    return Signal((*shape[:axis], 1, *shape[axis + 1 :]), dtype, axis, shape[axis])


def signal_of(whole, first, last, length, varies):
    """The signal of an output, given as arrays for the whole and its two pieces.

    Returns `None` if the pieces are not parts of the whole.

    Args:
        whole: the output for `length + 1` steps.
        first: that for the first `length` of them.
        last: that for the last step.
        length: number of steps.
        varies: whether it depends on a sequence.
    """
    dtype = keras.backend.standardize_dtype(whole.dtype)
    shape = tuple(whole.shape)
    if shape == tuple(first.shape) == tuple(last.shape):
        same = not _differ(whole, last, dtype)
        return Signal(shape, dtype, of_last_step=varies) if same else None
    if not len(shape) == len(first.shape) == len(last.shape):
        return None
    axes = [i for i, n in enumerate(shape) if (n, n) != (first.shape[i], last.shape[i])]
    axis, per_step = axes[0], last.shape[axes[0]]
    sizes = (shape[axis], first.shape[axis])
    if len(axes) > 1 or sizes != ((length + 1) * per_step, length * per_step):
        return None
    pieces = np.concatenate([_array(first), _array(last)], axis=axis)
    if _differ(whole, pieces, dtype):
        return None
    return Signal((*shape[:axis], 1, *shape[axis + 1 :]), dtype, axis, per_step)


def _differ(actual, expected, dtype):
    """Whether an entry differs in many rows.

    In some of them it may differ by rounding, which is as large as the entry where terms cancel.
    """
    actual, expected = _array(actual), _array(expected)
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    if "float" not in dtype:
        return not np.all(same)
    tolerance, share = (1e-1, 0.5) if dtype in ("float16", "bfloat16") else (1e-2, 0.25)
    with np.errstate(invalid="ignore"):
        bound = tolerance * np.maximum(np.abs(actual), np.abs(expected))
        same |= np.isfinite(bound) & (np.abs(actual - expected) <= bound)
    return bool(np.any(np.mean(np.atleast_1d(~same), axis=0) > share))


def _array(x):
    if not isinstance(x, np.ndarray):
        x = keras.ops.convert_to_numpy(x)
        x = x if x.dtype == "float64" else x.astype("float32")
    return x
