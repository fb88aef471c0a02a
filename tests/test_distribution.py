"""Several devices train what one device trains, with each framework's own engine."""

import keras
import numpy as np
import pytest
from scripts import run_python

from keras_hla.hub import HLABackbone

BACKEND = keras.config.backend()
CHECKED = {
    "jax": ["data parallel", "model parallel", "saved and streamed"],
    "tensorflow": ["mirrored", "saved and streamed", "exported"],
    "torch": [
        "DistributedDataParallel",
        "fully_shard",
        "sums in fit",
        "fused",
        "saved and streamed",
    ],
}


def test_training_on_several_devices():
    """One test of all, as it takes long to start processes and to compile."""
    printed = run_python("tests/train_on_devices.py", backend=BACKEND)
    assert [x for x in printed.splitlines() if x in CHECKED[BACKEND]] == CHECKED[BACKEND]


def mesh_of(*shape):
    devices = [f"cpu:{i}" for i in range(np.prod(shape))]
    return keras.distribution.DeviceMesh(shape, ("batch", "model"), devices)


def test_layouts_are_for_meshes_and_their_axes():
    layouts = HLABackbone.get_layout_map(mesh_of(2, 2))
    assert layouts["decoder_block_11/mixer/cell/key/kernel"].axes == ("batch", "model")
    assert layouts["decoder_block_11/down/kernel"].axes == ("model", "batch")
    assert layouts["decoder_block_0/mixer/cell/norm/scale"] is None
    with pytest.raises(ValueError, match="`device_mesh` must be a"):
        HLABackbone.get_layout_map([1, 4])
    with pytest.raises(ValueError, match="`model_parallel_dim_name` must be an axis of the mesh"):
        HLABackbone.get_layout_map(mesh_of(2, 2), model_parallel_dim_name="heads")
    with pytest.raises(ValueError, match="`data_parallel_dim_name` must be an axis of the mesh"):
        HLABackbone.get_layout_map(mesh_of(2, 2), data_parallel_dim_name="data")


@pytest.mark.skipif(BACKEND != "jax", reason="Keras splits weights under JAX alone")
@pytest.mark.parametrize(
    ("argument", "sizes"),
    [
        ("num_heads", {"num_heads": 6, "key_dim": 4}),
        ("num_key_value_heads", {"num_key_value_heads": 2}),
        ("intermediate_dim", {"intermediate_dim": 30}),
        ("vocabulary_size", {"vocabulary_size": 30}),
        ("hidden_dim", {"hidden_dim": 15, "key_dim": 4}),
    ],
)
def test_sizes_that_do_not_divide_are_refused(argument, sizes):
    layouts = HLABackbone.get_layout_map(mesh_of(2, 4))
    engine = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    sizes = {"vocabulary_size": 32, "num_layers": 1, "num_heads": 4, "hidden_dim": 16, **sizes}
    with (
        engine.scope(),
        pytest.raises(ValueError, match=f"Argument `{argument}` must be a multiple of the"),
    ):
        HLABackbone(**sizes)
