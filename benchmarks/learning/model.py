"""The model around a mixer: an embedding, blocks, and a head for the places that are asked."""

import keras
from keras import layers, ops

from benchmarks.learning import mixers
from keras_hla.layers.rms_normalization import RMSNormalization

EMBEDDING_SCALE = 0.02
MULTIPLE = 8  # the size of an MLP is a multiple of it


class Block(layers.Layer):
    """Norm, mixer and residual; and norm, gated MLP of a `hidden` size and residual."""

    def __init__(self, mixer, hidden, **kwargs):
        super().__init__(**kwargs)
        self.mixer, self.hidden = mixer, hidden

    def build(self, shape):
        self.norm = RMSNormalization()
        self.norm.build(shape)
        self.mixer.build(shape)
        if self.hidden:
            self.mlp_norm = RMSNormalization()
            self.gate_up = layers.Dense(2 * self.hidden, use_bias=False)
            self.down = layers.Dense(shape[-1], use_bias=False)
            self.mlp_norm.build(shape)
            self.gate_up.build(shape)
            self.down.build((*shape[:-1], self.hidden))

    def call(self, x, mask=None):
        x = x + self.mixer(self.norm(x), mask=mask)
        if not self.hidden:
            return x
        gate, up = ops.split(self.gate_up(self.mlp_norm(x)), 2, axis=-1)
        return x + self.down(ops.silu(gate) * up)

    def compute_output_spec(self, x, mask=None):
        return keras.KerasTensor(x.shape, self.compute_dtype)


def make(task, mixer, hidden, implementation="portable"):
    """A model of a list: inputs, then places and a mask where the task has them."""
    reads_tokens = task.metric != "error"
    x = keras.Input((None,), dtype="int32") if reads_tokens else keras.Input((None, task.inputs))
    inputs = [x]
    if reads_tokens:
        start = keras.initializers.RandomNormal(
            stddev=EMBEDDING_SCALE
        )  # a new one, with its own seed
        x = layers.Embedding(task.inputs, task.width, embeddings_initializer=start)(x)
    else:
        x = layers.Dense(task.width)(x)
    places = keras.Input((None,), dtype="int32") if task.placed else None
    mask = keras.Input((None,), dtype="bool") if task.masked else None
    inputs += [x for x in (places, mask) if x is not None]
    for number in range(task.layers):
        name = mixers.of_layer(mixer, number)
        layer = mixers.make(name, task.heads, task.width // task.heads, implementation)
        x = Block(layer, hidden)(x, mask=mask)
    if places is not None:
        x = ops.take_along_axis(x, places[..., None], axis=1)
    x = RMSNormalization()(x)
    return keras.Model(inputs, layers.Dense(task.outputs, use_bias=False)(x))


def hidden_size(task, mixer):
    """The size of MLPs that gives a model as many weights as a model of `hla2`."""
    if not task.mlp:
        return 0
    usual = -(-8 * task.width // (3 * MULTIPLE)) * MULTIPLE
    lacking = _count(task, "hla2", usual) - _count(task, mixer, usual)
    return usual + MULTIPLE * round(lacking / (3 * task.width * task.layers * MULTIPLE))


def _count(task, mixer, hidden):
    return make(task, mixer, hidden).count_params()


def inputs_of(batch):
    """The list that a model reads."""
    return [x for x in (batch.inputs, batch.places, batch.mask) if x is not None]


def state_size(model, length):
    """The number of elements that a mixer keeps of the past, as the mean of its layers."""
    blocks = [layer for layer in model.layers if isinstance(layer, Block)]
    return sum(mixers.state_size(block.mixer, length) for block in blocks) // len(blocks)
