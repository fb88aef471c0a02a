"""The layer and its cell."""

from keras_hla.layers.hla import HLA
from keras_hla.layers.hla_cell import HLACell

__all__ = ["HLA", "HLACell"]
