"""Arguments as users have them: NumPy's numbers, lists, names with a slip of the pen."""

import json

from backends import relative_error, to_numpy
from family import PLAIN
import keras
import numpy as np
import pytest

from keras_hla import layers, ops

OF_THE_CELL = {
    "num_heads": np.int64(4),
    "key_dim": np.int32(8),
    "value_dim": np.uint8(6),
    "num_key_value_heads": np.int64(2),
    "decay": np.full(4, 0.9, "float32"),
    "rope_max_wavelength": np.int64(1000),
    "scale": np.float32(0.5),
    "conv_kernel_size": np.int64(3),
    "qk_norm": np.True_,
    "masked": np.True_,
    "normalize": np.True_,
    "epsilon": np.float64(1e-3),
    "ridge": np.float32(0.25),
    "output_norm": np.False_,
    "dropout": np.float32(0.5),
    "use_bias": np.True_,
    "seed": np.int64(3),
}
OF_THE_LAYER = {
    **OF_THE_CELL,
    "output_shape": np.int64(6),
    "return_sequences": np.False_,
    "return_state": np.True_,
    "go_backwards": np.True_,
    "stateful": np.True_,
    "zero_output_for_mask": np.True_,
    "causal": np.True_,
    "chunk_size": np.int64(4),
    "remat_length": np.int64(5),
}
OF_THE_BLOCK = {
    **OF_THE_CELL,
    "intermediate_dim": np.int64(16),
    "norm_epsilon": np.float32(1e-5),
    "return_state": np.True_,
}


@pytest.mark.parametrize(
    ("layer", "arguments"), [(layers.HLA, OF_THE_LAYER), (layers.HLADecoderBlock, OF_THE_BLOCK)]
)
def test_numbers_of_numpy(rng, layer, arguments):
    """They give the layer of Python's numbers, and a config that JSON knows."""
    x = rng.standard_normal((2, 7, 10)).astype("float32")
    plain = {name: value.tolist() for name, value in arguments.items()}
    some, twin = layer(**arguments), layer(**plain)
    some.build(x.shape)
    twin.build(x.shape)
    twin.set_weights(some.get_weights())
    for a, e in zip(some(x), twin(x), strict=True):
        assert relative_error(a, e) <= 1e-6
    config = some.get_config()
    del config["name"]
    expected = twin.get_config()
    del expected["name"]
    assert json.dumps(config) == json.dumps(expected)


def test_chunk_sizes_of_numpy(rng):
    x = rng.standard_normal((2, 7, 2, 4)).astype("float32")
    output = ops.higher_order_attention(x, x, x, chunk_size=np.int64(3))
    assert relative_error(output, ops.higher_order_attention(x, x, x)) <= 1e-5


def test_lists(rng):
    """They are what arrays of the same numbers are, as in the functions of Keras."""
    x = rng.standard_normal((2, 5, 2, 4)).astype("float32")
    mask = [[True] * 5, [True, True, True, False, False]]
    segment_ids = [[1, 1, 2, 2, 2], [1, 1, 1, 1, 1]]
    states = [rng.standard_normal((2, 2, 4, 4)).astype("float32") for _ in range(2)]
    expected = ops.higher_order_attention(
        x, x, x, mask=np.array(mask), segment_ids=np.array(segment_ids), initial_state=states
    )
    lists = x.tolist()
    output = ops.higher_order_attention(
        lists,
        lists,
        tuple(lists),
        mask=mask,
        segment_ids=segment_ids,
        initial_state=tuple(s.tolist() for s in states),
    )
    assert relative_error(output, expected) <= 1e-6
    assert keras.backend.standardize_dtype(output.dtype) == "float32"
    weights = ops.attention_weights(lists, lists, mask=mask)
    assert relative_error(weights, ops.attention_weights(x, x, mask=np.array(mask))) <= 1e-6


@pytest.mark.parametrize("layer", [layers.HLA, layers.HLADecoderBlock])
def test_lists_as_masks_of_a_layer(rng, layer):
    layer = layer(2, 4)
    x = rng.standard_normal((2, 5, 8)).astype("float32")
    mask = [[True] * 5, [True, True, True, False, False]]
    segment_ids = ((1, 1, 2, 2, 2), (1, 1, 1, 1, 1))
    expected = layer(x, mask=np.array(mask), segment_ids=np.array(segment_ids))
    np.testing.assert_array_equal(
        to_numpy(layer(x, mask=mask, segment_ids=segment_ids)), to_numpy(expected)
    )


@pytest.mark.parametrize("layer", [layers.HLA, layers.HLADecoderBlock])
def test_inputs_that_are_no_sequences(layer):
    x = np.zeros((2, 5, 8), "float32")
    for wrong in ([x, x], (x,), x[0], keras.Input((5, None))):
        with pytest.raises(ValueError, match=r"`sequences` must have shape .*Received"):
            layer(2, 4)(wrong)
    built = layer(2, 4)
    built(x)
    with pytest.raises(ValueError, match=r"`sequences` must have shape .*Received"):
        built([x, x])
    with pytest.raises(ValueError, match=r"`mask` must be a tensor.*Received"):
        built(x, mask=[[True], [True, False]])
    with pytest.raises(ValueError, match=r"known number of features.*Received"):
        layers.HLACell(2, 4).build((2, None))


def test_functions_of_what_is_no_tensor():
    x = np.zeros((2, 5, 2, 4), "float32")
    for wrong in (None, [[1.0, 2.0], [3.0]], object()):
        with pytest.raises(ValueError, match=r"`key` must be a tensor.*Received"):
            ops.higher_order_attention(x, wrong, x)
    with pytest.raises(ValueError, match=r"`log_decay` must be"):
        ops.higher_order_attention(x, x, x, log_decay="fast")


@pytest.mark.parametrize("layer", [layers.HLA, layers.HLACell, layers.HLADecoderBlock])
def test_unknown_arguments_blame_the_layer_that_was_called(layer):
    with pytest.raises(ValueError, match=f"passed to {layer.__name__}: .*'num_hedas': 3"):
        layer(2, 4, num_hedas=3)


def test_arguments_of_keras_layers(rng):
    """They are the layer's, not the cell's, which Keras never calls."""
    x = rng.standard_normal((2, 5, 8)).astype("float32")
    for layer in (layers.HLA, layers.HLADecoderBlock):
        some = layer(2, 4, activity_regularizer="l2")
        output = some(x)
        (loss,) = some.losses
        expected = 0.01 * np.sum(to_numpy(output) ** 2) / len(x)  # Keras divides by the batch size
        assert abs(float(loss) - expected) <= 1e-5 * expected
        twin = layer.from_config(some.get_config())
        assert twin.activity_regularizer is not None


@pytest.mark.parametrize("layer", [layers.HLA, layers.HLADecoderBlock])
def test_no_causality(rng, layer):
    """What needs an order of the tokens is off by default, and refused where it is asked for."""
    x = rng.standard_normal((2, 6, 8)).astype("float32")
    some, twin = layer(2, 4, causal=False), layer(2, 4, causal=False, **PLAIN)
    expected = to_numpy(some(x))
    twin.build(x.shape)
    twin.set_weights(some.get_weights())
    assert relative_error(twin(x), expected) <= 1e-6
    unordered = layer(2, 4, causal=False, rope_max_wavelength=None)
    expected = to_numpy(unordered(x))[:, ::-1]
    assert relative_error(unordered(x[:, ::-1].copy()), expected) <= 1e-5
    for name, value in {"decay": "input", "conv_kernel_size": 4}.items():
        with pytest.raises(ValueError, match=rf"`causal=False`.*`{name}` must be None.*Received"):
            layer(2, 4, causal=False, **{name: value})


@pytest.mark.parametrize("layer", [layers.HLA, layers.HLACell, layers.HLADecoderBlock])
def test_defaults_of_decay_and_convolution(layer):
    config = layer(2, 4).get_config()
    assert (config["decay"], config["conv_kernel_size"]) == ("input", 4)
