"""Higher-order Linear Attention layers for Keras 3 (Zhang, Qin, Wang, Gu, arXiv:2510.27258)."""

from keras_hla import layers, operators, ops

__version__ = "0.1.0"
__all__ = ["__version__", "layers", "operators", "ops"]
