"""Export to files that need neither Keras nor this package."""

from keras_hla.export.litert import export_litert
from keras_hla.export.onnx import export_onnx
from keras_hla.export.saved_model import export_saved_model

__all__ = ["export_litert", "export_onnx", "export_saved_model"]
