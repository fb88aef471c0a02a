"""What is measured: the operators of keras_hla, and their peers on the backend in use.

A contender's function takes query, key and value, `(batch, length, heads, dim)`, and the log-decay
where the case has one.
"""

from collections.abc import Callable
from dataclasses import dataclass
import importlib

import keras

from keras_hla.ops import higher_order_attention


@dataclass(frozen=True)
class Contender:
    name: str
    operator: str  # what it computes and is checked against: an operator, or "softmax"
    function: Callable | None = None
    unavailable: str = ""  # why it cannot be measured
    ours: bool = False
    peer: str = ""  # its name in `--peers`
    implementation: str = ""  # of keras_hla, if one was requested


def choose(case, operators, implementations, peers):
    """The list of contenders for a case.

    Args:
        case: the `Case`.
        operators: names of operators.
        implementations: values of the argument `implementation`; empty leaves it out.
        peers: names of peers; `None` is all of this backend.
    """
    found = [
        _ours(operator, implementation)
        for operator in operators
        for implementation in implementations or [None]
    ]
    known = _peers(case, operators)
    if peers is not None:
        names = {peer.peer for peer in known}
        found += [
            Contender(name, "", unavailable="no such peer on this backend", peer=name)
            for name in peers
            if name not in names
        ]
    return found + [peer for peer in known if peers is None or peer.peer in peers]


def _ours(operator, implementation=None):
    options = {} if implementation is None else {"implementation": implementation}

    def function(query, key, value, log_decay=None):
        return higher_order_attention(query, key, value, operator, log_decay=log_decay, **options)

    name = f"keras_hla {operator}" + (f" ({implementation})" if implementation else "")
    return Contender(name, operator, function, ours=True, implementation=implementation or "")


def _peers(case, operators):
    backend = importlib.import_module(f"benchmarks.peers_{keras.config.backend()}")
    first_order = [] if "linear" in operators else [_ours("linear")]
    return [
        *(Contender(x.name, x.operator, x.function, peer="first_order") for x in first_order),
        *backend.peers(case, operators),
        Contender("keras.ops attention", "softmax", _keras_attention, peer="keras_attention"),
    ]


def _keras_attention(query, key, value, log_decay=None):
    del log_decay
    return keras.ops.dot_product_attention(query, key, value, is_causal=True)
