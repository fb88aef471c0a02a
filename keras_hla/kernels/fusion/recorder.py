"""Stages that are noted as they are called, and evaluated together."""

import keras

from keras_hla.kernels.fusion import functions
from keras_hla.kernels.fusion.fuse import Stage, fuse
from keras_hla.kernels.operator.chain import ATTENTION
from keras_hla.kernels.passes import passes_of
from keras_hla.kernels.stages.convolution import CONVOLUTION
from keras_hla.kernels.stages.gate import GATE
from keras_hla.kernels.stages.norm import NORM
from keras_hla.kernels.stages.rotary import ROTARY


class Recorder:
    """Each method notes a stage of `keras_hla.stages`, and returns what stands for its result."""

    def __init__(self):
        self._stages = []
        self._tensors = {}  # by number
        self._count = 0

    def tensor(self, x):
        """What stands for a tensor, or a variable, from outside; `None` for `None`."""
        if x is None:
            return None
        (name,) = self._names(1)
        self._tensors[name] = x.value if isinstance(x, keras.Variable) else x
        return name

    def evaluate(self, result):
        """The tensor that `result` stands for, that of the last stage."""
        if self._stages[-1].results != (result,):
            raise ValueError("The result must be that of the last stage.")
        return fuse(tuple(self._stages), self._tensors)

    def project(self, x, *projections):
        """The products of `x` with the weights of `Dense` layers.

        Args:
            x: stands for a tensor `(batch, length, ...)`.
            *projections: pairs of a `Dense` and the shape of the features of its result.
        """
        read = {"x": x}
        for i, (dense, _) in enumerate(projections):
            read |= {f"kernel{i}": self.tensor(dense.kernel), f"bias{i}": self.tensor(dense.bias)}
        shapes = tuple(tuple(shape) for _, shape in projections)
        return self._note(functions.PROJECT, read, shapes, count=len(projections))

    def convolve(self, xs, kernel, activation, starts):
        """The convolution of several tensors, whose features together are those of the kernel."""
        sizes = tuple(size for _, size in xs)
        kernels = self._note(functions.SPLIT, {"x": self.tensor(kernel)}, sizes, count=len(xs))
        segments = None if starts is None else self.tensor(starts.cumsum(1).int())
        results = []
        for (x, _), part in zip(xs, kernels, strict=True):
            read = {"x": x, "kernel": part, "segments": segments}
            results += self._note(CONVOLUTION, read, (activation is not None,))
        return results

    def rms_norm(self, x, norm):
        read = {"x": x, "scale": self.tensor(norm.scale)}
        (result,) = self._note(NORM, read, (norm.epsilon,), recompute=True)
        return result

    def rotate(self, x, cos, sin, scale=1.0):
        (result,) = self._note(ROTARY, {"x": x, "cos": cos, "sin": sin}, (scale,))
        return result

    def scale(self, x, scale):
        (result,) = self._note(functions.SCALE, {"x": x}, (scale,))
        return result

    def log_decay(self, x, dense, least, starts):
        """`log sigmoid` of a projection, no less than `least`, which it is at `starts`."""
        read = {"x": x, "kernel": self.tensor(dense.kernel), "bias": self.tensor(dense.bias)}
        read["starts"] = self.tensor(starts)
        (result,) = self._note(functions.LOG_DECAY, read, (least,))
        return result

    def attend(self, operator, query, key, value, log_decay):
        """The output of an operator, from zero states."""
        read = {"query": query, "key": key, "value": value, "log_decay": log_decay}
        (result,) = self._note(ATTENTION, read, (passes_of(operator), False))
        return result

    def gate(self, x, gates):
        (result,) = self._note(GATE, {"x": x, "gates": gates}, recompute=True)
        return result

    def add(self, x, y):
        (result,) = self._note(functions.ADD, {"x": x, "y": y})
        return result

    def _note(self, function, read, options=(), count=1, recompute=False):
        read = tuple((argument, name) for argument, name in read.items() if name is not None)
        results = self._names(count)
        self._stages.append(Stage(function, read, results, options, recompute))
        return results

    def _names(self, count):
        self._count += count
        return tuple(range(self._count - count, self._count))
