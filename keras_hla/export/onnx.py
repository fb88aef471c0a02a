"""ONNX files, for ONNX Runtime and others."""

from unittest import mock

import keras

from keras_hla.checks import check_positive_int
from keras_hla.export.tensorflow_function import check_backend, tensorflow_function
from keras_hla.types import StrPath


def export_onnx(
    model: keras.Model, path: StrPath, step: bool = False, length: int | None = None
) -> None:
    """Writes an ONNX file for whole sequences, or for pieces and states.

    To run it, neither Keras nor this package is needed. Inputs and outputs are
    named as by `keras_hla.streaming_model`, and free in batch size. But for states
    after a piece: as ONNX has no name for two things, the state after `"hla_S"`
    is `"next_hla_S"`.

    Args:
        model: Model in float32 that `keras_hla.streaming_model` takes, under
            TensorFlow.
        path: File to write.
        step: Whether the file takes the states before the sequences, and gives
            those after them. Before the first token they are zeros.
        length: Length of the sequences, or of the pieces. `None` is any.

    Raises:
        ImportError: if `tf2onnx` is not installed.
        RuntimeError: under JAX and torch. It names the command that exports a
            `.keras` file.
        ValueError: if the model cannot be streamed or is not in float32.

    Example:

    ```python
    keras_hla.export_onnx(model, "step.onnx", step=True)

    served = onnxruntime.InferenceSession("step.onnx")  # in any process
    ```
    """
    check_backend(path)
    check_positive_int("length", length, optional=True)
    try:
        import tf2onnx
    except ImportError as error:
        raise ImportError(
            'ONNX needs the package tf2onnx: `pip install "keras-hla[onnx]"`.'
        ) from error
    function = tensorflow_function(model, step, length, rename="next_{}".format)
    # Its optimizers and TensorFlow's together make wrong reshapes of a `Dense` whose length is
    # unknown, and ONNX Runtime optimizes what it loads anyway.
    with mock.patch("tf2onnx.optimizer._get_optimizers", dict):
        tf2onnx.convert.from_function(function, function.input_signature, output_path=str(path))
