"""SavedModels that answer whole sequences and serve streams."""

import keras
from keras import ops

from keras_hla.backend.exporting import check_batch_sizes, export_options
from keras_hla.export.session import Session
from keras_hla.streaming.model_call import ModelCall
from keras_hla.streaming.streaming_model import streaming_model
from keras_hla.types import StrPath

_FROM_TORCH = (
    "Keras writes no SavedModel of any length under torch. Save the model, "
    '`model.save("model.keras")`, and export that file with '
    "`python -m keras_hla.export model.keras {path}`, which needs TensorFlow installed."
)


def export_saved_model(model: keras.Model, path: StrPath, stateful: bool = False) -> None:
    """Writes a SavedModel for whole sequences and for streams.

    The file runs without Keras and without this package. Inputs and outputs have
    the names that `keras_hla.streaming_model` gives them, and any batch size and
    length.

    | signature | inputs | outputs |
    | --- | --- | --- |
    | `serving_default` | those of the model: whole sequences | those of the model |
    | `serving_masked` | the same and `mask` | those of the model |
    | `initial_state` | `batch_size`, an int32 scalar | states before the first token |
    | `step` | those of the model: a piece; states before it | those of the model; states after it |
    | `step_masked` | the same and `mask` | the same |

    `mask` is boolean, `(batch, length)`, true for unmasked tokens; the outputs of
    masked tokens are undefined. Under JAX, a piece must have at least one token.
    Floating-point outputs are float32, or float64 under a float64 policy.

    Args:
        model: Model that `keras_hla.streaming_model` takes, under TensorFlow or
            JAX. From JAX, the file runs on CPUs and on CUDA, and has no gradients.
        path: Folder to write.
        stateful: Whether the SavedModel keeps the states itself, for a single
            session of batch size 1. Its signatures are `serving_default`, `step`,
            which takes and returns no states, and `reset`, which has no inputs.

    Raises:
        ValueError: if the model cannot be streamed.
        RuntimeError: under PyTorch. The error names the command that exports a `.keras` file.

    Example:

    ```python
    keras_hla.export_saved_model(model, "saved_model")

    served = tf.saved_model.load("saved_model")  # in any process
    states = served.signatures["initial_state"](batch_size=tf.constant(1))
    outputs = served.signatures["step"](tokens=tf.zeros((1, 7), "int32"), **states)
    ```
    """
    if keras.config.backend() == "torch":
        raise RuntimeError(_FROM_TORCH.format(path=path))
    whole, stream = ModelCall(model), streaming_model(model)
    archive = keras.export.ExportArchive()
    sequences = {*whole.sequences, "mask"}

    def add(name, function, inputs, batch=None):
        specs = {
            key: keras.InputSpec(shape=(batch, *x.shape[1:]), dtype=x.dtype, name=key)
            for key, x in inputs.items()
        }

        def endpoint(inputs):
            check_batch_sizes(inputs)
            return _widen(function(inputs))

        archive.add_endpoint(name, endpoint, [specs], **export_options(specs, sequences))

    def answer(inputs):
        return whole(inputs, mask=inputs.get("mask"))[0]

    inputs = {name: x for name, x in stream.input.items() if name not in stream.state_names}
    session = Session(stream) if stateful else None
    archive.track(session or stream)  # before the endpoints are added: JAX counts the variables
    add("serving_default", answer, inputs)
    if session:
        add("step", session.step, inputs, batch=1)
        archive.add_endpoint("reset", session.reset, [])
    else:
        mask = {"mask": keras.KerasTensor((None, None), "bool")}
        add("serving_masked", answer, inputs | mask)
        add("step", stream.step, stream.input)
        add("step_masked", stream.step, stream.input | mask)
        archive.add_endpoint("initial_state", _initial_state(stream))
    archive.write_out(str(path), verbose=False)


def _widen(outputs):
    """Low precision is for inside: not every client has a type for it."""
    return {
        name: ops.cast(x, "float32") if x.dtype in ("float16", "bfloat16") else x
        for name, x in outputs.items()
    }


def _initial_state(stream):
    """As TensorFlow computes it, since JAX makes no array whose size is an input."""
    import tensorflow as tf

    states = {name: stream.input[name] for name in stream.state_names}

    @tf.function(input_signature=[tf.TensorSpec((), "int32", "batch_size")], autograph=False)
    def initial_state(batch_size):
        return {n: tf.zeros((batch_size, *x.shape[1:]), x.dtype) for n, x in states.items()}

    initial_state.get_concrete_function()
    return initial_state
