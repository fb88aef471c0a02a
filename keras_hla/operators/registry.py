"""The operators by name."""

from keras_hla.checks import check_number
from keras_hla.operators.ahla import AHLA
from keras_hla.operators.hla2 import HLA2
from keras_hla.operators.hla3 import HLA3
from keras_hla.operators.linear import Linear
from keras_hla.operators.operator import Operator
from keras_hla.operators.published import HLA2Published, HLA3Published

_OPERATORS = {
    "linear": Linear(),
    "hla2": HLA2(),
    "ahla": AHLA(),
    "hla3": HLA3(),
    "hla2_published": HLA2Published(),
    "hla3_published": HLA3Published(),
}


def get(identifier: str | Operator, masked: bool = True, ridge: float = 0.0) -> Operator:
    """Returns the operator of a name, with options of the paper.

    Args:
        identifier: `"hla2"`, `"ahla"`, `"hla3"`, `"linear"`, `"hla2_published"`,
            `"hla3_published"`, a name that was given to `register`, or an
            `Operator` instance.
        masked: `False` is the paper's prefix-unmasked variant (Eq. 3.1, section
            7.1) of a second or third order operator.
        ridge: `λ >= 0` of the paper's Algorithm 1, of second order operators.

    Returns:
        An `Operator`.

    Raises:
        ValueError: if there is no operator of that name, or it has no such
            option.

    Example:

    >>> keras_hla.operators.get("hla2").state_names
    ('S', 'F')
    >>> keras_hla.operators.get("hla2", masked=False).state_names
    ('S', 'C')
    """
    check_number("ridge", ridge, "a number >= 0", lambda x: x >= 0)
    if isinstance(identifier, str) and identifier in _OPERATORS:
        operator = _OPERATORS[identifier]
    elif isinstance(identifier, Operator):
        operator = identifier
    else:
        raise ValueError(
            f"Argument `operator` must be one of {sorted(_OPERATORS)} or an `Operator` "
            f"instance. Received: operator={identifier!r}"
        )
    return operator if masked and not ridge else operator.with_options(masked, ridge)


def register(name: str, operator: Operator) -> None:
    """Makes an operator known under a name: to `get`, and to layers and their saved files.

    Args:
        name: A string that is not taken yet.
        operator: An `Operator` instance.

    Raises:
        ValueError: if the name is taken or no string, or `operator` is no
            `Operator`.

    Example:

    >>> operator = keras_hla.operators.HLA2(ridge=0.1)
    >>> keras_hla.operators.register("hla2_ridge", operator)
    >>> layer = keras_hla.layers.HLA(num_heads=4, key_dim=16, operator="hla2_ridge")
    """
    if not isinstance(name, str) or name in _OPERATORS:
        raise ValueError(
            f"Argument `name` must be a string other than {sorted(_OPERATORS)}. "
            f"Received: name={name!r}"
        )
    if not isinstance(operator, Operator):
        raise ValueError(
            f"Argument `operator` must be an `Operator` instance. Received: operator={operator!r}"
        )
    _OPERATORS[name] = operator


def name_of(operator: Operator) -> str:
    """Returns the name under which an operator is registered.

    Args:
        operator: An `Operator`.

    Returns:
        The name, which `get` takes.

    Raises:
        ValueError: if it is not registered.
    """
    for name, known in _OPERATORS.items():
        if known == operator:
            return name
    raise ValueError(
        "Argument `operator` must be known by name, so that it can be saved: call "
        f"`keras_hla.operators.register` first. Received: operator={operator!r}"
    )
