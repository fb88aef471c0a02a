"""The functions on symbolic tensors: nodes of models that give what the functions give."""

from backends import relative_error
import keras
import numpy as np
import pytest

from keras_hla import operators, ops

SHAPES = [(None, None), (None, 6), (2, None), (2, 6)]
QUERY, SHARED = (4, 8), (2, 8)


def array(rng, x):
    """An array that fits a symbolic tensor, where batch and length are unknown: 2 and 6."""
    shape = [(2, 6)[axis] if size is None else size for axis, size in enumerate(x.shape)]
    if x.dtype == "bool":
        return rng.random(shape) < 0.7
    if "int" in x.dtype:
        return np.sort(rng.integers(0, 3, shape), axis=1).astype(x.dtype)
    return rng.standard_normal(shape).astype(x.dtype)


def assert_model(function, inputs, rng, path=None):
    """Holds the model of a function of a dictionary to the function, before and after saving."""
    inputs = {  # named as Keras names them after loading
        name: keras.Input(batch_shape=x.shape, dtype=x.dtype, name=name)
        for name, x in inputs.items()
    }
    outputs = function(inputs)
    flat = keras.tree.flatten(outputs)
    model = keras.Model(inputs, flat)
    arrays = {name: array(rng, x) for name, x in inputs.items()}
    arrays = {name: -abs(x) if "decay" in name else x for name, x in arrays.items()}
    expected = keras.tree.flatten(function(arrays))
    models = [model]
    if path is not None:
        model.save(path / "model.keras")
        models.append(keras.saving.load_model(path / "model.keras"))
    for some in models:
        found = keras.tree.flatten(some(arrays))
        for symbol, a, e in zip(flat, found, expected, strict=True):
            assert relative_error(a, e) <= 1e-5
            assert symbol.dtype == keras.backend.standardize_dtype(a.dtype)
            assert all(s in (None, n) for s, n in zip(symbol.shape, a.shape, strict=True))
    return outputs


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["chunked", "recurrent", "matrix"])
def test_shapes_and_dtypes(shape, form):
    q, k, v = (
        keras.Input(batch_shape=(*shape, *rest), dtype="float16")
        for rest in (QUERY, SHARED, (2, 5))
    )
    options = {"form": form, "mask": keras.Input(batch_shape=shape, dtype="bool")}
    if form != "matrix":
        sizes = operators.get("hla2").state_shapes(2, 4, 8, 5)
        states = [keras.Input(batch_shape=(shape[0], *size)) for size in sizes]
        options |= {"initial_state": states, "return_state": True}
    output = ops.higher_order_attention(q, k, v, **options)
    if form != "matrix":
        output, last = output
        assert [x.shape for x in last] == [x.shape for x in states]
        assert {x.dtype for x in last} == {"float32"}
    assert (output.shape, output.dtype) == ((*shape, 4, 5), "float16")


def test_attention_in_a_model(rng, tmp_path):
    """With every argument that may be a tensor."""
    sizes = operators.get("hla3").state_shapes(4, 4, 8, 8)
    inputs = {
        "query": keras.Input((None, *QUERY)),
        "key": keras.Input((None, *SHARED)),
        "value": keras.Input((None, *SHARED)),
        "log_decay": keras.Input((None, 4)),
        "mask": keras.Input((None,), dtype="bool"),
        "segment_ids": keras.Input((None,), dtype="int32"),
        **{f"state_{i}": keras.Input(size) for i, size in enumerate(sizes)},
    }

    def function(tensors):
        tensors = dict(tensors)
        states = [tensors.pop(f"state_{i}") for i in range(3)]
        return ops.higher_order_attention(
            **tensors,
            initial_state=states,
            operator=operators.HLA3(),
            return_state=True,
            chunk_size=np.int64(4),
        )

    assert_model(function, inputs, rng, tmp_path)


FUNCTIONS = {
    "arrays": lambda x: ops.higher_order_attention(
        x["query"],
        x["key"],
        x["value"],
        "hla2",
        "recurrent",
        np.array([-0.1, -0.2, -0.3, 0.0], "float32"),
        mask=np.array([[True] * 6, [True] * 4 + [False] * 2]),
        ridge=0.1,
    ),
    "two calls": lambda x: ops.higher_order_attention(
        x["query"],
        *[ops.higher_order_attention(x["query"], x["key"], x["value"], normalize=True)] * 2,
        causal=False,
    ),
    "first order": lambda x: ops.causal_linear_attention(
        x["query"], x["key"], x["value"], log_decay=-0.1, return_state=True
    ),
    "weights": lambda x: ops.attention_weights(x["query"], x["key"], normalize=True, epsilon=10.0),
    "summarize": lambda x: ops.summarize(x["query"], x["key"], x["value"], "ahla", -0.1),
    "combine": lambda x: ops.combine(
        *[ops.summarize(x["query"], x["key"], x["value"], "ahla", -0.1)] * 2
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_in_a_model(rng, name, tmp_path):
    shape = (2, 6) if name == "arrays" else (None, None)
    inputs = {
        name: keras.Input(batch_shape=(*shape, *rest))
        for name, rest in (("query", QUERY), ("key", SHARED), ("value", SHARED))
    }
    assert_model(FUNCTIONS[name], inputs, rng, tmp_path)


def test_segments_are_symbolic(rng):
    """They know their operator, as those of arrays do."""
    q, k, v = (keras.Input((None, *rest)) for rest in (QUERY, SHARED, SHARED))
    segment, other = (ops.summarize(q, k, v, name) for name in ("ahla", "hla2"))
    assert ops.combine(segment, segment).E.shape == (None, 4, 8, 8)
    with pytest.raises(ValueError, match=r"`right` must be a segment of AHLA"):
        ops.combine(segment, other)


def test_step_in_a_model(rng, tmp_path):
    inputs = {
        "query": keras.Input(QUERY),
        "key": keras.Input(SHARED),
        "value": keras.Input(SHARED),
        "log_decay": keras.Input((4,)),
        "S": keras.Input((4, 8, 8)),
        "F": keras.Input((4, 8, 8)),
    }

    def function(x):
        states = [x["S"], x["F"]]
        return ops.attention_step(
            x["query"], x["key"], x["value"], states, log_decay=x["log_decay"]
        )

    output, states = assert_model(function, inputs, rng, tmp_path)
    assert output.shape == (None, 4, 8)
    assert [x.shape for x in states] == [(None, 4, 8, 8)] * 2


def test_bad_arguments_are_named_as_for_arrays():
    q, k, v = (keras.Input((None, *rest)) for rest in (QUERY, SHARED, SHARED))
    with pytest.raises(ValueError, match="`chunk_size` must be a positive integer"):
        ops.higher_order_attention(q, k, v, chunk_size=0)
    with pytest.raises(ValueError, match="`log_decay` must be finite and <= 0"):
        ops.higher_order_attention(q, k, v, log_decay=np.full(4, 0.1))
    with pytest.raises(ValueError, match="same number of heads"):
        ops.higher_order_attention(q, k, q)
