"""The passes of an operator, which the kernels evaluate, derived from its `chain`."""

from collections.abc import Hashable
from typing import NamedTuple

from keras_hla.backend.compiling import remembered


class Pass(NamedTuple):
    """`output_t = query_tᵀ H_t`, `H_t = a_t^power H_{t-1} + key_t value_tᵀ`.

    Keys, values and the output are named: `"key"`, `"value"`, or the output of an earlier pass.
    `H` is the operator's state with the index `state`.
    """

    state: int
    key: str
    value: str
    power: int
    output: str


def passes_of(operator):
    """Returns the passes of an operator in order; the output of the last one is the operator's.

    Returns `None` if the operator computes anything but passes of its queries over its states.
    """
    return _found(operator) if isinstance(operator, Hashable) else None


@remembered  # as each call needs them
def _found(operator):
    passes: list[Pass] = []

    def scan(query, key, value, state=None, power=1, exclusive=False):
        if query is not symbols["query"] or state is None or exclusive:
            raise _MoreThanPassesError
        output = _Symbol(f"pass {len(passes)}")
        passes.append(Pass(state, key.name, value.name, power, output.name))
        return output, state

    symbols = {name: _Symbol(name) for name in ("query", "key", "value")}
    states = range(len(operator.state_names))
    try:
        output, _ = operator.chain(scan, states, **symbols)
    except _MoreThanPassesError:
        return None
    read = {name for x in passes for name in (x.key, x.value)} | {output.name}
    each_is_read = bool(passes) and all(x.output in read for x in passes)
    return tuple(passes) if each_is_read and output.name == passes[-1].output else None


class _MoreThanPassesError(Exception):
    """A chain computes with its tensors itself."""


class _Symbol:
    """Stands for a tensor, whose elements a chain of passes does not read."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, name):
        raise _MoreThanPassesError

    def _computes(self, *_, **__):
        raise _MoreThanPassesError

    __add__ = __sub__ = __mul__ = __truediv__ = __matmul__ = __pow__ = __neg__ = _computes
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rmatmul__ = __getitem__ = _computes
    __array__ = __tf_tensor__ = _computes

    @classmethod
    def __torch_function__(cls, *_, **__):
        raise _MoreThanPassesError
