"""The operators by name: one file each, showing the same computation in all its forms."""

from keras_hla.operators.hla2 import HLA2
from keras_hla.operators.linear import Linear
from keras_hla.operators.operator import Operator

__all__ = ["HLA2", "Linear", "Operator", "get"]

_OPERATORS = {operator.name: operator for operator in (HLA2(), Linear())}


def get(identifier):
    """Returns the operator of a name; an operator is returned as it is.

    Args:
        identifier: `"hla2"`, `"linear"`, or an `Operator` instance.

    Returns:
        An `Operator`.

    Raises:
        ValueError: if there is no operator of that name.

    Example:

    >>> keras_hla.operators.get("hla2").state_names
    ('S', 'F')
    """
    if isinstance(identifier, Operator):
        return identifier
    if isinstance(identifier, str) and identifier in _OPERATORS:
        return _OPERATORS[identifier]
    raise ValueError(
        f"Argument `operator` must be one of {sorted(_OPERATORS)} or an `Operator` "
        f"instance. Received: operator={identifier!r}"
    )
