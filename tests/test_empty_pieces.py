"""A piece without tokens: it has no outputs, and leaves every state as it was."""

import functools

from backends import compiled, to_numpy
from family import PLAIN
import keras
import numpy as np
import pytest

import keras_hla
from keras_hla import layers, operators, ops

BACKEND = keras.config.backend()
LAYERS = {
    "plain": PLAIN,
    "default": {},
    "convolution": {"conv_kernel_size": 3, "decay": "input"},
    "third order": {"operator": "hla3", "normalize": True, "decay": 0.9},
    "published": {"operator": "hla2_published"},
    "backwards": {"go_backwards": True, "conv_kernel_size": 2},
    "last": {"return_sequences": False, "conv_kernel_size": 3},
    "zeros": {"zero_output_for_mask": True, "rope_max_wavelength": None},
    "pieces": {"remat_length": 2},
}
with_and_without = pytest.mark.parametrize(
    ("masked", "segmented"), [(False, False), (True, False), (False, True), (True, True)]
)
# Tokens of an operator that reads states from before them can belong to no segments.
CALLS = [
    (name, masked, masked and name != "published") for name in LAYERS for masked in (False, True)
]


def empty(masked, segmented):
    """Arrays of the arguments of a call."""
    inputs = {"sequences": np.zeros((2, 0, 16), "float32")}
    if masked:
        inputs["mask"] = np.zeros((2, 0), bool)
    if segmented:
        inputs["segment_ids"] = np.zeros((2, 0), "int32")
    return inputs


def random_states(rng, cell):
    """Any states, in their own dtypes. A position is of whole numbers, 0 and up."""
    states = cell.get_initial_state(2)
    return [rng.integers(0, 9, x.shape).astype(to_numpy_dtype(x)) for x in states]


def to_numpy_dtype(x):
    return keras.backend.standardize_dtype(x.dtype)


def assert_same(states, expected):
    for a, e in zip(states, expected, strict=True):
        assert to_numpy_dtype(a) == to_numpy_dtype(e)
        np.testing.assert_array_equal(to_numpy(a), e)


def call_with_any_length(function, inputs, states):
    """With lengths that are unknown at trace time, where the backend can."""
    if BACKEND != "tensorflow":
        return compiled(function)(inputs, states)
    import tensorflow as tf

    signature = [
        {n: tf.TensorSpec([2, None, *x.shape[2:]], x.dtype, n) for n, x in inputs.items()},
        [tf.TensorSpec(x.shape, x.dtype) for x in states],
    ]
    return tf.function(function, input_signature=signature)(inputs, states)


@pytest.mark.parametrize(("name", "masked", "segmented"), CALLS)
def test_layer(rng, name, masked, segmented):
    layer = layers.HLA(4, 8, return_state=True, **LAYERS[name])
    layer.build((2, None, 16))
    states = random_states(rng, layer.cell)
    inputs = empty(masked, segmented)

    def function(inputs, states):
        return layer(**inputs, initial_state=states)

    output, *after = call_with_any_length(function, inputs, states)
    assert_same(after, states)
    if layer.return_sequences:
        assert tuple(output.shape) == (2, 0, 16)
    else:  # as where all tokens are masked
        np.testing.assert_array_equal(to_numpy(output), np.zeros((2, 16)))


@with_and_without
def test_stateful_block(rng, masked, segmented):
    block = layers.HLADecoderBlock(4, 8, stateful=True)
    block.build((2, None, 16))
    before = random_states(rng, block.cell)
    for variable, state in zip(block.states, before, strict=True):
        variable.assign(state)
    assert tuple(block(**empty(masked, segmented)).shape) == (2, 0, 16)
    assert_same(block.states, before)


def test_layer_that_is_not_causal():
    layer = layers.HLA(4, 8, causal=False)
    assert tuple(layer(**empty(masked=True, segmented=False)).shape) == (2, 0, 16)


def test_pieces_of_which_some_are_empty(rng):
    """Between others, an empty piece changes nothing."""
    layer = layers.HLA(4, 8, return_state=True, conv_kernel_size=3, decay="input")
    layer.build((2, None, 16))
    layer = compiled(layer)
    x = rng.standard_normal((2, 9, 16)).astype("float32")
    whole, *last = layer(x)
    states, outputs = None, []
    for begin, end in ((0, 0), (0, 4), (4, 4), (4, 9), (9, 9)):
        output, *states = layer(x[:, begin:end], initial_state=states)
        outputs.append(output)
    joint = keras.ops.concatenate(outputs, axis=1)
    np.testing.assert_allclose(to_numpy(joint), to_numpy(whole), rtol=1e-4, atol=1e-5)
    for a, e in zip(states, last, strict=True):
        np.testing.assert_allclose(to_numpy(a), to_numpy(e), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_stream(rng, masked):
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    x = keras.layers.Embedding(20, 16)(tokens)
    x = layers.HLADecoderBlock(2, 8)(x)
    model = keras.Model(tokens, keras.layers.Dense(20, name="logits")(x))
    stream = keras_hla.streaming_model(model, masked=masked)
    given = {"tokens": np.zeros((2, 0), "int32")}
    if masked:
        given["mask"] = np.zeros((2, 0), bool)
    names = stream.state_names
    states = random_states(rng, model.layers[2].cell)
    outputs = stream(given | dict(zip(names, states, strict=True)))
    assert tuple(outputs["logits"].shape) == (2, 0, 20)
    assert_same([outputs[name] for name in names], states)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="Only TensorFlow exports a length of zero.")
def test_saved_model(rng, tmp_path):
    import tensorflow as tf

    inputs = keras.Input((None, 16), name="inputs")
    layer = layers.HLADecoderBlock(2, 8, name="block")
    keras_hla.export_saved_model(keras.Model(inputs, layer(inputs)), str(tmp_path))
    served = tf.saved_model.load(str(tmp_path))
    states = random_states(rng, layer.cell)
    names = [f"block_mixer_{name}" for name in layer.cell.state_names]
    given = {"inputs": np.zeros((2, 0, 16), "float32"), **dict(zip(names, states, strict=True))}
    for signature, more in (("step", {}), ("step_masked", {"mask": np.zeros((2, 0), bool)})):
        tensors = {name: tf.constant(x) for name, x in (given | more).items()}
        outputs = served.signatures[signature](**tensors)
        assert outputs["block"].shape == (2, 0, 16)
        assert_same([outputs[name] for name in names], states)


@pytest.mark.parametrize("operator", ["hla2", "hla3_published"])
@pytest.mark.parametrize("form", ["chunked", "recurrent"])
@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_functions(rng, operator, form, decays, known):
    q, k, v = (np.zeros((2, 0, heads, 8), "float32") for heads in (4, 2, 2))
    inputs = {"query": q, "key": k, "value": v, "mask": np.zeros((2, 0), bool)}
    if decays:
        inputs["log_decay"] = np.zeros((2, 0, 4), "float32")
    if "published" not in operator:
        inputs["segment_ids"] = np.zeros((2, 0), "int32")
    shapes = operators.get(operator).state_shapes(4 if decays else 2, 4, 8, 8)
    states = [rng.standard_normal((2, *shape)).astype("float32") for shape in shapes]

    def function(inputs, states):
        return ops.higher_order_attention(
            **inputs, operator=operator, form=form, initial_state=states, return_state=True
        )

    call = compiled(function) if known else functools.partial(call_with_any_length, function)
    output, after = call(inputs, states)
    assert tuple(output.shape) == (2, 0, 4, 8)
    assert_same(after, states)


@pytest.mark.parametrize("operator", ["linear", "hla2"])
def test_functions_without_states(operator):
    q, k, v = (np.zeros((2, 0, heads, 8), "float32") for heads in (4, 2, 2))
    inputs = {"query": q, "key": k, "value": v, "mask": np.zeros((2, 0), bool)}
    output = ops.higher_order_attention(**inputs, operator=operator, form="matrix")
    assert tuple(output.shape) == (2, 0, 4, 8)
    weights = ops.attention_weights(q, k, operator)
    assert tuple(weights.shape) == (2, 4, 0, 0)


@pytest.mark.parametrize("operator", ["linear", "hla2", "ahla", "hla3"])
def test_segments(rng, operator):
    """The empty segment is the identity."""
    q, k, v = (rng.standard_normal((2, 5, heads, 8)).astype("float32") for heads in (4, 2, 2))
    summarize = compiled(functools.partial(ops.summarize, operator=operator))
    none, some = (summarize(q[:, :n], k[:, :n], v[:, :n]) for n in (0, 5))
    for joint in (ops.combine(none, some), ops.combine(some, none)):
        for a, e in zip(joint, some, strict=True):
            np.testing.assert_array_equal(to_numpy(a), to_numpy(e))
