"""The kernels against the float64 definitions: on a GPU if there is one, else interpreted."""

import dataclasses
import warnings

from backends import relative_error, rounded, to_numpy, value_and_gradients
from definitions import Reference, serial
from family import FORWARD, GRADIENT, VARIANTS, attend_with_gradients, draw, like, split
import keras
import numpy as np
import pytest

import keras_hla
from keras_hla import kernels, layers, operators, ops
from keras_hla.kernels import device
from keras_hla.kernels.operator import plan

OPERATORS = ("hla2", "ahla", "hla3", "linear")
KERNELS = {"implementation": "triton"}
every_operator = pytest.mark.parametrize("operator", OPERATORS)
every_variant = pytest.mark.parametrize("variant", [x for x in VARIANTS if "published" not in x])


@pytest.fixture(params=["one span", "spans"])
def spans(request, monkeypatch):
    """A short sequence in one span, or in one for each chunk."""
    monkeypatch.setattr(plan, "_FEWEST_SPAN_CHUNKS", 1 if request.param == "spans" else 8)
    forget_plans()
    yield
    forget_plans()


def forget_plans():
    plan.plan_of.cache_clear()
    if keras.config.backend() == "jax":  # whose programs were traced with them
        import jax

        jax.clear_caches()


@every_variant
@pytest.mark.parametrize("decay", ["none", "per_token"])
@pytest.mark.parametrize("key_heads", [2, 1])
@pytest.mark.usefixtures("spans")
def test_outputs_states_and_gradients(rng, variant, decay, key_heads):
    name, options = split(variant)
    inputs, log_decay = draw(rng, 75, decay, 2, key_heads, dim=24, value_dim=16, batch=1)
    inputs = [inputs[0] / 5, inputs[1] / 5, inputs[2]]
    expected = Reference(serial, name, inputs, log_decay, **options)
    state, weights = [], []
    if decay != "none" or key_heads == 2:  # with heads of their own, like those of the definition
        state, weights = (like(rng, expected.states) for _ in range(2))
        expected = Reference(serial, name, inputs, log_decay, state, **options)
    (weight,) = like(rng, [expected.output])
    (output, *last), found = attend_with_gradients(
        inputs, log_decay, [weight, *weights], state, **VARIANTS[variant], **KERNELS
    )
    assert relative_error(output, expected.output) <= FORWARD
    for a, e in zip(last, expected.states if state else [], strict=True):
        assert relative_error(a, e) <= FORWARD
    for a, e in zip(found, expected.gradients(weight, weights), strict=True):
        assert relative_error(a, e) <= GRADIENT


@every_operator
def test_without_states(rng, operator):
    inputs, log_decay = draw(rng, 40, "constant", dim=16, value_dim=40, batch=2)
    expected = Reference(serial, operator, inputs, log_decay)
    (weight,) = like(rng, [expected.output])
    (output,), found = attend_with_gradients(
        inputs, log_decay, [weight], operator=operator, **KERNELS
    )
    assert relative_error(output, expected.output) <= FORWARD
    for a, e in zip(found, expected.gradients(weight), strict=True):
        assert relative_error(a, e) <= GRADIENT


@every_operator
@pytest.mark.parametrize("strong", [-1e5, -1e9, -np.inf])
@pytest.mark.usefixtures("spans")
def test_strong_decays(rng, operator, strong):
    """Tokens that forget all before them, the first of a chunk among them."""
    inputs, log_decay = draw(rng, 75, "per_token", dim=16, value_dim=16, batch=1)
    log_decay[:, [5, 6, 64]] = strong
    expected = Reference(serial, operator, inputs, log_decay)
    weights = like(rng, [expected.output, *expected.states])
    state = [np.zeros_like(x) for x in weights[1:]]
    (output, *last), found = attend_with_gradients(
        inputs, log_decay, weights, state, operator=operator, **KERNELS
    )
    assert relative_error(output, expected.output) <= FORWARD
    for a, e in zip(last, expected.states, strict=True):
        assert relative_error(a, e) <= FORWARD
    wanted = expected.gradients(weights[0], weights[1:])
    for a, e in zip(found[: len(wanted)], wanted, strict=True):
        assert relative_error(a, e) <= GRADIENT


@every_operator
@pytest.mark.parametrize("shape", [(1, 45, 1), (2, 45, 1), (1, 45, 4), (2, 45, 2)])
def test_shared_keys_and_decays(rng, operator, shape):
    """States in and out, and gradients, where heads share keys and decays."""
    (q, k, v), _ = draw(rng, 45, "none", 4, 2, dim=16, value_dim=16)
    inputs = [q / 4, k / 4, v]
    log_decay = np.log(rng.uniform(0.8, 1, shape)).astype("float32")
    moments = 4 if shape[2] == 4 else 2
    shapes = operators.get(operator).state_shapes(moments, 4, 16, 16)
    state = like(rng, [np.empty((2, *shape)) for shape in shapes])
    expected = Reference(serial, operator, inputs, log_decay, state)
    weight, *weights = like(rng, [expected.output, *expected.states])
    (output, *last), found = attend_with_gradients(
        inputs, log_decay, [weight, *weights], state, operator=operator, **KERNELS
    )
    assert relative_error(output, expected.output) <= FORWARD
    for a, e in zip(last, expected.states, strict=True):
        assert relative_error(a, e) <= FORWARD
    for a, e in zip(found, expected.gradients(weight, weights), strict=True):
        assert relative_error(a, e) <= GRADIENT


@every_operator
@pytest.mark.parametrize("place", [0, -1])
def test_gradients_of_one_state(rng, operator, place):
    """A loss that reads one of the states alone, and no output."""
    inputs, log_decay = draw(rng, 40, "per_token", dim=16, value_dim=16)
    expected = Reference(serial, operator, inputs, log_decay)
    weights = [np.zeros_like(x) for x in expected.states]
    weights[place] = rng.standard_normal(weights[place].shape)

    def function(q, k, v, g, weight):
        _, last = ops.higher_order_attention(
            q, k, v, operator, log_decay=g, return_state=True, **KERNELS
        )
        return keras.ops.sum(last[place] * weight), []

    _, found = value_and_gradients(function, [*inputs, log_decay], [weights[place]])
    wanted = expected.gradients(np.zeros_like(expected.output), weights)
    for a, e in zip(found, wanted, strict=True):
        assert relative_error(a, e) <= GRADIENT


@dataclasses.dataclass(frozen=True)
class Twice(operators.HLA2):
    """Both of its passes read the values."""

    def chain(self, scan, state, query, key, value):
        moved, S = scan(query, key, value, state[0])
        output, F = scan(query, moved, value, state[1])
        return output, (S, F)


def read_twice(scan, q, k, v):
    return scan(q, scan(q, k, v), v)


@dataclasses.dataclass(frozen=True)
class Sums(operators.AHLA):
    """The values, which heads share, are part of a sum that is read and is part of another."""

    def chain(self, scan, state, query, key, value):
        first, P = scan(query, key, value, state[0])
        first = 0.5 * value - first / 4
        second, E = scan(query, key, first, state[1], power=2)
        return first + 3 * second, (P, E)


def add_up(scan, q, k, v):
    first = 0.5 * v - scan(q, k, v) / 4
    return first + 3 * scan(q, k, first, power=2)


@dataclasses.dataclass(frozen=True)
class OwnQueries(operators.HLA2):
    """Each pass adds its queries, the last one to a multiple."""

    def chain(self, scan, state, query, key, value):
        moved, S = scan(query, key, key, state[0])
        moved += query
        output, F = scan(moved, key, value, state[1])
        return moved * 0.5 + output * 2, (S, F)


def add_queries(scan, q, k, v):
    moved = scan(q, k, k) + q
    return 0.5 * moved + 2 * scan(moved, k, v)


@dataclasses.dataclass(frozen=True)
class InAllPlaces(operators.HLA3):
    """Queries are keys and values, keys are queries, and one pass is read as it is and in a sum."""

    def state_shapes(self, key_heads, query_heads, d, dv):
        return ((query_heads, d, d),) * 3

    def chain(self, scan, state, query, key, value):
        first, S = scan(query, query, query, state[0])
        second, P = scan(key, query, value, state[1], power=2)
        third, F = scan(first, key, first, state[2], power=3)
        return sum((2 * first, -0.5 * second, third)), (S, P, F)


def read_in_all_places(scan, q, k, v):
    first = scan(q, q, q)
    return 2 * first - 0.5 * scan(k, q, v, power=2) + scan(first, k, first, power=3)


@pytest.mark.parametrize("decay", ["none", "per_token"])
@pytest.mark.parametrize(
    ("operator", "function"),
    [
        (Twice(), read_twice),
        (Sums(), add_up),
        (OwnQueries(), add_queries),
        (InAllPlaces(), read_in_all_places),
    ],
)
@pytest.mark.usefixtures("spans")
def test_custom_operator(rng, operator, function, decay):
    inputs, log_decay = draw(rng, 75, decay, 2, 1, dim=16, value_dim=16, batch=2)
    inputs = [inputs[0] / 6, inputs[1] / 6, inputs[2]]

    def definition(_, q, k, v, g):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        total = g.transpose(1, 2).cumsum(-1)
        between = (total[..., :, None] - total[..., None, :]).tril()

        def scan(q, k, v, power=1):
            return ((q @ k.mT) * (power * between).exp()).tril() @ v

        return function(scan, q, k, v).transpose(1, 2)

    expected = Reference(definition, operator, inputs, log_decay)
    (weight,) = like(rng, [expected.output])
    (output,), found = attend_with_gradients(
        inputs, log_decay, [weight], operator=operator, **KERNELS
    )
    assert relative_error(output, expected.output) <= FORWARD
    for a, e in zip(found, expected.gradients(weight), strict=True):
        assert relative_error(a, e) <= GRADIENT


@every_variant
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(rng, variant, dtype):
    """The error is about twice that of the exact result, rounded to the dtype."""
    inputs, _ = draw(rng, 100, "none", dim=32, value_dim=32)
    inputs = [inputs[0] / 6, inputs[1] / 6, inputs[2]]
    inputs = [rounded(x, dtype) for x in inputs]
    operator, options = split(variant)
    expected = Reference(serial, operator, inputs, None, **options)
    weight = rounded(*like(rng, [expected.output]), dtype)

    def function(*arrays):
        *inputs, weight = (keras.ops.cast(x, dtype) for x in arrays)
        output = ops.higher_order_attention(*inputs, **VARIANTS[variant], **KERNELS)
        assert keras.backend.standardize_dtype(output.dtype) == dtype
        output, weight = (keras.ops.cast(x, "float32") for x in (output, weight))
        return keras.ops.sum(output * weight), [output]

    (output,), found = value_and_gradients(function, inputs, [weight])
    wanted = (expected.output, *expected.gradients(weight))
    # Third order takes one rounding more, and the interpreter truncates where a GPU rounds.
    allowed = 2.2 if device.interpreted() or operator == "hla3" else 2.0
    for a, e in zip((output, *found), wanted, strict=True):
        best = relative_error(rounded(e.astype("float32"), dtype), e)
        assert relative_error(a, e) <= allowed * best


@every_variant
@pytest.mark.usefixtures("spans")
def test_mask_and_segment_ids(rng, variant):
    inputs, log_decay = draw(rng, 80, "per_token", dim=16, value_dim=16, batch=1)
    mask = rng.random(80) < 0.7
    ids = np.repeat([0, 1, 2], [20, 33, 27])
    hidden = [np.where(mask[None, :, None, None], x, np.nan) for x in inputs]
    output = ops.higher_order_attention(
        *map(keras.ops.convert_to_tensor, hidden),
        log_decay=log_decay,
        mask=mask[None],
        segment_ids=ids[None],
        **VARIANTS[variant],
        **KERNELS,
    )
    assert not to_numpy(output)[:, ~mask].any()
    name, options = split(variant)
    for n in range(3):  # each segment alone, without its masked tokens
        kept = mask & (ids == n)
        inputs_alone = [x[:, kept] for x in inputs]
        alone = Reference(serial, name, inputs_alone, log_decay[:, kept], **options)
        assert relative_error(output[:, kept], alone.output) <= FORWARD


@every_operator
@pytest.mark.usefixtures("spans")
def test_causality_is_bitwise(rng, operator):
    inputs, log_decay = draw(rng, 90, "per_token", dim=16, value_dim=16, batch=1)
    changed = [x.copy() for x in inputs]
    for x in changed:
        x[:, 50] += 1

    def read(arrays):
        tensors = map(keras.ops.convert_to_tensor, arrays)
        return to_numpy(
            ops.higher_order_attention(*tensors, operator, log_decay=log_decay, **KERNELS)
        )

    before, after = read(inputs), read(changed)
    assert np.array_equal(before[:, :50], after[:, :50])
    assert not np.array_equal(before[:, 50:], after[:, 50:])


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_layer(rng, policy):
    keras.config.set_dtype_policy(policy)
    options = {"num_heads": 2, "key_dim": 16, "decay": "input", "conv_kernel_size": 4}
    fused = layers.HLA(**options, implementation="triton")
    portable = layers.HLA(**options, implementation="portable")
    x = rng.standard_normal((2, 70, 16)).astype("float32")
    expected = portable(x)
    fused.build(x.shape)
    fused.set_weights(portable.get_weights())
    tolerance = FORWARD if policy == "float32" else 2e-2
    assert relative_error(fused(x), expected) <= tolerance
    assert fused.implementation_for(expected) == ("triton", "implementation='triton' was given")
    again = layers.HLA.from_config(fused.get_config())
    assert again.implementation == "triton"


def test_generation_takes_steps():
    """One token is a step, whose trace needs no kernel, whatever was asked for."""
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(16, 16)(tokens)
    x = layers.HLADecoderBlock(1, 16, implementation="triton")(x)
    model = keras.Model(tokens, keras.layers.Dense(16)(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of a trace that fails
        fused = keras_hla.generate(model, [1, 2, 3], 5, temperature=0)
    model.layers[2].mixer.implementation = "portable"
    whole = [1, 2, 3]
    for _ in range(5):
        whole.append(int(keras.ops.argmax(model(np.asarray([whole]))[0, -1])))
    assert fused.tolist() == whole[3:]


def test_nothing_to_compute():
    empty, no_rows = keras.ops.zeros((1, 0, 2, 16)), keras.ops.zeros((0, 5, 2, 16))
    for q in (empty, no_rows):
        assert kernels.choose(dtype="float32", tensor=q).implementation == "portable"
    # A piece of a stream may be empty, as it may be a single token.
    state = [keras.ops.ones((1, 2, 16, 16)), 2 * keras.ops.ones((1, 2, 16, 16))]
    output, last = ops.higher_order_attention(
        empty, empty, empty, initial_state=state, return_state=True, **KERNELS
    )
    assert tuple(output.shape) == (1, 0, 2, 16)
    assert all(np.array_equal(to_numpy(a), to_numpy(b)) for a, b in zip(last, state, strict=True))
    with pytest.raises(ValueError, match="the tensor has no elements"):
        ops.higher_order_attention(no_rows, no_rows, no_rows, **KERNELS)
