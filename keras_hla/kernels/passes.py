"""What an operator computes, as the kernels need it: its passes, read off its `chain`."""

from collections.abc import Hashable
import dataclasses
import functools
from typing import NamedTuple


class Pass(NamedTuple):
    """`output_t = query_tᵀ H_t`, `H_t = a_t^power H_{t-1} + key_t value_tᵀ`.

    Keys, values and the output are named: `"key"`, `"value"`, or the output of an earlier pass.
    `H` is the state at the place `state` of the operator's.
    """

    state: int
    key: str
    value: str
    power: int
    output: str


def passes_of(operator):
    """Returns the passes of an operator in order, the output of the last of which is its own.

    Returns `None` if it is more than passes of its queries, over states that it keeps.
    """
    return _found(operator) if isinstance(operator, Hashable) else None


@functools.lru_cache(maxsize=256)  # as each call asks
def _found(operator):
    passes: list[Pass] = []

    def scan(query, key, value, state, power=1):
        if query != _Symbol("query"):
            raise TypeError
        output = _Symbol(f"pass {len(passes)}")
        passes.append(Pass(state, key.name, value.name, power, output.name))
        return output, state

    states = range(len(operator.state_names))
    query, key, value = map(_Symbol, ("query", "key", "value"))
    try:  # of which arithmetic with symbols is a TypeError, and so are other scans
        output, _ = operator.chain(scan, states, query, key, value)
    except TypeError:
        return None
    read = {name for one in passes for name in (one.key, one.value)} | {output.name}
    each_is_read = bool(passes) and all(one.output in read for one in passes)
    return tuple(passes) if each_is_read and output.name == passes[-1].output else None


@dataclasses.dataclass(frozen=True)
class _Symbol:
    name: str
