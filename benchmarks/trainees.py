"""The training steps that are measured: layers and blocks of keras_hla, and their peers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
import importlib
from typing import NamedTuple

import keras

from benchmarks import runtime
from benchmarks.cases import KINDS


class Announced(NamedTuple):
    """What a trainee says it runs, and the kernel name that confirms it.

    `sign` is a prefix of the name of a kernel or, after a `*`, any part of the name. `present`
    tells whether such a kernel must run, or must not. Without a sign nothing is checked.
    """

    text: str
    sign: str = ""
    present: bool = True

    def confirm(self, kernels):
        """Raises an error if other kernels ran. `None` or an empty set means unknown."""
        if not self.sign or not kernels:
            return
        contained = self.sign.startswith("*")
        found = any(
            self.sign[1:] in name if contained else name.startswith(self.sign) for name in kernels
        )
        if found != self.present:
            listed = ", ".join(sorted(kernels)[:8])
            raise AssertionError(f"announced {self.text}, but the kernels that ran were {listed}")


def no_errors(call, arguments, jit):
    """The errors of a peer whose results are not checked."""
    del call, arguments, jit
    return {}


class Step(NamedTuple):
    """A layer that is built, with its weights."""

    function: Callable  # f(x, *weights)
    weights: list
    announced: Announced
    check: Callable = (
        no_errors  # of the timed function, its arguments and jit; returns relative errors
    )
    jit: bool = True  # whether the layer may be compiled


class Which(NamedTuple):
    """Which rows: see the arguments of `python -m benchmarks`."""

    operators: list
    implementations: list
    peers: list | None  # all of them

    def asked(self):
        """Pairs of an operator and an implementation of keras_hla."""
        return [(x, y) for x in self.operators for y in self.implementations or ["auto"]]


@dataclass(frozen=True)
class Trainee:
    name: str
    build: Callable | None = None  # from a case: a `Step`, or of models a `models.Training`
    unavailable: str = ""  # why it cannot be measured
    ours: bool = False
    peer: str = ""  # its name in `--peers`
    jit: str = "auto"

    def jitted(self, jit, named):
        suffix = ", torch.compile" if jit == "on" and named else ""
        return replace(self, name=self.name + suffix, jit=jit)


def choose(kind, case, which, jit):
    """The list of trainees of a kind.

    Args:
        kind: one of `KINDS`.
        case: the `Case`.
        which: `Which` of them.
        jit: as in `benchmarks.runtime`, or "auto", which may be both.
    """
    modules = [importlib.import_module(f"benchmarks.{name}") for name in _modules()]
    known = {x: [t for m in modules for t in getattr(m, x)(case, which)] for x in KINDS}
    names = {trainee.peer for trainees in known.values() for trainee in trainees}
    chosen = [t for t in known[kind] if t.ours or which.peers is None or t.peer in which.peers]
    chosen += [
        Trainee(name, unavailable="no such peer on this backend", peer=name)
        for name in which.peers or []
        if name not in names
    ]
    torch = keras.config.backend() == "torch"
    jits = _jits(kind, jit)
    return [t if t.unavailable else t.jitted(x, torch) for t in chosen for x in jits]


def _modules():
    """The modules that have a function for each kind."""
    peers = {"torch": ["plain_attention", "fla_layers", "gpt2"], "jax": ["plain_attention"]}
    return ["own_layers", "keras_peers", *peers.get(keras.config.backend(), [])]


def _jits(kind, jit):
    both = kind == "blocks" and jit == "auto" and keras.config.backend() == "torch"
    return ["off", "on"] if both and runtime.current().on_gpu() else [jit]


def policy(case):
    """The dtype of Keras' layers."""
    return case.dtype if case.dtype == "float32" else f"mixed_{case.dtype}"


def width(case):
    return case.heads * case.dim


def hidden(case):
    """The width of the MLP of `HLADecoderBlock`."""
    return -(-8 * width(case) // 48) * 16


def keras_step(layer, announced, check=no_errors, call=None):
    """The `Step` of a layer that is built, whose `call` takes the input alone."""
    call = call or layer
    variables = layer.trainable_variables

    def stateless(x, *weights):
        with keras.StatelessScope(state_mapping=zip(variables, weights, strict=True)):
            return call(x)

    def direct(x, *weights):
        del weights  # they are the layer's own
        return call(x)

    function = direct if keras.config.backend() == "torch" else stateless
    weights = [variable.value for variable in variables]
    # Under TensorFlow cuDNN's GRU is no part of XLA: Keras does not compile it either.
    return Step(function, weights, announced, check, layer.supports_jit)
