"""Feature maps of queries and keys."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_hla")
def elu_plus_one(x):
    """`elu(x) + 1 > 0` (Katharopoulos et al., arXiv:2006.16236)."""
    return ops.elu(x) + 1


def get_activation(name, identifier):
    """The function of an identifier; raises `ValueError` that names the argument.

    Args:
        name: name of the argument.
        identifier: `None`, `"elu_plus_one"`, the name of a Keras activation, a
            callable, or a config.
    """
    if identifier is None:
        return None
    if identifier == "elu_plus_one":
        return elu_plus_one
    try:
        return keras.activations.get(identifier)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Argument `{name}` must be None, 'elu_plus_one', the name of a Keras activation, or "
            f"a callable. Received: {name}={identifier!r}"
        ) from error


def serialize_activation(activation):
    return None if activation is None else keras.activations.serialize(activation)
