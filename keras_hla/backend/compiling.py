"""What is traced and compiled, on each backend of Keras."""

import contextlib
import functools
import threading
import weakref

import keras

from keras_hla.backend.loops import scan_serially

# Of XLA. On a GPU it would try for each product which kernel is fastest.
_FEW_OPTIMIZATIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_gpu_autotune_level": 0,
}


def is_torch_compiling():
    """Whether PyTorch traces the call, for `torch.compile` or a file, where it is the backend."""
    if keras.config.backend() != "torch":
        return False
    import torch

    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def remembered(function):
    """The function, which keeps its results; `torch.compile` traces it as if it did not."""
    kept = functools.lru_cache(maxsize=256)(function)
    if keras.config.backend() != "torch":
        return kept
    import torch

    @functools.wraps(function)
    def call(*arguments):
        return (function if torch.compiler.is_compiling() else kept)(*arguments)

    return call


def called_while_traced(function):
    """The function of strings, numbers and tuples, whose result `torch.compile` keeps as it is."""
    if keras.config.backend() != "torch":
        return function
    import torch

    return torch.compiler.assume_constant_result(function)


def traced(function, *inputs):
    """What the function returns, where the contents of tensors do not matter."""
    if keras.config.backend() == "jax":
        import jax

        kept = []

        def keep(*inputs):
            kept.append(function(*inputs))

        jax.eval_shape(keep, *inputs)
        return kept[0]
    return function(*inputs)


def stateless(function, variables):
    """`f(values, *inputs)`: the function with values in the place of the variables', for inference.

    Args:
        function: takes nests of tensors, returns a nest of tensors.
        variables: list of the `keras.Variable`s that it reads.
    """
    # What is compiled must not keep weights in memory that their layer has replaced.
    references = [weakref.ref(v) for v in variables]

    def with_values(values, *inputs):
        mapping = ((reference(), x) for reference, x in zip(references, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return function(*inputs)

    if keras.config.backend() == "torch":
        import torch

        return torch.no_grad()(with_values)
    return with_values


def compiled_for_one_call(function):
    """The function, which JAX compiles as a whole, in less time, to code that is slower."""
    if keras.config.backend() != "jax":
        return function
    import jax

    return jax.jit(function, compiler_options=_FEW_OPTIMIZATIONS)


class Compiled:
    """A function of tensors that is compiled, and reads the values of variables when called.

    Args:
        call: takes the list of the values, and nests of tensors.
        variables: list of the `keras.Variable`s. Only weak references to them are kept.
    """

    def __init__(self, call, variables):
        self._call = call
        self._references: list = [weakref.ref(v) for v in variables]

    def __call__(self, *inputs):
        return self._call(self._values(), *inputs)

    def compile_ahead(self, *inputs):
        """Begins to compile for such inputs, under JAX, which can while other code runs.

        Args:
            inputs: nests of what has the shape and the dtype of a tensor.
        """
        if keras.config.backend() != "jax":
            return
        import jax

        inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
        lowered = self._call.lower(self._values(), *inputs)

        def compile_it():
            with contextlib.suppress(Exception):  # The call will raise it.
                lowered.compile()

        # JAX keeps what it compiles, and a call waits for what is being compiled.
        threading.Thread(target=compile_it).start()

    def _values(self):
        # Under TensorFlow they are its variables, as XLA would copy tensors at each call.
        return [reference().value for reference in self._references]


def compiled(function, variables, jit_compile=None):
    """The `Compiled` function for inference, compiled anew for each combination of shapes.

    Args:
        function: takes and returns nests of tensors.
        variables: list of the `keras.Variable`s that it reads, whose values may change.
        jit_compile: under TensorFlow, whether XLA compiles it, as in `tf.function`.
    """
    call = stateless(function, variables)
    if keras.config.backend() == "jax":
        import jax

        call = jax.jit(call)
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        # A partial one, or TensorFlow warns of the traces of all that is compiled here together.
        call = tf.function(functools.partial(call), autograph=False, jit_compile=jit_compile)
    return Compiled(call, variables)


def compiled_scan(step, variables, output_dtype=None):
    """`scan(state, inputs)`, that is `scan_serially` of the step, `Compiled` for inference.

    It is compiled anew for each combination of shapes. Under PyTorch the step alone is
    traced, for a loop in Python; one that cannot be traced runs as it is, with a warning.

    Args:
        step: as in `scan_serially`.
        variables: as in `compiled`.
        output_dtype: as in `scan_serially`.
    """
    if keras.config.backend() == "torch":
        from keras_hla.backend.torch_loop import TracedLoop

        return Compiled(TracedLoop(stateless(step, variables)), variables)

    def scan(state, inputs):
        return scan_serially(step, state, inputs, output_dtype)

    # XLA takes longer to compile, and makes a loop of small steps 20 times as fast.
    return compiled(scan, variables, jit_compile=True)
