"""A language model of causal attention with a key-value cache: the peer of a state."""

import keras
from keras import layers, ops

from keras_hla.backend.compiling import compiled_scan


class CachedAttention(layers.Layer):
    """A block of attention and gated MLP, for one token with the keys and values before it."""

    def __init__(self, width, heads, hidden):
        super().__init__()
        self.width, self.heads, self.hidden = width, heads, hidden

    def build(self, shape):
        self.norms = [layers.RMSNormalization() for _ in range(2)]
        width, hidden = self.width, self.hidden
        sizes = {"qkv": 3 * width, "out": width, "gate": hidden, "up": hidden, "down": width}
        self.dense = {name: layers.Dense(size, use_bias=False) for name, size in sizes.items()}
        for norm in self.norms:
            norm.build((None, width))
        for name, dense in self.dense.items():
            dense.build((None, hidden if name == "down" else width))

    def call(self, x, cache, position):
        """Tensor `(batch, width)`, cache `(2, batch, heads, context, dim)`, with the token after.

        The context is that of the cache, of which the tokens up to `position` are read.
        """
        dim = self.width // self.heads
        q, k, v = ops.split(self.dense["qkv"](self.norms[0](x)), 3, axis=-1)
        q, k, v = (ops.reshape(y, (-1, self.heads, 1, dim)) for y in (q, k, v))
        cache = _write(cache, position, ops.stack([k, v]))
        scores = q @ ops.swapaxes(cache[0], -1, -2) * dim**-0.5
        scores = ops.where(ops.arange(cache.shape[3]) <= position, scores, -1e9)
        read = ops.softmax(scores) @ cache[1]
        x = x + self.dense["out"](ops.reshape(read, (-1, self.width)))
        y = self.norms[1](x)
        return x + self.dense["down"](ops.silu(self.dense["gate"](y)) * self.dense["up"](y)), cache


def _write(cache, position, token):
    token = ops.cast(token, cache.dtype)
    if keras.config.backend() == "torch":  # in place, as XLA does by itself
        return cache.index_copy_(3, ops.cast(position[None], "int64"), token)
    return ops.slice_update(cache, (0, 0, 0, position, 0), token)


class CachedModel:
    """Embedding, blocks of attention, and logits, in the dtype of Keras' policy.

    Args:
        vocabulary: number of tokens.
        width: features of a token.
        heads: heads of each block.
        hidden: width of the MLPs.
        count: number of blocks.
    """

    def __init__(self, vocabulary, width, heads, hidden, count):
        self.embedding, self.head = layers.Embedding(vocabulary, width), layers.Dense(vocabulary)
        self.blocks = [CachedAttention(width, heads, hidden) for _ in range(count)]
        self.cache_shape = (heads, width // heads)
        self.embedding.build()
        self.head.build((None, width))
        for block in self.blocks:
            block.build(None)
        self._scan = compiled_scan(self._step, self.variables, "int32")

    @property
    def variables(self):
        return [v for x in (self.embedding, self.head, *self.blocks) for v in x.variables]

    def caches(self, context, batch=1):
        heads, dim = self.cache_shape
        shape, dtype = (2, batch, heads, context, dim), self.head.compute_dtype
        return [ops.zeros(shape, dtype) for _ in self.blocks]

    def write(self, token, caches, positions):
        """Generates the most likely token at each of the positions."""
        return self._scan((token, *caches), (positions,))[0]

    def _step(self, state, entries):
        token, *caches = state
        x, new = self.embedding(token), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, updated = block.call(x, cache, entries[0])
            new.append(updated)
        token = ops.cast(ops.argmax(self.head(x), axis=-1), "int32")
        return token, (token, *new)
