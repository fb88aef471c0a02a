"""A model as a function of TensorFlow, from which files of other formats are made."""

import keras

from keras_hla.backend.compiling import stateless
from keras_hla.streaming.model_call import ModelCall
from keras_hla.streaming.streaming_model import streaming_model

_NOT_TENSORFLOW = (
    "From TensorFlow alone this format is exact. Save the model, "
    '`model.save("model.keras")`, and export that file with '
    "`python -m keras_hla.export model.keras {path}`, which needs TensorFlow installed. "
    "Received: backend {backend}"
)


def check_backend(path):
    """Raises a `RuntimeError` that says what works if the backend is not TensorFlow."""
    backend = keras.config.backend()
    if backend != "tensorflow":
        raise RuntimeError(_NOT_TENSORFLOW.format(path=path, backend=backend))


def tensorflow_function(model, step, length, rename=str):
    """A `tf.function` of one dictionary of inputs, for any batch size.

    Args:
        model: the model.
        step: whether the states before and after are among its inputs and outputs.
        length: that of the sequences; `None` is any.
        rename: takes the name of a state, returns that of the state after.
    """
    import tensorflow as tf

    stream, whole = streaming_model(model), ModelCall(model)
    call = stream.step if step else lambda inputs: whole(inputs)[0]
    # LiteRT would read its own variables, which nothing sets, so that weights are constants.
    call = stateless(call, model.variables)
    weights = [v.numpy() for v in model.variables]
    states = stream.state_names

    def spec(name, x):
        shape = (None, length, *x.shape[2:]) if name in whole.sequences else (None, *x.shape[1:])
        return tf.TensorSpec(shape, x.dtype, name)

    specs = {n: spec(n, x) for n, x in stream.input.items() if step or n not in states}

    @tf.function(input_signature=[specs], autograph=False)
    def function(inputs):
        outputs = call(weights, inputs)
        return {rename(name) if name in states else name: x for name, x in outputs.items()}

    _check_precision(function.get_concrete_function())
    return function


def _check_precision(function):
    dtypes = {x.dtype.name for op in function.graph.get_operations() for x in op.outputs}
    low = sorted(dtypes & {"bfloat16", "float16"})
    if low:
        raise ValueError(
            "Argument `model` must compute in float32, as where "
            "`keras.saving.load_model` is given a file saved with that dtype policy. "
            f"Received: a model with {', '.join(low)}"
        )
