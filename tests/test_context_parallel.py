"""Context parallelism: shards on several devices give the results of the whole sequence.

`split_sequence.py` evaluates the cases in separate processes.
"""

import dataclasses
import pickle

from backends import relative_error
from definitions import Reference, serial
from family import VARIANTS, draw, split
import keras
from layer_problems import (
    LAYER_SIZES,
    LAYERS,
    LENGTH,
    LayerProblem,
    draw_mask,
    draw_segments,
    parts_of,
    starts_of,
)
import numpy as np
import pytest
from scripts import ROOT, run_python

from keras_hla import kernels, operators
from keras_hla.kernels import device
from keras_hla.ops import higher_order_attention

BACKEND = keras.config.backend()


@dataclasses.dataclass
class Case:
    """A variant of the family, and what else differs from case to case."""

    variant: str
    split: object = 4
    decay: str = "per_token"
    state: bool = True
    normalize: bool = False
    mask: bool = False
    segments: str = ""  # where they start: "anywhere", or "at borders" of parts alone
    length: int = LENGTH
    dtype: str = "float64"
    chunk_size: int | None = 4
    implementation: str = "auto"


def by_kernels(variant, **options):
    """A case in the dtype and of the options that they take."""
    return Case(variant, dtype="float32", chunk_size=None, implementation="triton", **options)


CASES = {
    **{variant: Case(variant) for variant in VARIANTS},
    **{
        f"packed {name}": Case(name, split=2, mask=True, segments="anywhere")
        for name in ("hla2 ridge", "ahla", "hla3", "hla3 unmasked")
    },
    "no decay, no state": Case("hla2", decay="none", state=False),
    "no decay in two": Case("ahla", split=2, decay="none", mask=True),
    "normalized": Case("hla2", decay="per_head", normalize=True, mask=True),
    "one token each": Case("hla3", length=4, chunk_size=None),
    "segments at borders": Case("hla2", segments="at borders", decay="none", state=False),
    "segments and a state": Case("ahla", segments="anywhere", decay="none"),
    "masked parts": Case("hla3", segments="at borders", mask=True),
    "in float32": Case("hla2", segments="anywhere", dtype="float32", chunk_size=None),
    "kernels": by_kernels("hla2", segments="anywhere", mask=True),
    "kernels of ahla": by_kernels("ahla", split=2, decay="none"),
    "kernels of hla3": by_kernels("hla3", decay="constant", state=False),
    "kernels with a ridge": by_kernels("hla2 ridge", segments="anywhere"),
    "kernels, unmasked": by_kernels("hla2 unmasked ridge", split=2, decay="none"),
}
if BACKEND == "torch":  # JAX cuts arrays into equal parts
    CASES["uneven"] = Case("hla2", split="uneven")
    CASES["uneven, packed"] = Case("hla3", split="uneven", mask=True, segments="anywhere")
    CASES["uneven, by kernels"] = by_kernels("hla3", split="uneven")
    CASES["uneven, published"] = Case("hla3_published", split="uneven", decay="constant")
SIZES = {n: Case("hla2", state=False, length=n, chunk_size=None) for n in (64, 1024)}


class Problem:
    """The arrays of a case, and what the definition makes of them."""

    def __init__(self, case):
        rng = np.random.default_rng(0)
        name, self.options = split(case.variant)
        inputs, decay = draw(
            rng,
            case.length,
            "constant" if case.decay == "per_head" else case.decay,
            heads=2,
            key_heads=1,
            dim=4,
            value_dim=3,
            positive=case.normalize,
        )
        self.case, self.name = case, name
        self.inputs = [x.astype(case.dtype) for x in inputs]
        self.decay = None if decay is None else decay.astype(case.dtype)
        if case.decay == "per_head":
            self.decay = np.linspace(-0.3, 0, 2).reshape(1, 1, 2)
        self.parts = parts_of(case)
        self.mask = draw_mask(rng, case, self.parts)
        self.segments = draw_segments(rng, case, self.parts)
        self.state, shapes = self._state(rng)
        shapes = [self.inputs[0].shape[:3] + self.inputs[2].shape[3:], *shapes]
        self.weights = [rng.standard_normal(x).astype(case.dtype) for x in shapes]

    def _state(self, rng):
        if not self.case.state:
            return None, ()
        options = {"masked": True, "ridge": 0.0, **self.options}
        operator = operators.get(self.name, **options)
        moments = 1 if self.decay is None else 2
        shapes = operator.state_shapes(moments, 2, 4, 3 + self.case.normalize)
        shapes = [(2, *shape) for shape in shapes]
        return [rng.standard_normal(x).astype(self.case.dtype) for x in shapes], shapes

    def to_run(self):
        arrays = dict(zip(("query", "key", "value"), self.inputs, strict=True))
        given = {"log_decay": self.decay, "mask": self.mask, "segment_ids": self.segments}
        options = {"operator": self.name, "normalize": self.case.normalize, **self.options}
        return {
            "arrays": arrays | {name: x for name, x in given.items() if x is not None},
            "state": self.state,
            "weights": self.weights,
            "parts": self.parts,
            "shape": self.inputs[0].shape[:2],
            "options": options
            | {"chunk_size": self.case.chunk_size, "implementation": self.case.implementation},
        }

    def reference(self):
        """Outputs and states, and gradients, where masked tokens are zeros without decay."""
        unmasked = np.ones((2, self.case.length)) if self.mask is None else self.mask
        inputs = [x * unmasked[..., None, None] for x in self.inputs]
        decay = np.zeros((1, 1, 2)) if self.decay is None else self.decay
        decay = np.broadcast_to(decay, (2, self.case.length, 2)) * unmasked[..., None]
        decay[starts_of(self.segments, unmasked)] = -np.inf
        definition = Reference(
            serial,
            self.name,
            inputs,
            decay,
            self.state or (),
            normalize=self.case.normalize,
            **self.options,
        )
        found = definition.gradients(self.weights[0], self.weights[1:])
        gradients = dict(zip(("query", "key", "value", "log_decay"), found[:4], strict=True))
        for name, x in gradients.items():
            gradients[name] = x * unmasked.reshape(*unmasked.shape, *[1] * (x.ndim - 2))
        of_decay = gradients.pop("log_decay")
        if self.decay is not None:
            spread = tuple(axis for axis, n in enumerate(self.decay.shape) if n == 1)
            gradients["log_decay"] = of_decay.sum(spread, keepdims=True)
        states = definition.states if self.state else ()
        # JAX goes through arguments in the order of their names.
        gradients = [gradients[name] for name in sorted(gradients)]
        return [definition.output, *states], [*gradients, *found[4:]]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The results of `split_sequence.py` for all problems in one run, as it takes long to start."""
    cases = {
        **{name: Problem(case) for name, case in (CASES | SIZES).items()},
        **{("layer", name): LayerProblem(x) for name, x in (LAYERS | LAYER_SIZES).items()},
    }
    folder = tmp_path_factory.mktemp("parts")
    (folder / "cases").write_bytes(pickle.dumps([problem.to_run() for problem in cases.values()]))
    script = ROOT / "tests" / "split_sequence.py"
    run_python(script, folder / "cases", folder / "results", backend=BACKEND)
    results = pickle.loads((folder / "results").read_bytes())
    return {name: (problem, *x) for (name, problem), x in zip(cases.items(), results, strict=True)}


without_engine = pytest.mark.skipif(
    BACKEND == "tensorflow", reason="it has no engine for it, as is tested here"
)


@without_engine
@pytest.mark.parametrize("name", CASES)
def test_shards_give_the_whole(evaluated, name):
    problem, *found, _ = evaluated[name]
    check(problem, found, problem.reference())


@without_engine
@pytest.mark.parametrize("name", LAYERS)
def test_layers_on_shards_give_the_whole(evaluated, name):
    problem, results, gradients, _, *beside = evaluated["layer", name]
    if problem.case.definition:
        results = [results[0] * problem.unmasked[..., None]]
        beside = [problem.reference()]
    check(problem, (results, gradients), *beside)


def check(problem, found, expected):
    """Compares results and gradients with the expected ones, of which there may be more."""
    tolerance = 1e-11 if problem.case.dtype == "float64" else 1e-5
    for kind, *both in zip(("results", "gradients"), found, expected, strict=True):
        assert {x.dtype for x in both[0]} == {np.dtype(problem.case.dtype)}
        errors = [relative_error(x, y) for x, y in zip(*both, strict=True)]
        assert max(errors) < tolerance, f"{kind}: {[f'{x:.0e}' for x in errors]}"


@without_engine
def test_collectives_do_not_depend_on_the_length(evaluated):
    check_collectives(*(evaluated[name][3] for name in SIZES))
    short, long = (evaluated["layer", name][3] for name in LAYER_SIZES)
    assert short == long


def check_collectives(short, long):
    """Each pass gathers the state of each device with its decay, whatever the length."""
    rows_and_heads = 2 * 2
    moments, values = rows_and_heads * (4 * 4 + 1), rows_and_heads * (4 * 3 + 1)
    forward = [("all-gather", 4 * values), ("all-gather", 4 * moments)]
    backward = [("reduce-scatter", values), ("reduce-scatter", moments)]
    assert short == long == forward + backward


def test_what_means_no_devices_is_refused():
    q = np.ones((1, 4, 1, 2), "float32")
    wrong = "needs the JAX or the PyTorch" if BACKEND == "tensorflow" else "must be"
    for devices in ("nowhere", 4, object()):
        with pytest.raises(ValueError, match=f"`context_parallel` {wrong}"):
            higher_order_attention(q, q, q, context_parallel=devices)


@pytest.mark.parametrize("options", [{"form": "matrix"}, {"form": "recurrent"}, {"causal": False}])
def test_other_forms_are_refused(options):
    q = np.ones((1, 4, 1, 2), "float32")
    with pytest.raises(ValueError, match="`context_parallel` needs form='chunked'"):
        higher_order_attention(q, q, q, context_parallel="parts", **options)


def test_devices_choose_alike_whatever_the_lengths_of_their_shards(monkeypatch):
    monkeypatch.setattr(device, "why_not", lambda tensor: None)
    monkeypatch.setattr(device, "is_measured", lambda tensor: True)
    monkeypatch.setattr(device, "interpreted", lambda: False)
    for length in (0, 1, 100):
        part = keras.ops.ones((1, length, 2, 64))
        assert kernels.choose(tensor=part).implementation == "portable"
        assert kernels.choose(tensor=part, context_parallel="parts").implementation == "triton"
