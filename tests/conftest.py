"""Chooses the backend before anything imports Keras: `pytest --backend jax`."""

import os
import tempfile

import pytest

BACKENDS = ("tensorflow", "jax", "torch")


def pytest_addoption(parser):
    parser.addoption(
        "--backend",
        choices=BACKENDS,
        default=os.environ.get("KERAS_BACKEND", "tensorflow"),
        help="backend of Keras for this run",
    )


def pytest_configure(config):
    os.environ["KERAS_BACKEND"] = config.getoption("--backend")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # JAX compiles for most of the time here; the README's code is run without this.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if not hasattr(config, "workerinput"):  # what one process of the run compiles, all can load
        cache = tempfile.TemporaryDirectory(prefix="jax_cache_", ignore_cleanup_errors=True)
        config.add_cleanup(cache.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    import torch  # Before TensorFlow: in the other order torch may crash on import.

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


# What is the same on other backends: definitions, which are torch or NumPy; kernels, which JAX has
# no interpreter for; a server without Keras; SavedModels in use, which TensorFlow and JAX make; and
# files that TensorFlow alone makes.
ONLY = {
    "test_benchmark_reference.py": ("torch",),
    "test_definitions.py": ("torch",),
    "test_formats.py": ("tensorflow",),
    "test_formats_elsewhere.py": ("jax", "torch"),
    "test_kernels.py": ("torch",),
    "test_serve.py": ("tensorflow",),
    "test_sessions_of_a_saved_model.py": ("tensorflow", "jax"),
}


def pytest_ignore_collect(collection_path, config):
    backend = config.getoption("--backend")
    return True if backend not in ONLY.get(collection_path.name, BACKENDS) else None


def pytest_report_header(config):
    import keras

    return f"keras {keras.__version__}, backend {keras.config.backend()}"


@pytest.fixture
def rng():
    import numpy as np

    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _fresh_keras():
    import keras

    keras.utils.clear_session(free_memory=False)  # collecting garbage takes half a second
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")
