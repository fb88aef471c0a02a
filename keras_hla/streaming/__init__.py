"""Streaming models, which read a sequence piece by piece, generation, and a scheduler for many."""

from keras_hla.streaming.generate import generate, generate_stream
from keras_hla.streaming.model_reader import ModelReader
from keras_hla.streaming.scheduler import Scheduler, SchedulerFullError
from keras_hla.streaming.scheduler_thread import SchedulerThread, TokenStream
from keras_hla.streaming.session import SavedSession, Session
from keras_hla.streaming.streaming_model import StreamingModel, streaming_model
from keras_hla.streaming.token_reader import TokenReader

__all__ = [
    "ModelReader",
    "SavedSession",
    "Scheduler",
    "SchedulerFullError",
    "SchedulerThread",
    "Session",
    "StreamingModel",
    "TokenReader",
    "TokenStream",
    "generate",
    "generate_stream",
    "streaming_model",
]
