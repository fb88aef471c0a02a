"""The operators as chains of causal linear attention, for the definition and for peers.

One pass is `target += sign * LA_p(a, b, c)`, with

    LA_p(a, b, c)_t = a_tᵀ H_t,   H_t = decay_t^p H_{t-1} + b_t c_tᵀ

or, exclusive, `a_tᵀ H_{t-1}`.
"""

from typing import NamedTuple


class Pass(NamedTuple):
    target: str
    a: str
    b: str
    c: str
    power: int = 1
    exclusive: bool = False
    sign: int = 1


CHAINS = {
    "linear": [Pass("o", "q", "k", "v")],
    "hla2": [Pass("u", "q", "k", "k"), Pass("o", "q", "u", "v", power=2)],
    "ahla": [Pass("r", "q", "k", "v"), Pass("o", "q", "k", "r")],
    "hla3": [
        Pass("u", "q", "k", "k"),
        Pass("r", "q", "k", "v"),
        Pass("o", "q", "u", "r", power=3),
    ],
    "hla2_published": [
        Pass("u", "q", "k", "k"),
        Pass("w", "k", "q", "v", exclusive=True),
        Pass("o", "u", "q", "v"),
        Pass("o", "q", "k", "w", sign=-1),
    ],
    "hla3_published": [
        Pass("y", "q", "k", "k"),
        Pass("z", "y", "q", "q"),
        Pass("x", "k", "q", "q", exclusive=True),
        Pass("r", "q", "k", "v", exclusive=True),
        Pass("s", "q", "k", "k", exclusive=True),
        Pass("xv", "x", "k", "v", exclusive=True),
        Pass("xk", "x", "k", "k", exclusive=True),
        Pass("o", "z", "k", "v"),
        Pass("o", "q", "k", "xv", sign=-1),
        Pass("o", "q", "s", "r", sign=-1),
        Pass("o", "q", "xk", "v", sign=-1),
    ],
}


def plain(operator):
    """Whether a chain needs nothing but inclusive passes that are added."""
    return not any(step.exclusive or step.sign < 0 for step in CHAINS[operator])


def run(operator, query, key, value, attend):
    """Evaluates a plain chain with `attend(a, b, c, power)`, a peer's linear attention."""
    tensors = {"q": query, "k": key, "v": value}
    for step in CHAINS[operator]:
        a, b, c = (tensors[name] for name in (step.a, step.b, step.c))
        tensors[step.target] = attend(a, b, c, step.power)
    return tensors["o"]
