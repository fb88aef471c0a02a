"""A model goes from one backend to another."""

from backends import relative_error
import keras
from keras.quantizers import Int8QuantizationConfig
import numpy as np
import pytest
from scripts import run_python

from keras_hla import layers

BACKENDS = ("tensorflow", "jax", "torch")

LOAD = """
import sys
import keras, numpy as np
import keras_hla
folder = sys.argv[1]
for name in ("model", "int8"):
    model = keras.saving.load_model(f"{folder}/{name}.keras")
    outputs = model.predict(np.load(f"{folder}/inputs.npy"), verbose=0)
    np.save(f"{folder}/{name}_{keras.config.backend()}.npy", outputs)
"""


@pytest.fixture(scope="module")
def model():
    """A small language model of several operators and kinds of decay."""
    keras.utils.set_random_seed(0)  # the same, whatever ran before
    tokens = keras.Input((None,), dtype="int32")
    h = keras.layers.Embedding(50, 16)(tokens)
    for operator, decay in (("hla2", None), ("ahla", "learned"), ("hla3", "input")):
        options = {"num_key_value_heads": 2, "conv_kernel_size": None, "decay": decay}
        layer = layers.HLA(4, 8, 6, operator=operator, **options)
        h = h + layer(keras.layers.RMSNormalization()(h))
    return keras.Model(tokens, keras.layers.Dense(50)(h))


def test_loads_under_the_other_backends(model, rng, tmp_path):
    tokens = rng.integers(0, 50, (3, 100)).astype("int32")
    quantized = keras.models.clone_model(model)
    quantized.set_weights(model.get_weights())
    quantized.quantize(config=Int8QuantizationConfig(activation_quantizer=None))
    # Scales are multiplied in another order: more rounding, but far less than that of int8.
    models = {"model": (model, 1e-5), "int8": (quantized, 1e-4)}
    for name, (saved, _) in models.items():
        saved.save(tmp_path / f"{name}.keras")
    np.save(tmp_path / "inputs.npy", tokens)
    for backend in set(BACKENDS) - {keras.config.backend()}:
        run_python("-c", LOAD, tmp_path, backend=backend)
        for name, (saved, tolerance) in models.items():
            outputs = np.load(tmp_path / f"{name}_{backend}.npy")
            assert relative_error(outputs, saved.predict(tokens, verbose=0)) <= tolerance


def test_imports_no_other_backend():
    backend = keras.config.backend()
    others = {"tensorflow": "tensorflow", "jax": "jax", "torch": "torch"}
    others.pop(backend)
    code = (
        "import importlib.util, sys, numpy as np\n"
        "class Blocked:\n"  # modules that can be looked for, but not imported
        "    def find_spec(self, name, *_):\n"
        f"        if name in {sorted(others.values())}:\n"
        "            return importlib.util.spec_from_loader(name, self)\n"
        "    def create_module(self, spec):\n"
        "        raise ImportError(spec.name)\n"
        "    def exec_module(self, module): pass\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import keras_hla\n"
        "layer = keras_hla.layers.HLA(2, 4)\n"
        "print(tuple(layer(np.zeros((1, 5, 8), 'float32')).shape))"
    )
    assert "(1, 5, 8)" in run_python("-c", code, backend=backend)
