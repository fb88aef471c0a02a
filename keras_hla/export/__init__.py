"""Export to files that need neither Keras nor this package, and what serves them."""

from keras_hla.export.litert import export_litert
from keras_hla.export.onnx import export_onnx
from keras_hla.export.saved_model import export_saved_model
from keras_hla.export.saved_model_reader import SavedModelReader

__all__ = ["SavedModelReader", "export_litert", "export_onnx", "export_saved_model"]
