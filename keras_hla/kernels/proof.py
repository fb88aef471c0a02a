"""Checks the kernels on GPUs on which they were not measured.

At first use the kernels run on a small case, and their results are compared with those of the
portable implementation. The verdict is remembered for the process.
"""

from concurrent.futures import ThreadPoolExecutor
import threading
from typing import NamedTuple
import warnings

import keras
from keras import ops
import numpy as np

from keras_hla import operators, stages
from keras_hla.backend.compiling import called_while_traced
from keras_hla.backend.gradients import exact_dtype, pull_back
from keras_hla.kernels import device, small_cases

# Largest relative RMS errors: 2.5 times the rounding error, where correct kernels reach 2.1 times,
# and the error of long sums in float32.
_TOLERANCE = {"bfloat16": 4.2e-3, "float16": 5.2e-4, "float32": 1e-5}
# How much larger errors of float32 gradients may be: in those of log-decays terms cancel.
_CANCELLING = 5


class Verdict(NamedTuple):
    """Whether kernels agree with the portable implementation, and the reason in words."""

    proven: bool
    reason: str


_verdicts: dict[tuple, Verdict] = {}  # by place and kind
_warned: set[tuple] = set()  # kinds
_lock = threading.Lock()


class OperatorKernels(NamedTuple):
    """A kind of kernels: those of an operator, as they are compiled for it."""

    dtype: str
    dims: tuple[int, int]  # of a key and of a value
    decays: bool
    operator: str

    def cases(self):
        return small_cases.of_operator(operators.get(self.operator), self.dims, self.decays)

    def __str__(self):
        decays = "with" if self.decays else "without"
        return f"{self.operator!r} {decays} decays in {self.dtype}, dims {self.dims}"


class StageKernels(NamedTuple):
    """A kind of kernels: those of the stages of a layer beside its operator."""

    dtype: str
    dims: tuple[int, int]

    def cases(self):
        return small_cases.of_stages(self.dims)

    def __str__(self):
        return f"the stages of a layer in {self.dtype}, dims {self.dims}"


@called_while_traced
def prove(operator, dtype, dims, decays, place):
    """The `Verdict` on all kernels that a layer with this operator may launch.

    Args:
        operator: the name of an operator that the kernels know, as compilers keep.
        dtype: name of the dtype of query, key and value.
        dims: sizes of a key and of a value, for which kernels are compiled.
        decays: whether there are log-decays.
        place: the GPU, as `device.place_of` returns it.
    """
    verdict = _verdict(place, OperatorKernels(dtype, dims, decays, operator))
    if verdict.proven and stages.are_fused("triton"):
        return _verdict(place, StageKernels(dtype, dims))
    return verdict


def _verdict(place, kind):
    """The `Verdict` on a kind of kernels, remembered after the first call."""
    if (place, kind) not in _verdicts:
        if device.is_capturing():  # where nothing runs that is launched
            return Verdict(False, "the kernels are not proven while a CUDA graph is captured")
        with _lock:
            if (place, kind) not in _verdicts:
                # In another thread, which no trace, mode or scope of the caller reaches.
                with ThreadPoolExecutor(max_workers=1) as thread:
                    _verdicts[place, kind] = thread.submit(_examine, place, kind).result()
                _warn_once(kind, _verdicts[place, kind])
    return _verdicts[place, kind]


def _warn_once(kind, verdict):
    if verdict.proven or kind in _warned:  # of another GPU
        return
    _warned.add(kind)
    warnings.warn(
        f"{kind} is evaluated by the portable implementation: {verdict.reason}. "
        "`implementation='triton'` takes them anyway.",
        stacklevel=2,
    )


def _examine(place, kind):
    gpu = f"this GPU ({device.describe(place)})"
    try:
        with keras.device(place):
            error = max(e for case in kind.cases() for e in _errors(case, kind.dtype))
    except Exception as e:
        summary = f"{type(e).__name__}: {e}".splitlines()[0]
        return Verdict(False, f"on {gpu} the kernels fail with {summary}")
    if error <= _TOLERANCE[kind.dtype]:
        return Verdict(True, f"the kernels agree with the portable implementation on {gpu}")
    return Verdict(
        False, f"on {gpu} the kernels differ from the portable implementation by {error:.1e}"
    )


def _errors(case, dtype):
    """The errors of results and gradients of kernels, which `_TOLERANCE` bounds."""
    inputs = [ops.convert_to_tensor(x, dtype) for x in case.inputs]
    inputs += [ops.convert_to_tensor(x, "float32") for x in case.exact]
    rng = np.random.default_rng(1)
    results, pull = pull_back(lambda *x: case.function(True, *x), inputs)
    weights = [ops.convert_to_tensor(rng.standard_normal(x.shape), x.dtype) for x in results]
    found = [*results, *pull(weights)]
    inputs, weights = ([ops.cast(x, exact_dtype()) for x in some] for some in (inputs, weights))
    results, pull = pull_back(lambda *x: case.function(False, *x), inputs)
    expected = [*results, *pull(weights)]
    errors = [_relative_error(*pair) for pair in zip(found, expected, strict=True)]
    first = len(errors) - len(case.exact)
    return [*errors[:first], *(e / _CANCELLING for e in errors[first:])]


def _relative_error(found, expected):
    """RMS of the difference over RMS of the expected values; infinity if it is NaN."""
    found, expected = (
        ops.convert_to_numpy(ops.cast(ops.stop_gradient(x), exact_dtype())).astype("float64")
        for x in (found, expected)
    )
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    return error if np.isfinite(error) else np.inf
