"""Chooses the backend before anything imports Keras: `pytest --backend jax`."""

import os
from pathlib import Path
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
    if config.getoption("--backend") == "jax":  # TensorFlow, too, compiles what JAX has exported
        flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        os.environ.setdefault("XLA_FLAGS", flags)
    if not hasattr(config, "workerinput"):  # what one process of the run compiles, all can load
        cache = tempfile.TemporaryDirectory(prefix="jax_cache_", ignore_cleanup_errors=True)
        config.add_cleanup(cache.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    # On a GPU, where JAX would round what products read.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    import torch  # Before TensorFlow: in the other order torch may crash on import.

    # For PyTorch alone: jax-triton compiles kernels, and can make nothing of interpreted ones.
    if os.environ["KERAS_BACKEND"] == "torch" and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def backends_of_kernels():
    """Where the kernels run on this machine: under JAX on a GPU alone."""
    import keras

    if keras.config.backend() == "jax":
        import jax

        if jax.default_backend() == "gpu":
            return "jax", "torch"
    return ("torch",)


# Files that run on some of the backends: on which, or a function that tells, and why not on the
# others.
ONLY = {
    "test_architecture.py": (("torch",), "it reads the source, and runs none of it"),
    "test_benchmark_reference.py": (("torch",), "the reference is written in torch alone"),
    "test_cuda_graphs.py": (("torch",), "JAX and TensorFlow compile what a layer is part of"),
    "test_definitions.py": (("torch",), "the definitions are NumPy and torch, without Keras"),
    "test_formats.py": (("tensorflow",), "TensorFlow alone writes these files"),
    "test_formats_elsewhere.py": (
        ("jax", "torch"),
        "TensorFlow writes the files, and has their tests",
    ),
    "test_host_copies.py": (("torch",), "JAX and TensorFlow compile what a layer is part of"),
    "test_jax_kernels.py": (("jax",), "PyTorch runs the kernels, TensorFlow has none"),
    "test_kernel_proof.py": (("jax", "torch"), "TensorFlow has no kernels"),
    "test_kernels.py": (
        backends_of_kernels,
        "without a GPU JAX cannot run the kernels, TensorFlow has none",
    ),
    "test_kernels_torch.py": (("torch",), "this is how PyTorch calls the kernels"),
    "test_loop_graphs.py": (("torch",), "JAX and TensorFlow compile loops"),
    "test_learning.py": (("jax",), "this benchmark trains many models at once, which needs JAX"),
    "test_serve.py": (("tensorflow",), "it serves a SavedModel; the scheduler has its tests"),
    "test_shard_kernels.py": (("torch",), "without a GPU PyTorch alone runs the kernels"),
    "test_sessions_of_a_saved_model.py": (
        ("tensorflow", "jax"),
        "TensorFlow writes PyTorch's SavedModels, and has their tests",
    ),
    "test_token_kernel.py": (("torch",), "without a GPU PyTorch alone runs the kernels"),
    "test_torch_module.py": (("torch",), "other backends replace no parameters"),
    "test_torch_compile.py": (("torch",), "only PyTorch has `torch.compile`"),
}


def runs_on(name, backend):
    backends, _ = ONLY.get(name, (BACKENDS, ""))
    return backend in (backends() if callable(backends) else backends)


def pytest_ignore_collect(collection_path, config):
    return None if runs_on(collection_path.name, config.getoption("--backend")) else True


def pytest_terminal_summary(terminalreporter, config):
    backend = config.getoption("--backend")
    asked = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    for name, (_, reason) in ONLY.items():
        path = Path(__file__).with_name(name)
        # A file that is named on the command line runs on any.
        if not runs_on(name, backend) and any(x in path.parents for x in asked):
            terminalreporter.write_line(f"NOT RUN with {backend}: {name}: {reason}")


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


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    """A process can hold so many compiled programs: beyond, JAX's compiler ends it."""
    yield
    import keras

    if keras.config.backend() == "jax":
        import jax

        jax.clear_caches()
