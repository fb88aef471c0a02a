"""Higher-order Linear Attention layers for Keras 3 (Zhang, Qin, Wang, Gu, arXiv:2510.27258)."""

from keras_hla import distribution, kernels, layers, operators, ops
from keras_hla.export import export_litert, export_onnx, export_saved_model
from keras_hla.streaming import generate, generate_stream, streaming_model

__version__ = "0.2.0"
__all__ = [
    "__version__",
    "distribution",
    "export_litert",
    "export_onnx",
    "export_saved_model",
    "generate",
    "generate_stream",
    "kernels",
    "layers",
    "operators",
    "ops",
    "streaming_model",
]
