"""The kernel of one token: layers that read token by token, rebuilt in float64."""

from backends import relative_error
import keras
from keras import ops
import numpy as np
import pytest
import stage_definitions
import torch
import triton
from triton.runtime import interpreter

import keras_hla
from keras_hla import kernels, layers
from keras_hla.layers import token

LENGTH, FEATURES = 9, 10
CONFIGURATIONS = {
    "hla2": {"output_gate": "silu"},
    "linear": {
        "operator": "linear",
        "decay": 0.9,
        "conv_kernel_size": None,
        "rope_max_wavelength": None,
        "value_dim": 5,
    },
    "ahla": {
        "operator": "ahla",
        "decay": [0.5, 0.8, 0.9, 1.0],
        "num_key_value_heads": 2,
        "conv_kernel_size": 2,
        "conv_activation": None,
        "output_norm": False,
        "use_bias": False,
    },
    "hla3": {
        "operator": "hla3",
        "decay": None,
        "num_key_value_heads": 1,
        "qk_norm": True,
        "value_dim": 20,
        "rope_max_wavelength": 30.0,
    },
}


# Of which there is no definition of a whole layer.
SUMS = {
    "ridge": {"ridge": 0.3},
    "unmasked": {"masked": False, "ridge": 0.3},
    "third order unmasked": {"operator": "hla3", "masked": False, "decay": None},
}


@pytest.fixture
def calls(monkeypatch):
    """The list of the layers of which the kernel computes a token, without gradients."""
    calls, mix = [], token.mix
    monkeypatch.setattr(token, "mix", lambda layer, *rest: calls.append(layer) or mix(layer, *rest))
    with torch.no_grad():
        yield calls


def draw(rng, layer):
    """A layer with random weights and a float32 input."""
    layer.build((2, None, FEATURES))
    for w in layer.trainable_weights:
        w.assign(0.4 * rng.standard_normal(w.shape) + ("scale" in w.path))
    return layer, rng.standard_normal((2, LENGTH, FEATURES)).astype("float32")


def read(layer, x, mask=None):
    """The outputs token by token, and the last states."""
    outputs, states = [], layer.get_initial_state(len(x))
    for t in range(x.shape[1]):
        some = {} if mask is None else {"mask": ops.convert_to_tensor(mask[:, t : t + 1])}
        piece = ops.convert_to_tensor(x[:, t : t + 1], layer.compute_dtype)
        output, *states = layer(piece, initial_state=states, **some)
        outputs.append(output)
    return ops.concatenate(outputs, axis=1), states


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_layer(rng, calls, name, masked):
    options = {"num_heads": 4, "key_dim": 6, **CONFIGURATIONS[name]}
    layer, x = draw(rng, layers.HLA(**options, return_state=True, implementation="triton"))
    mask = np.ones((2, LENGTH), bool)
    mask[0, 3] = mask[0, 7] = mask[1, 0] = not masked
    weights = {
        w.path.split("/", 1)[1]: torch.tensor(ops.convert_to_numpy(w).astype("float64"))
        for w in layer.trainable_weights
    }
    options = {"decay": "input", **options}
    found, _ = read(layer, x, mask if masked else None)
    assert len(calls) == LENGTH
    for row in range(2):
        tokens = torch.tensor(x[row, mask[row]].astype("float64"))
        expected = stage_definitions.layer(weights, tokens, **options)
        assert relative_error(found[row, mask[row]], expected) <= 1e-5


@pytest.fixture
def rounds(monkeypatch):
    """Lets Triton's interpreter round to bfloat16, as a GPU does, where it would truncate."""
    convert = interpreter._convert_float

    def rounded(x, source, target, mode):
        if (source, target) == (triton.language.float32, triton.language.bfloat16):
            x = torch.from_numpy(x).bfloat16().float().numpy()
        return convert(x, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.mark.usefixtures("rounds")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_errors_are_those_of_rounding(rng, calls, name, dtype):
    """In low precision they are no larger than those of the portable layer."""
    found = {}
    for implementation, policy in (
        ("portable", "float64"),
        ("portable", dtype),
        ("triton", dtype),
    ):
        options = {"return_state": True, "implementation": implementation, "dtype": policy}
        layer, x = draw(
            np.random.default_rng(0),
            layers.HLADecoderBlock(4, 6, **CONFIGURATIONS[name], **options),
        )
        output, states = read(layer, x)
        found[implementation, policy] = [ops.cast(y, "float64") for y in (output, *states)]
    exact = found["portable", "float64"]
    assert len(calls) == LENGTH
    for rounded, by_kernel, e in zip(
        found["portable", dtype], found["triton", dtype], exact, strict=True
    ):
        assert relative_error(by_kernel, e) <= 1.3 * relative_error(rounded, e) + 1e-7


@pytest.mark.parametrize("name", SUMS)
def test_operators_that_are_sums_of_passes(rng, calls, name):
    """By the step of the operator, which other tests compare with its definition."""
    found = []
    for implementation in ("portable", "triton"):
        options = {"return_state": True, "implementation": implementation, **SUMS[name]}
        layer, x = draw(np.random.default_rng(0), layers.HLA(2, 6, value_dim=5, **options))
        output, states = read(layer, x)
        found.append([output, *states])
    assert len(calls) == LENGTH
    for a, e in zip(*found, strict=True):
        assert relative_error(a, e) <= 1e-5


def test_positions_far_on(rng, calls):
    """Where a block of 65,536 tokens ends, and where there are many blocks."""
    found = []
    for implementation in ("portable", "triton"):
        layer, x = draw(
            np.random.default_rng(0),
            layers.HLA(2, 6, return_state=True, implementation=implementation),
        )
        *states, _ = layer.get_initial_state(2)
        states.append(ops.convert_to_tensor([[0.0, 65535.0], [70001.0, 40000.0]]))
        for t in range(2):
            output, *states = layer(ops.convert_to_tensor(x[:, t : t + 1]), initial_state=states)
        found.append([output, *states])
    np.testing.assert_array_equal(found[1][-1], [[1, 1], [70001, 40002]])
    for a, e in zip(*found, strict=True):
        assert relative_error(a, e) <= 1e-5
    assert len(calls) == 2


def test_generates_the_same_tokens(calls):
    """Also where the step of the model is traced, which calls kernels as custom operators."""
    texts = []
    for implementation in ("portable", "triton"):
        keras.utils.set_random_seed(0)
        tokens = keras.Input((None,), dtype="int32")
        x = keras.layers.Embedding(64, FEATURES)(tokens)
        x = layers.HLADecoderBlock(2, 8, output_gate="silu", implementation=implementation)(x)
        model = keras.Model(tokens, keras.layers.Dense(64)(x))
        settings = {"max_new_tokens": 6, "tokens_per_call": 3, "seed": 0}
        texts.append(keras_hla.generate(model, [[1, 2, 3], [4]], **settings))
    assert len(calls) > 0
    np.testing.assert_array_equal(*texts)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"feature_map": "softplus"}, "feature map"),
        ({"conv_activation": "gelu"}, "not 'silu'"),
        ({"normalize": True}, "divide by a sum"),
        ({"operator": "hla2_published"}, "passes over their states"),
        ({"implementation": "portable"}, "was given"),
        ({"implementation": "auto"}, "not known to be faster"),
    ],
)
def test_what_the_kernel_leaves_to_the_portable_layer(rng, calls, options, reason):
    options = {"implementation": "triton", **options}
    layer, x = draw(rng, layers.HLA(2, 6, return_state=True, **options))
    choice = layer.implementation_for(ops.convert_to_tensor(x[:, :1]))
    assert choice.implementation == "portable"
    assert reason in choice.reason
    read(layer, x[:, :1])
    assert not calls


def test_gradients_are_of_the_portable_layer(rng):
    layer, x = draw(rng, layers.HLA(2, 6, implementation="triton"))
    piece = ops.convert_to_tensor(x[:, :1])
    assert layer.implementation_for(piece) == kernels.Choice(
        "portable", "the kernel of a token has no gradients"
    )
    layer(piece).sum().backward()
    assert all(w.value.grad is not None for w in layer.trainable_weights)
