"""What differs between the backends of Keras."""

import functools
import weakref

import keras
from keras import ops

_NOT_RECOMPUTED = (
    "Where a sequence is longer than `remat_length` it is computed again for its gradients, and "
    "there is no {}. Use a larger `remat_length`, or None."
)
# TensorFlow is slow at many small products on a CPU.
DEFAULT_CHUNK_SIZE = 128 if keras.config.backend() == "tensorflow" else 64


def size_at_run_time(length, largest):
    """The size of pieces, at most `largest`, of a length that is unknown at trace time."""
    if keras.config.backend() == "tensorflow":
        # Or a single token would cost as much as a chunk.
        return ops.clip(length, 1, largest)
    return largest  # JAX cannot divide by a symbolic size.


def entries_to_loop_over(length):
    """The length, or 1 where that is 0 and `scan_serially` can loop over no empty inputs."""
    if isinstance(length, int):
        return max(length, 1)
    return ops.maximum(length, 1) if keras.config.backend() == "tensorflow" else length


def contiguous(x):
    """A tensor that is about to be read by many products, with its axes in order in memory."""
    # torch would copy it for each of the products; compilers choose by themselves.
    return x.contiguous() if keras.config.backend() == "torch" else x


def cumulative_sum(x):
    """The sums along the last axis, in the dtype of `x`."""
    if keras.config.backend() == "torch":  # where `keras.ops.cumsum` makes float32 of float64
        return x.cumsum(-1, dtype=x.dtype)
    if keras.config.backend() == "jax":
        import jax

        # Or XLA sums up constant decays while it compiles, which takes seconds for long sequences.
        x = jax.lax.optimization_barrier(x)
    return ops.cumsum(x, axis=-1)


def cos_and_sin(x):
    """Both in the dtype of `x`."""
    if keras.config.backend() == "jax":  # where those of `keras.ops` make float32 of float64
        import jax.numpy as jnp

        return jnp.cos(x), jnp.sin(x)
    return ops.cos(x), ops.sin(x)


def scan_serially(step, state, inputs, output_dtype=None):
    """Calls `output, state = step(state, entries)` for entry after entry, differentiably.

    Args:
        step: takes the tuple of states and the tuple of one entry of each of the inputs.
        state: tuple of tensors, whose shapes and dtypes `step` keeps.
        inputs: tuple of tensors whose first axis is that of the entries.
        output_dtype: dtype of the outputs; `None` is that of the first of the inputs.

    Returns:
        The outputs, stacked along the first axis, and the last states.
    """
    if keras.config.backend() == "tensorflow":
        # `keras.ops.scan` wants outputs shaped like states there, and has no gradient under XLA.
        return _scan_tensorflow(step, state, inputs, output_dtype)

    def body(state, entries):
        output, state = step(state, entries)
        return state, output

    state, outputs = ops.scan(body, state, inputs)
    return outputs, state


def _scan_tensorflow(step, state, inputs, output_dtype=None):
    import tensorflow as tf

    length = inputs[0].shape[0]
    bound = tf.shape(inputs[0])[0] if length is None else length
    outputs = tf.TensorArray(output_dtype or inputs[0].dtype, size=bound, element_shape=None)

    def body(t, state, outputs):
        output, state = step(state, tuple(x[t] for x in inputs))
        return t + 1, state, outputs.write(t, output)

    _, state, outputs = tf.while_loop(
        lambda t, *_: t < bound,
        body,
        (0, tuple(state), outputs),
        maximum_iterations=bound,
        parallel_iterations=1,
    )
    return outputs.stack(), state


def scan_recomputed(step, state, inputs, variables):
    """`scan_serially` for large entries, of which the backward pass computes each again.

    It keeps the states between the entries, and what it needs of one entry at a time.

    Args:
        step: as in `scan_serially`.
        state: as in `scan_serially`.
        inputs: as in `scan_serially`.
        variables: list of the `keras.Variable`s that `step` reads.
    """
    if keras.config.backend() == "tensorflow":
        try:
            return _scan_recomputed_tensorflow(step, state, inputs, variables)
        except NotImplementedError as error:
            raise ValueError(_NOT_RECOMPUTED.format("forward mode under TensorFlow")) from error
    if keras.config.backend() == "torch":
        _check_that_torch_recomputes()
    return scan_serially(keras.remat(step), state, inputs)


def _check_that_torch_recomputes():
    import torch

    try:  # What recomputes needs such hooks, which some transforms forbid.
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            pass
    except RuntimeError as error:
        raise ValueError(_NOT_RECOMPUTED.format("gradient by `torch.func`")) from error


def _scan_recomputed_tensorflow(step, state, inputs, variables):
    # In a `tf.while_loop` a recomputed function finds gradients of its arguments alone, and none
    # of booleans.
    import tensorflow as tf

    dtypes = [x.dtype for x in inputs]
    variables = [v for v in variables if "float" in v.dtype]
    values = tuple(tf.convert_to_tensor(v) for v in variables)

    @tf.recompute_grad
    def recomputed(state, entries, values):
        with keras.StatelessScope(state_mapping=zip(variables, values, strict=True)):
            return step(state, tuple(map(tf.cast, entries, dtypes)))

    inputs = tuple(tf.cast(x, state[0].dtype) if x.dtype == tf.bool else x for x in inputs)
    return _scan_tensorflow(lambda *entry: recomputed(*entry, values), state, inputs)


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


def stateless(function, variables, jit=True):
    """`f(values, *inputs)`: the function with values in the place of the variables', for inference.

    Args:
        function: takes nests of tensors, returns a nest of tensors.
        variables: list of the `keras.Variable`s that it reads.
        jit: whether JAX compiles it.
    """
    # What is compiled must not keep weights in memory that their layer has replaced.
    references = [weakref.ref(v) for v in variables]

    def with_values(values, *inputs):
        mapping = ((reference(), x) for reference, x in zip(references, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return function(*inputs)

    if keras.config.backend() == "jax" and jit:
        import jax

        return jax.jit(with_values)
    if keras.config.backend() == "torch":
        import torch

        return torch.no_grad()(with_values)
    return with_values


def compiled(function, variables, jit_compile=None):
    """The function for inference, compiled anew for each combination of shapes.

    Args:
        function: takes and returns nests of tensors.
        variables: list of the `keras.Variable`s that it reads, whose values may change. Only
            weak references to them are kept.
        jit_compile: under TensorFlow, whether XLA compiles it, as in `tf.function`.
    """
    call = stateless(function, variables)
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        # A partial one, or TensorFlow warns of the traces of all that is compiled here together.
        call = tf.function(functools.partial(call), autograph=False, jit_compile=jit_compile)
    values = _values(variables)
    return lambda *inputs: call(values(), *inputs)


def _values(variables):
    """A function that returns the values of variables at the time, as a list."""
    # Under TensorFlow they are its variables, as XLA would copy tensors at each call.
    references: list = [weakref.ref(v) for v in variables]
    return lambda: [reference().value for reference in references]


def compiled_scan(step, variables, output_dtype=None):
    """`scan(state, inputs)`, that is `scan_serially` of the step, for inference.

    It is compiled anew for each combination of shapes. Under PyTorch the step alone is
    traced, for a loop in Python; one that cannot be traced runs as it is, with a warning.

    Args:
        step: as in `scan_serially`.
        variables: as in `compiled`.
        output_dtype: as in `scan_serially`.
    """
    if keras.config.backend() == "torch":
        from keras_hla.torch_loop import TracedLoop

        loop, values = TracedLoop(stateless(step, variables)), _values(variables)
        return lambda state, inputs: loop(values(), state, inputs)

    def scan(state, inputs):
        return scan_serially(step, state, inputs, output_dtype)

    # XLA takes longer to compile, and makes a loop of small steps 20 times as fast.
    return compiled(scan, variables, jit_compile=True)


def export_options(specs, sequences):
    """Options of `ExportArchive.add_endpoint` for a function of one dictionary.

    Args:
        specs: dictionary of `keras.InputSpec`s.
        sequences: names of those whose axis 1 is the length, the same for all.
    """
    if keras.config.backend() != "jax":
        return {}

    def symbols(name, shape):
        axes = ["batch" if shape[0] is None else str(shape[0]), *map(str, shape[1:])]
        if name in sequences:
            axes[1] = "length"
        return f"({', '.join(axes)})"

    return {
        "jax2tf_kwargs": {
            "polymorphic_shapes": [{name: symbols(name, x.shape) for name, x in specs.items()}],
            "native_serialization_platforms": ("cpu", "cuda"),
        }
    }


def check_batch_sizes(inputs):
    """Has an exported function refuse inputs of different batch sizes.

    TensorFlow would repeat what has a batch size of 1; JAX checks by itself.

    Args:
        inputs: dictionary of tensors, whose batch sizes are known when the function runs.
    """
    if keras.config.backend() != "tensorflow":
        return
    import tensorflow as tf

    (first, x), *others = inputs.items()
    for name, other in others:
        message = f"Input '{name}' must have the batch size of '{first}'."
        tf.debugging.assert_equal(tf.shape(other)[0], tf.shape(x)[0], message)
