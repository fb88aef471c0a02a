"""From a trained model to one that reads a sequence piece by piece, and writes on."""

from keras_hla.streaming.streaming_model import StreamingModel, streaming_model

__all__ = ["StreamingModel", "streaming_model"]
