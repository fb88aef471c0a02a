"""The layer and the block, portable and by kernels, rebuilt in float64 from their weights."""

from backends import relative_error, value_and_gradients
from keras import ops
import numpy as np
import pytest
import stage_definitions
from test_stages import by_kernels
import torch

from keras_hla import layers
from keras_hla.layers import fused

FORWARD, GRADIENT = 1e-5, 1e-4
LENGTH, FEATURES = 21, 10
CONFIGURATIONS = {
    "every option": {
        "operator": "hla3",
        "decay": "input",
        "num_key_value_heads": 2,
        "value_dim": 5,
        "qk_norm": True,
        "feature_map": "softplus",
        "output_gate": "silu",
        "conv_kernel_size": 3,
    },
    "little": {
        "operator": "ahla",
        "decay": [0.5, 0.8, 0.9, 1.0],
        "rope_max_wavelength": None,
        "conv_kernel_size": 4,
        "conv_activation": None,
        "output_norm": False,
        "use_bias": False,
    },
}
CASES = ("packed and masked", "pieces", "whole", "masked", "packed")
in_every_case = pytest.mark.parametrize(
    ("case", "fused"),
    # Portable layers do the same in every case; by kernels there are shorter ways.
    [
        *((case, False) for case in CASES[:2]),
        *(pytest.param(case, True, marks=by_kernels) for case in CASES),
    ],
)


@in_every_case
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_layer(rng, name, case, fused):
    options = {"num_heads": 4, "key_dim": 6, **CONFIGURATIONS[name]}
    check(rng, layers.HLA, stage_definitions.layer, options, case, fused)


@in_every_case
def test_block(rng, case, fused):
    options = {"num_heads": 2, "key_dim": 4, "num_key_value_heads": 1, "qk_norm": True}
    definition = stage_definitions.decoder_block
    check(rng, layers.HLADecoderBlock, definition, options, case, fused, decay="input")


@by_kernels
def test_block_that_drops(rng):
    """With one seed, what is dropped by kernels is what is dropped by the portable block."""
    arrays, found = [rng.standard_normal((2, LENGTH, FEATURES)).astype("float32")], []
    for implementation in ("portable", "triton"):
        block = layers.HLADecoderBlock(2, 4, dropout=0.4, seed=3, implementation=implementation)
        block.build((None, None, FEATURES))
        if not found:
            arrays += [0.4 * rng.standard_normal(w.shape) for w in block.trainable_weights]

        def function(x, *weights, block=block):
            seeds = [w.value for w in block.non_trainable_variables]
            output, _ = block.stateless_call(weights, seeds, x, training=True)
            return ops.sum(output**2), [output]

        (output,), gradients = value_and_gradients(function, arrays)
        found.append([output, *gradients])
    for a, e in zip(*found, strict=True):
        assert relative_error(a, e) <= GRADIENT


@by_kernels
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"operator": "hla3", "use_bias": True, "decay": None},
        {"ridge": 0.3},
    ],
)
def test_parts_of_a_long_sequence(rng, monkeypatch, options, packed):
    """They are one function each, and with their states between them the whole."""
    options = {"num_key_value_heads": 2, "conv_kernel_size": 3, "output_gate": "silu", **options}
    x = rng.standard_normal((2, LENGTH, FEATURES)).astype("float32")
    _, segments = draw_tokens(rng, "packed")
    arguments = {"segment_ids": ops.convert_to_tensor(segments)} if packed else {}
    arrays, found, calls, mix = [x], [], [], fused.mix_with_states
    monkeypatch.setattr(fused, "mix_with_states", lambda *a: calls.append(a) or mix(*a))
    for longest, implementation in ((None, "portable"), (8, "triton")):
        layer = layers.HLA(4, 6, remat_length=longest, implementation=implementation, **options)
        layer.build(x.shape)
        if not calls and len(arrays) == 1:
            arrays += [0.4 * rng.standard_normal(w.shape) for w in layer.trainable_weights]

        def function(x, *weights, layer=layer):
            output, _ = layer.stateless_call(weights, [], x, **arguments)
            return ops.sum(output**2), [output]

        (output,), gradients = value_and_gradients(function, arrays)
        found.append([output, *gradients])
    assert len(calls) == 2 * 3
    for a, e in zip(*found, strict=True):
        assert relative_error(a, e) <= GRADIENT


def check(rng, make, definition, options, case, fused, **defaults):
    """Outputs, and the gradients of inputs and weights."""
    layer = make(
        **options,
        return_state=case == "pieces",
        implementation="triton" if fused else "portable",
    )
    x = rng.standard_normal((2, LENGTH, FEATURES)).astype("float32")
    layer.build(x.shape)
    weights = [
        (0.4 * rng.standard_normal(w.shape) + ("scale" in w.path)).astype("float32")
        for w in layer.trainable_weights
    ]
    mask, segments = draw_tokens(rng, case)
    hidden = np.broadcast_to(~mask[..., None], x.shape)
    weight = np.where(hidden, 0, rng.standard_normal(x.shape)).astype("float32")

    exact = [torch.tensor(y.astype("float64"), requires_grad=True) for y in (x, *weights)]
    names = [w.path.split("/", 1)[1] for w in layer.trainable_weights]
    expected = torch.zeros(x.shape, dtype=torch.float64)
    for row in range(2):
        for n in range(segments.max() + 1):
            document = torch.tensor(np.flatnonzero(mask[row] & (segments[row] == n)))
            if not len(document):
                continue
            output = definition(
                dict(zip(names, exact[1:], strict=True)),
                exact[0][row, document],
                **{**defaults, **options},
            )
            expected = expected.index_put((torch.tensor(row), document), output)
    gradients = torch.autograd.grad((expected * torch.tensor(weight)).sum(), exact)

    function = weighted_outputs(layer, case, mask, segments)
    (found,), found_gradients = value_and_gradients(function, [x, *weights], [weight])
    assert relative_error(np.where(hidden, 0, found), expected.detach().numpy()) <= FORWARD
    for a, e in zip(found_gradients, gradients, strict=True):
        assert relative_error(a, e.numpy()) <= GRADIENT


def draw_tokens(rng, case):
    """The mask, and the numbers of the documents in a sequence."""
    mask = np.ones((2, LENGTH), bool)
    if "masked" in case:
        mask = rng.random((2, LENGTH)) < 0.7
        mask[1, :4] = False
    segments = np.zeros((2, LENGTH), "int32")
    if "packed" in case:  # one of them of a single token
        segments[0, 6:], segments[0, 7:] = 1, 2
        segments[1, 15:] = 1
    return mask, segments


def weighted_outputs(layer, case, mask, segments):
    """The function that `value_and_gradients` takes."""

    def evaluate(weights, *arguments, **options):
        return layer.stateless_call(weights, [], *arguments, **options)[0]

    def function(x, *rest):
        *weights, weight = rest
        if case == "pieces":
            outputs, states = [], None
            for piece in (x[:, :8], x[:, 8:9], x[:, 9:]):
                output, *states = evaluate(weights, piece, states)
                outputs.append(output)
            output = ops.concatenate(outputs, axis=1)
        else:
            some = {}
            if "masked" in case:
                some["mask"] = ops.convert_to_tensor(mask)
            if "packed" in case:
                some["segment_ids"] = ops.convert_to_tensor(segments)
            output = evaluate(weights, x, **some)
        return ops.sum(output * weight), [output]

    return function
