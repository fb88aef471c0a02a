"""The operators as functions on tensors `(batch, length, heads, dim)`.

Like the operations of Keras, they take symbolic tensors too, `keras.Input`s, and
become nodes of a functional model, which is saved with them.
"""

from keras_hla.ops.attention import (
    attention_step,
    causal_linear_attention,
    higher_order_attention,
)
from keras_hla.ops.segment_algebra import combine, summarize
from keras_hla.ops.weights import attention_weights

__all__ = [
    "attention_step",
    "attention_weights",
    "causal_linear_attention",
    "combine",
    "higher_order_attention",
    "summarize",
]
