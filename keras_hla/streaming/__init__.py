"""Streaming models, which read a sequence piece by piece, and generation."""

from keras_hla.streaming.generate import generate, generate_stream
from keras_hla.streaming.streaming_model import StreamingModel, streaming_model

__all__ = ["StreamingModel", "generate", "generate_stream", "streaming_model"]
