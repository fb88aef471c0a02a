"""Operators by name, and one that a user of the package makes."""

import dataclasses

from backends import call, relative_error
import keras
import numpy as np
import pytest

from keras_hla import layers, operators, ops
from keras_hla.operators import Operator, outer, read, scores


@dataclasses.dataclass(frozen=True)
class Cascade(Operator):
    """`W W W V`."""

    state_names = ("P", "E", "D")

    def state_shapes(self, key_heads, query_heads, d, dv):
        return (key_heads, d, dv), (query_heads, d, dv), (query_heads, d, dv)

    def weights(self, query, key, decay):
        W = decay * scores(query, key)
        return W @ W @ W

    def step(self, state, query, key, value, decay):
        new = []
        for M in state:
            new.append(decay * M + outer(key, value))
            value = read(new[-1], query)
        return value, tuple(new)

    def chain(self, scan, state, query, key, value):
        new = []
        for M in state:
            value, last = scan(query, key, value, M)
            new.append(last)
        return value, tuple(new)


@pytest.fixture(scope="module")
def cascade():
    operators.register("cascade", Cascade())
    return "cascade"


def test_custom_operator(rng, cascade):
    q, k, v = (rng.standard_normal((2, 40, 2, 4)).astype("float32") for _ in range(3))
    W = np.tril(np.einsum("bthd,bjhd->bhtj", q, k, dtype="float64"))
    expected = np.einsum("bhtj,bjhd->bthd", W @ W @ W, v)
    for form in ("chunked", "recurrent", "matrix"):
        assert relative_error(ops.higher_order_attention(q, k, v, cascade, form), expected) <= 1e-5
    # By instance; and the others know nothing of it.
    assert relative_error(ops.higher_order_attention(q, k, v, Cascade()), expected) <= 1e-5
    with pytest.raises(ValueError, match="Cascade knows neither `masked=False`"):
        ops.higher_order_attention(q, k, v, cascade, masked=False)
    with pytest.raises(ValueError, match="segments of Cascade do not compose"):
        ops.summarize(q, k, v, cascade)
    with pytest.raises(ValueError, match="segments of Cascade do not compose"):
        ops.combine(*[[np.zeros((1, 2, 4, 4))] * 3 + [np.zeros((1, 1))]] * 2, cascade)


def test_custom_operator_in_a_layer(rng, cascade, tmp_path):
    inputs = keras.Input((None, 16))
    model = keras.Model(inputs, layers.HLA(2, 8, operator=cascade, decay="input")(inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[1].cell.operator == Cascade()
    x = rng.standard_normal((2, 20, 16)).astype("float32")
    assert relative_error(loaded(x), model(x)) == 0


def test_names():
    names = ("linear", "hla2", "ahla", "hla3", "hla2_published", "hla3_published")
    for name in names:
        operator = operators.get(name)
        assert operators.get(operator) is operator
        assert operators.name_of(operator) == name
    assert operators.get("hla2", ridge=0.1) == operators.HLA2(ridge=0.1)
    assert operators.get("hla2_published", masked=False, ridge=0.1) == operators.HLA2Unmasked(0.1)
    assert operators.get("hla3_published", masked=False) == operators.HLA3Unmasked()
    # Options of an instance stay.
    assert operators.get(operators.HLA2(0.1), masked=False) == operators.HLA2Unmasked(0.1)
    assert operators.get(operators.HLA2Unmasked(0.1)) == operators.HLA2Unmasked(0.1)


@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("hla2", {"masked": False, "ridge": 0.5}),
        ("ahla", {}),
        ("ahla", {"normalize": True, "epsilon": 1e3}),
        ("hla3", {}),
        ("hla3", {"masked": False}),
        ("hla2_published", {"ridge": 0.5}),
        ("hla3_published", {"normalize": True, "epsilon": 1e3}),
    ],
)
def test_in_a_layer(rng, operator, options):
    """The layer in pieces, from its config, and its cell."""
    layer = layers.HLA(4, 8, operator=operator, decay=0.9, return_state=True, **options)
    layer.build((2, None, 16))
    x = rng.standard_normal((2, 20, 16)).astype("float32")
    whole, *last = call(layer, x)
    twin = layers.HLA.from_config(layer.get_config())
    twin.build((2, None, 16))
    twin.set_weights(layer.get_weights())
    _, *state = call(twin, x[:, :19])
    assert [tuple(s.shape[1:]) for s in state] == [tuple(s) for s in layer.cell.state_size]
    token, state = twin.cell(keras.ops.convert_to_tensor(x[:, 19]), state)
    assert relative_error(token, whole[:, 19]) <= 1e-5
    for a, b in zip(state, last, strict=True):
        assert relative_error(a, b) <= 1e-5
