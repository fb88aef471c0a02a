"""From a trained model to files that need neither Keras nor this package."""

from keras_hla.export.saved_model import export_saved_model

__all__ = ["export_saved_model"]
