"""Mixers by name: an operator and options, `hla2+conv+decay`, or a peer.

An option that is not named is off. `linear+conv/hla2+conv` stands for alternating operators.
"""

import math
from typing import Any

from benchmarks.learning import peers
from benchmarks.learning.operators import CANDIDATES
from keras_hla.layers import HLA

OPERATORS = ("hla2", "ahla", "hla3", "linear", *CANDIDATES)
NOTHING: dict[str, Any] = {"decay": None, "conv_kernel_size": None, "rope_max_wavelength": None}
OPTIONS: dict[str, dict[str, Any]] = {
    "conv": {"conv_kernel_size": 4},
    "rope": {"rope_max_wavelength": 10_000},
    "decay": {"decay": "input"},
    "multiscale": {"decay": "multiscale"},
    "gate": {"output_gate": "silu"},
    "qk_norm": {"qk_norm": True},
    "ridge": {"ridge": 1.0},
    "unmasked": {"masked": False},
}
PEERS = {
    "softmax": lambda heads, dim: peers.Attention(heads, dim, conv=False),
    "softmax+conv": lambda heads, dim: peers.Attention(heads, dim, conv=True),
    "delta": lambda heads, dim: peers.GatedDelta(heads, dim, gate=False),
    "delta+gate": peers.GatedDelta,
    "gru": lambda heads, dim: peers.GRU(),
}


def of_layer(name, number):
    """The mixer of a layer, of which the first is 0."""
    parts = name.split("/")
    return parts[number % len(parts)]


def check(name):
    """Raises a `ValueError` if there is no mixer with this name."""
    for part in name.split("/"):
        _check(part)


def _check(name):
    base, *options = name.split("+")
    known = base in OPERATORS and set(options) <= set(OPTIONS)
    if name not in PEERS and not known:
        raise ValueError(
            f"A mixer must be one of {sorted(PEERS)}, or one of {sorted(OPERATORS)} "
            f"followed by options of {sorted(OPTIONS)}, as in 'hla2+conv'. Received: {name!r}"
        )


def make(name, heads, dim, implementation="portable"):
    """The layer with this name."""
    check(name)
    if name in PEERS:
        return PEERS[name](heads, dim)
    base, *options = name.split("+")
    arguments = dict(NOTHING)
    for option in options:
        arguments |= OPTIONS[option]
    return HLA(
        heads,
        dim,
        operator=base,
        use_bias=False,
        remat_length=None,
        implementation=implementation,
        **arguments,
    )


def state_size(layer, length):
    """The number of elements that a layer keeps of the past after `length` tokens."""
    if isinstance(layer, HLA):
        return sum(math.prod(size) for size in layer.cell.state_size)
    return layer.state_size(length)
