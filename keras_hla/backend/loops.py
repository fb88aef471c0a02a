"""Loops over the entries of tensors, differentiable on each backend of Keras."""

import keras
from keras import ops

_NOT_RECOMPUTED = (
    "Where a sequence is longer than `remat_length` it is recomputed for its gradients, and "
    "there is no {}. Use a larger `remat_length`, or None."
)


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

    if keras.config.backend() == "jax":
        from keras_hla.backend.jax_axes import differing_along, differing_axes

        # As they will differ where the inputs do, and are zeros at first.
        state = differing_along(differing_axes(state, inputs), state)
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
    """`scan_serially` for large entries, each of which the backward pass recomputes.

    It keeps the states between the entries, and what it needs of one entry at a time. But
    `torch.compile` chooses by itself what to keep.

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
        import torch

        if torch.compiler.is_compiling():  # No checkpoint may call layers there.
            return scan_serially(step, state, inputs)
        step = _recomputable_by_torch(step, variables)
    return scan_serially(keras.remat(step), state, inputs)


def recomputed(function, variables, devices):
    """The function of tensors, which the backward pass recomputes.

    Under PyTorch that runs no collectives: processes may differ in what they recompute.

    Args:
        function: takes and returns nests of tensors.
        variables: list of the `keras.Variable`s that it reads.
        devices: those whose collectives it runs, as `keras_hla.backend.devices` makes them.
    """
    if keras.config.backend() == "torch":
        import torch

        if torch.compiler.is_compiling():
            return function
        function = devices.exchanging_once(_recomputable_by_torch(function, variables))
    return keras.remat(function)


def _recomputable_by_torch(function, variables):
    """The function, which reads the values that variables have now when it is called again."""
    from keras.src.backend import in_stateless_scope  # which has no public name
    import torch

    try:  # What recomputes needs such hooks, which some transforms forbid.
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            pass
    except RuntimeError as error:
        raise ValueError(_NOT_RECOMPUTED.format("gradient by `torch.func`")) from error
    if not in_stateless_scope():
        return function
    values = [(v, v.value) for v in variables]

    def call(*arguments, **options):  # in the backward pass, too, which the scope does not hold
        with keras.StatelessScope(state_mapping=values):
            return function(*arguments, **options)

    return call


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
