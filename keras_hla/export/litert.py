"""LiteRT files, for phones and small devices."""

from pathlib import Path

import keras

from keras_hla.backend.tensors import DEFAULT_CHUNK_SIZE
from keras_hla.checks import check_positive_int
from keras_hla.export.tensorflow_function import check_backend, tensorflow_function
from keras_hla.streaming.check import check_streams
from keras_hla.types import StrPath


def export_litert(
    model: keras.Model, path: StrPath, step: bool = False, length: int | None = None
) -> None:
    """Writes a LiteRT file for whole sequences, or for pieces and states.

    It holds no operations but LiteRT's own, and one signature, `"serving_default"`.
    Inputs and outputs are named as by `keras_hla.streaming_model`, and free in
    batch size.

    Args:
        model: Model in float32 that `keras_hla.streaming_model` takes, under
            TensorFlow.
        path: File to write.
        step: Whether the file takes the states before the sequences, and gives
            those after them. Before the first token they are zeros.
        length: Length of the sequences, or of the pieces, which has to be known:
            an integer up to the chunk size of the model's layers, by default 128.
            With `step`, pieces of one file make a sequence of any length.

    Raises:
        RuntimeError: under JAX and torch. It names the command that exports a
            `.keras` file.
        ValueError: if the model cannot be streamed, is not in float32, or is
            quantized with its activations, or if the length is out of bounds.

    Example:

    ```python
    keras_hla.export_litert(model, "step.tflite", step=True, length=1)

    served = ai_edge_litert.interpreter.Interpreter("step.tflite")  # in any process
    ```
    """
    check_backend(path)
    import tensorflow as tf

    check_positive_int("length", length, optional=True)
    longest = min(layer.chunk_size or DEFAULT_CHUNK_SIZE for layer in check_streams(model).layers)
    if length is None or length > longest:  # with several chunks, tensors have too many axes
        raise ValueError(
            f"Argument `length` must be an integer from 1 to {longest}, the chunk size, in LiteRT. "
            "To read sequences of other lengths export pieces, as with `step=True, length=1`; or "
            f"another format: ONNX and SavedModels take any length. Received: length={length}"
        )
    function = tensorflow_function(model, step, length).get_concrete_function()
    _check_products(function)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], model)
    Path(path).write_bytes(converter.convert())


def _check_products(function):
    """Raises a `ValueError` where integers are multiplied, which LiteRT cannot convert."""
    products = (op for op in function.graph.get_operations() if "MatMul" in op.type)
    found = sorted({x.dtype.name for op in products for x in op.inputs if x.dtype.is_integer})
    if found:
        raise ValueError(
            "Argument `model` must multiply in float32 for LiteRT: quantize its weights alone, as "
            'with `Int8QuantizationConfig(activation_quantizer=None)` or `model.quantize("int4")`, '
            "or export another format: ONNX and SavedModels take any quantized model. Received: a "
            f"model with products of {', '.join(found)}"
        )
