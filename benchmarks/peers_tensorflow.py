"""Peers on TensorFlow: a minimal chunked form. Attention is that of Keras, see `contenders`."""

import tensorflow as tf

from benchmarks import chains
from benchmarks.minimal import minimal_peers

CHUNK = 128


def peers(case, operators):
    return minimal_peers(case, operators, minimal)


def minimal(operator, query, key, value):
    """The chunked form of a chain, and nothing else."""
    batch, length, heads, _ = query.shape
    padding = -length % CHUNK

    def chunks(x):
        """Shape (batch, heads, chunks, tokens, dim)."""
        x = tf.pad(tf.cast(x, "float32"), ((0, 0), (0, padding), (0, 0), (0, 0)))
        return tf.transpose(tf.reshape(x, (batch, -1, CHUNK, heads, x.shape[-1])), (0, 3, 1, 2, 4))

    mask = tf.linalg.band_part(tf.ones((CHUNK, CHUNK)), -1, 0)

    def attend(a, b, c, power):
        sums = tf.matmul(b, c, transpose_a=True)
        before = tf.cumsum(sums, axis=2, exclusive=True)
        scores = tf.matmul(a, b, transpose_b=True) * mask
        return scores @ c + a @ before

    output = chains.run(operator, chunks(query), chunks(key), chunks(value), attend)
    output = tf.transpose(output, (0, 2, 3, 1, 4))
    output = tf.reshape(output, (batch, length + padding, heads, output.shape[-1]))
    return tf.cast(output[:, :length], query.dtype)
