"""The layer, its cell, and the block made of it."""

from keras_hla.layers.hla import HLA
from keras_hla.layers.hla_cell import HLACell
from keras_hla.layers.hla_decoder_block import HLADecoderBlock

__all__ = ["HLA", "HLACell", "HLADecoderBlock"]
