"""What `keras_hla.distribution.split_sequence` sets and refuses."""

import weakref

import keras
import numpy as np
import pytest

import keras_hla
from keras_hla import distribution, kernels, layers

BACKEND = keras.config.backend()
AXIS = "parts"


@pytest.fixture
def axis(monkeypatch):
    """What `context_parallel` may be: under PyTorch it takes processes, which are not there."""
    if BACKEND == "torch":
        from keras_hla.backend import devices

        monkeypatch.setattr(devices.TorchDevices, "of", classmethod(lambda cls, _: cls(None, 0)))
    return AXIS


needs_engine = pytest.mark.skipif(
    BACKEND == "tensorflow", reason="it has no engine for it, as is tested here"
)


def make_model(**options):
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(11, 6)(tokens)
    inner = keras.Sequential([keras.Input((None, 6)), layers.HLADecoderBlock(2, 4)])
    x = layers.HLA(2, 4, name="last", **options)(inner(x))
    return keras.Model(tokens, keras.layers.Dense(11)(x))


def split_layers(model):
    return [x.context_parallel for x in model._flatten_layers() if isinstance(x, layers.HLA)]


@needs_engine
def test_all_layers_of_a_model_are_split_and_joined(axis):
    model = make_model()
    distribution.split_sequence(model, axis)
    assert split_layers(model) == [axis, axis]
    assert split_layers(keras.models.clone_model(model)) == [None, None]
    distribution.split_sequence(model, None)
    assert split_layers(model) == [None, None]


@pytest.mark.skipif(BACKEND != "torch", reason="JAX has no process groups")
def test_split_model_keeps_no_process_group_alive():
    """Its threads may abort the interpreter at its exit."""
    from torch import distributed as processes

    model = make_model()
    processes.init_process_group("gloo", store=processes.HashStore(), rank=0, world_size=1)
    try:
        distribution.split_sequence(model, processes.group.WORLD)
        tokens = np.ones((1, 5), "int32")
        whole = model(tokens).detach().numpy()
        reference = weakref.ref(processes.group.WORLD)
        assert split_layers(model) == [reference(), reference()]
    finally:
        processes.destroy_process_group()
    assert reference() is None
    with pytest.raises(
        ValueError, match="process group over which this model is split has been destroyed"
    ):
        model(tokens)
    distribution.split_sequence(model, None)
    np.testing.assert_allclose(model(tokens).detach().numpy(), whole, atol=1e-6)


@needs_engine
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"causal": False}, "layer 'last' must have causal=True. Received: causal=False"),
        ({"go_backwards": True}, "layer 'last' must have go_backwards=False"),
    ],
)
def test_layers_without_an_order_are_refused_and_nothing_is_changed(axis, options, named):
    model = make_model(**options)
    with pytest.raises(ValueError, match=named):
        distribution.split_sequence(model, axis)
    assert split_layers(model) == [None, None]
    with pytest.raises(ValueError, match=named):
        model.get_layer("last").context_parallel = axis


@needs_engine
def test_both_directions_are_refused(axis):
    layer = keras.layers.Bidirectional(layers.HLA(2, 4))
    layer.build((None, None, 6))
    with pytest.raises(ValueError, match="must have go_backwards=False"):
        distribution.split_sequence(layer, axis)


@pytest.mark.parametrize("model", [keras.layers.Dense(3), "model"])
def test_what_holds_no_layer_is_refused(model):
    with pytest.raises(ValueError, match="Argument `model` must be a layer or model that holds"):
        distribution.split_sequence(model, AXIS)


def test_a_cell_in_an_rnn_is_refused():
    model = keras.Sequential([keras.layers.RNN(layers.HLACell(2, 4)), layers.HLA(2, 4)])
    with pytest.raises(ValueError, match="not by their cells alone"):
        distribution.split_sequence(model, AXIS)


def test_what_means_no_devices_is_refused():
    wrong = "needs the JAX or the PyTorch" if BACKEND == "tensorflow" else "must be"
    for devices in (4, object()) if BACKEND == "jax" else (AXIS, 4):
        with pytest.raises(ValueError, match=f"`context_parallel` {wrong}"):
            distribution.split_sequence(make_model(), devices)


@needs_engine
def test_a_split_model_neither_streams_nor_generates(axis):
    model = make_model()
    distribution.split_sequence(model, axis)
    split = r"must have context_parallel=None, as `.*split_sequence\(model, None\)` makes it"
    with pytest.raises(ValueError, match=split):
        keras_hla.streaming_model(model)
    with pytest.raises(ValueError, match=split):
        keras_hla.generate(model, [1, 2, 3], 4)
    distribution.split_sequence(model, None)
    assert keras_hla.generate(model, [1, 2, 3], 4).shape == (4,)
    distribution.split_sequence(model, axis)
    with pytest.raises(ValueError, match=split):
        keras_hla.generate(model, [1, 2, 3], 4)


@pytest.mark.skipif(BACKEND != "torch", reason="JAX compiles whole layers anyway.")
def test_a_split_layer_is_one_function(axis, monkeypatch):
    monkeypatch.setattr(kernels, "choose", lambda *_, **__: kernels.Choice("triton", "asked for"))
    block = layers.HLADecoderBlock(2, 8, remat_length=4)
    block.build((None, None, 16))
    distribution.split_sequence(block, axis)
    for length, reason in ((4, None), (0, "no tokens"), (5, "longer than `remat_length`")):
        shard = keras.ops.ones((1, length, 16))
        assert block.mixer.why_not_fused(shard) is None
        found = block._why_not_fused(shard, None, None, False)
        assert reason in found if reason else found is None


@pytest.mark.skipif(BACKEND != "jax", reason="Others know at once whether there are devices.")
def test_an_axis_is_needed_when_a_model_is_called(axis):
    model = make_model()
    distribution.split_sequence(model, axis)
    with pytest.raises(ValueError, match="must be the name of an axis of the mesh"):
        model(np.ones((1, 4), "int32"))
