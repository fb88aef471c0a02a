"""The segment algebra: associative, with an identity, and equal to the serial recurrence."""

import copy
import functools
import itertools
import pickle

from backends import compiled, gradients, relative_error, to_numpy
from definitions import Reference, serial
from family import attend, draw
from hypothesis import given, settings
from hypothesis import strategies as st
import keras
import numpy as np
import pytest

from keras_hla import operators, ops

ALGEBRAS = ("linear", "hla2", "hla2 ridge", "ahla", "hla3")
every_operator = pytest.mark.parametrize("name", ALGEBRAS)
some = settings(max_examples=8, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def get(name):
    return operators.get(name.split()[0], ridge=0.3 if "ridge" in name else 0.0)


@functools.cache
def combine_with(name):
    return compiled(functools.partial(ops.combine, operator=get(name)))


def combine(name, left, right):
    return combine_with(name)(left, right)


@functools.cache
def summarize_with(name):
    def function(query, key, value, log_decay=None):
        return ops.summarize(query, key, value, get(name), log_decay)

    return compiled(function)


def summarize(name, inputs, log_decay, begin=None, end=None):
    arrays = inputs if log_decay is None else [*inputs, log_decay]
    return summarize_with(name)(*(x[:, begin:end] for x in arrays))


def random_segment(name, rng):
    """Any matrices at all: two key heads of two query heads each."""
    operator = get(name)
    shapes = list(operator.state_shapes(2, 4, 6, 5))
    shapes += [(4, 6, 5 if extra in "CX" else 6) for extra in operator.segment_names]
    values = [rng.standard_normal((3, *shape)) for shape in shapes]
    return [x.astype("float32") for x in (*values, -rng.uniform(0, 2, (3, 2)))]


def assert_equal(a, b, tolerance=1e-5):
    for x, y in zip(a, b, strict=True):
        assert relative_error(x, y) <= tolerance


@every_operator
def test_associative_with_an_identity(name):
    @some
    @given(seeds)
    def law(seed):
        rng = np.random.default_rng(seed)
        a, b, c = (random_segment(name, rng) for _ in range(3))
        left = combine(name, combine(name, a, b), c)
        right = combine(name, a, combine(name, b, c))
        assert_equal(left, right)
        empty = [np.zeros_like(x) for x in a]
        for same in (combine(name, empty, a), combine(name, a, empty)):
            for x, y in zip(same, a, strict=True):
                np.testing.assert_array_equal(to_numpy(x), y)

    law()


@pytest.mark.parametrize(
    ("name", "decay"), [*((name, "per_token") for name in ALGEBRAS), ("hla3", "none")]
)
def test_folds_trees_and_the_recurrence_agree(rng, name, decay):
    """Five segments of unequal lengths, four query heads on two key heads."""
    cuts = [0, 13, 14, 27, 28, 41]
    (query, *shared), _ = draw(rng, 41, "none", heads=4, key_heads=2)
    log_decay = None if decay == "none" else draw(rng, 41, decay)[1]
    inputs = [query, *shared]
    segments = [summarize(name, inputs, log_decay, *ends) for ends in itertools.pairwise(cuts)]
    whole = summarize(name, inputs, log_decay)
    left = functools.reduce(functools.partial(combine, name), segments)
    right = functools.reduce(lambda tail, x: combine(name, x, tail), reversed(segments))
    assert_equal(left, whole)
    assert_equal(right, whole)

    stacked = [keras.ops.stack(x) for x in zip(*segments, strict=True)]
    tree = compiled(
        lambda *segments: keras.ops.associative_scan(
            lambda a, b: ops.combine(a, b, get(name)), list(segments)
        )
    )(*stacked)
    assert_equal([x[-1] for x in tree], whole)

    repeated = [query, *(np.repeat(x, 2, axis=2) for x in shared)]
    decays = None if log_decay is None else np.repeat(log_decay, 2, axis=2)
    options = {"ridge": 0.3} if "ridge" in name else {}
    operator = name.split()[0]
    expected = Reference(serial, operator, repeated, decays, **options)
    states = len(expected.states)
    for state, e in zip(whole[:states], expected.states, strict=True):
        assert relative_error(state, e[:, :: 4 // state.shape[1]]) <= 1e-5
    # The outputs of each segment, from the summary of all before it.
    for n, (begin, end) in enumerate(itertools.pairwise(cuts[1:])):
        output = attend(
            [x[:, begin:end] for x in inputs],
            None if log_decay is None else log_decay[:, begin:end],
            [x[n] for x in tree[:states]],
            operator=get(name),
        )
        assert relative_error(output, expected.output[:, begin:end]) <= 1e-5


@every_operator
def test_a_split(name):
    inputs, log_decay = draw(np.random.default_rng(1), 50, "per_token")
    whole = summarize(name, inputs, log_decay)
    left = summarize(name, inputs, log_decay, end=17)
    right = summarize(name, inputs, log_decay, begin=17)
    assert_equal(combine(name, left, right), whole)


def test_one_decay_for_all_heads(rng):
    inputs, _ = draw(rng, 20, "none", heads=4, key_heads=2)
    for log_decay in (-0.1, np.full(4, -0.1)):
        left, right, whole = (
            ops.summarize(*(x[:, ends] for x in inputs), log_decay=log_decay)
            for ends in (slice(10), slice(10, None), slice(None))
        )
        assert_equal(ops.combine(left, right), whole)


DECAYS = {"none": None, "one": (1, 1, 1), "key heads": (2, 10, 2), "query heads": (2, 10, 4)}


@every_operator
@pytest.mark.parametrize(("left", "right"), [*itertools.product(DECAYS, DECAYS)])
def test_decays_of_different_kinds(rng, name, left, right):
    """Segments whose decays differ in their heads give the definition, or do not compose."""
    (query, *shared), _ = draw(rng, 20, "none", heads=4, key_heads=2)
    decays = [
        None if DECAYS[kind] is None else -rng.uniform(0, 1, DECAYS[kind]).astype("float32")
        for kind in (left, right)
    ]
    segments = [
        ops.summarize(*(x[:, half] for x in (query, *shared)), get(name), g)
        for half, g in zip((slice(10), slice(10, None)), decays, strict=True)
    ]
    if {left, right} == {"key heads", "query heads"}:
        with pytest.raises(ValueError, match="must have the same number of heads"):
            ops.combine(*segments)
        return
    spread = [
        np.zeros((2, 10, 4)) if g is None else np.repeat(g, 4 // g.shape[2], axis=2) for g in decays
    ]
    log_decay = np.concatenate([np.broadcast_to(g, (2, 10, 4)) for g in spread], axis=1)
    repeated = [query, *(np.repeat(x, 2, axis=2) for x in shared)]
    options = {"ridge": 0.3} if "ridge" in name else {}
    expected = Reference(serial, name.split()[0], repeated, log_decay, **options).states
    joint = ops.combine(*segments)
    for state, e in zip(joint[: len(expected)], expected, strict=True):
        assert relative_error(state, e[:, :: 4 // state.shape[1]]) <= 1e-5


def test_a_segment_knows_its_operator(rng):
    """Two asymmetric segments, without a word about the operator, against the definition."""
    inputs, log_decay = draw(rng, 20, "per_token")
    left, right = (
        ops.summarize(*(x[:, half] for x in inputs), "ahla", log_decay[:, half])
        for half in (slice(10), slice(10, None))
    )
    joint = ops.combine(left, right)
    P, E = Reference(serial, "ahla", inputs, log_decay).states
    assert relative_error(joint.P, P) <= 1e-5
    assert relative_error(joint.E, E) <= 1e-5
    assert_equal([joint.log_decay], [log_decay.sum(axis=1)])
    for same in (
        compiled(ops.combine)(left, right),
        ops.combine(list(left), right),
        ops.combine(left, list(right)),
        ops.combine(keras.tree.map_structure(lambda x: x + 0, left), copy.deepcopy(right)),
        ops.combine(pickle.loads(pickle.dumps(left)), right),
        ops.combine(list(left), list(right), "ahla"),
    ):
        assert_equal(same, joint)
    for some in (left, joint, keras.tree.map_structure(lambda x: x[None], left)):
        with pytest.raises(ValueError, match=r"`left` must be a segment of HLA2.*Received.*AHLA"):
            ops.combine(some, right, "hla2")
    with pytest.raises(ValueError, match="`operator` must be named"):
        ops.combine(list(left), list(right))


def test_segments_in_the_loops_of_a_backend(rng):
    """Stacked as trees: what scans them finds segments, and gives segments."""
    inputs, log_decay = draw(rng, 40, "per_token")
    segments = [
        ops.summarize(*(x[:, t : t + 10] for x in inputs), "ahla", log_decay[:, t : t + 10])
        for t in range(0, 40, 10)
    ]
    stacked = keras.tree.map_structure(lambda *x: keras.ops.stack(x), *segments)
    folded = compiled(lambda x: keras.ops.associative_scan(ops.combine, x))(stacked)
    whole = ops.summarize(*inputs, "ahla", log_decay)
    last = keras.tree.map_structure(lambda x: x[-1], folded)
    assert_equal(last, whole)
    assert_equal(ops.combine(last, whole), ops.combine(whole, whole))
    serially = compiled(
        lambda x: keras.ops.scan(
            lambda so_far, x: (ops.combine(so_far, x), so_far),
            keras.tree.map_structure(keras.ops.zeros_like, segments[0]),
            x,
        )[0]
    )(stacked)
    assert_equal(serially, whole)


def test_a_ridge_is_not_part_of_a_segment(rng):
    inputs, _ = draw(rng, 20, "none")
    plain, ridge = (ops.summarize(*inputs, operator) for operator in ("hla2", get("hla2 ridge")))
    twice = ops.combine(plain, plain)
    for left, right in itertools.product((plain, ridge), repeat=2):
        for operator in (None, "hla2", get("hla2 ridge")):
            assert_equal(ops.combine(left, right, operator), twice)


@every_operator
def test_segments_of_different_models_do_not_compose(rng, name):
    def segment(decay="none", dtype="float32", **sizes):
        inputs, log_decay = draw(rng, 5, decay, **{"heads": 4, "key_heads": 4, **sizes})
        return ops.summarize(*(x.astype(dtype) for x in inputs), get(name), log_decay)

    def replace(some, **entries):
        return [entries.get(name, x) for name, x in zip(some._fields, some, strict=True)]

    four = segment()
    wrong = [
        segment(heads=2, key_heads=2),
        segment(dim=7),
        segment(value_dim=4),
        segment(batch=3),
        segment(batch=1),
        replace(four, log_decay=np.zeros((2, 3), "float32")),
        replace(four, log_decay=np.zeros((2, 2), "float32")),
        [x[0] for x in four],
        [to_numpy(x) for x in four],
        [to_numpy(x).astype("int32") for x in four],
        [to_numpy(x).tolist() for x in four],
        [*four][:-1],
        [*four, four[-1]],
        four[0],
        None,
    ]
    if name != "linear":  # whose states are of keys alone
        wrong.append(segment(heads=8))
        wrong.append(segment("per_token", heads=2, key_heads=2))
    for other in wrong:
        with pytest.raises(ValueError, match=r"(?s)(`left`|`right`).*Received"):
            ops.combine(four, other)
        with pytest.raises(ValueError, match=r"(?s)(`left`|`right`).*Received"):
            ops.combine(other, four, get(name))
    if name != "linear":
        unfit = [four[0], keras.ops.swapaxes(four[1], -1, -2), *four[2:]]
        with pytest.raises(ValueError, match="`left` must be"):
            ops.combine(unfit, unfit, get(name))


def test_gradients_pass_through(rng):
    """Of a loss on the joint summary, against those of the summary of the whole."""
    inputs, log_decay = draw(rng, 20, "per_token")

    def loss(split):
        def function(*arrays):
            pieces = [[x[:, :9] for x in arrays], [x[:, 9:] for x in arrays]] if split else [arrays]
            segments = [ops.summarize(q, k, v, "hla3", log_decay=g) for q, k, v, g in pieces]
            joint = ops.combine(*segments, "hla3") if split else segments[0]
            return sum(keras.ops.sum(x) for x in joint)

        return function

    joint, whole = (gradients(loss(split), [*inputs, log_decay]) for split in (True, False))
    for a, b in zip(joint, whole, strict=True):
        assert relative_error(a, b) <= 1e-4
