"""The operators: one file each, showing the same computation in all its forms."""

from keras_hla.operators.ahla import AHLA
from keras_hla.operators.hla2 import HLA2, HLA2Unmasked
from keras_hla.operators.hla3 import HLA3, HLA3Unmasked
from keras_hla.operators.linear import Linear
from keras_hla.operators.operator import Operator, Scan, outer, read, scores
from keras_hla.operators.published import HLA2Published, HLA3Published
from keras_hla.operators.registry import get, name_of, register

__all__ = [
    "AHLA",
    "HLA2",
    "HLA3",
    "HLA2Published",
    "HLA2Unmasked",
    "HLA3Published",
    "HLA3Unmasked",
    "Linear",
    "Operator",
    "Scan",
    "get",
    "name_of",
    "outer",
    "read",
    "register",
    "scores",
]
