"""Layers recorded as CUDA graphs; without a GPU as functions that are called again."""

from family import PLAIN
from graphs import replayed_calls
import keras
import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from keras_hla import kernels, layers
from keras_hla.kernels.fusion import recordings

LENGTH, FEATURES = 8, 8
LITTLE = {**PLAIN, "operator": "linear", "rope_max_wavelength": None, "output_norm": False}
OPTIONS = {
    "little": (layers.HLA, LITTLE),
    "block": (layers.HLADecoderBlock, {"qk_norm": True, "output_gate": "silu"}),
    "decay": (layers.HLA, {"operator": "ahla", "decay": "learned", "rope_max_wavelength": None}),
}


@pytest.fixture
def replayed(monkeypatch):
    """The list of the recordings that calls replay."""
    return replayed_calls(monkeypatch, recordings, recordings.Recording)


def make(name="little", **others):
    kind, options = OPTIONS[name]
    layer = kind(1, 4, implementation="triton", **options, **others)
    layer.build((None, None, FEATURES))
    return layer


def draw(rng, length=LENGTH):
    x = keras.ops.convert_to_tensor(rng.standard_normal((1, length, FEATURES)), "float32")
    return x.requires_grad_()


def values(layer, x, **options):
    """The output, and the gradients of the input and the weights."""
    return gradients(layer, x, layer(x, **options))


def gradients(layer, x, output, **options):
    factors = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape)
    read = [x, *(w.value for w in layer.trainable_weights)]
    return [output, *torch.autograd.grad((output * factors).sum(), read, **options)]


def by_launches(layer, x, **options):
    """The same of another layer with the weights, without graphs."""
    other = type(layer).from_config(layer.get_config())
    other.build(x.shape)
    other.set_weights(layer.get_weights())
    kernels.disable_cuda_graphs()
    try:
        return values(other, x, **options)
    finally:
        kernels.enable_cuda_graphs()


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        # By the same kernels, of which some add up in an order that changes.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def warm_up(rng, layer, length=LENGTH):
    for _ in range(3):
        values(layer, draw(rng, length))


@pytest.mark.parametrize("name", OPTIONS)
def test_inputs_and_weights_change_from_call_to_call(rng, replayed, name):
    layer = make(name)
    for call in range(6):
        x, options = draw(rng), {}
        if call % 2 and name == "block":  # which is another function than without
            options["segment_ids"] = np.cumsum(rng.random((1, LENGTH)) < 0.2, axis=1)
        for w in layer.trainable_weights:
            w.assign(0.3 * rng.standard_normal(w.shape))
        assert_equal(values(layer, x, **options), by_launches(layer, x, **options))
    assert len(replayed) == (2 if name == "block" else 4)


def test_without_gradients(rng, replayed):
    layer = make()
    for _ in range(5):
        x = draw(rng)
        with torch.no_grad():
            output = layer(x)
        assert_equal([output], by_launches(layer, x)[:1])
        assert_equal(values(layer, x), by_launches(layer, x))
    assert len(replayed) == 6
    assert len(set(replayed)) == 2


def test_recorded_in_inference_mode(rng, replayed):
    layer = make()
    with torch.inference_mode():
        for _ in range(3):
            layer(draw(rng))
    x = draw(rng)
    with torch.no_grad():
        output = layer(x)
    assert_equal([output], by_launches(layer, x)[:1])
    assert len(replayed) == 2


def test_outputs_are_not_overwritten(rng, replayed):
    layer = make()
    warm_up(rng, layer)
    inputs = [draw(rng) for _ in range(3)]
    with torch.no_grad():
        outputs = [layer(x) for x in inputs * 2]
    for x, output in zip(inputs * 2, outputs, strict=True):
        assert_equal([output], by_launches(layer, x)[:1])


def test_a_second_call_before_the_gradients_of_the_first(rng, replayed):
    layer = make()
    warm_up(rng, layer)
    a, b = draw(rng), draw(rng)
    outputs = layer(a), layer(b)
    assert len(replayed) == 2  # the last of the warm-up, and one of these
    assert_equal(gradients(layer, a, outputs[0]), by_launches(layer, a))
    assert_equal(gradients(layer, b, outputs[1]), by_launches(layer, b))
    output = layer(a)
    del output
    values(layer, b)  # as nobody can ask for those of the call before
    assert len(replayed) == 4


def test_layers_share_buffers(rng, replayed):
    stack = [make() for _ in range(3)]
    for _ in range(4):
        x = draw(rng)
        output = x
        for layer in stack:
            output = layer(output)
        found = gradients(stack[0], x, output)
    assert len(replayed) == 6
    kernels.disable_cuda_graphs()
    output = x
    for layer in stack:
        output = layer(output)
    kernels.enable_cuda_graphs()
    assert_equal(found, gradients(stack[0], x, output))


def test_gradients_twice(rng, replayed):
    layer = make()
    warm_up(rng, layer)
    x = draw(rng)
    expected = by_launches(layer, x)
    output = layer(x)
    for _ in range(2):
        assert_equal(gradients(layer, x, output, retain_graph=True), expected)
    values(layer, draw(rng))
    with pytest.raises(RuntimeError, match="disable_cuda_graphs"):
        gradients(layer, x, output)
    assert len(replayed) == 3


def change(weight):
    weight.assign(2 * weight)


def move(weight):
    weight.value.data = weight.value.data.clone()


@pytest.mark.parametrize(("spoil", "message"), [(change, "in place"), (move, "moved")])
def test_weights_that_are_others_before_the_gradients(rng, replayed, spoil, message):
    layer = make()
    warm_up(rng, layer)
    x = draw(rng)
    output = layer(x)
    assert len(replayed) == 2
    spoil(layer.trainable_weights[0])
    with pytest.raises(RuntimeError, match=message):
        gradients(layer, x, output)


def test_only_calls_alike_are_recorded(rng, replayed):
    layer = make()
    for length in (5, 5, 7, 5):
        values(layer, draw(rng, length))
    assert not replayed
    warm_up(rng, layer, 5)
    for length in (7, 5):  # a batch of another shape in between
        x = draw(rng, length)
        assert_equal(values(layer, x), by_launches(layer, x))
    assert len(replayed) == 3
    warm_up(rng, layer, 7)
    assert len(replayed) == 4
    layer.trainable = False  # other gradients
    x = draw(rng, 7)
    layer(x)
    assert len(replayed) == 4
    layer.trainable = True
    assert_equal(values(layer, x), by_launches(layer, x))


def test_where_what_is_saved_is_not_at_hand(rng, replayed):
    """Nothing is recorded where tensors that gradients need are to be found by hooks."""
    layer = make()
    warm_up(rng, layer)
    x = draw(rng)
    output = checkpoint(layer, x, use_reentrant=False)
    assert len(replayed) == 1
    assert_equal(gradients(layer, x, output), by_launches(layer, x))


def test_weights_of_another_owner(rng, replayed):
    layer = make()
    warm_up(rng, layer)
    x = draw(rng)
    others = [2 * w.value.detach() for w in layer.trainable_weights]
    output, _ = layer.stateless_call(others, [], x)
    for w, value in zip(layer.trainable_weights, others, strict=True):
        w.assign(value)
    assert_equal([output], by_launches(layer, x)[:1])
    assert len(replayed) == 1


def test_without_memory_for_graphs(rng, replayed, monkeypatch):
    def refuse(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(recordings._Gradients, "store", refuse)
    layer = make()
    warm_up(rng, layer)
    x = draw(rng)
    assert_equal(values(layer, x), by_launches(layer, x))
    assert not replayed


def test_switch(rng, replayed):
    layer = make()
    assert kernels.is_cuda_graphs_enabled()
    warm_up(rng, layer)
    assert len(replayed) == 1
    kernels.disable_cuda_graphs()
    assert not kernels.is_cuda_graphs_enabled()
    try:
        values(layer, draw(rng))
    finally:
        kernels.enable_cuda_graphs()
    assert len(replayed) == 1
    warm_up(rng, layer)  # as what was recorded is gone
    assert len(replayed) == 2
