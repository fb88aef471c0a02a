"""Records stages as they are called, to be evaluated together."""

from keras_hla.kernels.fusion import functions
from keras_hla.kernels.fusion.program import DEVICES, Program, Stage
from keras_hla.kernels.operator.chain import ATTENTION
from keras_hla.kernels.passes import passes_of
from keras_hla.kernels.stages.gate import GATE
from keras_hla.kernels.stages.norm import NORM
from keras_hla.kernels.stages.operands import OPERANDS
from keras_hla.kernels.stages.rotary import ROTARY


class Recorder:
    """Each method records a stage of `keras_hla.stages`, and returns what stands for its result."""

    def __init__(self):
        self._stages = []
        self._variables = {}
        self._inputs = {}
        self._constants = set()
        self._count = 0

    def input(self, name, constant=False):
        """What stands for a tensor that a `Program` is called with.

        The first input must be the sequences. `constant` says that each call has the same tensor.
        """
        (number,) = self._numbers(1)
        self._inputs[name] = number
        if constant:
            self._constants.add(number)
        return number

    def variable(self, x):
        """What stands for a `keras.Variable`; `None` for `None`."""
        if x is None:
            return None
        (number,) = self._numbers(1)
        self._variables[number] = x
        return number

    def program(self, results):
        """The `Program` of all stages, which gives the results that these numbers stand for."""
        stages = tuple(self._stages)
        return Program(stages, tuple(results), self._variables, self._inputs, self._constants)

    def project(self, x, *projections):
        """The products of `x` with the weights of `Dense` layers.

        Args:
            x: stands for a tensor `(batch, length, ...)`.
            *projections: pairs of a `Dense` and the shape of the features of its result.
        """
        read = self._read(x, [dense for dense, _ in projections])
        shapes = tuple(tuple(shape) for _, shape in projections)
        return self._note(functions.PROJECT, read, shapes, count=len(projections))

    def project_together(self, x, *denses):
        """The products of `x` with the weights of `Dense` layers, in one tensor."""
        read = self._read(x, denses)
        (result,) = self._note(functions.PROJECT_TOGETHER, read, (len(denses),))
        return result

    def permute(self, x, order, inverse):
        """The tokens of all sequences in another order."""
        (result,) = self._note(functions.PERMUTE, {"x": x, "order": order, "inverse": inverse})
        return result

    def concatenate(self, before, x):
        """The tokens of both, along the length."""
        (result,) = self._note(functions.CONCATENATE, {"before": before, "x": x})
        return result

    def last_tokens(self, x, count):
        (result,) = self._note(functions.LAST_TOKENS, {"x": x}, (count,))
        return result

    def operands(
        self, x, heads, dims, scale=1.0, convolution=None, segments=None, angles=None, past=0
    ):
        """Queries, keys and values from their projections in one tensor.

        Args:
            x: stands for the projections.
            heads: number of heads of queries, and of keys and values.
            dims: size of a key and of a value.
            scale: factor of the queries.
            convolution: a `ShortConvolution`, or `None`.
            segments: stands for the number of the segment of each token, or `None`.
            angles: what stands for cosines and sines, or `None`.
            past: number of tokens that come before those of the results.
        """
        read, is_silu = {"x": x, "segments": segments}, False
        if convolution is not None:
            read["kernel"] = self.variable(convolution.kernel)
            is_silu = convolution.activation is not None
        if angles is not None:
            read["cos"], read["sin"] = angles
        return self._note(OPERANDS, read, (is_silu, scale, *heads, *dims, past), count=3)

    def rms_norm(self, x, norm, recompute=False):
        read = {"x": x, "scale": self.variable(norm.scale)}
        (result,) = self._note(NORM, read, (norm.epsilon,), recompute=recompute)
        return result

    def rotate(self, x, angles, scale=1.0):
        """`x` times the scale, rotated where `angles` are not `None`."""
        if angles is None and scale == 1.0:
            return x
        if angles is None:
            (result,) = self._note(functions.SCALE, {"x": x}, (scale,))
        else:
            cos, sin = angles
            (result,) = self._note(ROTARY, {"x": x, "cos": cos, "sin": sin}, (scale,))
        return result

    def log_decay(self, x, dense, least, starts):
        """`log sigmoid` of a projection, at least `least`, and exactly `least` at `starts`."""
        read = {"x": x, "kernel": self.variable(dense.kernel), "bias": self.variable(dense.bias)}
        read["starts"] = starts
        (result,) = self._note(functions.LOG_DECAY, read, (least,))
        return result

    def attend(self, operator, query, key, value, log_decay, states=()):
        """The output of an operator, and the tuple of the states after it if it is given states."""
        read = {"query": query, "key": key, "value": value, "log_decay": log_decay}
        read |= {f"state {i}": state for i, state in enumerate(states)}
        options = passes_of(operator), bool(states), DEVICES
        output, *after = self._note(ATTENTION, read, options, count=1 + len(states))
        return output, tuple(after)

    def gate(self, x, gates):
        (result,) = self._note(GATE, {"x": x, "gates": gates}, recompute=True)
        return result

    def add(self, x, y):
        (result,) = self._note(functions.ADD, {"x": x, "y": y})
        return result

    def _read(self, x, denses):
        """The tensors that a stage of projections of `x` reads."""
        read = {"x": x}
        for i, dense in enumerate(denses):
            read[f"kernel{i}"] = self.variable(dense.kernel)
            read[f"bias{i}"] = self.variable(dense.bias)
        return read

    def _note(self, function, read, options=(), count=1, recompute=False):
        read = tuple((name, number) for name, number in read.items() if number is not None)
        results = self._numbers(count)
        self._stages.append(Stage(function, read, results, options, recompute))
        return results

    def _numbers(self, count):
        self._count += count
        return tuple(range(self._count - count, self._count))
