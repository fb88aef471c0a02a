"""Keras' own attention and recurrence, and a block of its attention."""

from functools import partial

import keras
from keras import ops

from benchmarks import language_model, runtime
from benchmarks.trainees import Announced, Trainee, hidden, keras_step, policy, width

ATTENTION = "MultiHeadAttention"
FLASH = f"{ATTENTION}, flash"


def layers(case, which):
    del case, which
    gru = Trainee("GRU", _gru, peer="gru")
    if runtime.current().on_gpu():
        gru = Trainee("GRU", unavailable="a loop over tokens is for CPUs", peer="gru")
    return [
        Trainee(ATTENTION, partial(_attention, False), peer="mha"),
        Trainee(FLASH, partial(_attention, True), peer="mha_flash"),
        gru,
    ]


def blocks(case, which):
    del case, which
    flash = _has_flash()
    return [Trainee(f"block of {FLASH if flash else ATTENTION}", _block, peer="mha_block")]


def models(case, which):
    del case, which
    flash = _has_flash()
    return [Trainee(f"block of {FLASH if flash else ATTENTION}", _model, peer="mha_block")]


def _has_flash():
    """Whether `flash_attention=True` is for the backend and device in use."""
    return runtime.current().on_gpu() and keras.config.backend() != "tensorflow"


def _announced(flash):
    if not flash:
        return Announced("as Keras chooses")
    sign = {"torch": "*flash", "jax": "*cudnn"}.get(keras.config.backend(), "")
    return Announced(f"{sign[1:]} (flash_attention=True)", sign)


def _attention(flash, case):
    layer = keras.layers.MultiHeadAttention(
        case.heads, case.dim, flash_attention=True if flash else None, dtype=policy(case)
    )
    shape = (case.batch, case.length, width(case))
    layer.build(shape, shape)
    return keras_step(layer, _announced(flash), call=lambda x: layer(x, x, use_causal_mask=True))


def _gru(case):
    layer = keras.layers.GRU(width(case), return_sequences=True, dtype=policy(case))
    layer.build((case.batch, case.length, width(case)))
    return keras_step(layer, Announced("as Keras chooses"))


def _block(case):
    block = _make_block(case)
    block.build((case.batch, case.length, width(case)))
    return keras_step(block, _announced(_has_flash()))


def _make_block(case):
    return AttentionBlock(case.heads, case.dim, hidden(case), _has_flash(), dtype=policy(case))


def _model(case, jit):
    training, _ = language_model.of_keras(partial(_make_block, case), case, jit)
    return training._replace(announced=_announced(_has_flash()))


class AttentionBlock(keras.layers.Layer):
    """Pre-norm block of `MultiHeadAttention` and the gated MLP of `HLADecoderBlock`."""

    def __init__(self, heads, dim, hidden, flash, **options):
        super().__init__(**options)
        make = partial(keras.layers.Dense, use_bias=False, dtype=self.dtype_policy)
        self.norms = [keras.layers.RMSNormalization(dtype=self.dtype_policy) for _ in range(2)]
        self.attention = keras.layers.MultiHeadAttention(
            heads,
            dim,
            use_bias=False,
            flash_attention=True if flash else None,
            dtype=self.dtype_policy,
        )
        self.gate, self.up, self.down = make(hidden), make(hidden), make(heads * dim)

    def build(self, shape):
        for norm in self.norms:
            norm.build(shape)
        self.attention.build(shape, shape)
        for dense in (self.gate, self.up):
            dense.build(shape)
        self.down.build((*shape[:-1], self.gate.units))

    def call(self, x):
        y = self.norms[0](x)
        x = x + self.attention(y, y, use_causal_mask=True)
        y = self.norms[1](x)
        return x + self.down(ops.silu(self.gate(y)) * self.up(y))

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, self.compute_dtype)
