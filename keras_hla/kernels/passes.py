"""The passes of an operator, which the kernels evaluate, derived from its `chain`."""

from collections.abc import Hashable
import math
import numbers
from typing import NamedTuple

from keras_hla.backend.compiling import remembered

_INPUTS = ("query", "key", "value")


class Pass(NamedTuple):
    """`output_t = scale query_tᵀ H_t + factor added_t`, `H_t = a_t^power H_{t-1} + key_t value_tᵀ`.

    Tensors are named: `"query"`, `"key"`, `"value"`, or the output of an earlier pass. `added` may
    be `None`. `H` is the operator's state with the index `state`.
    """

    state: int
    query: str
    key: str
    value: str
    power: int
    output: str
    scale: float = 1.0
    added: str | None = None
    factor: float = 0.0

    @property
    def query_factor(self):
        """The factor, if the queries of the pass itself are added."""
        return self.factor if self.added == self.query else 0.0

    @property
    def operands(self):
        """The names of what is multiplied, and so has the dtype of products."""
        return self.query, self.key, self.value


def passes_of(operator):
    """Returns the passes of an operator in order; the output of the last one is the operator's.

    Returns `None` if the operator computes anything but passes over its states, one over each, and
    sums of their outputs, each times a number. What is added up may be read as the sum alone. One
    more tensor, an input or the output of an earlier pass, may be part of a sum.
    """
    return _found(operator) if isinstance(operator, Hashable) else None


@remembered  # as each call needs them
def _found(operator):
    chain = _Chain()
    states = tuple(_State(i) for i in range(len(operator.state_names)))
    try:
        output, last = operator.chain(chain.scan, states, *(_Sum({x: 1.0}) for x in _INPUTS))
        output = chain.name_of(output)
    except _MoreThanPassesError:
        return None
    passes = tuple(chain.passes)
    read = {name for x in passes for name in (*x.operands, x.added)} - {None} | {output}
    made = [*_INPUTS, *(x.output for x in passes)]
    each_state_once = sorted(x.state for x in passes) == list(range(len(states)))
    if not each_state_once or tuple(last) != states or read != set(made) or output != made[-1]:
        return None
    return passes


class _MoreThanPassesError(Exception):
    """A chain computes with its tensors itself."""


class _Chain:
    """The passes that a chain asks for, in order."""

    def __init__(self):
        self.passes = []

    def scan(self, query, key, value, state=None, power=1, exclusive=False):
        if not isinstance(state, _State) or exclusive:
            raise _MoreThanPassesError
        query, key, value = (self.name_of(x) for x in (query, key, value))
        output = f"pass {len(self.passes)}"
        self.passes.append(Pass(state.index, query, key, value, power, output))
        return _Sum({output: 1.0}), state

    def name_of(self, x):
        """The name of the tensor that is a sum: the latest pass in it adds the other terms."""
        if not isinstance(x, _Sum):
            raise _MoreThanPassesError
        terms = {name: factor for name, factor in x.terms.items() if factor}
        if list(terms.values()) == [1.0]:
            return next(iter(terms))
        name = self._add_up(terms)
        x.terms = {name: 1.0}
        return name

    def _add_up(self, terms):
        places = [i for i, x in enumerate(self.passes) if x.output in terms]
        if not places:
            raise _MoreThanPassesError
        latest = self.passes[places[-1]]
        scale = terms.pop(latest.output)
        if len(terms) > 1:
            terms = {self.name_of(_Sum(terms)): 1.0}
        added, factor = next(iter(terms.items()), (None, 0.0))
        # By the name of the pass alone nothing finds what it gives any more.
        output = f"sum at {latest.output}"
        self.passes[places[-1]] = latest._replace(
            output=output, scale=scale, added=added, factor=factor
        )
        return output


class _Symbol:
    """Stands for a tensor, whose elements a chain of passes does not read."""

    def __getattr__(self, name):
        raise _MoreThanPassesError

    def _computes(self, *_, **__):
        raise _MoreThanPassesError

    __add__ = __sub__ = __mul__ = __truediv__ = __matmul__ = __pow__ = __neg__ = _computes
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rmatmul__ = __getitem__ = _computes
    __array__ = __tf_tensor__ = _computes
    __array_ufunc__ = None  # so that numbers of NumPy leave products to a symbol

    @classmethod
    def __torch_function__(cls, *_, **__):
        raise _MoreThanPassesError


class _State(_Symbol):
    """Stands for a state, which a chain gives to a pass and returns."""

    def __init__(self, index):
        self.index = index


class _Sum(_Symbol):
    """Stands for a sum of named tensors, each times a number."""

    def __init__(self, terms):
        self.terms = terms

    def __add__(self, other):
        if isinstance(other, numbers.Real) and other == 0:  # where `sum` starts
            return self
        if not isinstance(other, _Sum):
            raise _MoreThanPassesError
        terms = dict(self.terms)
        for name, factor in other.terms.items():
            terms[name] = terms.get(name, 0.0) + factor
        return _Sum(terms)

    def __mul__(self, other):
        if not isinstance(other, numbers.Real) or not math.isfinite(other):
            raise _MoreThanPassesError
        return _Sum({name: float(other) * factor for name, factor in self.terms.items()})

    def __truediv__(self, other):
        if not isinstance(other, numbers.Real) or not other:
            raise _MoreThanPassesError
        return self * (1 / other)

    def __neg__(self):
        return self * -1.0

    def __sub__(self, other):
        return self + -1.0 * other

    def __rsub__(self, other):
        return -self + other

    __radd__, __rmul__ = __add__, __mul__
