"""Higher-order Linear Attention layers for Keras 3 (Zhang, Qin, Wang, Gu, arXiv:2510.27258).

These modules are public, by the names in their `__all__`; all others are private:

- `layers`: `HLA`, its cell `HLACell`, and `HLADecoderBlock`.
- `ops`: the operators as functions of tensors.
- `operators`: the operators as classes, and `register` for custom ones.
- `kernels`: which implementation runs, and why.
- `streaming`: streaming models, generation, and a scheduler of many sessions.
- `export`: files that need neither Keras nor this package, and what reads them for a scheduler.
- `distribution`: context parallelism.
- `hub`: language models for keras-hub, which it needs.
- `torch_module`: layers for what replaces parameters in PyTorch, which it needs.
- `types`: names of types, for annotations.
"""

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
