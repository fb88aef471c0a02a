"""What exported functions need, on each backend of Keras."""

import keras


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
            "with_gradient": False,  # or TensorFlow writes the backward pass of each function, too
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
